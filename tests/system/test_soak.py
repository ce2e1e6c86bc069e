"""Many edits, singly and in bursts, with one `dagster dev`: the result is always right, and nothing keeps growing.

FT_SOAK_EDITS is the number of edits; FT_SOAK_ROWS is a file for the measurements after each, as JSON Lines.
"""

import json
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import linear_regression

import dagster as dg
from commands import COMMAND
from dagster_dev import DagsterDev, wait_until
from reports import PROSE, chapter_text

from ft_dagster.base.prepare import prepare_base
from ft_dagster.config.recipe_file import load_recipe
from ft_dagster.corpus.sections import make_sections
from ft_dagster.corpus.snapshot import take_snapshot
from ft_dagster.dataset.dataset import make_dataset, outline_sections
from ft_dagster.dataset.held_out.choice import choose_split
from ft_dagster.dataset.held_out.record import read_pinned
from ft_dagster.defs.stages import ARTIFACT, STAGES, latest_materialization
from ft_dagster.evaluation.gate import judge
from ft_dagster.evaluation.request import BASE, NEW, RESULT
from ft_dagster.store.hashing import canonical_json
from ft_dagster.store.local import Store
from ft_dagster.training.find_or_train import keys_of

EDITS = int(os.environ.get("FT_SOAK_EDITS", "6"))
SEED = int(os.environ.get("FT_SOAK_SEED", "1"))
ROWS = os.environ.get("FT_SOAK_ROWS")
_RECOMPUTED_EVERY = 20
"""Edits between two comparisons with a separate workspace; the last state is always compared."""
_CLEANED_EVERY = 10
_SERVERS = ("web server", "daemon", "code server", "code", "dagster dev")
_LEAST_FOR_SLOPES = 40
"""Fewer edits give no meaningful slope: the first half of them is warm-up."""
_MOST_MIB_AN_EDIT = 0.5
"""The limit on the growth of all five servers' memory. At 20 edits a day it would be 10 MiB a day."""
_MOST_KB_AN_EDIT = 50
"""The limit on the growth of DAGSTER_HOME. A run takes ten times as much, so it shows if old runs are kept."""

Contents = dict[str, bytes]
"""Path in the workspace -> bytes of a report file."""
Edit = Callable[[Contents, random.Random, int], Contents]


def contents(workspace: Path) -> Contents:
    files = [*workspace.glob("chapter_markdowns/*"), *workspace.glob("outputs/consolidated/*")]
    return {path.relative_to(workspace).as_posix(): path.read_bytes() for path in files}


def save(workspace: Path, wanted: Contents) -> None:
    """Make the report files those wanted, as an editor does: only what differs is written or removed."""
    there = contents(workspace)
    for name in there.keys() - wanted.keys():
        (workspace / name).unlink()
    for name, content in wanted.items():
        if there.get(name) != content:
            (workspace / name).parent.mkdir(parents=True, exist_ok=True)
            (workspace / name).write_bytes(content)


def chapters_of(reports: Contents) -> list[str]:
    return sorted(name for name in reports if name.endswith(".md"))


def text_changed(reports: Contents, chance: random.Random, number: int) -> Contents:
    name = chance.choice(chapters_of(reports))
    return reports | {name: reports[name] + f"\nThe clerk wrote line {number}. {chance.choice(PROSE)}\n".encode()}


def section_added(reports: Contents, chance: random.Random, number: int) -> Contents:
    name = chance.choice(chapters_of(reports))
    text = "".join(chance.sample(PROSE, 3))
    return reports | {name: reports[name] + f"\n## SECTION {number}\n\n{text} It was section {number}.\n".encode()}


def section_removed(reports: Contents, chance: random.Random, number: int) -> Contents:
    found = [name for name in chapters_of(reports) if reports[name].count(b"\n## ") > 1]
    if not found:
        return section_added(reports, chance, number)
    name = chance.choice(found)
    return reports | {name: reports[name].rpartition(b"\n## ")[0] + b"\n"}


