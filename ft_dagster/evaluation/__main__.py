"""`python -m ft_dagster.evaluation REQUEST.json`: measure adapters against their base."""

import sys
from pathlib import Path

from ft_dagster.evaluation.request import EvaluationRequest
from ft_dagster.training.allocator import keep_freed_memory, wait_without_spinning

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m ft_dagster.evaluation REQUEST.json")
    wait_without_spinning()
    keep_freed_memory()
    from ft_dagster.evaluation.evaluate import evaluate

    evaluate(EvaluationRequest.read(Path(sys.argv[1])))
