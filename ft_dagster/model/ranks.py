"""The processes that train together: which one this is, and what they tell each other.

A process that trains alone is the first of one, and every function here then costs nothing.
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
    """Which of the processes this is, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def local_rank() -> int:
    """Which of the processes on this machine this is: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def count() -> int:
    """How many there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this one writes files and reports."""
    return rank() == 0


@contextmanager
def joined() -> Iterator[None]:
    """With the other processes of a training that torchrun started; alone, or where an engine did it, nothing happens.

    They meet in a file, and on a CPU talk through the loopback interface: no port is open to others.
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
    """Until every process has come here."""
    if count() > 1:
        distributed.barrier()


def first_says(value: float) -> float:
    """The value that the first process has, for all."""
    if count() == 1:
        return value
    told = torch.tensor(value, dtype=torch.float64)
    distributed.broadcast(told, 0)
    return told.item()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of which each process may hold a part (FSDP), in the memory of the machine. All have to ask for it."""
    gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return gathered.detach().cpu()


def total(value: int) -> int:
    """The sum over the processes."""
    if count() == 1:
        return value
    summed = torch.tensor(value)
    distributed.all_reduce(summed)
    return int(summed.item())
