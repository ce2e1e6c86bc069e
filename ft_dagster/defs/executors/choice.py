"""The choice of the Dagster executor that runs the steps: FT_EXECUTOR, for the whole code location."""

from importlib.util import find_spec

import dagster as dg

from ft_dagster.config.settings import Settings, SettingsError


def executor_for(settings: Settings) -> dg.ExecutorDefinition:
    """Return the executor of a code location.

    `local` runs light steps in the run's own process, `ray` runs each step as a job of a Ray cluster, and `k8s` as a
    Job of Kubernetes. Training starts its own processes wherever its step runs.

    Raises:
        SettingsError: the packages that the executor needs are not installed.
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
