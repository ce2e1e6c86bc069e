"""`python -m ft_dagster.evaluation.serving`: serve the released adapter through OpenAI's API.

Exit codes: 0 ended by a signal, 1 cannot be served, 130 interrupted.

The server is that of `transformers serve`, which loads any model that a request names. Here, it has a single model, the
released adapter of a workspace, and switches to a new release automatically.
"""

import argparse
import asyncio
import logging
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from transformers import GenerationMixin, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import GenerationState

from ft_dagster.config.settings import Settings, load_settings
from ft_dagster.errors import UserError
from ft_dagster.model.adapter import load_released

NAME = "released"
"""Name of the model in requests."""
_POLL_SECONDS = 1.0
"""Seconds between checks for a new release, each of which is one `readlink`."""
log = logging.getLogger("ft_dagster")


@dataclass(frozen=True)
class Served:
    """A release that is loaded into memory."""

    key: str
    model: GenerationMixin
    tokenizer: PreTrainedTokenizerBase
    since: int
    """When it was released, in seconds since 1970."""


class ReleasedModel(ModelManager):
    """A model manager for transformers' handlers whose only model is the released adapter."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(model_timeout=-1)
        self.settings = settings
        self.served = _load(settings)

    async def follow(self) -> None:
        """Switch to each new release once it is loaded; until then, the previous release answers.

        A request that is being answered keeps the model with which it started. The model is switched in the thread in
        which requests start, so that no request starts in between.
        """
        refused = ""
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            key = _released(self.settings).name
            if key in (self.served.key, refused):
                continue
            try:
                self.served = await asyncio.to_thread(_load, self.settings)
                log.info("answering with %s from now on", self.served.key)
            except Exception as error:  # whatever it is, the previous release keeps answering
                refused = key
                log.error(
                    "%s was released, but cannot be loaded; still answering with %s: %s", key, self.served.key, error
                )

    def process_model_name(self, model_id: str) -> str:
        """Return the key of the adapter that answers, which the response contains as its `model`."""
        if model_id not in (NAME, self.served.key):
            raise HTTPException(404, f"There is no model {model_id!r} here. Ask for {NAME!r}.")
        return self.served.key

    def load_model_and_processor(self, model_id_and_revision: str, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Return the model and tokenizer, which are loaded already."""
        return self.served.model, self.served.tokenizer

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """Return the released adapter, under the name that requests use and under its key."""
        return [
            {"id": name, "object": "model", "created": self.served.since, "owned_by": "ft_dagster"}
            for name in (NAME, self.served.key)
        ]

    def shutdown(self) -> None:
        """Do nothing: a request to unload all models keeps the only one."""


def _released(settings: Settings) -> Path:
    return settings.fine_tuned_model.resolve()


def _load(settings: Settings) -> Served:
    folder = _released(settings)
    adapted, tokenizer = load_released(settings, folder)
    model: Any = adapted.get_base_model()  # its layers contain the adapter's weights
    model.generation_config.use_cache = model.config.use_cache = True
    return Served(folder.name, model, tokenizer, int(folder.stat().st_mtime))


async def _openai_error(_: Request, error: HTTPException) -> JSONResponse:
    """Return an error in the form in which OpenAI's clients expect it."""
    return JSONResponse({"error": {"message": error.detail, "code": error.status_code}}, error.status_code)


class ServeError(UserError):
    """The adapter cannot be served at this address; the message says what to do."""


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. It is made before the model is loaded, so that a port in use is reported at once.

    Raises:
        ServeError: the address does not belong to this machine, or the port is in use.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ServeError(
            f"Cannot listen on port {port} of {host} ({error.strerror}). Name another one with --port or --host."
        ) from error


async def serve(settings: Settings, listener: socket.socket) -> None:
    """Answer requests until SIGINT or SIGTERM. Requests that are being answered then are finished first.

    Raises:
        AdapterError, BaseModelError: the released adapter cannot be loaded.
    """
    manager, state = ReleasedModel(settings), GenerationState()
    app = build_server(
        manager,
        ChatCompletionHandler(manager, state),
        completion_handler=CompletionHandler(manager, state),
        response_handler=ResponseHandler(manager, state),
        transcription_handler=TranscriptionHandler(manager, state),
        systemone_handler=SystemOneHandler(manager, state),
        generation_state=state,
    )
    app.exception_handler(HTTPException)(_openai_error)
    following = asyncio.create_task(manager.follow())
    try:
        await uvicorn.Server(uvicorn.Config(app, log_level="info")).serve([listener])
    finally:
        following.cancel()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ft_dagster.evaluation.serving", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        with listen(options.host, options.port) as listener:
            asyncio.run(serve(load_settings(), listener))
    except UserError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:  # uvicorn has shut down cleanly, and passes it on
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
