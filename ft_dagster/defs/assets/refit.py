"""Refitting: after an adapter passed the gate, it is trained once more on all text, and that one is released."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import dagster as dg

from ft_dagster.base.model_folder import chat_template
from ft_dagster.config.recipe import Recipe
from ft_dagster.dataset.refit import dataset_for_refit
from ft_dagster.defs.assets.processes import base_for_training, evaluation_process, training_process
from ft_dagster.defs.runs.child_process import ChildProcess
from ft_dagster.defs.stages import LORA_ADAPTER, TOKENIZED_DATASET, input_artifact
from ft_dagster.defs.workspace import Workspace
from ft_dagster.evaluation.eval_sets import load_eval_sets
from ft_dagster.evaluation.find_or_evaluate import Asked, InUse, find_or_check_refit
from ft_dagster.model.manifest import stored_manifest
from ft_dagster.runtime.number_format import resolved_here
from ft_dagster.store.local import Artifact
from ft_dagster.training.find_or_train import Wanted, find_or_train, why_unusable
from ft_dagster.training.sizing.steps import optimizer_steps


def refit_of(
    context: dg.AssetExecutionContext,
    workspace: Workspace,
    child_process: ChildProcess,
    measured: Artifact,
) -> Generator[Any, None, tuple[Artifact | None, str]]:
    """Train an adapter on all text with the recipe of a measured one, and check what it forgot and recites.

    Args:
        context: the context of the step that releases.
        workspace: the workspace.
        child_process: starts the training and the check.
        measured: the adapter that passed the gate.

    Yields:
        What the processes report.

    Returns:
        The refit, or None if it may not be released; and what became of it, for the history of releases.

    Raises:
        Failure: the training or the check failed. The next run goes on from the last checkpoint.
    """
    settings, store = workspace.settings, workspace.store
    if settings.executor == "ray" and workspace.recipe.training.processes > 1:
        return None, "it is not refitted: on Ray, release.refit needs training.processes: 1"
    measured_on = input_artifact(context, TOKENIZED_DATASET, store)
    dataset = dataset_for_refit(measured_on)
    recipe = recipe_for_refit(workspace.recipe, measured, measured_on)
    base = yield from base_for_training(context, workspace, child_process, recipe)
    started_from = stored_manifest(measured).started_from
    start = store.get(LORA_ADAPTER.name, started_from).path if started_from else None
    context.log.info(f"Adapter {measured.key[:12]} passed the gate. It is trained again on all text, for release.")
    train = training_process(context, workspace, child_process, dataset, recipe)
    refit, origin = yield from find_or_train(Wanted(dataset, base, recipe, start, measured.key), settings, train)
    if origin != "trained":
        context.log.info(f"The refit {refit.key[:12]} was {origin}; it is reused.")
    refit.verify()
    if refit.key in workspace.releases.withdrawn():
        return None, f"a person took its refit {refit.key[:12]} out of use"
    if problem := why_unusable(refit.about):
        return None, f"the refit on all text is not released: {problem}"
    eval_sets = load_eval_sets(recipe.evaluation, settings.workspace, bool(chat_template(Path(base.folder))))
    asked = Asked(refit, dataset, base, recipe, resolved_here(recipe, settings), eval_sets, InUse(None))
    measure = evaluation_process(context, settings, child_process)
    checked = yield from find_or_check_refit(asked, settings, measure)
    verdict = checked.about["verdict"]
    if verdict["decision"] != "release":
        context.log.warning(verdict["reason"])
    return refit if verdict["decision"] == "release" else None, verdict["reason"]


def recipe_for_refit(recipe: Recipe, measured: Artifact, dataset: Artifact) -> Recipe:
    """Return the recipe of a refit. Nothing is held out from it, so it is trained for as long as the weights that were
    kept of the measured adapter, if that was decided by measurements during training."""
    training = recipe.training
    if training.evaluate_every is None:
        return recipe
    about = measured.about
    planned = about.get("planned_steps") or optimizer_steps(dataset.about["splits"]["train"]["rows"], recipe)
    epochs = training.epochs * about["kept_step"] / planned
    changed = {"evaluate_every": None, "patience": None, "epochs": epochs}
    return recipe.model_copy(update={"training": training.model_copy(update=changed)})
