"""A real S3 server on loopback (moto's, a process of its own), and a wire to it that can be cut."""

import os
import select
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from processes import free_port
from s3fs import S3FileSystem
from servers import serving

KEY_ID, SECRET_KEY, SESSION_TOKEN = (
    "AKIACANARY0123456789",
    "canary/Secret+Key/0123456789abcdefABCDEF",
    "canaryToken0123",
)
BUCKET = "reports"


@dataclass(frozen=True)
class Server:
    """An S3 server that has the bucket BUCKET."""

    address: str
    environment: Mapping[str, str]
    """The environment variables of processes that use it."""


@contextmanager
def serving_s3(folder: Path) -> Iterator[Server]:
    """Run a server during the block; it keeps its objects in memory."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    with serving(command, f"{address}/moto-api/", folder / "s3.log"):
        server = Server(
            address,
            {
                "AWS_ENDPOINT_URL": address,
                "AWS_ACCESS_KEY_ID": KEY_ID,
                "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
                "AWS_SESSION_TOKEN": SESSION_TOKEN,
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
                "AWS_MAX_ATTEMPTS": "1",  # requests that are cut off are not retried for long
            },
        )
        with pytest.MonkeyPatch.context() as patch:
            set_environment(patch, server)
            S3FileSystem(endpoint_url=address).mkdir(BUCKET)
        yield server


def set_environment(patch: pytest.MonkeyPatch, server: Server, through: str | None = None) -> None:
    """Make the code that follows use this server, perhaps through another address."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        patch.delenv(name)
    for name, value in server.environment.items():
        patch.setenv(name, value)
    if through:
        patch.setenv("AWS_ENDPOINT_URL", through)


class Wire:
    """A TCP proxy in front of a server. `cut_after(n)` breaks every connection once n more bytes were sent up it, and
    refuses new ones until `restore()`."""

    def __init__(self, address: str) -> None:
        self._target = (str(urlsplit(address).hostname), int(urlsplit(address).port or 0))
        self._left: int | None = None
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.cuts = 0
        self._open = True
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_after(self, count: int) -> None:
        with self._lock:
            self._left, self.cuts = count, 0

    def restore(self) -> None:
        with self._lock:
            self._left = None

    def close(self) -> None:
        self._open = False
        self._listener.close()

    def _accept(self) -> None:
        while self._open:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(near,), daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        with near, suppress(OSError), socket.create_connection(self._target) as far:
            while True:
                for ready in select.select([near, far], [], [])[0]:
                    data = ready.recv(65536)
                    if ready is near:
                        data = self._passed(data)
                    if not data:
                        return
                    (far if ready is near else near).sendall(data)

    def _passed(self, data: bytes) -> bytes:
        """Return the part of the data that is still let through."""
        with self._lock:
            if self._left is None:
                return data
            data, self._left = data[: self._left], max(0, self._left - len(data))
            self.cuts += not self._left
            return data


@contextmanager
def wire_to(server: Server) -> Iterator[Wire]:
    wire = Wire(server.address)
    try:
        yield wire
    finally:
        wire.close()
