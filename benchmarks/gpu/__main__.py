"""Check that training is correct on the GPU of this machine, and measure its speed and memory.

    python -m benchmarks.gpu [--parts PART ...] [--only WORD ...] [--out FOLDER] [--cpu] [--tiny]

Run it in the root of a checkout, with a Python that has ft_dagster's packages and a torch that finds the GPU. Nothing
is downloaded: the model has the shape of Mistral-7B and random weights, and the text is the documentation of this
project.

Each part is a process with a time limit. Each result is written to OUT/results.jsonl as soon as it is known, and the
output of the processes to OUT/log.txt. The tables are printed, and on a GPU also written to benchmarks/results/gpu.md,
in a section for the card. With --cpu --tiny everything runs on a CPU in minutes, which tests this program but measures
nothing useful.

Exit codes: 0 if everything is right, 1 if a part failed or a result is wrong.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.gpu.results import Results, as_tables, is_right
from benchmarks.gpu.setup import Setup
from benchmarks.pages import with_section

PROJECT = Path(__file__).parents[2]
LIMITS = {
    "ceilings": 60,
    "reference": 60,
    "correct": 120,
    "resume": 60,
    "speed-nf4": 150,
    "speed-bf16": 100,
    "train": 200,
    "evaluate": 150,
}
"""The parts in the order in which they run, with their time limits in seconds: 15 minutes in total."""
TITLE = "# Training on GPUs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="run only variants with one of these words in their name"
    )
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "ft-dagster-gpu", help="%(default)s")
    parser.add_argument("--page", type=Path, default=PROJECT / "benchmarks" / "results" / "gpu.md", help="%(default)s")
    parser.add_argument("--recipe", default="mistral-7b-qlora", help="a shipped recipe or a file; default %(default)s")
    parser.add_argument("--layers", type=int, default=32, help="decoder layers of the large model, default %(default)s")
    parser.add_argument("--patience", type=float, default=1.0, help="factor of all time limits, for slow machines")
    parser.add_argument("--cpu", action="store_true", help="hide the GPU, and leave the page unchanged")
    parser.add_argument("--tiny", action="store_true", help="use a tiny model, and leave the page unchanged")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    setup = Setup(str(options.out.absolute()), options.recipe, options.layers, options.tiny, tuple(options.only))
    results = Results(options.out / "results.jsonl")
    results.clear()
    for part in options.parts:
        run_part(part, setup, results, LIMITS[part] * options.patience, hide_gpu=options.cpu or part == "reference")
    found = results.read()
    tables = as_tables(found)
    print(tables)
    if not (options.cpu or options.tiny) and (card := next((r.name for r in found if "torch" in r.facts), None)):
        before = options.page.read_text("utf-8") if options.page.exists() else ""
        options.page.write_text(with_section(TITLE, before, card, tables), "utf-8")
        print(f"\nWritten to {options.page}")
    sys.exit(0 if all(map(is_right, found)) else 1)


def run_part(part: str, setup: Setup, results: Results, limit: float, hide_gpu: bool) -> None:
    """Run a part in a process, kill it with its children at its time limit, and add its outcome to the results."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if hide_gpu:
        # Without the compiler, whose import takes as long as all others together.
        environment |= {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu.part", part, json.dumps(asdict(setup))]
    print(f"{part}: at most {limit:.0f} s ... ", end="", flush=True)
    began = time.monotonic()
    with (Path(setup.out) / "log.txt").open("a") as log:
        print(f"\n===== {part}", file=log, flush=True)
        process = subprocess.Popen(
            command, cwd=PROJECT, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(limit)
            ended = f"failed with exit code {code}, see {log.name}" if code else "done"
        except subprocess.TimeoutExpired:
            ended = f"ended after {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    seconds = time.monotonic() - began
    results.add(part, "the whole part", ended=ended, seconds=seconds)
    print(f"{ended}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
