"""Which of Dagster's executors runs the steps: one setting, FT_EXECUTOR, for the whole code location."""

from importlib.util import find_spec

import dagster as dg

from ft_dagster.config.settings import Settings, SettingsError


def executor_for(settings: Settings) -> dg.ExecutorDefinition:
    """The executor of a code location.

    `local` runs light steps in the run's own process, `ray` each step as a job of a Ray cluster, `k8s` as a
    Job of Kubernetes; training starts processes of its own wherever its step is run.

    Raises:
        SettingsError: the packages of the engine are not installed.
    """
    match settings.executor:
        case "local":
            return dg.in_process_executor
        case "ray":
            if not (find_spec("ray") and find_spec("dagster_ray")):
                raise SettingsError("FT_EXECUTOR=ray needs Ray. Run: pip install 'ft_dagster[ray]'")
            from ft_dagster.defs.executors.ray import on_ray

            return on_ray
        case "k8s":
            if not (find_spec("kubernetes") and find_spec("dagster_k8s")):
                raise SettingsError("FT_EXECUTOR=k8s needs dagster-k8s. Run: pip install 'ft_dagster[k8s]'")
            from ft_dagster.defs.executors.k8s import on_kubernetes

            return on_kubernetes
