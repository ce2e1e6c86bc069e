"""Print as JSON what torch finds on this machine, and what works there: `python -m ft_dagster.model.inspection`."""

import json
import sys
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch

from ft_dagster.model.products import time_products
from ft_dagster.runtime.machine import memory_for_process, processor

_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")


def inspect() -> dict[str, Any]:
    """Return versions of libraries, the devices with their memory in bytes, and the number formats that work.

    Returns:
        `libraries`: name -> version; `cuda`: the CUDA version that torch was built for, or None; `devices`: the `name`,
        `gpu` (whether it is one), `memory` and `free` of each; `products`: the ProductRates of the first device; `nf4`
        and `int8`: None if products with weights in that format work on the first device, otherwise the reason.
    """
    return {
        "libraries": {name: version(name) for name in _LIBRARIES},
        "cuda": torch.version.cuda,
        "devices": [_gpu(number) for number in range(torch.cuda.device_count())] or [_cpu()],
        "products": asdict(time_products()),
        "nf4": _problem(_four_bit),
        "int8": _problem(_eight_bit),
    }


def _gpu(number: int) -> dict[str, Any]:
    about = torch.cuda.get_device_properties(number)
    free, total = torch.cuda.mem_get_info(number)
    name = f"{about.name}, compute capability {about.major}.{about.minor}"
    return {"name": name, "gpu": True, "memory": total, "free": free}


def _cpu() -> dict[str, Any]:
    flags = torch.backends.cpu.get_cpu_capability()
    memory = memory_for_process()
    return {"name": f"{processor()}, {flags}", "gpu": False, "memory": memory, "free": memory}


def _problem(attempt: Any) -> str | None:
    try:
        attempt("cuda" if torch.cuda.is_available() else "cpu")
    except Exception as error:  # a library without its kernels raises anything; that is the answer here
        return f"{type(error).__name__}: {error}"
    return None


def _four_bit(device: str) -> None:
    from bitsandbytes.nn import Linear4bit

    _use(Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16), device)


def _eight_bit(device: str) -> None:
    from bitsandbytes.nn import Linear8bitLt

    _use(Linear8bitLt(64, 64, bias=False, has_fp16_weights=False), device)


def _use(layer: torch.nn.Module, device: str) -> None:
    found = layer.to(device)(torch.ones(2, 64, dtype=torch.bfloat16, device=device))
    if not torch.isfinite(found).all():
        raise ValueError("the product is infinite or not a number")


if __name__ == "__main__":
    json.dump(inspect(), sys.stdout)
