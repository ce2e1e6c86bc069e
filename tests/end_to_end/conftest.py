"""A real Dagster: web server, daemon and code server."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dagster_ui import answers

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def user_interface(workspace: Path, chapters: list[Path], free_port: int) -> Iterator[str]:
    """`dagster dev` on six chapters, through workspace.yaml, as `make dev` starts it; gives its address."""
    home = subprocess.check_output([sys.executable, "-m", "ft_dagster.defs.instance"], text=True).strip()
    dagster = str(Path(sys.executable).with_name("dagster"))
    command = [dagster, "dev", "-w", "workspace.yaml", "-h", "127.0.0.1", "-p", str(free_port)]
    process = subprocess.Popen(
        command,
        cwd=PROJECT,
        env=os.environ | {"DAGSTER_HOME": home},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    address = f"http://127.0.0.1:{free_port}"
    try:
        until = time.monotonic() + 120
        while not answers(address):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.2)
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
