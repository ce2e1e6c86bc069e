"""With the daemon running, a user only edits reports. tests/system/test_retraining.py has every kind of change."""

import time

import yaml
from dagster_ui import graphql, steps
from lineage import trained_on
from reports import PROSE, chapter_text
from watched import Watched, asked_at_once, statuses

from ft_dagster.defs.stages import STAGES


def test_a_cold_start_adopts_what_the_store_has_and_starts_no_process(watched: Watched) -> None:
    first = watched.dev.runs()[0]
    assert (first.status, first.reason) == ("SUCCESS", "raw_chapters: never materialized")
    assert steps(watched.dev.address, first.id) == {stage.name: "SUCCESS" for stage in STAGES}
    if len(watched.dev.runs()) == 1:  # no other test has run before this one
        assert watched.dev.made() == watched.found
        assert watched.dev.asset("lora_adapter").metadata["reused"] is True
        assert watched.dev.not_fresh() == set()


def test_the_ui_shows_the_graph_and_sends_no_telemetry(watched: Watched) -> None:
    address = watched.dev.address
    nodes = graphql(address, "{ assetNodes { assetKey { path } groupName description kinds } }")["assetNodes"]
    assert {node["assetKey"]["path"][0] for node in nodes} >= {"report_files", "lora_adapter", "released_adapter"}
    assert {node["groupName"] for node in nodes} == {"ft_dagster"}
    assert all(node["description"] and node["kinds"] for node in nodes)
    instance = graphql(address, "{ instance { info } canBulkTerminate }")["instance"]["info"]
    assert yaml.safe_load(instance)["telemetry"]["enabled"] is False


def test_a_new_chapter_causes_one_run_and_deleting_it_restores_the_earlier_adapter(watched: Watched) -> None:
    first = watched.released
    sentence = "The heron was counted twice."
    began = time.time()
    runs = watched.dev.runs_for(
        lambda: watched.chapter("chapter_9").write_text(f"{chapter_text(9)}\n{sentence}\n{' '.join(PROSE)}\n")
    )
    assert statuses(runs) == ["SUCCESS"] and asked_at_once(watched.dev.ticks_since(began))
    assert steps(watched.dev.address, runs[0].id) == {stage.name: "SUCCESS" for stage in STAGES}
    assert watched.released != first and sentence in trained_on(watched.folder)["chapter_9"]

    made = watched.dev.made()
    runs = watched.dev.runs_for(watched.chapter("chapter_9").unlink)
    assert statuses(runs) == ["SUCCESS"]
    assert watched.dev.asset("lora_adapter").metadata["reused"] is True
    assert (watched.dev.made().adapters, watched.dev.made().trainings) == (made.adapters, made.trainings)
    assert watched.released == first
    assert "chapter_9" not in trained_on(watched.folder) and sentence not in watched.current_text()
    assert watched.dev.not_fresh() == set()
