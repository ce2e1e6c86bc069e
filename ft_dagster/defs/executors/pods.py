"""What the pods of steps ask of Kubernetes: one YAML file, which FT_K8S names.

The docstrings of parts and fields are the descriptions in docs/kubernetes.md: Markdown, written there by `make docs`.
"""

import re
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ft_dagster.config.settings import Settings, SettingsError

_SHARED_MEMORY = "shared-memory"
"""Name of a volume."""
Quantity = Annotated[
    str, BeforeValidator(str), Field(pattern=re.compile(r"^\d+(\.\d+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$"), min_length=1)
]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class LightSteps(_Part):
    """Pods that read, parse, tokenize and release."""

    cpu: Quantity = "1"
    """Cores that a pod asks for."""
    memory: Quantity = "4Gi"
    """Memory that it gets, and no more."""
    max_hours: float = Field(default=4, gt=0)
    """After so long Kubernetes ends the pod, and the step has failed; a node that is lost would hold it for ever."""
    extra: dict[str, Any] = {}
    """What else pods shall have, as [dagster-k8s](https://docs.dagster.io/deployment/oss/deployment-options/kubernetes)
    takes it: `container_config`, `pod_spec_config`, `pod_template_spec_metadata`, `job_spec_config`, `job_metadata`."""


class GpuSteps(LightSteps):
    """Pods that train and evaluate."""

    gpu: str | None = "nvidia.com/gpu"
    """The resource that is a GPU: training asks for `training.processes` of the recipe, evaluation for one; `null`:
    they compute on CPUs."""
    cpu: Quantity = "4"
    """Cores that a pod asks for."""
    memory: Quantity = "32Gi"
    """Memory that it gets, and no more, `shared_memory` included."""
    shared_memory: Quantity = "8Gi"
    """Size of `/dev/shm`, through which the processes of one training talk."""
    node_selector: dict[str, str] = {}
    """Labels that a node must have, such as `nvidia.com/gpu.product: NVIDIA-H100-80GB-HBM3`."""
    tolerations: list[dict[str, Any]] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    """Taints of nodes that do not keep the pod away."""
    max_hours: float = Field(default=24, gt=0)
    """As for light steps; the next run goes on from the last checkpoint."""
    grace_seconds: int = Field(default=120, ge=90)
    """From SIGTERM to SIGKILL: training saves a checkpoint meanwhile."""


class Pods(_Part):
    """All that is set for steps. The rest comes from the chart, whose settings of the code server go along with steps:
    environment, secrets, volumes."""

    image: str | None = None
    """What steps run in; `null`: the image of the code server."""
    namespace: str | None = None
    """Where steps run; `null`: where runs do."""
    secrets: list[str] = []
    """Secrets of Kubernetes whose values steps get as variables, besides those of the code server."""
    light_steps: LightSteps = LightSteps()
    gpu_steps: GpuSteps = GpuSteps()


def load_pods(settings: Settings) -> Pods:
    """What FT_K8S says; defaults where it is not set.

    Raises:
        SettingsError: the file is missing, is no YAML, or has fields that are unknown or wrong.
    """
    if settings.k8s is None:
        return Pods()
    path = settings.workspace / settings.k8s.expanduser()
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
        return Pods.model_validate({} if content is None else content)
    except OSError as error:
        raise SettingsError(
            f"FT_K8S names {path}: {error.strerror}. Name a file, relative to the workspace."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}, which FT_K8S names, is not YAML: {error}") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors())
        raise SettingsError(f"{path}, which FT_K8S names, cannot be used: {problems}.") from None


def light_pod(light: LightSteps) -> dict[str, Any]:
    """Configuration of a step's Job, for dagster-k8s. It sees no GPU, also on a node and in an image that show all."""
    return _with_extra(
        {
            "container_config": {
                "resources": {"requests": {"cpu": light.cpu, "memory": light.memory}, "limits": _limits(light)},
                "env": [
                    {"name": "CUDA_VISIBLE_DEVICES", "value": ""},
                    {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"},
                ],
            },
            "job_spec_config": {"active_deadline_seconds": _seconds(light)},
        },
        light.extra,
    )


def gpu_pod(gpu: GpuSteps, count: int) -> dict[str, Any]:
    """The same of a step that computes on GPUs."""
    gpus = {gpu.gpu: str(count)} if gpu.gpu else {}
    return _with_extra(
        {
            "container_config": {
                "resources": {"requests": {"cpu": gpu.cpu, "memory": gpu.memory}, "limits": _limits(gpu) | gpus},
                "volume_mounts": [{"name": _SHARED_MEMORY, "mount_path": "/dev/shm"}],  # noqa: S108 - not a file
            },
            "pod_spec_config": {
                "node_selector": gpu.node_selector,
                "tolerations": gpu.tolerations if gpu.gpu else [],
                "termination_grace_period_seconds": gpu.grace_seconds,
                "volumes": [
                    {"name": _SHARED_MEMORY, "empty_dir": {"medium": "Memory", "size_limit": gpu.shared_memory}}
                ],
            },
            "job_spec_config": {"active_deadline_seconds": _seconds(gpu)},
        },
        gpu.extra,
    )


def _limits(part: LightSteps) -> dict[str, str]:
    return {"memory": part.memory}


def _seconds(part: LightSteps) -> int:
    return round(part.max_hours * 3600)


def _with_extra(config: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Maps are merged, lists appended; otherwise what is extra wins."""
    merged = dict(config)
    for name, value in extra.items():
        own = merged.get(name)
        if isinstance(own, dict) and isinstance(value, dict):
            merged[name] = _with_extra(own, value)
        else:
            merged[name] = own + value if isinstance(own, list) and isinstance(value, list) else value
    return merged
