"""The decorator that the assets of all stages share."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import dagster as dg

from ft_dagster.config.redaction import keeping_secrets
from ft_dagster.defs.stages import Stage
from ft_dagster.defs.workspace import GROUP, OWNERS


def stage_asset(stage: Stage, **options: Any) -> Callable[[Callable[..., Any]], dg.AssetsDefinition]:
    """Return a `dg.asset` decorator for the function of a stage, which must have the stage's name.

    Secrets are removed from its errors, because Dagster stores these. The UI links to the source of the function.

    Args:
        stage: provides the parents and the code version.
        options: further options of `dg.asset`.
    """

    def define(body: Callable[..., Any]) -> dg.AssetsDefinition:
        decorate = dg.asset(
            deps=stage.parents,
            code_version=stage.code_version,
            group_name=GROUP,
            owners=OWNERS,
            metadata=_code_of(body),
            **options,
        )
        return decorate(keeping_secrets(body))

    return define


def _code_of(body: Callable[..., Any]) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)  # only the link in the UI depends on it
        place = dg.LocalFileCodeReference(file_path=inspect.getfile(body), line_number=inspect.getsourcelines(body)[1])
        return {"dagster/code_references": dg.CodeReferencesMetadataValue(code_references=[place])}
