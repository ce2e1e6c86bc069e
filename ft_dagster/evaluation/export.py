"""`python -m ft_dagster.evaluation.export REQUEST.json`: merge an adapter and its base. Exit codes: 0, or 1."""

import logging
from pathlib import Path

from ft_dagster.evaluation.request import ExportRequest
from ft_dagster.runtime.allocator import keep_freed_memory, spin_briefly
from ft_dagster.runtime.child import TRAINING_MAY_USE_IT, exit_code, run_child
from ft_dagster.runtime.quick_start import compile_nothing, import_quickly


def main(request_path: Path) -> int:
    """Merge, and return the exit code."""
    logging.getLogger().setLevel(logging.WARNING)

    def export() -> int:
        spin_briefly()
        keep_freed_memory()
        request = ExportRequest.read(request_path)
        compile_nothing(request.resolved_recipe())
        import_quickly("ft_dagster.evaluation.merge")
        from ft_dagster.evaluation.merge import merge

        merge(request)
        return 0

    return exit_code(export, request_path.parent, advice=TRAINING_MAY_USE_IT)


if __name__ == "__main__":
    run_child("ft_dagster.evaluation.export", main)
