"""`ft-dagster generate`, `chat` and `serve`: text from the models, which run in a process of their own."""

import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ft_dagster.cli.common import Json, errors_said
from ft_dagster.config.redaction import child_environment
from ft_dagster.config.settings import SettingsError, load_settings
from ft_dagster.evaluation.request import TalkRequest
from ft_dagster.model.manifest import made_on, read_manifest
from ft_dagster.release.released import adapter_folder

Adapter = Annotated[str, typer.Option(help="Key of an adapter, or the beginning of it. Default: the released one.")]
Tokens = Annotated[int, typer.Option("--tokens", min=1, help="Maximum number of tokens to write.")]
Temperature = Annotated[
    float, typer.Option(min=0.0, help="0 always takes the most probable token; higher values vary more.")
]
Seed = Annotated[int | None, typer.Option(help="Random seed, to get the same varied text again.")]


def generate(
    prompt: Annotated[str, typer.Argument(help="A text to continue, or with --chat a message to answer.")],
    adapter: Adapter = "",
    as_chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a message, not the beginning of a text.")
    ] = False,
    tokens: Tokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Show how the base and the adapter continue the same prompt, side by side.

    Exit codes: 0 done; 1 nothing is released, or the models cannot be loaded; 130 interrupted.
    """
    _talk(
        adapter, prompt=prompt, as_chat=as_chat, as_json=as_json, new_tokens=tokens, temperature=temperature, seed=seed
    )


def chat(adapter: Adapter = "", tokens: Tokens = 256, temperature: Temperature = 0.0, seed: Seed = None) -> None:
    """Chat with the adapter. /help lists the commands of the conversation; Ctrl-D ends it."""
    _talk(adapter, prompt=None, new_tokens=tokens, temperature=temperature, seed=seed)


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on. There is no log-in, so keep it on this machine.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
) -> None:
    """Serve the released adapter over HTTP, with OpenAI's API. A new release is loaded automatically.

    The model is called `released`. Ctrl-C stops the server once the answers in progress are finished.
    """
    with errors_said(Console(stderr=True)):
        read_manifest(adapter_folder(load_settings(), ""))  # raises at once if something is missing
        if missing := [name for name in ("fastapi", "uvicorn", "openai") if find_spec(name) is None]:
            raise SettingsError(f"{', '.join(missing)} is missing. Run `pip install ft_dagster[serve]`.")
        command = [sys.executable, "-m", "ft_dagster.evaluation.serving", "--host", host, "--port", str(port)]
        os.execv(sys.executable, command)  # noqa: S606 - signals then reach the server itself


def _talk(beginning: str, **options: Any) -> None:
    with errors_said(Console(stderr=True)):
        settings = load_settings()
        folder = adapter_folder(settings, beginning)
        recipe, base = made_on(read_manifest(folder), settings)
        request = TalkRequest(
            base.to_json(), recipe.model_dump(mode="json"), str(folder), str(settings.offload), **options
        )
        with tempfile.TemporaryDirectory() as scratch:
            path = request.write(Path(scratch) / "request.json")
            command = [sys.executable, "-m", "ft_dagster.evaluation.terminal", str(path)]
            done = subprocess.run(command, env=child_environment(), check=False)
    raise typer.Exit(done.returncode)
