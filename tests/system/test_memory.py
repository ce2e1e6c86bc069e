"""With too little memory the error says what to change, before or after training, and progress is kept."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import COMMAND, on_one_line, work_in_copy
from dagster_dev import wait_until
from memory import container, use_up
from processes import command_of
from reports import prose_of

from ft_dagster.store.local import Store
from ft_dagster.training.request import KIND as ADAPTER

WEIGHTS = "fine_tuned_model/adapter_model.safetensors"


@pytest.fixture
def workspace(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a finished workspace."""
    return work_in_copy(finished, tmp_path, monkeypatch)


def change(workspace: Path, chapters: int = 0, **parts: dict[str, Any]) -> None:
    """Change parts of the recipe, and add the prose of this many chapters to one."""
    path = workspace / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(recipe | {name: recipe[name] | part for name, part in parts.items()}))
    with (workspace / "chapter_markdowns" / "chapter_1.md").open("a") as chapter:
        chapter.writelines(prose_of(number) for number in range(20, 20 + chapters))


def run(*before: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*before, *COMMAND, "run"], capture_output=True, text=True, check=False)


def test_a_training_too_large_for_its_container_is_refused_with_what_would_fit(
    workspace: Path,
) -> None:
    before = (workspace / WEIGHTS).read_bytes()
    change(workspace, tokens={"block_length": 2048}, training={"rows_per_device": 64, "rows_per_step": 64})
    with container(gibibytes=2.5) as small:
        done = run(*small.command())
    said = on_one_line(done.stderr)
    assert done.returncode == 1
    assert re.search(r"This training does not fit: it takes about \d+\.\d+ GiB", said), said
    assert "of memory are available. With training." in said
    assert "in the recipe it would take about" in said and "Traceback" not in said
    assert (workspace / WEIGHTS).read_bytes() == before


def test_a_training_that_runs_out_of_memory_says_what_to_change(workspace: Path) -> None:
    before = (workspace / WEIGHTS).read_bytes()
    change(
        workspace, chapters=400, tokens={"block_length": 2048}, training={"rows_per_device": 64, "rows_per_step": 64}
    )
    done = run("sh", "-c", 'ulimit -v 4000000; exec "$@"', "sh")
    said = on_one_line(done.stderr)
    assert done.returncode == 1
    assert "There is not enough memory. Lower training.rows_per_device or tokens.block_length" in said, said
    assert (workspace / WEIGHTS).read_bytes() == before


def test_a_training_killed_for_its_memory_is_reported_and_the_next_run_resumes_it(
    workspace: Path,
) -> None:
    before = (workspace / WEIGHTS).read_bytes()
    change(workspace, chapters=6, training={"epochs": 6})
    with container(gibibytes=3) as small:
        running = subprocess.Popen(
            small.command(*COMMAND, "run"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        wait_until(
            lambda: list((workspace / ".ft" / "attempts").glob("*/*/checkpoint-*/complete")), "a checkpoint", pause=0.1
        )
        (training,) = (p for p in small.processes() if "ft_dagster.training" in command_of(p))
        training.suspend()  # it takes seconds, and would finish before memory is used up
        use_up(small, training)
        said, _ = running.communicate()
    assert running.returncode == 1
    assert "was killed, most likely by the system because memory ran out. Lower training.rows_per_device" in (
        on_one_line(said)
    )
    assert (workspace / WEIGHTS).read_bytes() == before
    done = run()
    assert done.returncode == 0, done.stderr
    adapter = Store(workspace / ".ft" / "store").newest(ADAPTER)
    assert adapter and adapter.about["resumed_from"] > 0
