"""Train one adapter on several hosts of a Ray cluster: `python -m ft_dagster.training.on_ray REQUEST.json`.

This process runs within a Ray job, starts as many workers as the recipe asks for processes, and waits for them. If a
worker is lost, all of them are restarted, in a new attempt. Exit codes: those of `python -m ft_dagster.training`.
"""

import logging
import math
import os
import sys
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from dagster_pipes import PipesContext, open_dagster_pipes
from ray.train import RunConfig, ScalingConfig, get_context
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch.distributed import is_nccl_available

from ft_dagster.config.settings import load_settings
from ft_dagster.errors import UserError
from ft_dagster.runtime.child import FAILED, LOG_FORMAT, exit_code, run_child
from ft_dagster.runtime.messages import report_to_run
from ft_dagster.training.attempts import attempt_in
from ft_dagster.training.request import RESULT, TrainingRequest

log = logging.getLogger(__name__)
_STARTS = 4
_POLL_SECONDS = 0.5
_START_TIMEOUT_SECONDS = str(10**9)
"""How long workers wait for GPUs: without limit. Ray Train would otherwise request them again every minute, and keep
some of those that it had requested before."""


@ray.remote(num_cpus=0)
class Mailbox:
    """Metrics and errors of the first worker, kept on the host of the process that waits for it."""

    def __init__(self) -> None:
        self._metrics: list[dict[str, Any]] = []
        self._refusal: str | None = None

    def send(self, metrics: dict[str, Any]) -> None:
        self._metrics.append(metrics)

    def refuse(self, reason: str) -> None:
        """Record an error that a restart would not fix; the first one counts."""
        self._refusal = self._refusal or reason

    def take(self) -> list[dict[str, Any]]:
        taken, self._metrics = self._metrics, []
        return taken

    def refusal(self) -> str | None:
        return self._refusal


def work(mailbox: Any, request: TrainingRequest) -> None:
    """Run one of the processes that train; Ray has already connected them with each other."""
    first = get_context().get_world_rank() == 0
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format=LOG_FORMAT)
    from torch import OutOfMemoryError

    from ft_dagster.runtime.allocator import keep_freed_memory
    from ft_dagster.training.train import train

    keep_freed_memory()
    # Ray sets it to a GPU whenever one was requested; ft_dagster detects the device instead.
    os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
    try:
        train(request, mailbox.send.remote)
    except (UserError, OutOfMemoryError) as error:
        ray.get(mailbox.refuse.remote(str(error)))


def main(request_path: Path) -> int:
    """Train with several processes, and return the exit code."""
    return exit_code(lambda: _train(request_path), request_path.parent)


def _train(request_path: Path) -> int:
    request = TrainingRequest.read(request_path)
    attempts = Path(request.attempt).parent
    with ExitStack() as held:
        pipes = held.enter_context(open_dagster_pipes()) if "DAGSTER_PIPES_CONTEXT" in os.environ else None
        os.environ.setdefault(WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, _START_TIMEOUT_SECONDS)
        ray.init(address="auto", logging_level=logging.WARNING)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        mailbox = Mailbox.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
        for _ in range(_STARTS):
            lost = _run(request, mailbox, pipes)
            if reason := ray.get(mailbox.refusal.remote()):
                print(reason, file=sys.stderr)  # noqa: T201
                return FAILED
            if lost is None:
                return 0 if (Path(request.attempt) / RESULT).exists() else FAILED
            log.warning("A worker was lost; all workers are restarted. %s", lost)
            request = replace(request, attempt=str(held.enter_context(attempt_in(attempts))))
            request.write(Path(request.attempt) / "request.json")
    return FAILED


def _run(request: TrainingRequest, mailbox: Any, pipes: PipesContext | None) -> TrainingFailedError | None:
    """Train until the workers finish, and return the error if a worker was lost, otherwise None."""
    settings, processes = load_settings(), request.resolved_recipe().training.processes
    gpus = math.ceil(settings.ray_gpus)
    workers = ScalingConfig(
        num_workers=processes,
        use_gpu=gpus > 0,
        resources_per_worker={"CPU": max(1, (request.threads or 1) // processes)} | ({"GPU": gpus} if gpus else {}),
    )
    trainer = TorchTrainer(
        lambda: work(mailbox, request),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus and is_nccl_available() else "gloo"),
        scaling_config=workers,
        run_config=RunConfig(
            name="ray", storage_path=request.attempt, failure_config=FailureConfig(controller_failure_limit=0)
        ),
    )
    failures: list[TrainingFailedError] = []

    def fit() -> None:
        try:
            trainer.fit()
        except TrainingFailedError as error:
            failures.append(error)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_SECONDS)
        for metrics in ray.get(mailbox.take.remote()):
            if pipes:
                report_to_run(pipes, metrics)
    return failures[0] if failures else None


if __name__ == "__main__":
    run_child("ft_dagster.training.on_ray", main)
