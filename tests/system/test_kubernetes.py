"""Runs and steps as Jobs of Kubernetes: what would be submitted, to an API server that runs Jobs as processes here."""

import copy
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import helm
import kubernetes_validate
import pytest
import yaml
from dagster_dev import PROJECT, DagsterDev, wait_until
from dagster_ui import launch, terminate
from kubernetes_api import Cluster, kubernetes_api
from manifests import problems
from processes import command_of

from ft_dagster.store.local import Store
from ft_dagster.training.request import KIND as ADAPTER
from ft_dagster.training.request import WEIGHTS

DEPLOY = PROJECT / "deploy" / "k8s"
PAGE = PROJECT / "docs" / "kubernetes.md"
VALUES = yaml.safe_load((DEPLOY / "values.yaml").read_text())
SECRETS = {
    "ft-dagster": {"HUGGINGFACE_TOKEN": "hf_of_the_tests"},
    "dagster-postgresql-secret": {"postgresql-password": "of the tests"},
}


@dataclass(frozen=True)
class Done:
    """Runs that have finished."""

    cluster: Cluster
    folder: Path
    statuses: list[str]

    def of_step(self, name: str) -> dict[str, Any]:
        return self.cluster.of_step(name)


@pytest.fixture(scope="module")
def done(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    """Run twice to make a lost adapter again, configured as by the chart with our values.

    The sensor requests the first run, which is canceled while it trains; a user starts the second.
    """
    folder = tmp_path_factory.mktemp("kubernetes")
    for part in ("workspace", "home"):
        shutil.copytree(finished / part, folder / part, symlinks=True)
    shutil.copy(DEPLOY / "pods.yaml", folder / "workspace" / "k8s.yaml")
    (lost,) = (folder / "workspace" / ".ft" / "store" / ADAPTER).iterdir()
    shutil.rmtree(lost)
    here = {
        "FT_WORKSPACE": str(folder / "workspace"),
        "FT_CACHE": str(folder / "cache"),
        "FT_RECIPE": "recipe.yaml",
        "FT_STORE": ".ft/store",
    }
    environment = helm.deployment(VALUES)["env"] | here
    with kubernetes_api(folder, SECRETS | {helm.config_map(VALUES): environment}) as cluster:
        at = {"load_incluster_config": False, "kubeconfig_file": str(cluster.kubeconfig)}
        instance = helm.dagster_yaml(VALUES, dagster_home=str(folder / "home"), **at)
        (folder / "home" / "dagster.yaml").write_text(yaml.safe_dump(instance))
        server = {
            "DAGSTER_CURRENT_IMAGE": helm.image(VALUES),
            "DAGSTER_CONTAINER_CONTEXT": json.dumps(helm.container_context(VALUES)),
        }
        with DagsterDev(folder, **environment, **server) as dev:
            dev.until_training()
            (training,) = [process for process in dev.processes() if "ft_dagster.training" in command_of(process)]
            training.suspend()  # it takes seconds, and is suspended until it is asked to stop
            terminate(dev.address, dev.runs()[-1].id)
            wait_until(lambda: cluster.deleted_steps(), "the Job of the step is deleted")
            training.resume()
            dev.until_skipped("for this content was canceled")
            launch(dev.address, "lora_adapter", "adapter_evaluation", "released_adapter")
            dev.until_up_to_date()
            statuses = [run.status for run in dev.runs()][1:]
        yield Done(cluster, folder, statuses)


def test_runs_and_their_steps_are_jobs_and_make_the_same_adapter(done: Done, finished: Path) -> None:
    steps = [job["metadata"]["labels"].get("dagster/op") for job in done.cluster.jobs]
    assert steps[:2] == [None, "lora_adapter"], "cancelled"
    assert steps[2:6] == [None, "lora_adapter", "adapter_evaluation", "released_adapter"]
    assert steps[6:] == ["released_adapter_keeps_up_with_reports"]
    made, before = (Store(where / "workspace" / ".ft" / "store").newest(ADAPTER) for where in (done.folder, finished))
    assert made and before and made.files[WEIGHTS] == before.files[WEIGHTS]


def test_a_training_whose_job_is_deleted_saves_a_checkpoint_and_the_next_resumes_it(done: Done) -> None:
    assert done.statuses == ["CANCELED", "SUCCESS"]
    adapter = Store(done.folder / "workspace" / ".ft" / "store").newest(ADAPTER)
    assert adapter and adapter.about["resumed_from"] > 0
    (log,) = (path.read_text() for path in (done.folder / "workspace" / "logs").glob(f"{adapter.key[:12]}.log"))
    stopped_at = int(re.findall(r"stopped at step (\d+)", log)[-1])
    assert adapter.about["resumed_from"] == stopped_at


def test_each_job_is_valid_for_kubernetes(done: Done) -> None:
    assert {job["metadata"]["name"]: problems(job) for job in done.cluster.jobs if problems(job)} == {}


@pytest.mark.parametrize("step", ["lora_adapter", "released_adapter"])
def test_the_page_shows_the_pods_as_they_are(done: Done, step: str) -> None:
    assert shown(done.of_step(step), done.folder) in PAGE.read_text("utf-8")


def shown(job: dict[str, Any], folder: Path) -> str:
    """Return the relevant parts of a Job, as the page shows it."""
    pod = copy.deepcopy(job["spec"]["template"]["spec"])
    (container,) = pod.pop("containers")
    container["args"] = [*container["args"][:3], "..."]
    container["env"] = [v for v in container["env"] if not v["name"].startswith(("DAGSTER_RUN_", "DAGSTER_COMPRESSED"))]
    pod["containers"] = [container]
    text = yaml.safe_dump({"activeDeadlineSeconds": job["spec"]["activeDeadlineSeconds"], "spec": pod}, sort_keys=True)
    return f"```text\n{text.replace(str(folder / 'home'), '/opt/dagster/dagster_home')}```\n"


POD = "spec/template/spec"
CONTAINER = f"{POD}/containers/0"
BROKEN: list[tuple[str, Any, str]] = [
    (f"{POD}/tolerationz", [], "schema"),
    (f"{POD}/terminationGracePeriodSeconds", "long", "schema"),
    (f"{POD}/restartPolicy", "Always", "a Job takes Never or OnFailure"),
    ("spec/activeDeadlineSeconds", 0, "not above 0"),
    ("metadata/name", "Training_1", "is no DNS label"),
    (f"{CONTAINER}/name", "x" * 64, "is no DNS label"),
    ("metadata/labels/dagster~op", "lora adapter", "is no value of a label"),
    (f"{CONTAINER}/resources/limits/memory", "8 GB", "is no quantity"),
    (f"{CONTAINER}/resources/limits/memory", "8Mi", "above its limit"),
    (f"{CONTAINER}/resources/limits/nvidia.com~gpu", "0.5", "only whole ones"),
    (f"{CONTAINER}/resources/requests/nvidia.com~gpu", "2", "above its limit"),
    (f"{CONTAINER}/resources/requests/amd.com~gpu", "1", "needs a limit"),
    (f"{CONTAINER}/volumeMounts/0/name", "elsewhere", "no volume is called elsewhere"),
    (f"{CONTAINER}/volumeMounts/0/mountPath", "/dev/shm", "is mounted twice"),
    (f"{CONTAINER}/volumeMounts/0/mountPath", "workspace", "no absolute path"),
    (f"{CONTAINER}/env/0/name", "1ST", "is no name of a variable"),
    (f"{CONTAINER}/env/0/name", "DAGSTER_HOME", "is set twice"),
    (f"{CONTAINER}/envFrom/0", {"secretRef": {"name": "My_Secret"}}, "is no name of an object"),
    (f"{CONTAINER}/image", "", "no image"),
    (f"{POD}/volumes/0/name", "left-over", "volume left-over is not mounted"),
    (f"{POD}/volumes/-1/emptyDir/sizeLimit", "much", "is no quantity"),
    (f"{POD}/volumes/-1/emptyDir/medium", "Disk", "there is only Memory"),
    (f"{POD}/tolerations/0/effect", "NoSchedules", "is none"),
    (f"{POD}/tolerations/0/value", "yes", "has no value"),
]


@pytest.mark.parametrize(("where", "value", "said"), BROKEN, ids=[f"{w.split('/')[-1]}={v}" for w, v, _ in BROKEN])
def test_an_invalid_job_is_detected(done: Done, where: str, value: Any, said: str) -> None:
    job = copy.deepcopy(done.of_step("lora_adapter"))
    *steps, last = (step.replace("~", "/") for step in where.split("/"))
    holder = reduce(lambda part, step: part[int(step) if isinstance(part, list) else step], steps, job)
    holder[int(last) if isinstance(holder, list) else last] = value
    assert any(said in problem for problem in problems(job)), problems(job)


def test_the_claim_of_the_workspace_is_valid_for_kubernetes() -> None:
    claim = yaml.safe_load((DEPLOY / "workspace.yaml").read_text())
    kubernetes_validate.validate(claim, kubernetes_validate.latest_version(), strict=True)
    named = [volume["persistentVolumeClaim"]["claimName"] for volume in helm.deployment(VALUES)["volumes"]]
    assert named == [claim["metadata"]["name"]]
