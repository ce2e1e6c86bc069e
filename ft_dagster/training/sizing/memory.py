"""Check whether a training fits into memory, before weights are loaded."""

import logging
from pathlib import Path

import torch

from ft_dagster.base.model_folder import PreparedBase, model_config
from ft_dagster.config.recipe import Recipe
from ft_dagster.errors import TrainingError
from ft_dagster.model import ranks
from ft_dagster.model.device import device
from ft_dagster.runtime.machine import memory_for_process
from ft_dagster.training.sizing.estimate import CUDA_CONTEXT, MemoryEstimate
from ft_dagster.training.sizing.fitting import fit
from ft_dagster.training.sizing.shape import UnknownModelError

log = logging.getLogger(__name__)


def available_memory() -> int:
    """Return the bytes that this process may use in total, on its GPU or on the machine."""
    if device().type == "cuda":
        free, _ = torch.cuda.mem_get_info(device())
        return free + CUDA_CONTEXT  # the query has created the CUDA context
    return memory_for_process() // ranks.count()


def require_memory(base: PreparedBase, recipe: Recipe) -> MemoryEstimate | None:
    """Return the estimated memory of a training, or None if the formula does not support the model. Loads no weights.

    Raises:
        TrainingError: the training cannot fit. The message says what it needs, what is available, and what to change.
    """
    config = model_config(Path(base.folder))
    on_gpu = device().type == "cuda"
    try:
        found = fit(config, recipe, on_gpu, available_memory())
    except UnknownModelError as error:
        log.info("No estimate of memory: %s.", error)
        return None
    available = f"{found.available / 2**30:.2f} GiB"
    log.info("Training will take about %s; %s are available.", found.estimate, available)
    if found.is_refused:
        where = "of GPU memory" if on_gpu else "of memory"
        raise TrainingError(
            f"This training does not fit: it takes about {found.estimate}, and {available} {where} are available. "
            f"{found.advice}"
        )
    if found.advice:
        log.warning("Memory may not be enough. %s", found.advice)
    return found.estimate
