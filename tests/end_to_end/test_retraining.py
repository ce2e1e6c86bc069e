"""With the daemon running, an edit is all a person does."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dagster_ui import graphql

RUNS = "{ runsOrError { ... on Runs { results { runId status tags { key value } } } } }"
TICKS = """{ sensorOrError(sensorSelector: {repositoryName: "__repository__", repositoryLocationName: "ft_dagster",
  sensorName: "keep_up_to_date"}) {
  ... on Sensor { sensorState { ticks(limit: 500) { tickId status skipReason } } } } }"""
STALE = "{ assetNodes { assetKey { path } staleStatus } }"


@pytest.fixture(autouse=True)
def quick_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FT_WATCH_SECONDS", "1")
    monkeypatch.setenv("FT_SETTLE_SECONDS", "1")


def wait_until(condition: Callable[[], Any], seconds: float = 180) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "the condition did not come true in time"
        time.sleep(0.3)


def runs(address: str) -> list[dict[str, Any]]:
    return graphql(address, RUNS)["runsOrError"]["results"]


def quiet_ticks(address: str) -> int:
    ticks = graphql(address, TICKS)["sensorOrError"]["sensorState"]["ticks"]
    return sum(tick["skipReason"] == "Everything is up to date." for tick in ticks)


def trained_on(workspace: Path) -> set[str]:
    manifest = json.loads((workspace / "fine_tuned_model" / "manifest.json").read_text())
    return {row["section"] for row in manifest["trained_on"]}


def test_an_edit_alone_brings_one_run_and_a_touch_none(
    user_interface: str, workspace: Path, chapters: list[Path]
) -> None:
    wait_until(lambda: quiet_ticks(user_interface))
    assert [run["status"] for run in runs(user_interface)] == ["SUCCESS"], "the cold start is one run"
    adapters = list((workspace / ".ft" / "store" / "lora_adapter").iterdir())
    assert len(adapters) == 1 and (workspace / "fine_tuned_model" / "adapter_model.safetensors").exists()

    seen = quiet_ticks(user_interface)
    for chapter in chapters:
        os.utime(chapter)
    wait_until(lambda: quiet_ticks(user_interface) >= seen + 3)
    assert len(runs(user_interface)) == 1, "a touch is not a change"

    held_out = json.loads((workspace / "fine_tuned_model" / "manifest.json").read_text())["held_out"]
    edited = next(chapter for chapter in chapters if chapter.stem not in held_out)
    seen = quiet_ticks(user_interface)
    edited.write_text(edited.read_text() + "\nOne more sentence stands here since this morning.\n")
    wait_until(lambda: len(runs(user_interface)) == 2 and quiet_ticks(user_interface) > seen)
    newest = runs(user_interface)[0]
    assert newest["status"] == "SUCCESS"
    reasons = {tag["key"]: tag["value"] for tag in newest["tags"]}
    assert reasons["ft_dagster/reason"] == "raw_chapters: report_files has new content"
    assert len(list((workspace / ".ft" / "store" / "lora_adapter").iterdir())) == 2

    seen = quiet_ticks(user_interface)
    wait_until(lambda: quiet_ticks(user_interface) >= seen + 3)
    assert len(runs(user_interface)) == 2, "exactly one run for one change"
    status = {node["assetKey"]["path"][0]: node["staleStatus"] for node in graphql(user_interface, STALE)["assetNodes"]}
    assert status["lora_adapter"] == "FRESH"
