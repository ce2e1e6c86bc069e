"""With the daemon running, a user only edits reports: one `dagster dev`, and every kind of change.

Adding and deleting a chapter is tested in tests/test_daemon.py.

Each test starts and finishes with everything up to date, and leaves its changes behind.
"""

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import COMMAND
from dagster_dev import UP_TO_DATE, WRITING, DagsterDev, wait_until
from dagster_ui import steps, stop_sensor, ticks
from lineage import sections, trained_on
from reports import PROSE, chapter_text
from watched import Watched, statuses

from ft_dagster.dataset.held_out.record import position
from ft_dagster.defs.runs.state import SCHEDULE
from ft_dagster.model.manifest import read_manifest
from ft_dagster.store.local import write_atomically

NEW_CONTENT = "raw_chapters: report_files has new content"


@pytest.fixture(scope="module", autouse=True)
def scheduled(
    finished: Path, tmp_path_factory: pytest.TempPathFactory, new_history: Callable[[], dict[str, str]]
) -> Iterator[DagsterDev]:
    """Start a second `dagster dev`, with the schedule in place of the sensor, on a stale workspace.

    It runs from the first test on, because it ticks once a minute; the last test checks its ticks.
    """
    folder, history = tmp_path_factory.mktemp("scheduled"), new_history()
    for part in ("workspace",) if history else ("workspace", "home"):
        shutil.copytree(finished / part, folder / part, symlinks=True)
    dev = DagsterDev(folder, FT_SCHEDULE="* * * * *", **history)
    if history:  # the history is empty, and the store has everything
        done = subprocess.run([*COMMAND, "run"], env=dev.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    with dev:
        stop_sensor(dev.address)
        chapter = folder / "workspace" / "chapter_markdowns" / "chapter_1.md"
        chapter.write_text(chapter.read_text().replace("\n", "\r\n"))
        yield dev


def write_slowly(path: Path, text: str, enough: Callable[[], object]) -> None:
    """Write a file in pieces until a condition is true, then its rest, which ends with "Complete."."""
    with path.open("w") as file:
        while not enough():
            file.write(text[file.tell() :][:20] or " ")
            file.flush()
            time.sleep(0.2)
        file.write(text[file.tell() :] + "\nComplete.\n")


def touch_and_copy(watched: Watched) -> None:
    for chapter in (watched.folder / "chapter_markdowns").iterdir():
        chapter.touch()
    copy = shutil.copy(watched.chapter("chapter_1"), watched.folder / "copy")
    Path(copy).replace(watched.chapter("chapter_1"))


def save_in_another_way(watched: Watched) -> None:
    """Save reports with Windows line ends and a byte-order mark, a review block, and JSON instead of Markdown."""
    windows = watched.chapter("chapter_1")
    windows.write_bytes(b"\xef\xbb\xbf" + windows.read_bytes().replace(b"\n", b"\r\n"))
    watched.append("chapter_2", "### Citation Accuracy Analysis\n\nOne citation of three was found.\n\n---")
    moved = watched.chapter("chapter_3")
    _, heading, text = moved.read_text().partition("## BACKGROUND KNOWLEDGE\n\n")
    assert heading and text
    folder = watched.folder / "outputs" / "consolidated"
    folder.mkdir(parents=True)
    content = {"sections": {"BACKGROUND KNOWLEDGE": {"improved": text.strip()}}}
    (folder / "chapter_3.json").write_text(json.dumps(content))
    moved.unlink()


def review_again(watched: Watched) -> None:
    chapter = watched.chapter("chapter_2")
    assert "One citation" in chapter.read_text(), "the change above has been made"
    chapter.write_text(chapter.read_text().replace("One citation", "No citation"))


def save_the_base_by_another_version(watched: Watched) -> None:
    config = watched.folder / watched.recipe()["base"]["model"] / "config.json"
    write_atomically(config, json.dumps(json.loads(config.read_text()) | {"transformers_version": "5.999"}))


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        pytest.param(touch_and_copy, [], id="files touched, and copied over themselves"),
        pytest.param(save_in_another_way, [NEW_CONTENT], id="line ends, a review block, JSON for Markdown"),
        pytest.param(review_again, [NEW_CONTENT], id="the review block changed"),
        pytest.param(
            save_the_base_by_another_version,
            ["tokenized_dataset: base_model has new content"],
            id="the same base model saved by another version",
        ),
    ],
)
def test_changes_that_leave_the_text_unchanged_train_nothing(
    watched: Watched, change: Callable[[Watched], None], reasons: list[str]
) -> None:
    made, adapter = watched.dev.made(), watched.dev.asset("lora_adapter").data_version
    runs = watched.dev.runs_for(lambda: change(watched))
    assert [(run.status, run.reason) for run in runs] == [("SUCCESS", reason) for reason in reasons]
    assert watched.dev.made() == made, "no training or evaluation process was started"
    assert watched.dev.asset("lora_adapter").data_version == adapter
    assert watched.dev.not_fresh() == set()


