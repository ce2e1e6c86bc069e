"""After kills at random moments and restarts, the state is that of an undisturbed update."""

import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from adapter_reader import reading_throughout
from dagster_dev import DagsterDev, wait_until
from dagster_ui import slots_taken
from reports import chapter_text

from ft_dagster.defs.clean import KINDS
from ft_dagster.defs.stages import STAGES
from ft_dagster.store.local import Store
from ft_dagster.training.request import KIND as ADAPTER

KILLS = int(os.environ.get("FT_KILLS", "2"))
SEED = int(os.environ.get("FT_KILLS_SEED", "1"))
EVERYTHING = "everything"
_ENDS_WITH = ("dagster dev", "web server", "daemon", EVERYTHING)
"""The processes whose death stops `dagster dev`; it is started again."""
_NOT_STARTED_AGAIN = ("code server", "code")
"""Without these Dagster keeps running idle and reports it in the UI, so a user restarts `dagster dev`."""
_SERVICES = ("dagster dev", "web server", "daemon", "code server", "code")
_ORPHANS_SECONDS = 120
"""A code server exits after 45 s without a heartbeat of `dagster dev`, and its child 45 s later."""


@dataclass(frozen=True)
class Undisturbed:
    """An undisturbed update."""

    seconds: float
    """The seconds from the edit until everything was up to date."""
    lives: dict[str, tuple[float, float]]
    """Kind of process -> when the first and the last were seen after the edit, in seconds."""
    idle: Counter[str]
    """Kind of process -> how many there are when nothing runs."""
    outcome: dict[str, Any]


def a_copy(finished: Path, folder: Path) -> Path:
    """Return a copy of a finished workspace with its history, whose recipe is unchanged."""
    for part in ("workspace", "home"):
        shutil.copytree(finished / part, folder / part, symlinks=True)
    return folder


def edit(workspace: Path) -> None:
    """Add text that takes seconds to train on, with two processes, so that training has children of its own.

    The text is added first: no run, which would be for the recipe alone, is requested before the reports settle.
    """
    with (workspace / "chapter_markdowns" / "chapter_1.md").open("a") as chapter:
        chapter.write("\nThe ferry went only once.\n")
        chapter.writelines(chapter_text(number).rpartition("\n\n")[2] for number in range(20, 26))
    recipe = yaml.safe_load((workspace / "recipe.yaml").read_text())
    recipe["training"]["processes"] = 2
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def released(dev: DagsterDev) -> str:
    return (dev.workspace / "fine_tuned_model").resolve().name


def outcome(dev: DagsterDev) -> dict[str, Any]:
    """Return everything that must not depend on the kills: versions, keys and bytes."""
    store = Store(dev.workspace / ".ft" / "store")
    assets = {stage.name: dev.asset(stage.name) for stage in STAGES}
    keys = {name: asset.metadata["artifact"] for name, asset in assets.items()}
    evaluation = store.get("adapter_evaluation", keys["adapter_evaluation"])
    return {
        "versions": {name: asset.data_version for name, asset in assets.items()},
        "keys": keys,
        "adapter": dict(store.get(ADAPTER, keys[ADAPTER]).files),
        "dataset": dict(store.get("tokenized_dataset", keys["tokenized_dataset"]).files),
        "measured": evaluation.about["models"],
        "verdict": evaluation.about["verdict"],
        "released": released(dev),
        "releases": [
            json.loads(line)["adapter"]
            for line in (dev.workspace / ".ft" / "released" / "history.jsonl").read_text().splitlines()
        ],
        "not fresh": dev.not_fresh(),
    }


def counted(dev: DagsterDev) -> Counter[str]:
    return Counter({kind: len(processes) for kind, processes in dev.kinds().items()})


def require_whole(store: Store) -> None:
    """Require that every artifact has its manifest, and that it and every blob have the bytes that were committed."""
    for stage in KINDS:
        for key in store.keys(stage.name):
            store.get(stage.name, key)
    for name in store.blobs():
        store.get_blob(name)


