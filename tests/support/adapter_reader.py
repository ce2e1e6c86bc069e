"""Reads a released adapter repeatedly, as a server would: every read must find a complete adapter.

Run as `python adapter_reader.py LINK`, it reads until its input is closed and prints how often it read; it exits
with an error at the first incomplete read.
"""

import hashlib
import json
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_PAUSE_SECONDS = 0.05


@dataclass
class Reads:
    """The result of the reads."""

    count: int = 0


@contextmanager
def reading_throughout(link: Path) -> Iterator[Reads]:
    """Read in a separate process during the block; fail if a read was incomplete. `count` is set at the end."""
    reads = Reads()
    command = [sys.executable, str(Path(__file__)), str(link)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            yield reads
        finally:
            said, _ = process.communicate(b"", timeout=30)
    assert process.returncode == 0, said.decode()
    reads.count = int(said)


def read(link: Path) -> None:
    """Read once: follow the link once and compare every byte with the manifest. Raises if the adapter is incomplete."""
    from safetensors.numpy import load

    folder = link.resolve(strict=True)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert {path.name for path in folder.iterdir()} >= {*manifest["files"], "adapter_config.json"}
    for name, expected in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == expected, f"{folder / name} is not what was saved"
        if name == "adapter_config.json":
            assert json.loads(content)["peft_type"] == "LORA"
        if name == "adapter_model.safetensors":
            assert load(content)


def _main(link: Path) -> None:
    count = 0
    while not select.select([sys.stdin], [], [], _PAUSE_SECONDS)[0]:
        read(link)
        count += 1
    print(count)  # noqa: T201


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
