"""`ft-dagster generate` and `ft-dagster chat`: the models answer, in a process of their own with this terminal."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ft_dagster.base import SECRETS
from ft_dagster.cli.common import Json, errors_said
from ft_dagster.evaluation.request import TalkRequest
from ft_dagster.release.released import adapter_folder
from ft_dagster.settings import load_settings
from ft_dagster.training.manifest import made_on, read_manifest

Adapter = Annotated[str, typer.Option(help="Key of an adapter, or its beginning. Default: the released one.")]
Tokens = Annotated[int, typer.Option("--tokens", min=1, help="Tokens to write, at most.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0: always the most probable token; higher: more varied.")]
Seed = Annotated[int | None, typer.Option(help="For the same varied text again.")]


def generate(
    prompt: Annotated[str, typer.Argument(help="A text to go on with, or with --chat a message to answer.")],
    adapter: Adapter = "",
    as_chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a message, not the beginning of a text.")
    ] = False,
    tokens: Tokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Let the base and the adapter write after the same prompt, side by side.

    Exit codes: 0 done; 1 nothing is released, or the models cannot be loaded; 130 interrupted.
    """
    _talk(
        adapter, prompt=prompt, as_chat=as_chat, as_json=as_json, new_tokens=tokens, temperature=temperature, seed=seed
    )


def chat(adapter: Adapter = "", tokens: Tokens = 256, temperature: Temperature = 0.0, seed: Seed = None) -> None:
    """Hold a conversation with the adapter; /help says what else can be typed. Ctrl-D ends it."""
    _talk(adapter, prompt=None, new_tokens=tokens, temperature=temperature, seed=seed)


def _talk(beginning: str, **options: Any) -> None:
    with errors_said(Console(stderr=True)):
        settings = load_settings()
        folder = adapter_folder(settings, beginning)
        recipe, base = made_on(read_manifest(folder), settings)
        request = TalkRequest(
            base.to_json(), recipe.model_dump(mode="json"), str(folder), str(settings.offload), **options
        )
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "request.json"
            path.write_text(json.dumps(asdict(request)), "utf-8")
            environment = {name: value for name, value in os.environ.items() if name not in SECRETS}
            command = [sys.executable, "-m", "ft_dagster.evaluation.terminal", str(path)]
            done = subprocess.run(command, env=environment, check=False)
    raise typer.Exit(done.returncode)
