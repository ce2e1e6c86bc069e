"""A pinned wheel is fetched with pip from the index that the user configured, or the error says why not."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from package_index import add_wheel, serving_index

from ft_dagster.base.wheel import WheelError, fetch_wheel
from ft_dagster.store.hashing import file_digest

PASSWORD, TOKEN = "index-password-of-the-tests", "hf_thisIsTheSecretOfTheTests"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """Put a wheel that depends on a nonexistent package into an index."""
    return add_wheel(tmp_path / "index", "llm_tiny", "1", {"llm_tiny/tiny.gguf": b"GGUF"}, needs="llama-nowhere")


@pytest.fixture
def index(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve the index that pip's configuration names, with a password; no other index is used."""
    with serving_index(tmp_path / "index") as address:
        for name in [name for name in os.environ if name.startswith("PIP_")]:
            monkeypatch.delenv(name)
        config = tmp_path / "pip.conf"
        config.write_text(f"[global]\nindex-url = http://reader:{PASSWORD}@{address}\nretries = 0\n")
        monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
        monkeypatch.setenv("HUGGINGFACE_TOKEN", TOKEN)
        yield address


def without_secrets(error: pytest.ExceptionInfo[WheelError]) -> str:
    said = str(error.value)
    assert PASSWORD not in said and TOKEN not in said
    return said


def test_a_wheel_is_fetched_from_the_users_index_without_what_it_depends_on(
    index: str, wheel: Path, tmp_path: Path
) -> None:
    fetched = fetch_wheel("llm-tiny==1", file_digest(wheel), tmp_path / "cache" / "new")
    assert fetched.parent == tmp_path / "cache" / "new"
    assert fetched.read_bytes() == wheel.read_bytes()


def test_pip_is_given_no_secret_of_ours(
    index: str, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nenv > "{tmp_path}/given"\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    fetch_wheel("llm-tiny==1", file_digest(wheel), tmp_path / "cache")
    given = (tmp_path / "given").read_text()
    assert "PIP_CONFIG_FILE" in given and TOKEN not in given


def test_bytes_other_than_the_pinned_ones_are_refused(index: str, wheel: Path, tmp_path: Path) -> None:
    pinned = file_digest(wheel)
    add_wheel(tmp_path / "index", "llm_tiny", "1", {"llm_tiny/tiny.gguf": b"GGUg"})
    with pytest.raises(WheelError) as error:
        fetch_wheel("llm-tiny==1", pinned, tmp_path / "cache")
    assert without_secrets(error) == (
        f"The llm-tiny==1 that pip's index gives is not the pinned wheel (SHA-256 {pinned}), so that it is not used. "
        "Take it from another index: PIP_INDEX_URL, `pip config list`."
    )
    assert not list((tmp_path / "cache").glob("*.whl"))


def test_a_version_missing_from_the_index_is_reported_in_pips_own_words(
    index: str, wheel: Path, tmp_path: Path
) -> None:
    with pytest.raises(WheelError) as error:
        fetch_wheel("llm-tiny==2", file_digest(wheel), tmp_path / "cache")
    said = without_secrets(error)
    assert said.startswith("pip cannot fetch llm-tiny==2:\n") and "(from versions: 1)" in said
    assert said.endswith("or install it from a file that you bring here: `pip install --no-deps FILE`.")


def test_without_a_network_the_connection_is_named(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": f"http://reader:{PASSWORD}@127.0.0.1:9/simple",  # an address where nothing listens
        "PIP_RETRIES": "1",
        "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(WheelError, match=r"(?s)Connection refused.*Check the connection and pip's index") as error:
        fetch_wheel("llm-tiny==1", file_digest(wheel), tmp_path / "cache")
    without_secrets(error)


def test_a_python_without_pip_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(WheelError, match=r"has no pip .* -m ensurepip`, .*`uv pip install --no-deps llm-tiny==1`\."):
        fetch_wheel("llm-tiny==1", "0" * 64, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