def test_a_renamed_chapter_gets_its_new_name_in_the_sections_without_retraining(
    watched: Watched,
) -> None:
    made = watched.dev.made()
    runs = watched.dev.runs_for(
        lambda: watched.chapter("chapter_4").rename(watched.chapter("chapter_4 (second edition)"))
    )
    assert statuses(runs) == ["SUCCESS"]
    named = {s.chapter for s in sections(watched.folder, watched.dev.asset("sections").metadata["artifact"])}
    assert "chapter_4 (second edition)" in named and "chapter_4" not in named
    assert watched.dev.made() == made
    assert watched.dev.not_fresh() == set()


def test_a_changed_recipe_trains_again_and_reverting_it_reuses_the_earlier_adapter(watched: Watched) -> None:
    first, recipe = watched.released, watched.recipe()
    made = watched.dev.made()
    smaller = recipe | {"lora": recipe["lora"] | {"rank": 2}}
    (run,) = watched.dev.runs_for(lambda: watched.save_recipe(smaller))
    assert (run.status, run.reason) == (
        "SUCCESS",
        "lora_adapter: the recipe changed (base, objectives, lora, training)",
    )
    assert list(steps(watched.dev.address, run.id)) == ["lora_adapter", "adapter_evaluation", "released_adapter"]
    assert len(watched.dev.made().adapters - made.adapters) == 1

    made = watched.dev.made()
    (run,) = watched.dev.runs_for(lambda: watched.save_recipe(recipe))
    assert (run.status, run.reason) == (
        "SUCCESS",
        "lora_adapter: the recipe changed (base, objectives, lora, training)",
    )
    assert watched.dev.asset("lora_adapter").metadata["reused"] is True
    assert (watched.dev.made().adapters, watched.dev.made().trainings) == (made.adapters, made.trainings)
    assert watched.released == first


def test_an_edit_that_cannot_be_read_prevents_training_until_it_is_fixed(watched: Watched) -> None:
    made, text = watched.dev.made(), watched.chapter("chapter_5").read_text() + "\nThe café of the office was closed.\n"
    before = watched.dev.runs()
    watched.chapter("chapter_5").write_bytes(text.encode("latin-1"))
    watched.dev.until_skipped("Held back: a blocking check of sections failed")
    (run,) = watched.dev.runs()[len(before) :]
    assert run.status == "FAILURE" and "lora_adapter" not in steps(watched.dev.address, run.id)
    assert watched.dev.made() == made

    runs = watched.dev.runs_for(lambda: watched.chapter("chapter_5").write_text(text, "utf-8"))
    assert statuses(runs) == ["SUCCESS"]
    (new,) = watched.dev.made().adapters - made.adapters
    assert "café" in trained_on(watched.folder, watched.adapter(new))["chapter_5"]
    assert watched.dev.not_fresh() == set()


