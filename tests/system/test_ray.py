"""FT_EXECUTOR=ray on a real cluster, whose head and workers are on hosts that a test can disconnect."""

import os
import shutil
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest
import yaml
from commands import COMMAND
from dagster_dev import wait_until
from graphs import instance_on, run
from hosts import INTERFACE, Host, hosts
from processes import accept_ctrl_c
from ray_cluster import RayCluster
from reports import chapter_text, recipe_for

from ft_dagster.defs.stages import STAGES
from ft_dagster.defs.workspace import GPU_POOL
from ft_dagster.store.local import Artifact, Store
from ft_dagster.training.request import KIND as ADAPTER
from ft_dagster.training.request import WEIGHTS

PROJECT = Path(__file__).parents[2]
TRAINING = "ft_dagster.training"
SECRETS = {
    "HUGGINGFACE_TOKEN": "hf_canary_of_the_driver",
    "AWS_SECRET_ACCESS_KEY": "canary-of-aws",
    "MLFLOW_TRACKING_URI": "http://user:canary-of-mlflow@127.0.0.1:9",
    "FT_CANARY": "postgresql://user:canary-of-a-database@127.0.0.1/dagster",
}
LONG = 30
"""Epochs of a training that runs long enough to be disturbed."""


@dataclass
class Deployment:
    """A cluster, and a workspace that its hosts share."""

    cluster: RayCluster
    workspace: Path
    recipe: dict[str, Any]
    began: float = 0.0
    """When the last run started."""

    def train_for(self, epochs: int, **options: int) -> None:
        recipe = self.recipe | {"training": self.recipe["training"] | {"epochs": epochs} | options}
        (self.workspace / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    @contextmanager
    def run(self, **settings: str) -> Iterator["subprocess.Popen[str]"]:
        """Run `ft-dagster run` on the head's host; if it outlasts the block, stop it and its jobs as by Ctrl-C."""
        command = self.cluster.head.command(*COMMAND, "run")
        output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        self.began = time.time()
        process = subprocess.Popen(command, env=os.environ | settings, preexec_fn=accept_ctrl_c, **output)
        try:
            yield process
        finally:
            if process.poll() is None:  # an assertion failed
                process.send_signal(signal.SIGINT)
                process.wait(60)

    def events(self, kind: dg.DagsterEventType) -> list[tuple[str, str]]:
        """Return the step and message of this kind of event in the last run."""
        if not list((self.workspace / ".dagster" / "history" / "runs").glob("*-*.db")):
            return []  # no run exists yet
        with dg.DagsterInstance.from_config(str(self.workspace / ".dagster")) as instance:
            last = instance.get_run_records(limit=1)[0].dagster_run
            entries = instance.all_logs(last.run_id, of_type=kind)
        events = [entry.dagster_event for entry in entries if entry.dagster_event]
        return [(event.step_key or "", _said(event)) for event in events]

    def has_checkpoint(self) -> bool:
        """Return whether the training of the last run has made a complete checkpoint."""
        found = (self.workspace / ".ft" / "attempts").glob("*/*/checkpoint-*/complete")
        return any(modified(path) > self.began for path in found)

    def taken_slots(self) -> int:
        """Return how many slots of the pool for training and evaluation are taken."""
        with dg.DagsterInstance.from_config(str(self.workspace / ".dagster")) as instance:
            return instance.event_log_storage.get_concurrency_info(GPU_POOL).active_slot_count

    def adapter(self) -> Artifact:
        return adapter_of(self.workspace)

    def log(self) -> str:
        """Return the log of its training, or trainings."""
        return (self.workspace / "logs" / f"{self.adapter().key[:12]}.log").read_text()

    def host_of_training(self) -> Host | None:
        return next((host for host in self.cluster.workers if trainings(host)), None)


def _said(event: dg.DagsterEvent) -> str:
    if event.is_step_failure:
        return event.step_failure_data.error.message
    return event.step_retry_data.error.message if event.is_step_up_for_retry else event.message or ""


def adapter_of(workspace: Path) -> Artifact:
    artifact = Store(workspace / ".ft" / "store").newest(ADAPTER)
    assert artifact
    return artifact


def locally(workspace: Path) -> Artifact:
    """Return the adapter that FT_EXECUTOR=local makes in a workspace."""
    cache = Path(os.environ["FT_CACHE"])
    with instance_on(workspace, workspace / ".dagster", cache) as instance, pytest.MonkeyPatch.context() as patch:
        patch.setenv("FT_EXECUTOR", "local")
        assert run(instance, "lora_adapter").success
    return adapter_of(workspace)


def ray_workers(host: Host) -> list[psutil.Process]:
    """Return the processes there that train together."""
    return [process for process in host.processes() if "RayTrainWorker" in process.name()]


def modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # a newer one exists
        return 0.0


def trainings(host: Host) -> list[psutil.Process]:
    """Return the training processes there."""
    found = []
    for process in host.processes():
        with suppress(psutil.NoSuchProcess):
            if TRAINING in process.cmdline():
                found.append(process)
    return found


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Deployment]:
    """Start a head and one worker with a device that exists only for Ray's scheduler; another host has no Ray yet."""
    folder = tmp_path_factory.mktemp("ray")
    workspace = folder / "workspace"
    (workspace / "chapter_markdowns").mkdir(parents=True)
    for number in range(1, 7):
        (workspace / "chapter_markdowns" / f"chapter_{number}.md").write_text(chapter_text(number), "utf-8")
    settings = {"FT_WORKSPACE": str(workspace), "FT_RECIPE": "recipe.yaml", "FT_CACHE": str(folder / "cache")}
    with pytest.MonkeyPatch.context() as patch, hosts(3) as (head, worker, spare):
        cluster = RayCluster((head, worker, spare), folder / "cache")
        for name in ("DAGSTER_HOME", "FT_STORE", "FT_THREADS"):
            patch.delenv(name, raising=False)
        ray = {"FT_EXECUTOR": "ray", "FT_RAY_ADDRESS": cluster.address, "PYTHONPATH": str(PROJECT)}
        for name, value in (settings | ray | SECRETS).items():
            patch.setenv(name, value)
        deployment = Deployment(cluster, workspace, recipe_for(tiny_base))
        deployment.train_for(epochs=3)
        cluster.start_head(num_cpus=2)
        cluster.start_worker(worker, num_cpus=2, num_gpus=1)
        yield deployment


