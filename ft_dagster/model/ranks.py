"""The processes that train together: the rank of this one, and the communication between them.

A process that trains alone has rank 0 of 1, and every function here then costs nothing.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from ft_dagster.runtime.processes import RENDEZVOUS


def rank() -> int:
    """Return the rank of this process among all processes, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def local_rank() -> int:
    """Return the rank of this process on its machine, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def count() -> int:
    """Return the number of processes that train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that writes files and reports."""
    return rank() == 0


@contextmanager
def joined() -> Iterator[None]:
    """Join the other processes that torchrun started, within the block.

    Nothing happens for a single process, or if an engine such as Ray has already joined them. The processes find each
    other through a file, and on a CPU communicate over the loopback interface: no port is open to other machines.
    """
    if RENDEZVOUS not in os.environ or distributed.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        init_method=f"file://{Path(os.environ[RENDEZVOUS]).absolute()}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    try:
        yield
    finally:
        distributed.destroy_process_group()


def wait_for_all() -> None:
    """Wait until every process has reached this call."""
    if count() > 1:
        distributed.barrier()


def first_says(value: float) -> float:
    """Return, in every process, the value that the first process passes."""
    if count() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64)
    distributed.broadcast(tensor, 0)
    return tensor.item()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a complete copy on the CPU of a tensor that FSDP may have sharded. All processes must call this."""
    gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return gathered.detach().cpu()


def total(value: int) -> int:
    """Return the sum of a value over the processes."""
    if count() == 1:
        return value
    summed = torch.tensor(value)
    distributed.all_reduce(summed)
    return int(summed.item())
