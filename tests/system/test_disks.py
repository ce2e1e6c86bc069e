"""Full and read-only disks are named, nothing is left half written, and work continues once there is free space.

Each command runs with another disk, in its own mount namespace, which other processes do not see.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from adapter_reader import reading_throughout
from commands import COMMAND, on_one_line, work_in_copy
from hosts import require_namespaces
from reports import prose_of

WEIGHTS = "fine_tuned_model/adapter_model.safetensors"
_ON_A_SMALL_DISK = """
set -eu
folder=$1 size=$2 kept=$3; shift 3
mkdir -p "$folder" "$kept" && cp -a "$folder/." "$kept/"
mount -t tmpfs -o "size=$size" none "$folder" && cp -a "$kept/." "$folder/"
if "$@"; then exit 40; fi
echo 'NOW THERE IS ROOM' >&2
mount -o remount,size=100m "$folder"
"$@"
"""
_READ_ONLY = """
set -eu
folder=$1; shift
mkdir -p "$folder"
mount --bind "$folder" "$folder" && mount -o remount,bind,ro "$folder"
"$@"
"""


@pytest.fixture
def edited(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a finished workspace with an edit that is not trained on yet."""
    require_namespaces()
    return with_an_edit(finished, tmp_path, monkeypatch)


def with_an_edit(finished: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    workspace = work_in_copy(finished, folder, monkeypatch)
    with (workspace / "chapter_markdowns" / "chapter_1.md").open("a") as chapter:
        chapter.writelines(prose_of(number) for number in range(20, 26))
    return workspace


@pytest.fixture(scope="module")
def undisturbed(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[bytes]:
    """Return the weights that the edit gives with enough disk space and with reports in a read-only folder."""
    require_namespaces()
    with pytest.MonkeyPatch.context() as patch:
        workspace = with_an_edit(finished, tmp_path_factory.mktemp("undisturbed"), patch)
        done = elsewhere(_READ_ONLY, workspace / "chapter_markdowns")
        assert done.returncode == 0, done.stderr
        yield (workspace / WEIGHTS).read_bytes()


def elsewhere(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `ft-dagster run` as a script does, with mounts that no other process sees."""
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *map(str, arguments)]
    return subprocess.run([*command, *COMMAND, "run"], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("folder", "size", "name"),
    [
        (".ft/store", "380k", "FT_STORE"),
        (".ft/attempts", "120k", "attempts at training"),
        ("../home", "2000k", "DAGSTER_HOME"),
    ],
    ids=["store", "checkpoints", "history"],
)
def test_a_full_disk_is_named_and_once_it_has_space_the_next_run_gives_equal_bytes(
    edited: Path, undisturbed: bytes, tmp_path: Path, folder: str, size: str, name: str
) -> None:
    place = Path(os.path.normpath(edited / folder))
    with reading_throughout(edited / "fine_tuned_model") as reads:
        done = elsewhere(_ON_A_SMALL_DISK, place, size, tmp_path / "kept")
    refused, _, went_on = done.stderr.partition("NOW THERE IS ROOM")
    assert f"The disk that holds {name} ({place}) is full. Make space and run again" in on_one_line(refused)
    assert done.returncode == 0, went_on
    assert (edited / WEIGHTS).read_bytes() == undisturbed
    assert reads.count > 0


@pytest.mark.parametrize(
    ("folder", "name"),
    [(".ft/store", "FT_STORE"), (".ft", "the state of the workspace"), ("../home", "DAGSTER_HOME")],
)
def test_a_folder_that_is_not_writable_is_named_and_nothing_is_changed(edited: Path, folder: str, name: str) -> None:
    place = Path(os.path.normpath(edited / folder))
    before = (edited / "fine_tuned_model").resolve()
    refused = elsewhere(_READ_ONLY, place)
    assert refused.returncode == 1
    said = on_one_line(refused.stderr)
    assert f"{name} ({place})" in said and "cannot be written to. Mount it for writing" in said, said
    assert "Traceback" not in said
    assert (edited / "fine_tuned_model").resolve() == before


def test_reports_may_be_in_a_read_only_folder(undisturbed: bytes, finished: Path) -> None:
    assert undisturbed != (finished / "workspace" / WEIGHTS).read_bytes(), "the edit has been learned"
