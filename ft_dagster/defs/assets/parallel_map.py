"""Parallel work on many groups of chapters, spread over the available machines."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from ft_dagster.config.settings import Settings
from ft_dagster.corpus.shards import Each

_TASKS_PER_CPU = 4
"""Enough that the last tasks do not keep the others waiting for long, and few enough that each is worth starting."""
_FEW = 8
"""Fewer groups than this are written sooner than Ray can start a process elsewhere."""


def mapper_for(settings: Settings) -> Each:
    """Return what applies a function to each group: `map` on one machine, or tasks on a Ray cluster."""
    return _on_ray if settings.executor == "ray" else map


def _on_ray(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """Return the results in the order of the items. Ray runs a task again elsewhere if its host is lost."""
    todo = list(items)
    if len(todo) < _FEW:
        return list(map(function, todo))
    import ray

    ray.init(address="auto", ignore_reinit_error=True, log_to_driver=False)
    try:
        cpus = int(ray.cluster_resources().get("CPU", 1))
        shared = ray.put(function)
        task = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(_apply)
        size = math.ceil(len(todo) / (cpus * _TASKS_PER_CPU))
        results = ray.get([task.remote(shared, todo[first : first + size]) for first in range(0, len(todo), size)])
        return [result for batch in results for result in batch]
    finally:
        ray.shutdown()


def _apply(function: Callable[[Any], Any], batch: Iterable[Any]) -> list[Any]:
    return [function(item) for item in batch]
