"""Compare training with ft_dagster and with other tools, on the same base, chapters and epochs, in one run.

    python benchmarks/training.py [--chapters FOLDER ...] [--epochs 1] [--rounds 2]

Each contender runs in its own process (benchmarks/peers/), with the packages that a requirements file there pins, in a
virtual environment that is made on the first run. They take turns, in reverse order every other round. All train on the
Markdown of the chapters that ft_dagster trains on, with one example per chapter. All adapters are measured on the
chapters that ft_dagster holds out, by the code of `ft_dagster.model.scoring`. All compute in the number format that is
faster on this processor. For a contender that would train longer than --patience minutes, only the rate of its first
three steps is measured.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.contenders import CONTENDERS, OURS, Contender
from benchmarks.match import PEERS, PROJECT, Match
from benchmarks.pages import with_section
from benchmarks.processes import ProcessError, child_environment, make_environment
from benchmarks.training_table import TITLE, USUAL, Score, as_table, introduction, kind_of_processor, report_name
from ft_dagster.config.recipe_file import load_recipe, resolve_recipe
from ft_dagster.config.settings import Settings
from ft_dagster.runtime.number_format import resolved_here


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--chapters",
        type=Path,
        nargs="+",
        default=[PROJECT / "ft_dagster" / "examples"],
        help="reports, one table each",
    )
    parser.add_argument("--epochs", type=int, default=1, choices=(1, 2))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--recipe", default="smollm2-135m")
    parser.add_argument("--patience", type=float, default=20, help="minutes above which only the rate is measured")
    parser.add_argument(
        "--only", nargs="+", choices=[c.name for c in CONTENDERS], help="run only these, and ft_dagster"
    )
    parser.add_argument("--peers", type=Path, help="folder of the contenders' virtual environments")
    parser.add_argument("--output", type=Path, default=PROJECT / "benchmarks" / "results" / "training.md")
    options = parser.parse_args()
    content = load_recipe(options.recipe).model_dump(mode="json")
    content["training"]["epochs"] = options.epochs
    recipe = resolved_here(resolve_recipe(content), Settings())
    contenders = [c for c in CONTENDERS if options.only is None or c.name in (*options.only, OURS)]
    pythons, failures = install(contenders, options.peers or Settings().cache / "peers")
    parts = []
    ok = True
    for folder in options.chapters:
        with tempfile.TemporaryDirectory() as scratch:
            match = Match(markdown_folder(folder), Path(scratch), recipe, options.threads, 60 * options.patience)
            scores = [Score(contender, failure=failures.get(contender.name)) for contender in contenders]
            rates, base = play(match, scores, pythons, options.rounds)
            parts.append(as_table(report_name(folder), match, scores, rates, base))
        ok &= scores[-1].failure is None
        about = introduction(
            options.epochs, options.rounds, options.threads, options.patience, options.chapters, contenders
        )
        before = options.output.read_text("utf-8") if options.output.exists() else ""
        page = with_section(TITLE, before, kind_of_processor(), "\n\n".join([about, *parts]))
        options.output.write_text(page, "utf-8")
        print(parts[-1], flush=True)
    sys.exit(0 if ok else f"{OURS} failed")


def markdown_folder(folder: Path) -> Path:
    """Return the folder with the chapters of a report: one of the usual subfolders, or the folder itself."""
    return next((path for name in USUAL if (path := folder / name).is_dir()), folder)


def install(contenders: list[Contender], folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the Python of each contender, and the reason for each that cannot be installed."""
    pythons, failures = {}, {}
    for contender in contenders:
        try:
            requirements = contender.requirements
            pythons[contender.name] = (
                make_environment(PEERS / requirements, folder) if requirements else Path(sys.executable)
            )
        except ProcessError as error:
            failures[contender.name] = f"cannot be installed: {error}"
    return pythons, failures


def play(match: Match, scores: list[Score], pythons: dict[str, Path], rounds: int) -> tuple[list[float], float | None]:
    """Run all rounds. Return rates of matrix products, measured before each run, and the base's bits per byte."""
    rates = []
    for number in range(rounds):
        for score in scores if number % 2 == 0 else reversed(scores):
            name = score.contender.name
            if score.failure:
                continue
            rates.append(matrix_rate(match.threads, match.recipe.base.dtype))
            print(f"round {number + 1} of {rounds}: {name} ... ", end="", flush=True)
            try:
                score.runs.append(match.train(score.contender, pythons[name], number))
                result = score.runs[-1].result
                print(f"{result['text_tokens']} tokens, {result['cpu_seconds']:.0f} CPU-seconds", flush=True)
            except ProcessError as error:
                score.failure = str(error)
                print(error, flush=True)
    adapters = {score.contender.name: score.runs[-1].adapter for score in scores if score.finished}
    if not adapters:
        return rates, None
    found = match.measure(adapters)
    for score in scores:
        score.bits_per_byte = found.get(score.contender.name)
    return rates, found["base"]


def matrix_rate(threads: int, number_format: str) -> float:
    """Measure GFLOP per CPU-second of matrix products, in a separate process."""
    script = str(PROJECT / "benchmarks" / "matrix_rate.py")
    environment = child_environment(Path(tempfile.gettempdir()), threads)
    done = subprocess.run(
        [sys.executable, script, str(threads), number_format],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return float(done.stdout)


if __name__ == "__main__":
    main()
