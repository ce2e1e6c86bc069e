"""Data written by a newer version is refused; data written by an older one is read."""

import sqlite3
import tarfile
from contextlib import closing
from pathlib import Path

import dagster as dg
import pytest
from commands import ft_dagster
from safetensors.numpy import load_file

from ft_dagster.cli.examination import examine
from ft_dagster.config.settings import Settings, SettingsError, load_settings
from ft_dagster.dataset.dataset import load_rows
from ft_dagster.defs.clean import KINDS
from ft_dagster.defs.instance import instance_to_read, open_instance, prepare_home
from ft_dagster.defs.workspace import Workspace
from ft_dagster.model.manifest import read_manifest
from ft_dagster.release.lineage import restore, trained_on_text
from ft_dagster.release.released import Releases
from ft_dagster.store import formats
from ft_dagster.store.local import StoreError
from ft_dagster.store.shared import open_store

WRITTEN_BEFORE = sorted((Path(__file__).parents[1] / "data").glob("format-*.tar.xz"))
"""A workspace of each earlier format; data/README.md says how to make one."""
NEWER = "says 99: this was written by a newer ft_dagster"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of the first format with one file in it."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "name").write_text("old")
    return tmp_path / "folder"


def test_a_new_folder_gets_the_current_format_number_and_an_unmarked_one_the_first(
    folder: Path, tmp_path: Path
) -> None:
    for place, number in ((tmp_path / "new", 3), (folder, 1)):
        for _ in range(2):
            formats.mark(place, 3)
            assert formats.require_known(place, 3) == number


@pytest.mark.parametrize("content", [b"99\n", b"", b"one", b"-1"])
def test_a_newer_or_unreadable_number_is_refused_by_name_and_nothing_is_changed(folder: Path, content: bytes) -> None:
    (folder / formats.NAME).write_bytes(content)
    before = files(folder)
    with pytest.raises(StoreError, match=NEWER if content == b"99\n" else "it contains no number") as refused:
        formats.mark(folder, 1)
    assert str(folder / formats.NAME) in str(refused.value)
    assert files(folder) == before


def test_a_run_writes_the_numbers_of_store_and_state_and_refuses_newer_ones(workspace: Path) -> None:
    context = dg.build_init_resource_context()
    for _ in range(2):
        with Workspace().yield_for_execution(context):
            pass
    store, state = load_settings().store_root, load_settings().state
    assert formats.require_known(store, formats.STORE) == formats.STORE
    assert formats.require_known(state, formats.STATE) == formats.STATE
    (state / formats.NAME).write_text("99")
    with pytest.raises(StoreError, match=NEWER), Workspace().yield_for_execution(context):
        pass
    (store / formats.NAME).write_text("99")
    with pytest.raises(StoreError, match=NEWER):
        open_store(load_settings())


def test_a_bucket_has_a_number_too(workspace: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FT_STORE", s3_url)
    store = Workspace().store
    for _ in range(2):
        with store.in_use():
            pass
    store.bucket.write(formats.NAME, b"99")  # type: ignore[attr-defined]
    with pytest.raises(StoreError, match=NEWER) as refused, store.in_use():
        pass
    assert f"{s3_url}/{formats.NAME}" in str(refused.value)


@pytest.mark.parametrize("archive", WRITTEN_BEFORE, ids=lambda path: path.name.partition(".")[0])
def test_a_workspace_of_each_earlier_format_is_upgraded_and_read_completely(
    archive: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(archive) as tar:
        tar.extractall(workspace, filter="data")
    reports = workspace / "reports"
    monkeypatch.setenv("FT_WORKSPACE", str(reports))
    with Workspace().yield_for_execution(dg.build_init_resource_context()):
        pass
    settings = load_settings()
    assert formats.require_known(settings.state, formats.STATE) == formats.STATE
    store = open_store(settings)
    made = {stage.name: store.get(stage.name, store.keys(stage.name)[0]) for stage in KINDS}
    assert all(store.get_blob(name) for name in store.blobs())
    assert load_rows(made["tokenized_dataset"], "train").num_rows > 0

    manifest = read_manifest(settings.fine_tuned_model)
    history = Releases(settings.fine_tuned_model, settings.state).history()
    assert manifest.key == made["lora_adapter"].key == history[-1]["adapter"]
    assert load_file(settings.fine_tuned_model / "adapter_model.safetensors")
    assert trained_on_text(store, "its clerk wrote down what each of the members asked for")
    for name in restore(store, manifest, workspace / "again"):
        assert (workspace / "again" / name).read_bytes() == (reports / name).read_bytes()
    shown = ft_dagster("lineage", "show")
    assert shown.returncode == 0 and manifest.key in shown.stdout, shown.stderr


@pytest.fixture
def home(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("DAGSTER_HOME", str(workspace / "home"))
    monkeypatch.setenv("DAGSTER_DISABLE_TELEMETRY", "yes")
    return load_settings()


def test_a_newer_home_is_refused(home: Settings) -> None:
    prepare_home(home)
    (home.dagster_home / formats.NAME).write_text("99")
    for attempt in (lambda: prepare_home(home), lambda: instance_to_read(home).__enter__()):
        with pytest.raises(StoreError, match=NEWER):
            attempt()


def test_the_doctor_names_what_a_newer_version_has_written(home: Settings) -> None:
    prepare_home(home)
    for place in (home.dagster_home, home.state):
        place.mkdir(exist_ok=True)
        (place / formats.NAME).write_text("99")
    found = {finding.subject: finding for finding in examine(home, {"failed": "not looked at"})}
    for subject, place in {"pool gpu": home.dagster_home, "store": home.state}.items():
        assert found[subject].status == "problem" and f"{place / formats.NAME} {NEWER}" in found[subject].text


def test_a_history_that_a_newer_dagster_has_migrated_is_refused(home: Settings) -> None:
    with open_instance(home) as instance:
        instance.get_runs()
    (runs,) = home.dagster_home.rglob("runs.db")
    with closing(sqlite3.connect(runs)) as database:
        database.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
        database.commit()
    with pytest.raises(SettingsError, match=r"written by a newer Dagster than .* \(revision ffffffffffff\)"):
        open_instance(home)
