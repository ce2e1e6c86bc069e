"""Which settings are secret, who is given them, and how they stay out of what is shown and written."""

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
"""Variables whose values, or the passwords in them, are shown and written nowhere."""
_SHORTEST = 4
"""Characters: a shorter password is not looked for, because it is a part of many words."""
_HIDDEN = "***"

_Body = TypeVar("_Body", bound=Callable[..., Any])


class RedactedError(Exception):
    """Stands for an error whose text held a secret: its kind, and its text without the secret."""


def child_environment(*, bucket: bool = False) -> dict[str, str]:
    """The environment of processes that compute: models are downloaded before they start, MLflow is told after, and
    none of them looks into Dagster's history.

    Args:
        bucket: whether it reads or writes the bucket itself, and needs the keys.
    """
    kept_back = set(SECRETS) - (set(OF_THE_BUCKET) if bucket else set())
    return {name: value for name, value in os.environ.items() if name not in kept_back}


def redacted(text: str) -> str:
    """A text in which no secret of the environment or of the workspace's `.env` can be read, whoever wrote it.

    Servers quote what they were sent: secrets are found as they are, as a URL spells them, and in base64, as HTTP
    sends a password.
    """
    for secret in _forms():
        text = text.replace(secret, _HIDDEN)
    return text


@contextmanager
def secrets_kept() -> Iterator[None]:
    """An error that leaves the block holds no secret, nor do those that it came from.

    Raises:
        RedactedError: in the place of one whose own text holds a secret.
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
    """The same for a function, or a generator, that Dagster calls: it writes errors into its history."""

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
    """Everything that must not be read, the longest first: one may be a part of another."""
    found: set[str] = set()
    for value in _values(os.environ):
        found |= _forms_of(value)
    return sorted((form for form in found if len(form) >= _SHORTEST), key=len, reverse=True)


def _values(environment: Mapping[str, str]) -> Iterator[str]:
    yield from (environment[name] for name in SECRETS if environment.get(name))
    try:
        settings = load_settings()
    except SettingsError:  # then nobody was given what stands in .env
        return
    for secret in (settings.huggingface_token, settings.mlflow_tracking_uri):
        if secret:
            yield secret.get_secret_value()


def _forms_of(value: str) -> set[str]:
    """
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
