"""Which rows each of several processes takes, so that together they take what one alone would."""

from collections.abc import Callable, Iterator, Sized
from typing import Any

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import DataLoader, Sampler

from ft_dagster.model import ranks


class Shares(Sampler[list[int]]):
    """This process's rows, a forward pass at a time.

    Of each group of rows that the processes take in one forward pass, the first takes the first rows, and so on. The
    last group of an epoch may leave fewer for some processes, and none for others, who then get an empty list.
    """

    def __init__(self, rows: int, at_once: int, seed: int) -> None:
        """
        Args:
            rows: in all.
            at_once: rows of one process in one forward pass.
            seed: of their order, which is the one that accelerate gives a process that trains alone.
        """
        self.rows = rows
        self.at_once = at_once
        self.order = SeedableRandomSampler(range(rows), data_seed=seed)

    def set_epoch(self, epoch: int) -> None:
        """Rows come in another order in each epoch."""
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return -(-self.rows // (self.at_once * ranks.count()))

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.order)
        for start in range(0, self.rows, self.at_once * ranks.count()):
            mine = start + ranks.rank() * self.at_once
            yield order[mine : mine + self.at_once]


class SharesLoader(DataLoader[Any]):
    """Loads this process's rows."""

    def __init__(self, rows: Sized, shares: Shares, collate: Callable[..., Any]) -> None:
        super().__init__(rows, batch_sampler=shares, collate_fn=collate)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Asked by the trainer when an epoch begins; one that goes on in mid-epoch asks the shares themselves."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