def chapter_added(reports: Contents, chance: random.Random, number: int) -> Contents:
    return reports | {f"chapter_markdowns/chapter_{100 + number}.md": chapter_text(100 + number).encode()}


def chapter_removed(reports: Contents, chance: random.Random, number: int) -> Contents:
    if len(chapters_of(reports)) <= 5:
        return chapter_added(reports, chance, number)
    gone = chance.choice(chapters_of(reports))
    return {name: content for name, content in reports.items() if name != gone}


def chapter_renamed(reports: Contents, chance: random.Random, number: int) -> Contents:
    old = chance.choice(chapters_of(reports))
    return {(f"chapter_markdowns/renamed {number}.md" if n == old else n): c for n, c in reports.items()}


def json_changed(reports: Contents, chance: random.Random, number: int) -> Contents:
    text = f"{''.join(chance.sample(PROSE, 4))} It was report {number}."
    content = {"sections": {"INTRODUCTION": {"original": "A draft.", "improved": text}}}
    return reports | {f"outputs/consolidated/report_{number % 3}.json": json.dumps(content).encode()}


def made_invalid(reports: Contents, chance: random.Random, number: int) -> Contents:
    name = chance.choice(chapters_of(reports))
    return reports | {name: reports[name] + f"\nThe café of office {number} was closed.\n".encode("latin-1")}


def repaired(reports: Contents) -> Contents:
    return {n: c if is_text(c) else c.replace(b"caf\xe9", "café".encode()) for n, c in reports.items()}


def is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def spaces_changed(reports: Contents, chance: random.Random, number: int) -> Contents:
    name = chance.choice(chapters_of(reports))
    return reports | {name: reports[name] + b"\n\n"}


CHANGES: tuple[Edit, ...] = (
    text_changed,
    section_added,
    section_removed,
    chapter_added,
    chapter_removed,
    chapter_renamed,
    json_changed,
    made_invalid,
    spaces_changed,
)
TOUCHED, TAKEN_BACK, REPAIRED = "touched", "taken back", "mended"


@dataclass
class Row:
    """The measurements after an edit, with everything up to date."""

    edit: int
    kind: str
    seconds: float
    """Seconds since the edit, or since the last edit of a burst."""
    runs: int
    """So far."""
    mebibytes: dict[str, float]
    """Server -> resident memory."""
    handles: dict[str, int]
    processes: int
    databases: int
    """Bytes of the SQLite files in DAGSTER_HOME."""
    home: int
    """Bytes of DAGSTER_HOME without ticks, which happen every second here and which Dagster deletes after a week."""
    store: int
    """Bytes of the store and of the released adapters."""
    cleaned: bool
    """Whether `ft-dagster clean` has just run."""


def bytes_of(folder: Path, pattern: str = "*") -> int:
    total = 0
    for path in folder.rglob(pattern):
        with suppress(FileNotFoundError):
            total += path.lstat().st_size
    return total


def measure(dev: DagsterDev, edit: int, kind: str, seconds: float, cleaned: bool) -> Row:
    memory, handles = {}, {}
    wait_until(lambda: "run" not in dev.kinds(), "the process of the last run is gone")
    kinds = dev.kinds()
    for name in _SERVERS:
        (process,) = kinds[name]
        memory[name], handles[name] = process.memory_info().rss / 2**20, process.num_fds()
    state = dev.workspace / ".ft"
    return Row(
        edit,
        kind,
        round(seconds, 1),
        len(dev.runs()),
        {name: round(size, 1) for name, size in memory.items()},
        handles,
        len(dev.processes()),
        bytes_of(dev.home, "*.db*"),
        bytes_of(dev.home) - bytes_of(dev.home / "schedules"),
        bytes_of(state / "store") + bytes_of(state / "released"),
        cleaned,
    )


