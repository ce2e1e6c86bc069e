"""Steps as Jobs of Kubernetes: dagster-k8s's executor, configured with what the pods of the steps request."""

from typing import Any

import dagster as dg
from dagster._config import EvaluateValueResult, process_config  # private: to fill in a schema
from dagster_k8s import K8sRunLauncher, k8s_job_executor

from ft_dagster.config.recipe_file import load_recipe
from ft_dagster.config.settings import Settings, SettingsError, load_settings
from ft_dagster.defs.executors.pods import gpu_pod, light_pod, load_pods
from ft_dagster.defs.stages import LORA_ADAPTER, RELEASED_ADAPTER
from ft_dagster.defs.workspace import GPU_POOL


@dg.executor(name="k8s", requirements=dg.multiple_process_executor_requirements())
def on_kubernetes(context: dg.InitExecutorContext) -> dg.Executor:
    """Run each step as a Job. What its pod requests is read from FT_K8S and the recipe when a run starts."""
    if not isinstance(context.instance.run_launcher, K8sRunLauncher):
        raise SettingsError(
            "FT_EXECUTOR=k8s needs the K8sRunLauncher as run_launcher of Dagster's instance. Dagster's Helm chart sets "
            "it: see docs/kubernetes.md."
        )
    ops = {node.name: node.definition for node in context.job.get_definition().nodes}
    on_gpu = {name for name, op in ops.items() if isinstance(op, dg.OpDefinition) and op.pool == GPU_POOL}
    config = steps_config(load_settings(), on_gpu, set(ops) - on_gpu)
    return _executor(context, process_config(k8s_job_executor.config_schema.config_type, config))


def _executor(context: dg.InitExecutorContext, config: EvaluateValueResult) -> dg.Executor:
    """Return dagster-k8s's own executor. Raises SettingsError if its schema does not accept the configuration."""
    if not config.success or config.value is None:
        problems = "; ".join(error.message for error in config.errors or [])
        raise SettingsError(f"The pods that FT_K8S describes cannot be used: {problems}")
    create: Any = k8s_job_executor.executor_creation_fn
    return create(context._replace(executor_config=config.value))


def steps_config(settings: Settings, on_gpu: set[str], light: set[str]) -> dict[str, Any]:
    """Return the configuration of dagster-k8s's executor for the named steps."""
    pods = load_pods(settings)
    processes = load_recipe(settings.recipe, settings.workspace).training.processes
    trains = {LORA_ADAPTER.name, RELEASED_ADAPTER.name}  # the latter is in the pool only if the recipe refits
    named = {"job_image": pods.image, "job_namespace": pods.namespace, "env_secrets": pods.secrets}
    return {name: value for name, value in named.items() if value} | {
        "per_step_k8s_config": {name: light_pod(pods.light_steps) for name in light}
        | {name: gpu_pod(pods.gpu_steps, processes if name in trains else 1) for name in on_gpu}
    }
