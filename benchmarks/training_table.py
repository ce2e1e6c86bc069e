"""The tables of benchmarks/training.py, and the text above them."""

import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

import psutil

from benchmarks.contenders import NOT_RUN, OURS, Contender
from benchmarks.match import PEERS, Match, Run
from ft_dagster.base.model_folder import model_config
from ft_dagster.training.sizing.model_flops import flops_of_pieces
from ft_dagster.training.sizing.shape import shape_of

USUAL = ("chapter_markdowns", "chapters")
"""Usual names of folders with the chapters of a report."""


@dataclass
class Score:
    """The results of one contender: its runs, from which medians are taken, or the reason of its failure."""

    contender: Contender
    runs: list[Run] = field(default_factory=list)
    failure: str | None = None
    bits_per_byte: float | None = None

    def median(self, figure: Callable[[Run], float]) -> float:
        return statistics.median(figure(run) for run in self.runs)

    @property
    def finished(self) -> bool:
        """Whether training ran to the end, so that there is an adapter to measure."""
        return not self.failure and not any(run.result["ended_early"] for run in self.runs)

    @property
    def rate(self) -> float:
        """Useful tokens per CPU-second of training."""
        return self.median(lambda run: run.result["text_tokens"] / run.result["cpu_seconds"])


def introduction(
    epochs: int, rounds: int, threads: int, patience: float, folders: list[Path], contenders: list[Contender]
) -> str:
    """Return the text that says what was measured, where and how."""
    pinned = sorted(
        {line for c in contenders if c.requirements for line in (PEERS / c.requirements).read_text().split()}
    )
    own = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    return "\n\n".join(
        [
            f"{datetime.now(UTC):%Y-%m-%d}, {machine()}, {threads} threads. `python benchmarks/training.py --chapters "
            f"{' '.join(report_name(folder) for folder in folders)} --epochs {epochs} --rounds {rounds} "
            f"--patience {patience:g}`. Medians.",
            f"Packages: ft_dagster {own}; its peers {', '.join(line.replace('==', ' ') for line in pinned)}.",
            "Same base (SmolLM2-135M-Instruct), same chapters, same number of epochs, each contender in its own "
            "process, taking turns. All except `original` use the recipe's LoRA (rank, alpha, dropout, all linear "
            "layers) and learning rate; TRL also its block length, rows per step, schedule, clipping and weight "
            "decay. Useful tokens are the tokens of text that a step learned from, without padding and "
            "end-of-sequence tokens. Text that reached the loss is their number divided by that of the tokens in the "
            "training chapters' Markdown. Training is timed from the first forward pass, which is the probe in "
            "ft_dagster, to the end of the last optimizer step; memory and start-up are those of the process. Share "
            "of the matrix limit is the rate of operations that the model needs (training/sizing/model_flops.py) per "
            "CPU-second, divided by that of matrix products in the same run. All compute in the number format that "
            "is faster on this processor. If there are no bits per byte, training would have taken more than "
            f"{patience:g} minutes, and the rate is that of the first three steps. Adapters are measured by the same "
            "code on the same held-out sections.",
            "\n".join(f"- {c.name}: {c.about}." for c in contenders),
            NOT_RUN,
        ]
    )


TITLE = "# Training, side by side"


