"""The processes in which assets train and measure."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path

import dagster as dg

from ft_dagster.base.model_folder import PreparedBase
from ft_dagster.base.prepare import prepare_base
from ft_dagster.config.recipe import Recipe
from ft_dagster.config.settings import Settings
from ft_dagster.defs.automation.cost import training_cost
from ft_dagster.defs.runs.child_process import ChildProcess
from ft_dagster.defs.workspace import Workspace
from ft_dagster.evaluation.request import EvaluationRequest
from ft_dagster.runtime.number_format import resolved_here
from ft_dagster.store.local import Artifact
from ft_dagster.training.layout import with_layout
from ft_dagster.training.request import LayoutRequest, TrainingRequest
from ft_dagster.training.sizing.steps import few_steps_advice


def base_for_training(
    context: dg.AssetExecutionContext, workspace: Workspace, child_process: ChildProcess, recipe: Recipe
) -> Generator[dg.AssetObservation, None, PreparedBase]:
    """Prepare the base model of a recipe, and return it with the layout of its rows, which may have to be tried."""
    settings = workspace.settings
    base = prepare_base(recipe.base, settings.cache, token=settings.token)

    def try_layout(request: LayoutRequest, path: Path) -> Iterator[dg.AssetObservation]:
        context.log.info("Trying whether pieces of text that are packed into one row see each other in this base model")
        log = settings.logs / f"layout-{Path(request.output).stem[:12]}.log"
        try:
            yield from child_process.run(context, "ft_dagster.training.try_layout", request.write(path), log)
        finally:
            path.unlink(missing_ok=True)

    base = yield from with_layout(base, resolved_here(recipe, settings), settings, try_layout)
    if base.layout != "packed":
        context.log.info("Each piece of text gets a row of its own: in this base model, packed pieces see each other.")
    return base


def training_process(
    context: dg.AssetExecutionContext,
    workspace: Workspace,
    child_process: ChildProcess,
    dataset: Artifact,
    recipe: Recipe,
) -> Callable[[TrainingRequest], Iterator[dg.AssetObservation]]:
    """Return a function that carries out a training request in a process, and yields what the process reports."""
    settings, store = workspace.settings, workspace.store

    def train(request: TrainingRequest) -> Iterator[dg.AssetObservation]:
        on_hosts = settings.executor == "ray" and recipe.training.processes > 1  # then other hosts compute
        seconds = None if on_hosts else _say_cost(context, recipe, settings, dataset)
        asked = replace(request, run=context.run.run_id, expected_seconds=seconds)
        path = asked.write(Path(request.attempt) / "request.json")
        module = "ft_dagster.training.on_ray" if on_hosts else "ft_dagster.training"
        log = settings.logs / f"{request.key[:12]}.log"
        bucket = store.url is not None  # training copies checkpoints to it
        yield from child_process.run(context, module, path, log, bucket=bucket)

    return train


def evaluation_process(
    context: dg.AssetExecutionContext, settings: Settings, child_process: ChildProcess
) -> Callable[[EvaluationRequest, str], Iterator[dg.AssetObservation]]:
    """Return a function that carries out a request to measure in a process; its second argument names the log."""

    def measure(request: EvaluationRequest, key: str) -> Iterator[dg.AssetObservation]:
        path = request.write(Path(request.output) / "request.json")
        log = settings.logs / f"evaluation-{key[:12]}.log"
        yield from child_process.run(context, "ft_dagster.evaluation", path, log)
        path.unlink()

    return measure


def _say_cost(context: dg.AssetExecutionContext, recipe: Recipe, settings: Settings, dataset: Artifact) -> float | None:
    """Log beforehand what training will take where the step runs. Return the estimated seconds, if they are known."""
    tokens = dataset.about["splits"]["train"]["tokens"] * recipe.training.epochs
    here = settings.model_copy(update={"executor": "local"})  # the executor has already placed the step here
    cost = training_cost(here, recipe, tokens)
    if cost.slow:
        context.log.warning(cost.slow)
    if advice := few_steps_advice(dataset.about["splits"]["train"]["rows"], recipe):
        context.log.warning(advice)
    if cost.seconds:
        context.log.info(f"Training takes about {cost.seconds / 60:.1f} min in {cost.number_format} on this machine.")
    return cost.seconds
