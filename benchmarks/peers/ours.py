"""ft_dagster's own training process, with its time measured. Option: `training`, the path of its request.

The process is that of `python -m ft_dagster.training`. benchmarks/match.py counts the tokens of its rows.
"""

import sys
from pathlib import Path

from contender import Request, Stopwatch

from ft_dagster.runtime.allocator import spin_briefly
from ft_dagster.training.__main__ import main as train


def main() -> None:
    request = Request.read()
    spin_briefly()  # before torch is imported, as the training process does
    stopwatch = Stopwatch(end_id=-1, patience_seconds=float("inf"))
    if code := train(Path(request.options["training"])):
        sys.exit(code)
    stopwatch.write(request.output)


if __name__ == "__main__":
    main()
