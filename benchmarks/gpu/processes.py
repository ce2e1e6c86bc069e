"""Run the project's own processes on a base of full size, and measure speed, memory, and when each stage starts."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu import world
from benchmarks.gpu.results import Results
from benchmarks.gpu.setup import Setup
from ft_dagster.evaluation.request import RESULT as EVALUATION
from ft_dagster.evaluation.request import EvaluationRequest
from ft_dagster.training.request import RESULT, TrainingRequest

_REQUEST = "request.json"
_KEPT = ("steps", "tokens_per_second", "tokens_since_resume", "seconds_since_resume", "final_loss", "reloads")


def train(setup: Setup, results: Results) -> None:
    """Run `python -m ft_dagster.training` for an epoch on the documentation. The base is made first, and kept."""
    began = time.monotonic()
    base = world.random_base(setup, world.large_config(setup))
    length, epochs = (128, 0.1) if setup.tiny else (2048, 1)
    recipe = world.recipe(setup, base, {"tokens.block_length": length, "training.epochs": epochs})
    trained_on = world.dataset(setup, base, length)
    request = world.training_request(setup, recipe, trained_on, time.strftime("attempt-%H%M%S"))
    results.add("train", "base and dataset are made", seconds=time.monotonic() - began)
    attempt = Path(request.attempt)
    command = [sys.executable, "-m", "ft_dagster.training", str(request.write(attempt / _REQUEST))]
    began = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in process.stderr or ():
        print(line, end="")
        if line.startswith("INFO ft_dagster"):
            said = line.split(": ", 1)[1].strip()
            results.add("train", f"at {time.monotonic() - began:.1f} s", says=said[:110])
    if process.wait():
        sys.exit(process.returncode)
    found = json.loads((attempt / RESULT).read_bytes())
    memory = {"GiB": found["peak_memory_bytes"], "GiB_estimated": found["estimate"]["memory_bytes"] or 0}
    kept = {name: found[name] for name in _KEPT} | {name: size / 2**30 for name, size in memory.items()}
    results.add("train", "the whole process", seconds=time.monotonic() - began, **kept)
    _last(setup).write_text(str(attempt))


def evaluate(setup: Setup, results: Results) -> None:
    """Run `python -m ft_dagster.evaluation` on the adapter that `train` made last."""
    attempt = Path(_last(setup).read_text())
    trained = TrainingRequest.read(attempt / _REQUEST)
    output = attempt / "evaluation"
    request = EvaluationRequest(
        base=trained.base,
        dataset=trained.dataset,
        recipe=trained.recipe,
        adapters={"new": str(attempt / "adapter")},
        known={},
        output=str(output),
        offload=str(setup.folder / "offload"),
        locks=trained.locks,
    )
    command = [sys.executable, "-m", "ft_dagster.evaluation", str(request.write(attempt / "evaluation.json"))]
    began = time.monotonic()
    subprocess.run(command, check=True, env=os.environ)
    found = json.loads((output / EVALUATION).read_bytes())
    results.add("evaluate", "the whole process", seconds=time.monotonic() - began, **found["seconds_by_part"])
    for name, model in found["models"].items():
        results.add("evaluate", name, bits_per_byte=model["bits_per_byte"])


def _last(setup: Setup) -> Path:
    return setup.folder / "last-attempt"
