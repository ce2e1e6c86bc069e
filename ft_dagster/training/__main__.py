"""Make one adapter: `python -m ft_dagster.training REQUEST.json`. Exit codes: 0 made, 1 failed, 130 interrupted.

The process leases the devices that it needs, and trains. If the recipe asks for several processes, it starts them and
waits for them; each of them runs this module, too.
"""

import logging
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from dagster_pipes import PipesContext, open_dagster_pipes  # the protocol alone: it does not import Dagster

from ft_dagster.runtime.allocator import keep_freed_memory, spin_briefly
from ft_dagster.runtime.child import INTERRUPTED, exit_code, run_child
from ft_dagster.runtime.lease import leased
from ft_dagster.runtime.messages import report_to_run
from ft_dagster.runtime.parent import die_with_parent
from ft_dagster.runtime.processes import RENDEZVOUS, leave, run_together
from ft_dagster.runtime.quick_start import compile_nothing, import_quickly
from ft_dagster.training.request import TrainingRequest


def main(request_path: Path) -> int:
    """Train, and return the exit code."""
    if RENDEZVOUS in os.environ:
        die_with_parent()
        first = os.environ["RANK"] == "0"
        if not first:
            logging.getLogger().setLevel(logging.WARNING)
        leave(exit_code(lambda: _train(TrainingRequest.read(request_path), reports=first), request_path.parent))
    return exit_code(lambda: _start(request_path), request_path.parent)


def _start(request_path: Path) -> int:
    """Train in this process, or in several processes if the recipe asks for them."""
    request = TrainingRequest.read(request_path)
    processes = request.resolved_recipe().training.processes
    with leased(Path(request.locks), processes):
        if processes == 1:
            return _train(request, reports=True)
        threads = (request.threads or os.cpu_count() or 1) // processes
        return run_together("ft_dagster.training", request_path, processes, threads)


def _train(request: TrainingRequest, reports: bool) -> int:
    """Train in this process. `reports` says whether it reports to the run; only the first of several processes does."""
    spin_briefly()
    keep_freed_memory()
    compile_nothing(request.resolved_recipe())
    started_by_a_run = reports and "DAGSTER_PIPES_CONTEXT" in os.environ
    with open_dagster_pipes() if started_by_a_run else nullcontext() as pipes:
        import_quickly("ft_dagster.training.train")
        from ft_dagster.model.ranks import joined
        from ft_dagster.training.train import InterruptedTrainingError, train

        def report(metrics: dict[str, Any]) -> None:
            if isinstance(pipes, PipesContext):
                report_to_run(pipes, metrics)

        try:
            with joined():
                train(request, report)
        except InterruptedTrainingError as stopped:
            if reports:
                print(f"Training {stopped}; the next run resumes from there.", file=sys.stderr)  # noqa: T201
            return INTERRUPTED
    return 0


if __name__ == "__main__":
    run_child("ft_dagster.training", main)
