"""Releases by hand, recorded in the release history and in Dagster."""

import getpass
import os
from pathlib import Path
from typing import Any

import dagster as dg

from ft_dagster.defs.stages import LORA_ADAPTER, RELEASED_ADAPTER
from ft_dagster.defs.workspace import Workspace
from ft_dagster.release.released import ReleaseError

PROMOTED, ROLLED_BACK = "promoted by hand", "rolled back"


def override(reason: str, decision: str) -> dict[str, str]:
    """Return the history's entry for a person's decision. Raises ReleaseError if no reason is given."""
    if not reason.strip():
        raise ReleaseError("Say why, in a few words: the history keeps it.")
    return {"decision": decision, "reason": reason.strip(), "by": _user()}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a user id without a name
        return str(os.getuid())


def roll_back(instance: dg.DagsterInstance, workspace: Workspace, beginning: str, reason: str) -> dict[str, Any]:
    """Release an adapter again that was in use before.

    Args:
        instance: the Dagster instance, in which an observation of the asset is recorded.
        workspace: the workspace whose release changes.
        beginning: the beginning of the adapter's key; empty for the adapter in use before the current one.
        reason: the reason, for the history.

    Returns:
        The new entry of the history. If a folder at `fine_tuned_model` was moved, `kept_as` is its new path.

    Raises:
        ReleaseError: there is no such adapter, or no reason is given.
    """
    releases, why = workspace.releases, override(reason, ROLLED_BACK)
    if beginning:
        keys = {entry["adapter"] for entry in releases.history() if entry["adapter"].startswith(beginning)}
        if len(keys) != 1:
            raise ReleaseError(
                f"{len(keys)} of the adapters that were in use have a key that begins with {beginning!r}. "
                "`ft-dagster release list` shows them."
            )
        key = keys.pop()
    else:
        key = releases.before()
    return _recorded(instance, workspace, releases.roll_back(key, why))


def promote(instance: dg.DagsterInstance, workspace: Workspace, beginning: str, reason: str) -> dict[str, Any]:
    """Release an adapter of the store, whatever the gate decided. Arguments and results are as in `roll_back`."""
    why = override(reason, PROMOTED)
    adapter = workspace.store.match(LORA_ADAPTER.name, beginning)
    if adapter.key == workspace.releases.current():
        raise ReleaseError(f"The adapter {adapter.key} is in use already.")
    return _recorded(instance, workspace, workspace.releases.release(adapter, why))


def _recorded(instance: dg.DagsterInstance, workspace: Workspace, aside: Path | None) -> dict[str, Any]:
    """Record the last entry of the history in Dagster, and return it.

    It is recorded as an observation, not a materialization: the asset was not made again from its parents, so its last
    materialization still decides when it is stale.
    """
    entry = workspace.releases.history()[-1]
    metadata = {"adapter": entry["adapter"], **entry["why"]}
    instance.report_runless_asset_event(dg.AssetObservation(RELEASED_ADAPTER.key, metadata=metadata))
    return entry | ({"kept_as": str(aside)} if aside else {})
