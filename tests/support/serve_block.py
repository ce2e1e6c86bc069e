"""`python serve_block.py < BLOCK`: run commands that start the UI, until it answers; then stop it as Ctrl-C does."""

import os
import signal
import subprocess
import sys
from contextlib import suppress

from dagster_dev import wait_until
from dagster_ui import answers
from processes import accept_ctrl_c, end_inheriting, free_port

MARK = "UI_ON_PORT"
PORT = "DAGSTER_WEBSERVER_PORT"
"""The web server's own variable: `make dev` names no port."""


def serve(commands: str) -> None:
    port = str(free_port())
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", commands],
        env=os.environ | {PORT: port, MARK: port},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=accept_ctrl_c,
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
        end_inheriting(MARK, port)


if __name__ == "__main__":
    serve(sys.stdin.read())
