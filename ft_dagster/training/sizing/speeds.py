"""Save the speed and memory of trainings on this machine for the next plan. Imports no torch."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ft_dagster.config.recipe import Recipe
from ft_dagster.runtime.lease import visible_devices
from ft_dagster.runtime.machine import processor
from ft_dagster.store.hashing import digest
from ft_dagster.store.local import write_atomically
from ft_dagster.training.request import CODE_VERSION


@dataclass(frozen=True)
class Speed:
    """Speed and memory, measured by the probe or, more accurately, by a finished training."""

    tokens_per_second: float
    peak_memory_bytes: int
    device: str


def speed_key(config: Mapping[str, Any], recipe: Recipe, threads: int | None) -> str:
    """Return a hash of what determines speed and memory: model shape, recipe and machine, but not weights or rows."""
    steps = {"rows_per_device", "rows_per_step", "gradient_checkpointing", "attention", "fused", "optimizer"}
    steps |= {"processes", "strategy", "mixed_precision"}
    return digest(
        {
            "config": dict(config),
            "base": recipe.base.model_dump(mode="json", include={"quantization", "dtype"}),
            "block_length": recipe.tokens.block_length,
            "lora": recipe.lora.model_dump(mode="json"),
            "training": recipe.training.model_dump(mode="json", include=steps),
            # The model of the GPU, not its index: a training sees only the GPUs that it leased, and the plan sees all.
            "machine": [processor(), threads, visible_devices()[0].model],
            "code": CODE_VERSION,
        }
    )[:32]


def remember_speed(folder: Path, key: str, speed: Speed) -> None:
    """Save the latest measurement."""
    write_atomically(folder / f"{key}.json", json.dumps(asdict(speed)))


def recall_speed(folder: Path, key: str) -> Speed | None:
    """Return the latest measurement, or None if there is none or it cannot be read, to be measured again."""
    try:
        return Speed(**json.loads((folder / f"{key}.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
