"""`python serve_block.py < BLOCK`: run commands that start the UI, until it answers; then end it as Ctrl-C does."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress

import psutil
from dagster_dev import inheriting, wait_until
from dagster_ui import answers

MARK = "UI_ON_PORT"
PORT = "DAGSTER_WEBSERVER_PORT"
"""The web server's own variable: `make dev` names no port."""


def serve(commands: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", commands],
        env=os.environ | {PORT: port, MARK: port},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        wait_until(
            lambda: process.poll() is not None or answers(f"http://127.0.0.1:{port}"), "the UI answers", seconds=120
        )
        assert process.poll() is None, "the UI has ended by itself"
    finally:
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGINT)
            process.wait(60)
        while left := inheriting(MARK, port):
            for one in left:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            psutil.wait_procs(left, timeout=10)


if __name__ == "__main__":
    serve(sys.stdin.read())
