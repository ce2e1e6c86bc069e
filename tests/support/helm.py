"""What Dagster's Helm chart makes of our values, reproduced from its templates without Helm."""

from typing import Any

RELEASE = "dagster"
NAMESPACE = "reports"
_SERVERS = f"{RELEASE}-dagster-user-deployments"


def deployment(values: dict[str, Any]) -> dict[str, Any]:
    """Return the deployment of the code server."""
    (found,) = values["dagster-user-deployments"]["deployments"]
    return found


def image(values: dict[str, Any]) -> str:
    of = deployment(values)["image"]
    return f"{of['repository']}:{of['tag']}"


def config_map(values: dict[str, Any]) -> str:
    """Return the ConfigMap with the code server's environment."""
    return f"{_SERVERS}-{deployment(values)['name']}-user-env"


def container_context(values: dict[str, Any]) -> dict[str, Any]:
    """Return what runs and steps inherit from the code server (`dagsterUserDeployments.k8sContainerContext`)."""
    server = deployment(values)
    assert server["includeConfigInLaunchedRuns"]["enabled"]
    return {
        "k8s": {
            "image_pull_policy": server["image"]["pullPolicy"],
            "env_config_maps": [config_map(values)],
            "env_secrets": [secret["name"] for secret in server["envSecrets"]],
            "volume_mounts": server["volumeMounts"],
            "volumes": server["volumes"],
            "resources": server["resources"],
            "namespace": NAMESPACE,
            "service_account_name": f"{_SERVERS}-user-deployments",
            "run_k8s_config": {"pod_spec_config": {"automount_service_account_token": True}},
        }
    }


def dagster_yaml(values: dict[str, Any], **launcher: Any) -> dict[str, Any]:
    """Return the instance's configuration except the database (`templates/configmap-instance.yaml`)."""
    of_runs = values["runLauncher"]["config"]["k8sRunLauncher"]
    monitoring = values["dagsterDaemon"]["runMonitoring"]
    raw = {_snake(name): content for name, content in of_runs["runK8sConfig"].items()}
    return {
        "run_launcher": {
            "module": "dagster_k8s",
            "class": values["runLauncher"]["type"],
            "config": {
                "load_incluster_config": of_runs["loadInclusterConfig"],
                "image_pull_policy": of_runs["imagePullPolicy"],
                "job_namespace": NAMESPACE,
                "service_account_name": RELEASE,
                "instance_config_map": f"{RELEASE}-instance",
                "postgres_password_secret": f"{RELEASE}-postgresql-secret",
                "dagster_home": "/opt/dagster/dagster_home",
                "run_k8s_config": raw,
                **launcher,
            },
        },
        "run_coordinator": {"module": "dagster.core.run_coordinator", "class": "QueuedRunCoordinator"},
        "run_monitoring": {_snake(name): value for name, value in monitoring.items()},
        "telemetry": values["telemetry"],
        **values["additionalInstanceConfig"],
    }


def _snake(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)
