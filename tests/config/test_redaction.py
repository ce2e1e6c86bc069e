"""Secrets are removed from every text and error before it is shown."""

import traceback
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest

from ft_dagster.config.redaction import SECRETS, RedactedError, keeping_secrets, redacted, secrets_kept

TOKEN = "hf_canary/0123456789"
PASSWORD = "canary@of:mlflow"
BASIC = b64encode(f"reporter:{PASSWORD}".encode()).decode()


@pytest.fixture(autouse=True)
def only_these(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set one secret in the environment and one in `.env`."""
    for name in SECRETS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HUGGINGFACE_TOKEN", TOKEN)
    (workspace / ".env").write_text("MLFLOW_TRACKING_URI=http://reporter:canary%40of%3Amlflow@127.0.0.1:9\n")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"Bearer {TOKEN} is refused", "Bearer *** is refused"),
        ("/api?token=hf_canary%2F0123456789", "/api?token=***"),
        (f"http://reporter:canary%40of%3Amlflow@host and {PASSWORD}", "http://reporter:***@host and ***"),
        (f"Authorization: Basic {BASIC}", "Authorization: Basic ***"),
        ("nothing to hide from reporter", "nothing to hide from reporter"),
    ],
)
def test_a_secret_is_hidden_however_a_server_quotes_it(text: str, shown: str) -> None:
    assert redacted(text) == shown


def test_an_error_that_quotes_a_secret_is_shown_without_the_secret_and_its_cause() -> None:
    with pytest.raises(RedactedError, match=r"^ValueError: \*\*\* is wrong$") as caught, secrets_kept():
        try:
            raise OSError(f"sent {TOKEN}")
        except OSError as error:
            raise ValueError(f"{TOKEN} is wrong") from error
    assert "hf_canary" not in "".join(traceback.format_exception(caught.value))


def test_an_error_caused_by_one_that_quotes_a_secret_keeps_its_type() -> None:
    with pytest.raises(KeyError) as caught, secrets_kept():
        try:
            raise OSError(f"sent {TOKEN}")
        except OSError as error:
            raise KeyError("a clean one") from error
    assert "hf_canary" not in "".join(traceback.format_exception(caught.value))


def test_an_error_without_a_secret_is_unchanged_with_its_causes() -> None:
    cause = OSError("the disk is full")
    with pytest.raises(ValueError, match="the file") as caught, secrets_kept():
        raise ValueError("the file") from cause
    assert caught.value.__cause__ is cause


def test_a_generator_hides_secrets_until_it_is_exhausted() -> None:
    @keeping_secrets
    def stage() -> Iterator[int]:
        yield 1
        raise ValueError(TOKEN)

    steps = stage()
    assert next(steps) == 1
    with pytest.raises(RedactedError, match=r"\*\*\*"):
        next(steps)


def test_a_password_of_one_letter_is_not_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_POSTGRES_PASSWORD", "a")
    assert redacted("a table of names") == "a table of names"
