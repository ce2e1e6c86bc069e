"""The GPU benchmark also runs without a GPU, on a tiny model: its program works, and reports wrong results."""

import json
import subprocess
import sys
from pathlib import Path

from dagster_dev import PROJECT

from benchmarks.gpu.results import Result, as_tables, is_right

PARTS = ("reference", "correct", "resume", "speed-bf16")
WAYS = ("none float32 sdpa", "nf4 bfloat16 varlen")
LIGER = "none bfloat16 varlen liger"
SPEED = "varlen, no checkpointing"


def test_the_benchmark_compares_and_measures_a_tiny_model_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--cpu", "--tiny", "--patience", "10", "--out", str(tmp_path)]
    chosen = ["--parts", *PARTS, "--only", *WAYS, LIGER, SPEED]
    done = subprocess.run([*command, *chosen], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + (tmp_path / "log.txt").read_text()
    found = [Result(**json.loads(line)) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    facts = {(result.part, result.name): result.facts for result in found}
    assert [facts["correct", way]["right"] for way in WAYS] == [True, True]
    assert "need a GPU" in facts["correct", LIGER]["not_run"]
    assert facts["reference", "nats of a token"]["change_if_pieces_mixed"] > 0.1, "mixed pieces would be seen"
    resumed = facts["resume", "resumed"]
    assert resumed["same_bytes"] and 0 < resumed["resumed_from"] < resumed["steps"]
    assert facts["speed-bf16", SPEED]["tokens_per_second"] > 0
    assert {part for part, name in facts if name == "the whole part"} == set(PARTS)


def test_wrong_results_and_parts_that_were_killed_are_not_right() -> None:
    wrong = Result("correct", "nf4 bfloat16 sdpa", {"right": False, "loss": 0.5})
    assert not is_right(wrong) and "**NO**" in as_tables([wrong])
    assert not is_right(Result("resume", "the whole part", {"ended": "ended after 60 s"}))
    assert is_right(Result("resume", "the whole part", {"ended": "done"}))
