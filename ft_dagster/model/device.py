"""The device that this process computes on."""

import torch

from ft_dagster.model import ranks


def device() -> torch.device:
    """Return the device that this process computes on: its own GPU among the visible ones, or the CPU."""
    return torch.device("cuda", ranks.local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def format_to_write_in() -> str:
    """Return the number format for generating text token by token. On a CPU this is float32, which is faster there."""
    if not torch.cuda.is_available():
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def device_name() -> str:
    """Return the name of the GPU, or `cpu`."""
    return torch.cuda.get_device_name(device()) if torch.cuda.is_available() else "cpu"
