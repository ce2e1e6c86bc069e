"""Results of the GPU benchmark, saved as JSON lines as soon as they are known, and tables of them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Result:
    """The facts that one part measured for one name."""

    part: str
    name: str
    facts: dict[str, Any] = field(default_factory=dict)


class Results:
    """A file of results that parts append to."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def clear(self) -> None:
        self._path.unlink(missing_ok=True)

    def add(self, part: str, name: str, **facts: Any) -> None:
        with self._path.open("a") as file:
            print(json.dumps(asdict(Result(part, name, facts))), file=file, flush=True)

    @contextmanager
    def adding_failures(self, part: str, name: str) -> Iterator[None]:
        """Add an error in the block as a result, and continue, for example if kernels are missing or memory is full."""
        try:
            yield
        except Exception as error:  # libraries raise errors of all kinds
            reason = str(error).strip().partition("\n")[0][:150]
            self.add(part, name, not_run=f"{type(error).__name__}: {reason}")

    def read(self) -> list[Result]:
        return [Result(**json.loads(line)) for line in self._path.read_text("utf-8").splitlines()]


def is_right(result: Result) -> bool:
    """Whether a result is right: within its tolerance, and not from a part that failed or took too long."""
    return result.facts.get("right", True) and result.facts.get("ended", "done") == "done"


def as_tables(results: list[Result]) -> str:
    """Return Markdown with a table for each part, which has a column for each fact."""
    tables = []
    for part, group in groupby(results, key=lambda result: result.part):
        rows = list(group)
        columns = list(dict.fromkeys(name for row in rows for name in row.facts))
        lines = [[part, *columns], ["---", *["---:"] * len(columns)]]
        lines += [[row.name, *(_shown(row.facts.get(column, "")) for column in columns)] for row in rows]
        tables.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(tables)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**NO**"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "/")