def ft_dagster(dev: DagsterDev, *arguments: str, **settings: str) -> None:
    done = subprocess.run([*COMMAND, *arguments], env=dev.environment | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def keys(home: Path) -> dict[str, str]:
    """Return the key of the last artifact of each stage."""
    with dg.DagsterInstance.from_config(str(home)) as instance:
        found = {stage.name: latest_materialization(instance, stage.key) for stage in STAGES}
        return {name: str(last.metadata[ARTIFACT].value) for name, last in found.items() if last}


def keys_offline(dev: DagsterDev) -> dict[str, str]:
    """Return the expected keys, computed from the reports with an empty store and without Dagster."""
    recipe = load_recipe("recipe.yaml", dev.workspace)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sections = make_sections(
            take_snapshot(dev.workspace, folder / "files.db", Store(folder / "store")), recipe.corpus
        )
        base = prepare_base(recipe.base, folder / "cache")
        split = choose_split(
            outline_sections(sections), recipe.tokens, read_pinned(dev.workspace / ".ft" / "held_out.json")
        )
        dataset = make_dataset(
            outline_sections(sections), Path(base.folder), base.tokenizer, recipe.tokens, split, recipe.objectives
        )
        return {
            "sections": sections.key,
            "tokenized_dataset": dataset.key,
            "lora_adapter": keys_of(dataset, base.identity, recipe)[0],
        }


def require_right(dev: DagsterDev) -> None:
    """Require the keys of a computation without history, and the release that the rules demand."""
    found = keys(dev.home)
    assert found == found | keys_offline(dev)
    evaluation = Store(dev.workspace / ".ft" / "store").get("adapter_evaluation", found["adapter_evaluation"])
    adapter, in_use = evaluation.about["adapter"], evaluation.about["in_use"]
    assert adapter == found["lora_adapter"]
    history = [json.loads(line)["adapter"] for line in (dev.workspace / ".ft/released/history.jsonl").open()]
    released = (dev.workspace / "fine_tuned_model").resolve().name
    assert history[-1] == released
    earlier = history[:-1] if released == adapter else history
    rules = load_recipe("recipe.yaml", dev.workspace).release
    verdict = judge(evaluation.read_json(RESULT)["models"], rules, in_use is not None and adapter in earlier)
    assert canonical_json(verdict.to_json()) == canonical_json(evaluation.about["verdict"])
    assert released == (adapter if verdict.decision == "release" else in_use or released)


def require_trained_alike(dev: DagsterDev, folder: Path) -> None:
    """Require the same weights and measurements from the same reports in a workspace without history."""
    workspace = folder / "workspace"
    save(workspace, contents(dev.workspace))
    (workspace / ".ft").mkdir()
    for name in ("recipe.yaml", ".ft/held_out.json"):
        if (dev.workspace / name).exists():
            shutil.copy(dev.workspace / name, workspace / name)
    ft_dagster(dev, "run", FT_WORKSPACE=str(workspace), DAGSTER_HOME=str(folder / "home"))
    here, there = keys(dev.home), keys(folder / "home")
    for name in ("raw_chapters", "sections", "tokenized_dataset", "lora_adapter"):
        ours = Store(dev.workspace / ".ft" / "store").get(name, here[name])
        theirs = Store(workspace / ".ft" / "store").get(name, there[name])
        assert (ours.key, dict(ours.files)) == (theirs.key, dict(theirs.files))
    ours, theirs = (
        Store(path / ".ft" / "store").get("adapter_evaluation", key["adapter_evaluation"]).about["models"]
        for path, key in ((dev.workspace, here), (workspace, there))
    )
    assert (ours[NEW], ours[BASE]) == (theirs[NEW], theirs[BASE])
    shutil.rmtree(folder)


def bursts(chance: random.Random) -> Iterator[list[int]]:
    """Return the numbers of the edits that are made at once, without waiting between them."""
    number = 0
    while number < EDITS:
        size = min(chance.choice((1, 2, 4, 6)), EDITS - number)
        yield list(range(number, number + size))
        number += size


def test_after_many_edits_the_state_is_correct_and_disk_and_memory_have_not_grown(
    finished: Path, tmp_path: Path
) -> None:
    for part in ("workspace", "home"):
        shutil.copytree(finished / part, tmp_path / part, symlinks=True)
    chance = random.Random(SEED)
    rows: list[Row] = []
    settings = {"FT_KEEP_ADAPTERS": "2", "FT_KEEP_RELEASED": "false", "FT_KEEP_RUNS": "10"}
    with DagsterDev(tmp_path, **settings) as dev:
        dev.until_up_to_date()
        reports = before = contents(dev.workspace)
        last_recomputed = last_cleaned = 0
        for numbers in bursts(chance):
            made = []
            for number in numbers:
                if not all(map(is_text, reports.values())):
                    kind, new = REPAIRED, repaired(reports)
                elif (edit := chance.choice([*CHANGES, TOUCHED, TAKEN_BACK])) == TAKEN_BACK:
                    kind, new = TAKEN_BACK, before
                elif edit == TOUCHED:
                    kind, new = TOUCHED, reports
                    (dev.workspace / chance.choice(chapters_of(reports))).touch()
                else:
                    assert callable(edit)
                    kind, new = edit.__name__, edit(reports, chance, number)
                reports, before = new, reports
                save(dev.workspace, reports)
                made.append(kind)
                if len(numbers) > 1 and chance.random() < 0.5:  # while the run for the edit before is under way
                    seen = len(dev.runs())
                    with suppress(AssertionError):  # an edit that changes no content requests none
                        wait_until(lambda seen=seen: len(dev.runs()) > seen, "a run is asked for", seconds=6)
            edited = time.monotonic()
            if all(map(is_text, reports.values())):
                dev.until_up_to_date()
                seconds = time.monotonic() - edited
                require_right(dev)
            else:
                dev.until_skipped("Held back: a blocking check of sections failed")
                seconds = time.monotonic() - edited
            done = numbers[-1] + 1
            if cleans := done - last_cleaned >= _CLEANED_EVERY:
                ft_dagster(dev, "clean", "--yes")
                last_cleaned = done
            if done - last_recomputed >= _RECOMPUTED_EVERY and all(map(is_text, reports.values())):
                require_trained_alike(dev, tmp_path / "offline")
                last_recomputed = done
            rows.append(measure(dev, done, ", ".join(made), seconds, cleans))
            if ROWS:
                with Path(ROWS).open("a") as file:
                    file.write(json.dumps(asdict(rows[-1])) + "\n")
        if not all(map(is_text, reports.values())):
            save(dev.workspace, repaired(reports))
            dev.until_up_to_date()
            require_right(dev)
        require_trained_alike(dev, tmp_path / "offline")
        assert dev.not_fresh() == set()
    require_flat(rows)


def require_flat(rows: list[Row]) -> None:
    later = rows[len(rows) // 2 :]
    first = later[0]
    assert {row.processes for row in later} == {first.processes}
    for name in _SERVERS:
        assert abs(later[-1].handles[name] - first.handles[name]) <= 8, name  # connections that come and go
    if rows[-1].edit < _LEAST_FOR_SLOPES:
        return
    edits = [row.edit for row in later]
    grown = linear_regression(edits, [sum(row.mebibytes.values()) for row in later]).slope
    assert grown < _MOST_MIB_AN_EDIT, f"the servers grow by {grown:.2f} MiB with each edit"
    cleaned = [row for row in later if row.cleaned]
    assert cleaned[-1].store < 1.5 * cleaned[0].store
    grown = linear_regression([row.edit for row in cleaned], [row.home / 1000 for row in cleaned]).slope
    assert grown < _MOST_KB_AN_EDIT, f"Dagster's history grows by {grown:.0f} kB with each edit"