def test_a_failed_training_is_retried_once_and_its_change_waits_for_a_fix(
    watched: Watched,
) -> None:
    before, released, recipe, made = watched.dev.runs(), watched.released, watched.recipe(), watched.dev.made()
    watched.append("chapter_1", "The second bridge was painted green.")
    watched.save_recipe(recipe | {"training": recipe["training"] | {"learning_rate": 1e30, "warmup": 0.0}})
    watched.dev.until_skipped("2 runs for this content failed")
    failed = watched.dev.runs()[len(before) :]
    assert statuses(failed) == ["FAILURE", "FAILURE"]
    assert watched.released == released and watched.dev.made().adapters == made.adapters

    runs = watched.dev.runs_for(lambda: watched.save_recipe(recipe))
    assert statuses(runs) == ["SUCCESS"]
    (new,) = watched.dev.made().adapters - made.adapters
    assert "painted green" in trained_on(watched.folder, watched.adapter(new))["chapter_1"]
    failures = watched.folder / "logs" / "failures.log"
    for run in failed:
        (line,) = wait_until(
            lambda run=run: [line for line in failures.read_text().splitlines() if run.id in line],
            "the failure is reported",
        )
        assert "lora_adapter failed" in line and "Lower training.learning_rate" in line


def held_out(watched: Watched, adapter: str) -> set[str]:
    return set(read_manifest(watched.adapter(adapter)).held_out)


def test_a_burst_of_files_causes_one_training_and_changes_during_it_one_more(
    watched: Watched,
) -> None:
    # The last names in the order in which text is held out, so that these are trained on.
    last, late, *names = sorted((f"burst_{number}" for number in range(31)), key=position, reverse=True)
    withdrawn = names[0]
    made, before = watched.dev.made(), watched.dev.runs()

    def write_files() -> None:
        for number, name in enumerate(names):
            watched.chapter(name).write_text(f"# {name}\n\n{PROSE[number % 5]} It was file {number}.\n")
            time.sleep(0.1)  # as a tool that writes for some seconds
        began = time.time()
        write_slowly(watched.chapter(last), chapter_text(98), lambda: WRITING in str(watched.dev.ticks_since(began)))
        (run,) = wait_until(lambda: watched.dev.runs()[len(before) :], "a run is asked for")
        write_slowly(watched.chapter(late), chapter_text(99), lambda: steps(watched.dev.address, run.id))

    writer = threading.Thread(target=write_files)
    writer.start()
    try:
        watched.dev.until_training()
    finally:
        writer.join()
    watched.chapter(withdrawn).unlink()
    assert statuses(watched.dev.runs()[len(before) :]) == ["STARTED"]
    watched.dev.until_up_to_date()

    assert statuses(watched.dev.runs()[len(before) :]) == ["SUCCESS", "SUCCESS"]
    keys = watched.dev.made().adapters - made.adapters
    second = str(watched.dev.asset("lora_adapter").metadata["artifact"])
    (first,) = keys - {second}
    assert len(keys) == 2
    texts = trained_on(watched.folder, watched.adapter(first))
    assert texts.keys() >= {withdrawn, last, late} and texts.keys() | held_out(watched, first) >= set(names)
    assert texts[last].endswith("Complete.") and texts[late].endswith("Complete.")
    texts = trained_on(watched.folder, watched.adapter(second))
    assert withdrawn not in texts and texts.keys() >= {last, late}
    assert texts.keys() | held_out(watched, second) >= set(names[1:])
    assert "It was file 0." not in watched.current_text()
    assert watched.dev.not_fresh() == set()


def test_the_schedule_alone_updates_a_stale_graph_and_then_starts_no_more_runs(
    scheduled: DagsterDev,
) -> None:
    asked = wait_until(
        lambda: [tick for tick in ticks(scheduled.address, SCHEDULE) if tick.runs],
        "a tick starts a run",
    )
    wait_until(
        lambda: [
            tick
            for tick in ticks(scheduled.address, SCHEDULE)
            if tick.at > asked[0].at and tick.skipped == UP_TO_DATE  # an earlier tick may have been before the edit
        ],
        "a later tick of the schedule finds everything up to date",
    )
    (run,) = scheduled.runs()[1:]
    assert (run.status, run.reason) == ("SUCCESS", NEW_CONTENT)
    assert run.tags["dagster/schedule_name"] == SCHEDULE
    assert [tick.runs for tick in ticks(scheduled.address, SCHEDULE) if tick.runs] == [(run.id,)]
    assert not [tick for tick in scheduled.ticks_since(0) if tick.runs], "the sensor was off"
    assert scheduled.not_fresh() == set()
