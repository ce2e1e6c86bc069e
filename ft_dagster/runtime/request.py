"""What a child process is asked to do: plain data, handed over as a JSON file."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from ft_dagster.store.local import write_atomically


@dataclass(frozen=True)
class Request:
    """Fields of plain data; each kind of child process has a subclass."""

    def write(self, path: Path) -> Path:
        """Write it as JSON where the child process will read it; returns the path."""
        write_atomically(path, json.dumps(asdict(self), indent=1, ensure_ascii=False))
        return path

    @classmethod
    def read(cls, path: Path) -> Self:
        """The request in a file."""
        return cls(**json.loads(path.read_bytes()))
