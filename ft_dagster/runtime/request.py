"""Requests to child processes: plain data that is passed as a JSON file."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from ft_dagster.store.local import write_atomically


@dataclass(frozen=True)
class Request:
    """A request with fields of plain data. Each kind of child process has a subclass."""

    def write(self, path: Path) -> Path:
        """Write the request as JSON to a path from which the child process reads it, and return the path."""
        write_atomically(path, json.dumps(asdict(self), indent=1, ensure_ascii=False))
        return path

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the request in a file."""
        return cls(**json.loads(path.read_bytes()))
