"""What the pods of steps request, according to the file that FT_K8S names and the recipe."""

from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster._core.definitions.job_base import InMemoryJob  # private: an executor is only created for a job
from dagster_k8s.job import DagsterK8sJobConfig, UserDefinedDagsterK8sConfig, construct_dagster_k8s_job
from kubernetes.client import ApiClient
from manifests import problems

from ft_dagster.config.settings import Settings, SettingsError
from ft_dagster.defs.executors import choice
from ft_dagster.defs.executors.choice import executor_for
from ft_dagster.defs.executors.k8s import on_kubernetes, steps_config
from ft_dagster.defs.executors.pods import load_pods

TWO = ({"lora_adapter", "adapter_evaluation"}, {"sections"})


def settings(folder: Path, pods: Any = None, **training: Any) -> Settings:
    """Return the settings of a workspace with such a file and recipe."""
    recipe = {"name": "r", "base": {"source": "embedded", "model": "m"}, "training": training}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    if pods is not None:
        (folder / "k8s.yaml").write_text(pods if isinstance(pods, str) else yaml.safe_dump(pods))
    return Settings(workspace=folder, recipe="recipe.yaml", k8s=Path("k8s.yaml") if pods is not None else None)


def job_of(step: str, found: Settings) -> dict[str, Any]:
    """Return the Job that dagster-k8s makes of a step's configuration."""
    config = steps_config(found, *TWO)
    job = construct_dagster_k8s_job(
        DagsterK8sJobConfig(job_image=config.get("job_image", "image"), env_secrets=config.get("env_secrets")),
        ["dagster", "api", "execute_step"],
        "dagster-step-0",
        UserDefinedDagsterK8sConfig.from_dict(config["per_step_k8s_config"][step]),
        pod_name="dagster-step-0",
    )
    sent: dict[str, Any] = ApiClient().sanitize_for_serialization(job)
    assert problems(sent) == []
    return sent


def container(job: dict[str, Any]) -> dict[str, Any]:
    (found,) = job["spec"]["template"]["spec"]["containers"]
    return dict(found)


def test_training_requests_a_gpu_per_process_evaluation_one_and_light_steps_none(tmp_path: Path) -> None:
    found = settings(tmp_path, processes=4, rows_per_step=8)
    limits = {step: container(job_of(step, found))["resources"]["limits"] for step in (*TWO[0], *TWO[1])}
    assert {step: limit.get("nvidia.com/gpu") for step, limit in limits.items()} == {
        "lora_adapter": "4",
        "adapter_evaluation": "1",
        "sections": None,
    }
    seen = {variable["name"]: variable["value"] for variable in container(job_of("sections", found))["env"]}
    assert seen == {"CUDA_VISIBLE_DEVICES": "", "NVIDIA_VISIBLE_DEVICES": "void"}
    assert not container(job_of("lora_adapter", found)).get("env")


def test_all_settings_in_the_file_are_in_the_pod(tmp_path: Path) -> None:
    said = {
        "image": "registry.example/other:1",
        "secrets": ["hub"],
        "gpu_steps": {
            "gpu": "amd.com/gpu",
            "cpu": "8",
            "memory": "64Gi",
            "shared_memory": "16Gi",
            "node_selector": {"pool": "gpu"},
            "tolerations": [{"key": "amd.com/gpu", "operator": "Exists"}],
            "max_hours": 1.5,
            "grace_seconds": 300,
            "extra": {
                "pod_spec_config": {"priority_class_name": "low"},
                "container_config": {"resources": {"limits": {"cpu": "8"}}},
            },
        },
    }
    job = job_of("lora_adapter", settings(tmp_path, said))
    pod = job["spec"]["template"]["spec"]
    assert job["spec"]["activeDeadlineSeconds"] == 5400
    assert container(job)["image"] == "registry.example/other:1"
    assert container(job)["envFrom"] == [{"secretRef": {"name": "hub"}}]
    assert container(job)["resources"] == {
        "requests": {"cpu": "8", "memory": "64Gi"},
        "limits": {"amd.com/gpu": "1", "memory": "64Gi", "cpu": "8"},
    }
    assert {"mountPath": "/dev/shm", "name": "shared-memory"} in container(job)["volumeMounts"]
    assert {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}} in pod["volumes"]
    assert (pod["nodeSelector"], pod["priorityClassName"]) == ({"pool": "gpu"}, "low")
    assert pod["tolerations"] == [{"key": "amd.com/gpu", "operator": "Exists"}]
    assert pod["terminationGracePeriodSeconds"] == 300


def test_without_gpus_training_runs_on_cpus(tmp_path: Path) -> None:
    job = job_of("lora_adapter", settings(tmp_path, {"gpu_steps": {"gpu": None}}))
    assert container(job)["resources"]["limits"] == {"memory": "32Gi"}
    assert not job["spec"]["template"]["spec"].get("tolerations")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"gpu_steps": {"memory": "lots"}}, "gpu_steps.memory"),
        ({"gpu_step": {}}, "gpu_step"),
        ({"gpu_steps": {"grace_seconds": 5}}, "gpu_steps.grace_seconds"),
        ("gpu_steps: [", "is not YAML"),
        ("- gpu_steps", "cannot be used"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_the_field(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(SettingsError, match="FT_K8S names") as caught:
        load_pods(settings(tmp_path, content))
    assert said in str(caught.value) and str(tmp_path / "k8s.yaml") in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"FT_K8S names .*missing\.yaml: No such file"):
        load_pods(Settings(workspace=tmp_path, k8s=Path("missing.yaml")))


def test_the_executor_is_chosen_by_the_setting_and_needs_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert executor_for(Settings(executor="k8s")) is on_kubernetes
    monkeypatch.setattr(choice, "find_spec", lambda _: None)
    with pytest.raises(SettingsError, match=r"FT_EXECUTOR=k8s needs .*ft_dagster\[k8s\]"):
        executor_for(Settings(executor="k8s"))


def test_an_instance_that_launches_runs_elsewhere_is_refused(instance: dg.DagsterInstance) -> None:
    @dg.job(executor_def=on_kubernetes)
    def nothing() -> None: ...

    context = dg.InitExecutorContext(InMemoryJob(nothing), on_kubernetes, {}, instance)
    with pytest.raises(SettingsError, match="K8sRunLauncher"):
        on_kubernetes.executor_creation_fn(context)  # type: ignore[misc]
