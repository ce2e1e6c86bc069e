"""How fast trainings went on this machine, remembered for the next plan. Imports no torch."""

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
    """What was measured, by one trial step or, better, by a whole training."""

    tokens_per_second: float
    peak_memory_bytes: int
    device: str


def speed_key(config: Mapping[str, Any], recipe: Recipe, threads: int | None) -> str:
    """What decides speed and memory: the model's shape, the recipe, the machine. Not what the weights or rows are."""
    steps = {"rows_per_device", "rows_per_step", "gradient_checkpointing", "attention", "fused", "optimizer"}
    steps |= {"processes", "strategy", "mixed_precision"}
    return digest(
        {
            "config": dict(config),
            "base": recipe.base.model_dump(mode="json", include={"quantization", "dtype"}),
            "block_length": recipe.tokens.block_length,
            "lora": recipe.lora.model_dump(mode="json"),
            "training": recipe.training.model_dump(mode="json", include=steps),
            # The model of a GPU, not which one it is: a training sees the one that it leased, and the plan all.
            "machine": [processor(), threads, visible_devices()[0].model],
            "code": CODE_VERSION,
        }
    )[:32]


def remember_speed(folder: Path, key: str, speed: Speed) -> None:
    """Keep what was measured last."""
    write_atomically(folder / f"{key}.json", json.dumps(asdict(speed)))


def recall_speed(folder: Path, key: str) -> Speed | None:
    """What was measured last; None if nothing was, or it cannot be read: it is measured again."""
    try:
        return Speed(**json.loads((folder / f"{key}.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
