"""Starts and stops servers on loopback in tests."""

import os
import subprocess
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from dagster_dev import wait_until
from processes import accept_ctrl_c


@contextmanager
def serving(command: Sequence[str], address: str, log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server during the block, once `address` answers; it is stopped with all processes that it started."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
            cwd=log.parent,
            preexec_fn=accept_ctrl_c,
        )
    try:
        wait_until(lambda: process.poll() is not None or _answers(address), f"{address} answers")
        assert process.poll() is None, log.read_text()
        yield process
    finally:
        family = [process, *(psutil.Process(process.pid).children(recursive=True) if process.poll() is None else [])]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
