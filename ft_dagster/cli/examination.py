"""What this machine can run, what the recipe needs, and what prevents its training here."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.request import urlopen

import dagster as dg

from ft_dagster.base.model_folder import BaseModelError, model_config
from ft_dagster.base.prepare import local_base
from ft_dagster.config.recipe import Recipe
from ft_dagster.config.recipe_file import RecipeError, load_recipe
from ft_dagster.config.redaction import child_environment
from ft_dagster.config.settings import Settings, SettingsError
from ft_dagster.defs.executors.choice import executor_for
from ft_dagster.defs.executors.pods import load_pods
from ft_dagster.defs.instance import has_instance, instance_to_read
from ft_dagster.defs.workspace import GPU_POOL
from ft_dagster.errors import UserError
from ft_dagster.runtime.disk import can_write, free_bytes
from ft_dagster.runtime.lease import CPU, visible_devices
from ft_dagster.runtime.number_format import ProductRates, slowness
from ft_dagster.store import formats
from ft_dagster.store.local import StoreError
from ft_dagster.store.shared import open_store
from ft_dagster.training.sizing.fitting import fit
from ft_dagster.training.sizing.shape import UnknownModelError

_PATIENCE_SECONDS = 300
_ANSWER_SECONDS = 5
_LITTLE_DISK = 5 * 2**30
"""Bytes of free disk space below which to warn. The converted default base takes 0.5 GB, a 7B base 15 GB."""


Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Diagnosis:
    """The result of one examination."""

    subject: str
    status: Status
    """A problem prevents training the recipe here."""
    text: str


def examine(settings: Settings, machine: dict[str, Any] | None = None) -> Iterator[Diagnosis]:
    """Examine one subject after another, without creating, downloading or changing anything.

    Args:
        settings: the settings of a workspace.
        machine: the output of model/inspection.py, which is run by default.
    """
    machine = machine or _inspect()
    yield from _devices(machine, settings)
    yield from _numbers(machine)
    try:
        recipe = load_recipe(settings.recipe, settings.workspace)
    except RecipeError as error:
        yield Diagnosis("recipe", "problem", str(error))
    else:
        if settings.executor == "local":
            yield _recipe(recipe, machine)
            yield from _slowness(recipe, machine)
            yield _memory(recipe, settings, machine)
        else:
            yield Diagnosis(
                "recipe", "ok", f"{recipe.name}; its steps run on other machines, which must meet its needs"
            )
        yield _base(recipe, settings)
    yield _token(settings)
    yield from _disks(settings)
    yield _store(settings)
    yield _pool(settings)
    yield _executor(settings)


def _inspect() -> dict[str, Any]:
    command = [sys.executable, "-m", "ft_dagster.model.inspection"]
    try:
        done = subprocess.run(
            command, env=child_environment(), capture_output=True, text=True, timeout=_PATIENCE_SECONDS, check=True
        )
        return json.loads(done.stdout)
    except (subprocess.SubprocessError, ValueError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return {"failed": said[-1] if said else repr(error)}


def _devices(machine: dict[str, Any], settings: Settings) -> Iterator[Diagnosis]:
    if "failed" in machine:
        yield Diagnosis("torch", "problem", f"It cannot be used: {machine['failed']}. Install it again.")
        return
    libraries = ", ".join(f"{name} {version}" for name, version in machine["libraries"].items())
    build = f"for CUDA {machine['cuda']}" if machine["cuda"] else "for CPUs"
    yield Diagnosis("libraries", "ok", f"{libraries}; torch is built {build}")
    for device in machine["devices"]:
        size = (
            f"{device['free'] / 2**30:.1f} of {device['memory'] / 2**30:.1f} GiB free"
            if device["gpu"]
            else (f"{device['free'] / 2**30:.1f} GiB for a process")
        )
        threads = "" if device["gpu"] or not settings.threads else f", FT_THREADS={settings.threads}"
        yield Diagnosis("device", "ok", f"{device['name']}; {size}{threads}")
    driver = [one.name for one in visible_devices() if one != CPU]
    seen = sum(device["gpu"] for device in machine["devices"])
    if len(driver) != seen:
        yield Diagnosis(
            "GPU driver",
            "warning",
            f"nvidia-smi lists {len(driver)} GPUs, torch sees {seen}. Install a build of torch for CUDA in the virtual "
            "environment (docs/gpus.md), or fix the driver.",
        )


def _numbers(machine: dict[str, Any]) -> Iterator[Diagnosis]:
    if "failed" in machine:
        return
    rates = ProductRates(**machine["products"])
    speeds = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in rates.rates.items())
    where = rates.device if rates.on_gpu else "core"
    yield Diagnosis("number format", "ok", f"{rates.best} is used for base.dtype: auto; GFLOP/s of a {where}: {speeds}")
    for kind in ("nf4", "int8"):
        problem = machine[kind]
        yield Diagnosis(f"{kind} weights", "warning" if problem else "ok", problem or "yes")


def _recipe(recipe: Recipe, machine: dict[str, Any]) -> Diagnosis:
    training = recipe.training
    gpus = sum(device["gpu"] for device in machine.get("devices", []))
    said = f"{recipe.name} ({recipe.base.model}, {recipe.base.quantization}, {recipe.compute_dtype})"
    if training.processes > 1:
        said += f", {training.processes} processes, {training.strategy}"
    if gpus and training.processes > gpus:
        return Diagnosis("recipe", "problem", f"{said}: it needs {training.processes} GPUs, and there are {gpus}")
    if training.strategy == "fsdp" and not gpus:
        return Diagnosis("recipe", "problem", f"{said}: fsdp needs GPUs; set ddp")
    if recipe.compute_dtype == "float16" and not gpus:
        return Diagnosis("recipe", "problem", f"{said}: float16 needs a GPU; set auto")
    if recipe.base.quantization != "none" and machine.get(recipe.base.quantization):
        return Diagnosis("recipe", "problem", f"{said}: {recipe.base.quantization} weights do not work here")
    return Diagnosis("recipe", "ok", said)


def _slowness(recipe: Recipe, machine: dict[str, Any]) -> Iterator[Diagnosis]:
    if "failed" not in machine and (said := slowness(recipe, ProductRates(**machine["products"]))):
        yield Diagnosis("speed", "warning", said)


def _base(recipe: Recipe, settings: Settings) -> Diagnosis:
    try:
        base = local_base(recipe.base, settings.cache)
    except BaseModelError as error:
        return Diagnosis("base model", "problem", str(error))
    if base is not None:
        return Diagnosis("base model", "ok", f"{base.name} is in {base.folder}")
    how = "fetches and converts" if recipe.base.source == "embedded" else "downloads"
    return Diagnosis("base model", "ok", f"{recipe.base.model} is not on this machine yet; the first run {how} it")


def _memory(recipe: Recipe, settings: Settings, machine: dict[str, Any]) -> Diagnosis:
    devices = machine.get("devices", [])
    base = None if not devices else _known_base(recipe, settings)
    if base is None:
        return Diagnosis("memory", "ok", "`ft-dagster plan` estimates it once the base model is on this machine")
    on_gpu = devices[0]["gpu"]
    recipe = recipe.computing_in(ProductRates(**machine["products"]).best)
    available = min(device["free"] for device in devices) // (1 if on_gpu else recipe.training.processes)
    try:
        found = fit(base, recipe, on_gpu, available)
    except UnknownModelError as error:
        return Diagnosis("memory", "warning", f"No estimate: {error}")
    text = f"each process of training takes about {found.estimate.total / 2**30:.1f} of {available / 2**30:.1f} GiB"
    if not found.advice:
        return Diagnosis("memory", "ok", text)
    return Diagnosis("memory", "problem" if found.is_refused else "warning", f"{text}. {found.advice}")


def _known_base(recipe: Recipe, settings: Settings) -> dict[str, Any] | None:
    try:
        base = local_base(recipe.base, settings.cache)
        return model_config(Path(base.folder)) if base else None
    except BaseModelError:
        return None  # `_base` reports it


def _token(settings: Settings) -> Diagnosis:
    text = "set" if settings.token else "not set; only gated bases and `ft-dagster release push` need it"
    return Diagnosis("HUGGINGFACE_TOKEN", "ok", text)


def _disks(settings: Settings) -> Iterator[Diagnosis]:
    for name, folder in (("workspace", settings.workspace), ("FT_CACHE", settings.cache)):
        free = free_bytes(folder)
        if not can_write(folder):
            yield Diagnosis(f"disk of {name}", "problem", f"{folder} cannot be written to")
        elif free is None:
            yield Diagnosis(f"disk of {name}", "warning", f"the free space in {folder} cannot be read")
        else:
            status: Status = "warning" if free < _LITTLE_DISK else "ok"
            yield Diagnosis(f"disk of {name}", status, f"{free / 2**30:.0f} GiB free in {folder}")


def _store(settings: Settings) -> Diagnosis:
    try:
        formats.require_known(settings.state, formats.STATE)
        store = open_store(settings)
        store.keys("lora_adapter")
    except StoreError as error:
        return Diagnosis("store", "problem", str(error))
    return Diagnosis("store", "ok", f"{store}, format {formats.STORE}")


def _pool(settings: Settings) -> Diagnosis:
    devices = len(visible_devices())
    if not has_instance(settings):
        return Diagnosis("pool gpu", "ok", f"it will have {devices} slot(s) once Dagster has been started here")
    try:
        with instance_to_read(settings) as instance:
            limit = _limit(instance)
    except UserError as error:  # a newer version's history, or no answer from its server
        return Diagnosis("pool gpu", "problem", str(error))
    if limit == devices:
        return Diagnosis("pool gpu", "ok", f"{limit} slot(s) for {devices} device(s)")
    return Diagnosis(
        "pool gpu",
        "warning",
        f"{limit or 'no'} slot(s) for {devices} device(s); `dagster instance concurrency set gpu {devices}` sets them, "
        f"with DAGSTER_HOME={settings.dagster_home.absolute()}",
    )


def _limit(instance: dg.DagsterInstance) -> int | None:
    own = {pool.name: pool.limit for pool in instance.event_log_storage.get_pool_limits()}
    return own.get(GPU_POOL, instance.get_concurrency_config().pool_config.default_pool_limit)


def _executor(settings: Settings) -> Diagnosis:
    try:
        executor_for(settings)
        match settings.executor:
            case "local":
                text = "local: steps run on this machine"
            case "ray":
                asked = f"{settings.ray_address}/api/version"
                with urlopen(asked, timeout=_ANSWER_SECONDS) as answer:  # noqa: S310 - the user's own setting
                    ray = json.load(answer)["ray_version"]
                text = f"ray: steps run on the cluster of {settings.ray_address}, Ray {ray}"
            case "k8s":
                pods = load_pods(settings)
                text = f"k8s: steps run in pods of {pods.image or 'the image of the code server'}"
    except SettingsError as error:
        return Diagnosis("FT_EXECUTOR", "problem", str(error))
    except (OSError, ValueError, KeyError) as error:
        return Diagnosis("FT_EXECUTOR", "problem", f"ray: the head at {settings.ray_address} does not answer ({error})")
    return Diagnosis("FT_EXECUTOR", "ok", text)
