"""The number format of one attempt: the machine's own, or the one that the attempt began in elsewhere."""

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
_NAME = "number_format"
"""File in a checkpoint that names its format."""
_BEFORE_IT_WAS_WRITTEN = "bfloat16"
"""The format of checkpoints without that file: `auto` came with it, and its forerunner was this."""


def write_format(checkpoint: Path, number_format: str) -> None:
    """Write into a checkpoint what its training computes in."""
    (checkpoint / _NAME).write_text(number_format)


def settle_format(recipe: Recipe, attempt: Path, cache: Path | None, shared: SharedCheckpoints | None) -> Recipe:
    """The recipe with its number format decided: that of the attempt's last checkpoint, or the machine's own.

    Where the machine cannot go on in the checkpoint's format, the checkpoints are removed, and the log says so. All
    processes of a training call this, and the first decides.

    Args:
        recipe: what to train.
        attempt: folder with checkpoints to go on from, if there are any.
        cache: FT_CACHE, where it is kept how fast the machine is; None to measure it.
        shared: where checkpoints are kept for other machines.
    """
    if recipe.base.dtype != AUTO:
        return recipe
    chosen = _decide(attempt, cache, shared) if ranks.is_first() else FORMATS[0]
    chosen = FORMATS[int(ranks.first_says(FORMATS.index(chosen)))]  # they wait for the first one's answer
    log.info("base.dtype: auto is %s here", chosen)
    return recipe.computing_in(chosen)


def _decide(attempt: Path, cache: Path | None, shared: SharedCheckpoints | None) -> str:
    rates = rates_here(cache)
    checkpoint = last_checkpoint(attempt)
    if checkpoint is None:
        return rates.best
    began_in = _read_format(checkpoint)
    if rates.can_go_on_in(began_in):
        return began_in
    log.warning(
        "Training starts over: its %s was made in %s, which this machine is too slow in or does not have; here it is "
        "made in %s.",
        checkpoint.name,
        began_in,
        rates.best,
    )
    if shared:
        shared.forget()
    for path in attempt.parent.glob("*/checkpoint-*"):  # of earlier attempts, too: theirs are of later steps
        shutil.rmtree(path, ignore_errors=True)
    return rates.best


def _read_format(checkpoint: Path) -> str:
    try:
        return (checkpoint / _NAME).read_text().strip()
    except FileNotFoundError:
        return _BEFORE_IT_WAS_WRITTEN