@pytest.fixture(scope="module")
def undisturbed(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = a_copy(finished, tmp_path_factory.mktemp("undisturbed"))
    with DagsterDev(folder) as dev:
        dev.until_up_to_date()
        idle, before = counted(dev), released(dev)
        edit(dev.workspace)
        edited, seen = time.monotonic(), {}
        while released(dev) == before or "run" in counted(dev):
            now = time.monotonic() - edited
            assert now < 240, "the edit is learned"
            for kind in dev.kinds():
                seen[kind] = (seen.get(kind, (now, now))[0], now)
        dev.until_up_to_date()
        seconds = time.monotonic() - edited
        return Undisturbed(seconds, seen, idle, outcome(dev))


def rounds() -> Iterator[list[int]]:
    """Return the numbers of the kills, two in each update: one during the update and one during its recovery."""
    for first in range(0, KILLS, 2):
        yield list(range(first, min(first + 2, KILLS)))


def in_turn(undisturbed: Undisturbed, number: int) -> str:
    """Return what is killed in an update: each kind equally often, in random order."""
    kinds = sorted([*undisturbed.lives, EVERYTHING])
    random.Random(SEED).shuffle(kinds)
    return kinds[number // 2 % len(kinds)]


def strike(dev: DagsterDev, kind: str, moment: float, done: str, chance: random.Random) -> str:
    """Send SIGKILL to a process of a kind at a moment, or once there is one; to all if none appears any more."""
    began = time.monotonic()
    wait_until(lambda: time.monotonic() - began >= moment, "the moment has come")
    if kind != EVERYTHING:
        victims = wait_until(lambda: dev.kinds().get(kind) or released(dev) == done, f"there is a {kind}")
        if victims is not True:
            with suppress(psutil.NoSuchProcess):
                chance.choice(victims).kill()
            return kind
    dev.kill()
    return EVERYTHING


def restart(dev: DagsterDev, hit: str, chance: random.Random) -> str:
    """Restart `dagster dev` as a supervisor does: systemd kills what is left of it, a user does not."""
    if hit in _NOT_STARTED_AGAIN:
        dev.interrupt()
        dev.start()
        return "and a person starts it anew"
    dev.until_ended()
    rest = chance.choice(("what is left is killed", "what is left lives on"))
    if rest == "what is left is killed":
        dev.kill()
    dev.start()
    return rest


@pytest.mark.parametrize("numbers", [*rounds()], ids=lambda numbers: "-".join(map(str, numbers)))
def test_kills_at_random_moments_do_not_change_the_outcome(
    undisturbed: Undisturbed, finished: Path, tmp_path: Path, numbers: list[int]
) -> None:
    folder = a_copy(finished, tmp_path)
    done = undisturbed.outcome["released"]
    told = []
    with reading_throughout(folder / "workspace" / "fine_tuned_model") as reads, DagsterDev(folder) as dev:
        edit(dev.workspace)
        for number in numbers:
            chance = random.Random(f"{SEED}.{number}")
            first = number == numbers[0]
            # A second failure for the same content would wait for a user, so only servers are killed in a recovery.
            kind = in_turn(undisturbed, number) if first else chance.choice([*_SERVICES, EVERYTHING])
            # A recovery has less to do than the complete update.
            span = undisturbed.lives.get(kind, (0.0, undisturbed.seconds)) if first else (0, undisturbed.seconds / 2)
            moment = chance.uniform(*span)
            hit = strike(dev, kind, moment, done, chance)
            how = restart(dev, hit, chance) if hit in (*_ENDS_WITH, *_NOT_STARTED_AGAIN) else ""
            told.append(f"FT_KILLS_SEED={SEED}, kill {number}: {hit} after {moment:.1f} s {how}")
            print(told[-1])  # noqa: T201 - a test that fails shows it
        recovering = time.monotonic()
        dev.until_up_to_date()
        took = time.monotonic() - recovering

        assert outcome(dev) == undisturbed.outcome, told
        require_whole(Store(dev.workspace / ".ft" / "store"))
        attempts = dev.workspace / ".ft" / "attempts"
        assert not list(attempts.iterdir()), told
        wait_until(lambda: slots_taken(dev.address) == 0, "no slot of the pool is taken", seconds=30)
        wait_until(
            lambda: counted(dev) == undisturbed.idle, f"no orphan is left after {told}", seconds=_ORPHANS_SECONDS
        )
        dev.interrupt()
        dev.until_gone()
    assert reads.count > 0
    print(f"up to date after {took:.1f} s, {reads.count} whole reads of the released adapter")  # noqa: T201
