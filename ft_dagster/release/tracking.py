"""Report what was trained, measured and released to an MLflow server, with one run for each adapter.

MLflow is updated afterwards, from the store, so that no training waits for a server or fails with it. Anything that was
not reported, because the server was unavailable or configured only later, is reported the next time: comparing the
store with what the server has shows what is missing.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ft_dagster.config.redaction import redacted
from ft_dagster.config.settings import Settings
from ft_dagster.errors import UserError
from ft_dagster.model.manifest import Manifest, stored_manifest
from ft_dagster.release.lineage import flat, last_evaluations
from ft_dagster.release.released import Releases
from ft_dagster.store.local import Artifact, Store
from ft_dagster.training.request import KIND as ADAPTER

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

ALIAS = "released"
"""Alias of the registered model's version that is in use, whose address is `models:/<name>@released`."""
_ADAPTER, _EVALUATION, _VERSION = (f"ft_dagster.{name}" for name in ("adapter", "evaluation", "version"))
_FOLDER = "adapter"
_VALUE_LENGTH = 6000
"""Largest number of characters in a parameter's value, which MLflow limits."""
_BATCH = 1000
"""Largest number of metrics in one request, which MLflow limits."""
_CLIENT_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Settings of MLflow's client, unless the environment sets them. With its own defaults, it waits for minutes."""


class TrackingError(UserError):
    """The MLflow server could not be updated; the message gives the reason. Nothing else depends on it."""


@dataclass(frozen=True)
class Tracked:
    """What was reported to the server in one update."""

    adapters: tuple[str, ...]
    """Keys of adapters that the server did not have, or whose last evaluation it did not have."""
    versions: tuple[str, ...]
    """Keys of adapters that were registered as versions of the model."""


def track(settings: Settings, store: Store, releases: Releases) -> Tracked | None:
    """Report to the MLflow server of the settings what it does not have yet; returns None if no server is set.

    A run has the recipe as parameters, the curves of the training, the measurements of the last evaluation, and the
    verdict. An adapter that was ever in use is registered as a version, with its files; the alias `released` points to
    the version in use.

    Raises:
        TrackingError: the server cannot be reached or refuses the update, or the client is not installed.
    """
    if settings.mlflow_tracking_uri is None:
        return None
    for name, value in _CLIENT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from requests.exceptions import RequestException
    except ImportError as error:
        raise TrackingError(
            f"MLFLOW_TRACKING_URI is set, but {error.name} is missing. Run `pip install ft_dagster[mlflow]`."
        ) from error
    address = settings.mlflow_tracking_uri.get_secret_value()
    name = settings.mlflow_experiment_name or settings.workspace.name
    try:
        return _Server(MlflowClient(address, address), name).update(store, releases)
    except (MlflowException, RequestException, OSError) as error:
        raise TrackingError(
            f"MLflow was not updated: {redacted(str(error))} The next release or refusal updates it, and so does "
            "`ft-dagster track`."
        ) from None  # the cause contains the address with its password


