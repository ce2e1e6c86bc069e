"""What the pods of steps request from Kubernetes, as set in the YAML file that FT_K8S names.

The docstrings of parts and fields are the descriptions in docs/kubernetes.md: Markdown, which `make docs` copies there.
"""

import re
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ft_dagster.config.settings import Settings, SettingsError

_SHARED_MEMORY = "shared-memory"
"""The name of the volume for `/dev/shm`."""
Quantity = Annotated[
    str, BeforeValidator(str), Field(pattern=re.compile(r"^\d+(\.\d+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$"), min_length=1)
]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class LightSteps(_Part):
    """Pods that read, parse, tokenize and release."""

    cpu: Quantity = "1"
    """CPU cores that a pod requests."""
    memory: Quantity = "4Gi"
    """Memory that a pod requests; it is also its limit."""
    max_hours: float = Field(default=4, gt=0)
    """After this time Kubernetes stops the pod, and the step fails. Without a limit, the step of a lost node would
    never end."""
    extra: dict[str, Any] = {}
    """Further configuration of pods, as
    [dagster-k8s](https://docs.dagster.io/deployment/oss/deployment-options/kubernetes) accepts it: `container_config`,
    `pod_spec_config`, `pod_template_spec_metadata`, `job_spec_config`, `job_metadata`."""


class GpuSteps(LightSteps):
    """Pods that train and evaluate."""

    gpu: str | None = "nvidia.com/gpu"
    """The name of the GPU resource. Training requests `training.processes` of the recipe, evaluation one. `null`: they
    compute on CPUs."""
    cpu: Quantity = "4"
    """CPU cores that a pod requests."""
    memory: Quantity = "32Gi"
    """Memory that a pod requests, `shared_memory` included; it is also its limit."""
    shared_memory: Quantity = "8Gi"
    """Size of `/dev/shm`, through which the processes of one training communicate."""
    node_selector: dict[str, str] = {}
    """Labels that a node must have, such as `nvidia.com/gpu.product: NVIDIA-H100-80GB-HBM3`."""
    tolerations: list[dict[str, Any]] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    """Tolerations of the pod, for nodes that have taints."""
    max_hours: float = Field(default=24, gt=0)
    """As for light steps. The next run continues from the last checkpoint."""
    grace_seconds: int = Field(default=120, ge=90)
    """Seconds from SIGTERM to SIGKILL, in which training saves a checkpoint."""


class Pods(_Part):
    """All settings of the pods of steps. Everything else comes from the chart: a step gets the environment, the secrets
    and the volumes of the code server."""

    image: str | None = None
    """The image that steps run in. `null`: the image of the code server."""
    namespace: str | None = None
    """The namespace that steps run in. `null`: the namespace of the runs."""
    secrets: list[str] = []
    """Kubernetes Secrets whose values steps get as environment variables, in addition to those of the code server."""
    light_steps: LightSteps = LightSteps()
    gpu_steps: GpuSteps = GpuSteps()


def load_pods(settings: Settings) -> Pods:
    """Read the file that FT_K8S names. Where it is not set, return the defaults.

    Raises:
        SettingsError: the file is missing, is not YAML, or has unknown fields or invalid values.
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
    """Return dagster-k8s's configuration of a light step's Job. It sees no GPU, even if node and image expose GPUs."""
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
    """Return dagster-k8s's configuration of the Job of a step that computes on GPUs."""
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
    """Merge `extra` into a configuration: maps are merged, lists are appended, and other values are replaced."""
    merged = dict(config)
    for name, value in extra.items():
        own = merged.get(name)
        if isinstance(own, dict) and isinstance(value, dict):
            merged[name] = _with_extra(own, value)
        else:
            merged[name] = own + value if isinstance(own, list) and isinstance(value, list) else value
    return merged
