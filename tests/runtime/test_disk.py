"""Full and read-only disks are recognized before an error is shown."""

import errno
import os
from pathlib import Path

import pytest

from ft_dagster.runtime.disk import can_write, free_bytes, reports_full_disk, reports_read_only


@pytest.mark.parametrize(
    ("message", "full", "read_only"),
    [
        (str(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/model")), True, False),
        (str(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))), True, False),
        ("(sqlite3.OperationalError) database or disk is full", True, False),
        ("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0", True, False),
        (str(OSError(errno.EROFS, os.strerror(errno.EROFS), "/data/model")), False, True),
        ("(sqlite3.OperationalError) attempt to write a readonly database", False, True),
        ("CUDA out of memory", False, False),
    ],
)
def test_errors_of_full_and_read_only_disks_are_told_apart(message: str, full: bool, read_only: bool) -> None:
    assert (reports_full_disk(message), reports_read_only(message)) == (full, read_only)


def test_a_folder_that_does_not_exist_yet_is_judged_by_its_parent(tmp_path: Path) -> None:
    assert can_write(tmp_path / "a" / "b") and not list(tmp_path.iterdir())
    free, of_parent = free_bytes(tmp_path / "a" / "b"), free_bytes(tmp_path)
    assert free and of_parent and abs(free - of_parent) < 2**30


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system in which nobody can create files")
def test_a_folder_that_even_root_cannot_write_to_is_recognized() -> None:
    assert not can_write(Path("/proc/self/folder"))
