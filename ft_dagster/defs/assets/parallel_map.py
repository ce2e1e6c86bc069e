"""Work on many groups of chapters, spread over the machines that there are."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from ft_dagster.config.settings import Settings
from ft_dagster.corpus.shards import Each

_TASKS_A_CPU = 4
"""So many that the last ones do not keep the others waiting for long, and so few that each is worth its start."""
_FEW = 8
"""Groups that are written sooner than Ray has started a process elsewhere."""


def mapper_for(settings: Settings) -> Each:
    """What applies a function to each group: `map` on one machine, tasks on a Ray cluster."""
    return _on_ray if settings.executor == "ray" else map


def _on_ray(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """Results in the order of the items. A task whose host is lost is done again elsewhere: Ray sees to that."""
    todo = list(items)
    if len(todo) < _FEW:
        return list(map(function, todo))
    import ray

    ray.init(address="auto", ignore_reinit_error=True, log_to_driver=False)
    try:
        cpus = int(ray.cluster_resources().get("CPU", 1))
        shared = ray.put(function)
        task = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(_apply)
        size = math.ceil(len(todo) / (cpus * _TASKS_A_CPU))
        results = ray.get([task.remote(shared, todo[first : first + size]) for first in range(0, len(todo), size)])
        return [result for batch in results for result in batch]
    finally:
        ray.shutdown()


def _apply(function: Callable[[Any], Any], batch: Iterable[Any]) -> list[Any]:
    return [function(item) for item in batch]