def kind_of_processor() -> str:
    """Return the processor's name, and the instruction sets that determine which number format is fast."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in facts.get("flags", "").split()]
    return f"{facts.get('model name', platform.processor() or platform.machine())} ({', '.join(flags)})"


def machine() -> str:
    """Return a description of processor, cores and memory."""
    return f"{kind_of_processor()}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"


def report_name(folder: Path) -> str:
    """Return the name of a report: that of the folder with its chapters, or of the folder above."""
    folder = folder.resolve()
    return folder.parent.name if folder.name in USUAL else folder.name


def as_table(name: str, match: Match, scores: list[Score], rates: list[float], base: float | None) -> str:
    """Return a report's results as Markdown, with a table that has a row for each contender."""
    rate = statistics.median(rates)
    ours = next((score for score in scores if score.contender.name == OURS and not score.failure), None)
    share = partial(share_of_limit, match, rate)
    columns: list[tuple[str, Callable[[Score], str]]] = [
        ("text that reached the loss", lambda s: f"{kept(match, s):.1%}" if s.finished else "–"),
        (
            "useful tokens a second",
            lambda s: f"{s.median(lambda r: r.result['text_tokens'] / r.result['seconds']):.0f}",
        ),
        ("per CPU-second", lambda s: f"{s.rate:.0f}"),
        ("ratio to ft_dagster", lambda s: f"{s.rate / ours.rate:.2f}" if ours else "–"),
        ("per CPU-second with start-up", lambda s: f"{s.median(with_start_up):.0f}"),
        ("peak memory, MB", lambda s: f"{s.median(lambda r: r.cost.memory) / 1e6:,.0f}"),
        ("optimizer steps", lambda s: f"{s.median(lambda r: r.result['steps']):.0f}"),
        ("bits per byte after", lambda s: f"{s.bits_per_byte:.4f}" if s.bits_per_byte else "–"),
        ("share of the matrix limit", lambda s: f"{share(s):.1%}" if s.contender.all_linear else "–"),
    ]
    lines = [f"| | {' | '.join(title for title, _ in columns)} |", "|---|" + "---:|" * len(columns)]
    for score in scores:
        row = score.contender.name
        if score.failure:
            lines.append(f"| {row} | {score.failure.replace('|', ' ')} |" + " |" * (len(columns) - 1))
        else:
            lines.append(f"| {row} | {' | '.join(cell(score) for _, cell in columns)} |")
    reasons = ", ".join(f"{reason} {size:,}" for reason, size in match.dataset.about["ledger"]["left_out"].items())
    about = [
        f"### {name}",
        f"{len(match.files)} chapters to train on, {match.tokens:,} tokens of Markdown an epoch; held out: "
        f"{', '.join(match.held_out)}. Bits per byte of the base: {f'{base:.4f}' if base else '–'}. "
        f"{match.recipe.base.dtype} matrix products (4096^3): {rate:.0f} GFLOP per CPU-second "
        f"({min(rates):.0f} to {max(rates):.0f} in {len(rates)} measurements).",
        *([f"Bytes of all chapters that ft_dagster leaves out, by reason: {reasons}."] if reasons else []),
        "\n".join(lines),
        *verdict(match, scores, ours),
    ]
    return "\n\n".join(about)


def verdict(match: Match, scores: list[Score], ours: Score | None) -> list[str]:
    """Return a sentence that compares ft_dagster with the fastest lossless peer, if there is one."""
    peers = [s for s in scores if s is not ours and not s.failure and s.contender.lossless]
    if not ours or not peers:
        return []
    best = max(peers, key=lambda score: score.rate)
    memory = ours.median(lambda r: r.cost.memory) / best.median(lambda r: r.cost.memory)
    quality = ""
    if ours.bits_per_byte and best.bits_per_byte:
        quality = f", {ours.bits_per_byte:.4f} to its {best.bits_per_byte:.4f} bits per byte"
    return [
        f"Best lossless peer: {best.contender.name}. ft_dagster: {ours.rate / best.rate:.2f} times its useful tokens "
        f"per CPU-second, {memory:.2f} times its memory{quality}."
    ]


def kept(match: Match, score: Score) -> float:
    """Return the share of the text's tokens that a step learned from, in an epoch."""
    epochs = int(match.recipe.training.epochs)
    return score.median(lambda run: run.result["text_tokens"]) / (match.tokens * epochs)


def with_start_up(run: Run) -> float:
    return run.result["text_tokens"] / run.cost.cpu_seconds


def share_of_limit(match: Match, rate: float, score: Score) -> float:
    """Return model FLOPs per CPU-second, divided by those of matrix products alone."""
    shape = shape_of(model_config(match.base))

    def share(run: Run) -> float:
        result = run.result
        pieces = {int(length): count for length, count in result["pieces"].items()}
        predicted = result["text_tokens"] + result["end_tokens"]
        flops = flops_of_pieces(shape, pieces, predicted, match.recipe.lora.rank)
        return flops / 1e9 / result["cpu_seconds"] / rate

    return score.median(share)