@dataclass
class Job:
    """What was observed of the main job while it ran."""

    devices: dict[str, set[str | None]]
    """Step -> CUDA_VISIBLE_DEVICES of its processes."""
    hosts: dict[str, set[str]]
    """Step -> names of hosts."""
    trained_while_taken: bool
    jobs: str
    """All that Ray reports about its jobs."""
    output: str


@pytest.fixture(scope="module")
def job(deployment: Deployment) -> Job:
    """Run the main job while another job has the only GPU, which is released once training waits for it."""
    cluster = deployment.cluster
    cluster.jobs("submit", "--submission-id=other", "--no-wait", "--entrypoint-num-gpus=1", "--", "sleep infinity")
    seen = Job(defaultdict(set), defaultdict(set), trained_while_taken=False, jobs="", output="")
    taken = True
    with deployment.run() as process:
        while process.poll() is None:
            time.sleep(0.5)  # each look takes CPU time
            for host in (cluster.head, *cluster.workers):
                for member in host.processes():
                    with suppress(psutil.Error):
                        environment, command = member.environ(), member.cmdline()
                        step = environment.get("DAGSTER_RUN_STEP_KEY")
                        if step and "execute_step" in command:
                            seen.devices[step].add(environment.get("CUDA_VISIBLE_DEVICES"))
                            seen.hosts[step].add(host.name)
            if taken and any("lora_adapter" in step for step, _ in waiting(deployment)):
                seen.trained_while_taken = "lora_adapter" in seen.devices
                cluster.jobs("stop", "other")
                taken = False
        assert process.stderr
        seen.output = process.stderr.read()
        assert process.returncode == 0, seen.output
    seen.jobs = cluster.jobs("list")
    return seen


@pytest.fixture(scope="module")
def second_worker(job: Job, deployment: Deployment) -> Host:
    """Make the spare host join the cluster after the main job, and return it."""
    host = deployment.cluster.workers[1]
    deployment.cluster.start_worker(host, num_cpus=2, num_gpus=1)
    return host


def waiting(deployment: Deployment) -> list[tuple[str, str]]:
    events = deployment.events(dg.DagsterEventType.ENGINE_EVENT)
    return [(step, message) for step, message in events if " waits: " in message]


def test_the_main_job_gives_the_same_adapter_as_on_one_machine(
    job: Job, deployment: Deployment, finished: Path
) -> None:
    assert deployment.adapter().files[WEIGHTS] == adapter_of(finished / "workspace").files[WEIGHTS]


