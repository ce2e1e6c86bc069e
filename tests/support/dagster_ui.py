"""Queries a running Dagster UI."""

import json
import urllib.request
from dataclasses import dataclass
from typing import Any

from ft_dagster.defs.runs.state import SENSOR
from ft_dagster.defs.stages import STAGES

_REPOSITORY = '{{repositoryName: "__repository__", repositoryLocationName: "ft_dagster", {key}: "{name}"}}'
_RUNS = "{ runsOrError { ... on Runs { results { runId status tags { key value } } } } }"
_STEPS = """{{ runOrError(runId: "{run}") {{ ... on Run {{ stepStats {{ stepKey status }} }} }} }}"""
_TICKS = """{{ instigationStateOrError(instigationSelector: {selector}) {{
  ... on InstigationState {{ id status ticks(limit: {limit}) {{ timestamp status skipReason runIds }} }} }} }}"""
_ASSET = """{{ assetNodeOrError(assetKey: {{path: ["{name}"]}}) {{ ... on AssetNode {{ staleStatus
  assetMaterializations(limit: 1) {{ runId tags {{ key value }} metadataEntries {{ label
    ... on BoolMetadataEntry {{ boolValue }} ... on TextMetadataEntry {{ text }} }} }} }} }} }}"""
_TERMINATE = 'mutation {{ terminateRun(runId: "{run}") {{ __typename ... on PythonError {{ message }} }} }}'
_LAUNCH = """mutation {{ launchRun(executionParams: {{mode: "default", runConfigData: "{{}}", selector: {{
  repositoryName: "__repository__", repositoryLocationName: "ft_dagster", jobName: "bring_up_to_date",
  assetSelection: [{assets}] }} }}) {{ __typename ... on PythonError {{ message }} }} }}"""
_SLOTS = """{ instance { concurrencyLimit(concurrencyKey: "gpu") { activeSlotCount pendingSteps { runId } } } }"""
_STOP = 'mutation {{ stopSensor(id: "{id}") {{ __typename ... on PythonError {{ message }} }} }}'


@dataclass(frozen=True)
class Run:
    """One run of the instance."""

    id: str
    status: str
    tags: dict[str, str]

    @property
    def reason(self) -> str | None:
        """Why the sensor or the schedule requested it."""
        return self.tags.get("ft_dagster/reason")


@dataclass(frozen=True)
class Tick:
    """One evaluation of the sensor or of the schedule."""

    at: float
    """When it started, in seconds since 1970."""
    status: str
    skipped: str
    """Why it requested no run; empty if it did request one, and while it is under way."""
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Asset:
    """An asset as its page in the UI shows it: its staleness and its last materialization."""

    stale_status: str
    run: str
    data_version: str
    metadata: dict[str, Any]
    """The texts and truth values in it."""


def answers(address: str) -> bool:
    """Return whether the UI answers and has loaded the code location."""
    try:
        return bool(graphql(address, "{ repositoriesOrError { ... on RepositoryConnection { nodes { name } } } }"))
    except OSError:
        return False


def graphql(address: str, query: str) -> Any:
    request = urllib.request.Request(
        f"{address}/graphql", json.dumps({"query": query}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)["data"]


def runs(address: str) -> list[Run]:
    """All runs, oldest first."""
    found = graphql(address, _RUNS)["runsOrError"]["results"]
    return [
        Run(run["runId"], run["status"], {tag["key"]: tag["value"] for tag in run["tags"]}) for run in reversed(found)
    ]


def steps(address: str, run: str) -> dict[str, str]:
    """Return the stages that a run started with their status; checks that are separate steps are left out."""
    stats = graphql(address, _STEPS.format(run=run))["runOrError"]["stepStats"]
    stages = {stage.name for stage in STAGES}
    return {step["stepKey"]: step["status"] for step in stats if step["stepKey"] in stages}


def ticks(address: str, name: str = SENSOR, limit: int = 500) -> list[Tick]:
    """Return the last ticks of the sensor or of the schedule, oldest first."""
    found = graphql(address, _TICKS.format(selector=_REPOSITORY.format(key="name", name=name), limit=limit))
    return [
        Tick(tick["timestamp"], tick["status"], tick["skipReason"] or "", tuple(tick["runIds"]))
        for tick in reversed(found["instigationStateOrError"]["ticks"])
    ]


def asset(address: str, name: str) -> Asset:
    node = graphql(address, _ASSET.format(name=name))["assetNodeOrError"]
    (last,) = node["assetMaterializations"]
    return Asset(
        node["staleStatus"],
        last["runId"],
        next(tag["value"] for tag in last["tags"] if tag["key"] == "dagster/data_version"),
        {entry["label"]: entry.get("boolValue", entry.get("text")) for entry in last["metadataEntries"]},
    )


def is_running(address: str) -> bool:
    """Return whether the sensor is on."""
    found = graphql(address, _TICKS.format(selector=_REPOSITORY.format(key="name", name=SENSOR), limit=1))
    return found["instigationStateOrError"]["status"] == "RUNNING"


def terminate(address: str, run: str) -> None:
    """Cancel a run, as a user does."""
    done = graphql(address, _TERMINATE.format(run=run))["terminateRun"]
    assert done["__typename"] == "TerminateRunSuccess", done


def launch(address: str, *assets: str) -> None:
    """Materialize these assets in one run, as the button in the UI does."""
    chosen = ", ".join(f'{{path: ["{asset}"]}}' for asset in assets)
    done = graphql(address, _LAUNCH.format(assets=chosen))["launchRun"]
    assert done["__typename"] == "LaunchRunSuccess", done


def stop_sensor(address: str) -> None:
    """Turn the sensor off, as the switch in the UI does."""
    found = graphql(address, _TICKS.format(selector=_REPOSITORY.format(key="name", name=SENSOR), limit=1))
    done = graphql(address, _STOP.format(id=found["instigationStateOrError"]["id"]))["stopSensor"]
    assert done["__typename"] == "StopSensorMutationResult", done


def slots_taken(address: str) -> int:
    """Return how many slots of the pool `gpu` are held by steps, and how many steps wait for one."""
    limit = graphql(address, _SLOTS)["instance"]["concurrencyLimit"]
    return int(limit["activeSlotCount"]) + len(limit["pendingSteps"])
