"""Which settings are secret, which processes receive them, and how they are kept out of output and files."""

import inspect
import os
import traceback
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

from ft_dagster.config.settings import SettingsError, load_settings

OF_THE_BUCKET = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN")
SECRETS = (
    "HUGGINGFACE_TOKEN",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "DAGSTER_POSTGRES_PASSWORD",
    *OF_THE_BUCKET,
)
"""Variables whose values, or the passwords in them, are never shown or written."""
_SHORTEST = 4
"""Characters. A shorter password is not searched for, because it would be part of many words."""
_HIDDEN = "***"

_Body = TypeVar("_Body", bound=Callable[..., Any])


class RedactedError(Exception):
    """Replaces an error whose text contained a secret: its class name, and its text without the secret."""


def child_environment(*, bucket: bool = False) -> dict[str, str]:
    """Return the environment for processes that compute, without secrets.

    Such a process needs none: models are downloaded before it starts, MLflow is updated after it, and it does not read
    Dagster's history.

    Args:
        bucket: whether the process reads or writes the bucket itself, and needs its keys.
    """
    kept_back = set(SECRETS) - (set(OF_THE_BUCKET) if bucket else set())
    return {name: value for name, value in os.environ.items() if name not in kept_back}


def redacted(text: str) -> str:
    """Return the text without the secrets of the environment and of the workspace's `.env`.

    Servers quote what they were sent, so secrets are found as they are, percent-encoded as in a URL, and in base64, as
    HTTP sends a password.
    """
    for secret in _forms():
        text = text.replace(secret, _HIDDEN)
    return text


@contextmanager
def secrets_kept() -> Iterator[None]:
    """Keep secrets out of an error that leaves the block, and out of its causes.

    Raises:
        RedactedError: replaces an error whose own text contains a secret.
    """
    try:
        yield
        return
    except Exception as error:
        whole = "".join(traceback.format_exception(error))
        if redacted(whole) == whole:
            raise
        safe = error if redacted(str(error)) == str(error) else _without_secret(error)
    safe.__cause__ = safe.__context__ = None
    raise safe from None


def keeping_secrets(body: _Body) -> _Body:
    """Apply `secrets_kept` to a function or generator that Dagster calls: Dagster writes errors into its history."""

    @wraps(body)
    def call(*arguments: Any, **named: Any) -> Any:
        with secrets_kept():
            return body(*arguments, **named)

    @wraps(body)
    def generate(*arguments: Any, **named: Any) -> Any:
        with secrets_kept():
            return (yield from body(*arguments, **named))

    return generate if inspect.isgeneratorfunction(body) else call  # type: ignore[return-value]


def _without_secret(error: Exception) -> RedactedError:
    return RedactedError(f"{type(error).__name__}: {redacted(str(error))}")


def _forms() -> list[str]:
    """Return all spellings of all secrets, the longest first, because one may be part of another."""
    found: set[str] = set()
    for value in _values(os.environ):
        found |= _forms_of(value)
    return sorted((form for form in found if len(form) >= _SHORTEST), key=len, reverse=True)


def _values(environment: Mapping[str, str]) -> Iterator[str]:
    yield from (environment[name] for name in SECRETS if environment.get(name))
    try:
        settings = load_settings()
    except SettingsError:  # the secrets in .env were then given to no process
        return
    for secret in (settings.huggingface_token, settings.mlflow_tracking_uri):
        if secret:
            yield secret.get_secret_value()


def _forms_of(value: str) -> set[str]:
    """Return the spellings under which a secret, or the password in a URL, may appear.

    >>> sorted(_forms_of("p/q4"))
    ['cC9xNA==', 'p%2Fq4', 'p/q4']
    >>> sorted(_forms_of("http://me:p%40ss@host/x"))
    ['bWU6cEBzcw==', 'cEBzcw==', 'p%40ss', 'p@ss']
    """
    if "://" not in value:
        return {value, quote(value), quote(value, safe=""), b64encode(value.encode()).decode()}
    try:
        parts = urlsplit(value)
    except ValueError:
        return {value}
    if not parts.password:
        return set()
    password = unquote(parts.password)
    both = f"{unquote(parts.username or '')}:{password}"
    return {parts.password, *_forms_of(password), b64encode(both.encode()).decode()}