class _Server:
    def __init__(self, client: "MlflowClient", name: str) -> None:
        self.client = client
        self.name = name

    def update(self, store: Store, releases: Releases) -> Tracked:
        known = self._runs()
        evaluations = last_evaluations(store)
        used = {entry["adapter"] for entry in releases.history()}
        logged, versions = [], []
        for adapter in reversed(list(store.all(ADAPTER))):
            run = known.get(adapter.key) or self._create_run(adapter)
            evaluation = evaluations.get(adapter.key)
            new = run.info.status != "FINISHED"
            if new:
                self._log_training(run, adapter)
            if evaluation and run.data.tags.get(_EVALUATION) != evaluation.key:
                self._log_evaluation(run, evaluation)
                new = True
            if new:
                logged.append(adapter.key)
                self.client.set_terminated(run.info.run_id, "FINISHED", end_time=_milliseconds(adapter))
            if adapter.key in used:
                version = run.data.tags.get(_VERSION)
                if version is None:
                    version = self._register(run, adapter)
                    versions.append(adapter.key)
                if adapter.key == releases.current():
                    self.client.set_registered_model_alias(self.name, ALIAS, version)
        return Tracked(tuple(logged), tuple(versions))

    def _experiment(self) -> str:
        found = self.client.get_experiment_by_name(self.name)
        return str(found.experiment_id if found else self.client.create_experiment(self.name))

    def _runs(self) -> dict[str, "Run"]:
        """Return adapter -> its run."""
        self.experiment = self._experiment()
        runs: dict[str, Run] = {}
        page = None
        while True:
            found = self.client.search_runs([self.experiment], f"tags.`{_ADAPTER}` != ''", page_token=page)
            runs |= {run.data.tags[_ADAPTER]: run for run in found}
            if not (page := found.token):
                return runs

    def _create_run(self, adapter: Artifact) -> "Run":
        began = _milliseconds(adapter) - int(1000 * adapter.about["seconds_since_resume"])
        return self.client.create_run(
            self.experiment, start_time=began, tags={_ADAPTER: adapter.key}, run_name=adapter.key[:12]
        )

    def _log_training(self, run: "Run", adapter: Artifact) -> None:
        manifest, about = stored_manifest(adapter), adapter.about
        by_step = [(row["step"], row) for row in (*about["history"], *about["held_out"])]
        once = ("final_loss", "peak_memory_bytes", "seconds_since_resume", "trainable_parameters", "supervised_tokens")
        numbers = [
            (name, value, step) for step, row in by_step for name, value in row.items() if _is_number(name, value)
        ] + [(name, about[name], about["steps"]) for name in once]
        self._log(run, adapter, numbers, _parameters(manifest), _origin(manifest))

    def _log_evaluation(self, run: "Run", evaluation: Artifact) -> None:
        numbers = [
            (f"{model}.{name}", value, 0)
            for model, found in evaluation.about["models"].items()
            for name, value in flat({n: v for n, v in found.items() if n not in ("chapters", "samples")}).items()
            if _is_number(name, value)
        ]
        verdict = evaluation.about["verdict"]
        tags = {"ft_dagster.decision": verdict["decision"], "ft_dagster.reason": verdict["reason"]}
        self._log(run, evaluation, numbers, {}, tags)
        self.client.set_tag(run.info.run_id, _EVALUATION, evaluation.key)  # last, after everything else has been logged

    def _log(
        self,
        run: "Run",
        artifact: Artifact,
        numbers: list[tuple[str, float, int]],
        parameters: Mapping[str, Any],
        tags: Mapping[str, str],
    ) -> None:
        """Log to a run. Logging again does no harm, because the time of each value is that of the artifact."""
        from mlflow.entities import Metric, Param, RunTag

        at = _milliseconds(artifact)
        metrics = [Metric(_name(name), float(value), at, step) for name, value, step in numbers]
        self.client.log_batch(
            run.info.run_id,
            params=[Param(name, str(value)[:_VALUE_LENGTH]) for name, value in parameters.items()],
            tags=[RunTag(name, value) for name, value in tags.items()],
        )
        for first in range(0, len(metrics), _BATCH):
            self.client.log_batch(run.info.run_id, metrics=metrics[first : first + _BATCH])

    def _register(self, run: "Run", adapter: Artifact) -> str:
        """Upload an adapter's files, register them as a version, and return its number."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        adapter.verify()
        self.client.log_artifacts(run.info.run_id, str(adapter.path), _FOLDER)
        version = self.client.create_model_version(
            self.name, f"{run.info.artifact_uri}/{_FOLDER}", run.info.run_id, tags={_ADAPTER: adapter.key}
        )
        self.client.set_tag(run.info.run_id, _VERSION, version.version)
        return str(version.version)


def _parameters(manifest: Manifest) -> dict[str, Any]:
    return {**flat(manifest.recipe), "base.weights": manifest.base["weights"], "held_out": ", ".join(manifest.held_out)}


def _origin(manifest: Manifest) -> dict[str, str]:
    return {
        "ft_dagster.dataset": manifest.dataset,
        "ft_dagster.base": manifest.base["name"],
        "ft_dagster.started_from": manifest.started_from,
        "ft_dagster.chapters": str(len(manifest.chapters)),
    }


def _is_number(name: str, value: Any) -> bool:
    return name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)


def _name(name: str) -> str:
    """Return a name without the characters that MLflow does not allow."""
    return re.sub(r"[^\w\-. /:]", "_", name)


def _milliseconds(artifact: Artifact) -> int:
    """Return when an artifact was committed, in milliseconds since 1970."""
    return int(artifact.store.committed_at(artifact) * 1000)