def test_training_and_evaluation_wait_for_a_gpu_from_ray_and_light_steps_see_none(
    job: Job, deployment: Deployment
) -> None:
    worker = deployment.cluster.workers[0]
    assert not job.trained_while_taken
    heavy = {"lora_adapter", "adapter_evaluation"}
    assert job.devices == {step: {"0" if step in heavy else ""} for step in job.devices}
    assert job.devices.keys() >= {stage.name for stage in STAGES}
    assert job.hosts["lora_adapter"] == job.hosts["adapter_evaluation"] == {worker.name}


def test_ray_receives_settings_and_no_secret(job: Job, deployment: Deployment) -> None:
    assert f"'FT_WORKSPACE': '{deployment.workspace}'" in job.jobs
    assert "canary" not in job.jobs.lower()


def test_processes_on_two_hosts_train_as_on_one_even_if_one_of_them_dies(
    second_worker: Host, deployment: Deployment, tmp_path: Path
) -> None:
    workers = deployment.cluster.workers
    deployment.train_for(LONG // 5, processes=2, rows_per_device=1)
    alone = tmp_path / "workspace"
    shutil.copytree(deployment.workspace, alone, symlinks=True)
    with deployment.run(GLOO_SOCKET_IFNAME=INTERFACE) as process:
        wait_until(deployment.has_checkpoint, "training has a checkpoint")
        assert all(ray_workers(host) for host in workers), "one process on each host"
        ray_workers(second_worker)[0].kill()
        wait_until(lambda: process.poll() is not None, "the run ends")
        assert process.stderr and process.returncode == 0, process.stderr.read()
    assert "A worker was lost; all workers are restarted." in deployment.log()
    assert "Resuming from checkpoint-" in deployment.log()
    on_one_host = locally(alone)
    found, wanted = deployment.adapter().about, on_one_host.about
    assert found["history"] == wanted["history"]
    assert deployment.adapter().files[WEIGHTS] == on_one_host.files[WEIGHTS]


def test_a_lost_host_costs_only_the_steps_after_the_last_checkpoint(
    second_worker: Host, deployment: Deployment, tmp_path: Path
) -> None:
    deployment.train_for(LONG)
    alone = tmp_path / "workspace"
    shutil.copytree(deployment.workspace, alone, symlinks=True)
    with deployment.run() as process:
        wait_until(deployment.has_checkpoint, "training has a checkpoint")
        lost = deployment.host_of_training()
        assert lost
        lost.freeze(deployment.workspace / ".dagster")
        lost.cut_off()
        (left,) = (host for host in deployment.cluster.workers if host != lost)
        wait_until(lambda: trainings(left), "training goes on elsewhere")
        lost.plug_in()
        lost.thaw()
        wait_until(lambda: process.poll() is not None, "the run ends")
        assert process.stderr and process.returncode == 0, process.stderr.read()
    ((step, why),) = deployment.events(dg.DagsterEventType.STEP_UP_FOR_RETRY)
    assert step == "lora_adapter" and "was lost" in why
    assert "Resuming from checkpoint-" in deployment.log()
    wait_until(lambda: not trainings(lost), "the lost training is gone")
    assert deployment.adapter().files[WEIGHTS] == locally(alone).files[WEIGHTS]


def test_ctrl_c_stops_the_job_and_its_training_which_saves_a_checkpoint(job: Job, deployment: Deployment) -> None:
    deployment.train_for(20 * LONG)
    with deployment.run() as process:
        wait_until(deployment.has_checkpoint, "training has a checkpoint")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert not deployment.taken_slots()
    wait_until(lambda: deployment.host_of_training() is None, "the training has ended")
    wait_until(lambda: "STOPPED" in deployment.cluster.jobs("list"), "Ray says so")


def test_a_silent_head_fails_the_run_within_the_configured_patience(job: Job, deployment: Deployment) -> None:
    deployment.train_for(20 * LONG)
    with deployment.run(FT_RAY_PATIENCE_SECONDS="5") as process:
        wait_until(deployment.host_of_training, "training is under way")
        for member in deployment.cluster.head.processes():
            if member.pid != process.pid:
                member.suspend()
        wait_until(lambda: process.poll() is not None, "the run ends", seconds=60)
        assert process.stderr
        said = " ".join(process.stderr.read().split())
    assert process.returncode == 1
    assert f"The head of the Ray cluster, {deployment.cluster.address}, has not answered for" in said
