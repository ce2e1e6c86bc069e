"""What is reported to an MLflow server about adapters, with a real one on loopback."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import mlflow
import pytest
from commands import ft_dagster, on_one_line
from graphs import run
from mlflow import MlflowClient
from processes import free_port
from servers import serving

from ft_dagster.config.settings import load_settings
from ft_dagster.model.manifest import read_manifest
from ft_dagster.release.released import Releases
from ft_dagster.release.tracking import TrackingError, track
from ft_dagster.store.hashing import file_digest
from ft_dagster.store.local import Store

QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "DO_NOT_TRACK": "true"}
NAME = "annual report"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the address of an MLflow server with its own database and files."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "files")]
    address = f"http://127.0.0.1:{port}"
    with serving([*command, *stores], f"{address}/health", folder / "server.log", **QUIET):
        yield address


@pytest.fixture
def client(server: str, two_adapters: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MlflowClient:
    """Return a client of the server, which the workspace uses with the test's own experiment."""
    for name, value in {"MLFLOW_TRACKING_URI": server, "MLFLOW_EXPERIMENT_NAME": f"{NAME} {tmp_path.name}"}.items():
        monkeypatch.setenv(name, value)
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    return MlflowClient(server)


def experiment_name() -> str:
    return str(load_settings().mlflow_experiment_name)


def runs(client: MlflowClient) -> dict[str, mlflow.entities.Run]:
    found = client.get_experiment_by_name(experiment_name())
    return {run.data.tags["ft_dagster.adapter"]: run for run in client.search_runs([found.experiment_id])}


def in_use(client: MlflowClient) -> str:
    version = client.get_model_version_by_alias(experiment_name(), "released")
    return str(version.tags["ft_dagster.adapter"])


def test_a_run_reports_what_was_trained_measured_and_released_to_the_server(
    client: MlflowClient, two_adapters: Path, tmp_path: Path
) -> None:
    released = (two_adapters / "fine_tuned_model").resolve()
    with dg.DagsterInstance.get() as instance:
        assert run(instance, "released_adapter").success
    known = runs(client)
    assert known.keys() == {released.name, "second"}
    training = known[released.name]
    assert training.info.status == "FINISHED"
    artifact = Store(two_adapters / ".ft" / "store").get("lora_adapter", released.name)
    losses = client.get_metric_history(training.info.run_id, "loss")
    assert [(point.step, point.value) for point in losses] == [
        (row["step"], row["loss"]) for row in artifact.about["history"]
    ]
    recipe = read_manifest(released).recipe
    assert training.data.params["lora.rank"] == str(recipe["lora"]["rank"])
    evaluation = Store(two_adapters / ".ft" / "store").newest("adapter_evaluation")
    assert evaluation
    for model in ("base", "new"):
        assert training.data.metrics[f"{model}.bits_per_byte"] == evaluation.about["models"][model]["bits_per_byte"]
    assert training.data.tags["ft_dagster.decision"] == "release"
    assert in_use(client) == released.name
    mlflow.set_tracking_uri(load_settings().mlflow_tracking_uri.get_secret_value())
    files = Path(
        mlflow.artifacts.download_artifacts(f"models:/{experiment_name()}@released", dst_path=str(tmp_path / "got"))
    )
    for name in artifact.files:
        assert file_digest(files / name) == artifact.files[name], name


def test_the_alias_follows_a_release_by_hand_and_each_adapter_is_one_version(
    client: MlflowClient, two_adapters: Path
) -> None:
    first = (two_adapters / "fine_tuned_model").resolve().name
    assert ft_dagster("release", "promote", "second", "--why", "a try").returncode == 0
    assert in_use(client) == "second"
    assert ft_dagster("release", "rollback", "--why", "enough").returncode == 0
    assert in_use(client) == first
    versions = client.search_model_versions(f"name = '{experiment_name()}'")
    assert {version.tags["ft_dagster.adapter"] for version in versions} == {first, "second"} and len(versions) == 2


def test_the_server_is_not_sent_what_it_has_except_interrupted_records(
    client: MlflowClient, two_adapters: Path
) -> None:
    first = (two_adapters / "fine_tuned_model").resolve().name
    done = ft_dagster("track", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert set(told["adapters"]) == {first, "second"} and told["versions"] == [first]
    assert json.loads(ft_dagster("track", "--json").stdout) == {"adapters": [], "versions": []}
    broken = runs(client)["second"].info.run_id
    client.update_run(broken, "RUNNING")
    points = len(client.get_metric_history(broken, "loss"))
    assert json.loads(ft_dagster("track", "--json").stdout)["adapters"] == ["second"]
    assert len(client.get_metric_history(broken, "loss")) == points
    assert runs(client)["second"].info.status == "FINISHED"


def test_an_unreachable_server_delays_no_release_and_its_password_is_not_shown(
    two_adapters: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://somebody:canary-4321@127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    done = ft_dagster("release", "promote", "second", "--why", "a try")
    assert done.returncode == 0 and "MLflow was not updated" in on_one_line(done.stderr)
    settings = load_settings()
    with pytest.raises(TrackingError, match=r"ft-dagster track") as raised:
        track(settings, Store(settings.store_root), Releases(settings.fine_tuned_model, settings.state))
    with dg.DagsterInstance.get() as instance:
        done_run = run(instance, "released_adapter")
        assert done_run.success
        said = " ".join(event.event_specific_data.__repr__() for event in done_run.all_events)
    captured = capfd.readouterr()
    everything = done.stdout + done.stderr + str(raised.value) + said + captured.out + captured.err + repr(settings)
    assert "canary-4321" not in everything


def test_without_a_server_nothing_is_sent_and_the_command_says_what_to_set(workspace: Path) -> None:
    settings = load_settings()
    assert track(settings, Store(settings.store_root), Releases(settings.fine_tuned_model, settings.state)) is None
    done = ft_dagster("track")
    assert done.returncode == 1 and "MLFLOW_TRACKING_URI is not set" in on_one_line(done.stderr)
