"""Run one part of the benchmark in this process: `python -m benchmarks.gpu.part PART SETUP`, with SETUP as JSON."""

import json
import logging
import sys
from collections.abc import Callable

from benchmarks.gpu import ceilings, correctness, processes, speed
from benchmarks.gpu.results import Results
from benchmarks.gpu.setup import Setup

PARTS: dict[str, Callable[[Setup, Results], None]] = {
    "ceilings": ceilings.measure,
    "reference": correctness.compute_reference,
    "correct": correctness.compare,
    "resume": correctness.compare_resumed,
    "speed-nf4": speed.measure_nf4,
    "speed-bf16": speed.measure_bf16,
    "train": processes.train,
    "evaluate": processes.evaluate,
}

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    content = json.loads(sys.argv[2])
    setup = Setup(**content | {"only": tuple(content["only"])})
    PARTS[sys.argv[1]](setup, Results(setup.folder / "results.jsonl"))
