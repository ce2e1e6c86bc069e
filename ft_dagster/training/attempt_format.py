"""The number format of an attempt: the machine's best one, or the one that the attempt started in elsewhere."""

import logging
import shutil
from pathlib import Path

from ft_dagster.config.recipe import AUTO, Recipe
from ft_dagster.model import ranks
from ft_dagster.model.products import rates_here
from ft_dagster.runtime.number_format import FORMATS
from ft_dagster.training.attempts import last_checkpoint
from ft_dagster.training.shared_checkpoints import SharedCheckpoints

log = logging.getLogger(__name__)
_FORMAT_FILE = "number_format"
"""File in a checkpoint that names its number format."""
_FORMAT_BEFORE_AUTO = "bfloat16"
"""The format of checkpoints without that file, which are older than `auto` and were made in the former default."""


def write_format(checkpoint: Path, number_format: str) -> None:
    """Write the number format of a training into its checkpoint."""
    (checkpoint / _FORMAT_FILE).write_text(number_format)


def settle_format(recipe: Recipe, attempt: Path, cache: Path | None, shared: SharedCheckpoints | None) -> Recipe:
    """Return the recipe with its number format decided: that of the attempt's last checkpoint, or the machine's best.

    If the machine cannot continue in the checkpoint's format, the checkpoints are removed, and a warning is logged. All
    processes of a training call this, and the first one decides.

    Args:
        recipe: the recipe of the training.
        attempt: the attempt's folder, which may contain checkpoints to resume from.
        cache: FT_CACHE, where the machine's speed by number format is saved; None to measure it.
        shared: the checkpoints that are shared with other machines, if any.
    """
    if recipe.base.dtype != AUTO:
        return recipe
    chosen = _decide(attempt, cache, shared) if ranks.is_first() else FORMATS[0]
    chosen = FORMATS[int(ranks.first_says(FORMATS.index(chosen)))]  # the others wait for the first one's decision
    log.info("base.dtype: auto resolves to %s on this machine", chosen)
    return recipe.computing_in(chosen)


def _decide(attempt: Path, cache: Path | None, shared: SharedCheckpoints | None) -> str:
    rates = rates_here(cache)
    checkpoint = last_checkpoint(attempt)
    if checkpoint is None:
        return rates.best
    started_in = _read_format(checkpoint)
    if rates.can_go_on_in(started_in):
        return started_in
    log.warning(
        "Training starts over: its %s was made in %s, a number format that this machine lacks or is too slow in. It "
        "now trains in %s.",
        checkpoint.name,
        started_in,
        rates.best,
    )
    if shared:
        shared.forget()
    for path in attempt.parent.glob("*/checkpoint-*"):  # also those of earlier attempts, which may be of later steps
        shutil.rmtree(path, ignore_errors=True)
    return rates.best


def _read_format(checkpoint: Path) -> str:
    try:
        return (checkpoint / _FORMAT_FILE).read_text().strip()
    except FileNotFoundError:
        return _FORMAT_BEFORE_AUTO
