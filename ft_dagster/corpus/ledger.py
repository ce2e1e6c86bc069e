"""The ledger of bytes: each byte of each report file is either used as text or left out for a reason."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


class LedgerError(Exception):
    """The bytes do not add up. This is a bug in the program, never a fault of the reports."""


@dataclass
class FileLedger:
    """The ledger of one file."""

    path: str
    size: int
    """Size of the file in bytes."""
    used: int = 0
    """Number of bytes that are titles and text of sections."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason -> number of bytes."""
    problem: str | None = None
    """Why the file could not be read; None if it could."""

    def move(self, size: int, reason: str) -> None:
        """Turn used bytes into left-out bytes, for a section that is not used after all."""
        self.used -= size
        self.left_out[reason] += size

    def check(self) -> None:
        """Raise LedgerError unless every byte is accounted for exactly once."""
        counted = self.used + sum(self.left_out.values())
        if counted != self.size or self.used < 0 or any(count < 0 for count in self.left_out.values()):
            raise LedgerError(f"{self.path}: {self.size} bytes, but {counted} are accounted for: {self}")

    def row(self) -> dict[str, Any]:
        """Return the ledger as plain JSON data."""
        row = {
            "path": self.path,
            "size": self.size,
            "used": self.used,
            "left_out": dict(sorted(self.left_out.items())),
        }
        return row | ({"problem": self.problem} if self.problem else {})

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "FileLedger":
        """Return the ledger that `row` converted to JSON data."""
        return cls(row["path"], row["size"], row["used"], Counter(row["left_out"]), row.get("problem"))
