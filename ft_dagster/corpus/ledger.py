"""The account of bytes: each byte of each report file is text that is used, or left out for a reason."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


class LedgerError(Exception):
    """Bytes do not add up: a fault of the program, never of the reports."""


@dataclass
class FileLedger:
    """One file's account."""

    path: str
    size: int
    """Bytes of the file."""
    used: int = 0
    """Bytes that are titles and text of sections."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason -> bytes."""
    problem: str | None = None
    """Why the file could not be read, if it could not."""

    def move(self, size: int, reason: str) -> None:
        """Turn used bytes into left-out bytes: a section that another one replaces."""
        self.used -= size
        self.left_out[reason] += size

    def check(self) -> None:
        """Raise LedgerError unless every byte is accounted for, once."""
        counted = self.used + sum(self.left_out.values())
        if counted != self.size or self.used < 0 or any(count < 0 for count in self.left_out.values()):
            raise LedgerError(f"{self.path}: {self.size} bytes, but {counted} are accounted for: {self}")

    def row(self) -> dict[str, Any]:
        """As plain JSON."""
        row = {
            "path": self.path,
            "size": self.size,
            "used": self.used,
            "left_out": dict(sorted(self.left_out.items())),
        }
        return row | ({"problem": self.problem} if self.problem else {})

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "FileLedger":
        return cls(row["path"], row["size"], row["used"], Counter(row["left_out"]), row.get("problem"))
