"""`python -m ft_dagster.evaluation REQUEST.json`: measure adapters against their base. Exit codes: 0 done, 1 failed."""

from pathlib import Path

from ft_dagster.evaluation.request import EvaluationRequest
from ft_dagster.runtime.allocator import keep_freed_memory, spin_briefly
from ft_dagster.runtime.child import exit_code, run_child
from ft_dagster.runtime.lease import leased
from ft_dagster.runtime.quick_start import compile_nothing, import_quickly


def main(request_path: Path) -> int:
    """Measure, and return the exit code."""
    return exit_code(lambda: _measure(EvaluationRequest.read(request_path)), request_path.parent)


def _measure(request: EvaluationRequest) -> int:
    spin_briefly()
    keep_freed_memory()
    with leased(Path(request.locks)):  # before anything looks for GPUs, as bitsandbytes does when it is imported
        compile_nothing(request.resolved_recipe())
        import_quickly("ft_dagster.evaluation.evaluate")
        from ft_dagster.evaluation.evaluate import evaluate

        evaluate(request)
    return 0


if __name__ == "__main__":
    run_child("ft_dagster.evaluation", main)
