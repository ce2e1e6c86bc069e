"""The device a process computes on."""

import torch

from ft_dagster.model import ranks


def device() -> torch.device:
    """The device this process computes on: its GPU among the visible ones, or the CPU."""
    return torch.device("cuda", ranks.local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def format_to_write_in() -> str:
    """The number format in which text is written one token at a time: on a CPU float32, which is faster there."""
    if not torch.cuda.is_available():
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def device_name() -> str:
    """The GPU's name, or `cpu`."""
    return torch.cuda.get_device_name(device()) if torch.cuda.is_available() else "cpu"
