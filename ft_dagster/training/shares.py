"""Divide rows among processes so that together they train on the same batches as a single process."""

from collections.abc import Callable, Iterator, Sized
from typing import Any

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import DataLoader, Sampler

from ft_dagster.model import ranks


class Shares(Sampler[list[int]]):
    """Yields the rows of this process, one list for each forward pass.

    The rows that the processes read in one forward pass are divided in the order of their ranks. In the last pass of an
    epoch, some processes may get fewer rows, or an empty list.
    """

    def __init__(self, rows: int, at_once: int, seed: int) -> None:
        """
        Args:
            rows: the total number of rows.
            at_once: the number of rows of one process in one forward pass.
            seed: the seed of their order, which is the order that accelerate uses in a single process.
        """
        self.rows = rows
        self.at_once = at_once
        self.order = SeedableRandomSampler(range(rows), data_seed=seed)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, each of which has its own order of rows."""
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return -(-self.rows // (self.at_once * ranks.count()))

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.order)
        for start in range(0, self.rows, self.at_once * ranks.count()):
            mine = start + ranks.rank() * self.at_once
            yield order[mine : mine + self.at_once]


class SharesLoader(DataLoader[Any]):
    """Loads the rows of this process."""

    def __init__(self, rows: Sized, shares: Shares, collate: Callable[..., Any]) -> None:
        super().__init__(rows, batch_sampler=shares, collate_fn=collate)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch. The trainer calls this when an epoch starts, and Shares.set_epoch to resume within one."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
