"""A package index on loopback, with wheels of a few bytes."""

import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class _Index(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def serving_index(folder: Path) -> Iterator[str]:
    """Serve a folder as an index and yield its address without the scheme: `127.0.0.1:PORT/simple`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Index, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}/simple"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def add_wheel(folder: Path, name: str, version: str, files: dict[str, bytes], needs: str = "") -> Path:
    """Put a wheel with these files into an index's folder; it may depend on another package."""
    place = folder / "simple" / name.replace("_", "-")
    place.mkdir(parents=True, exist_ok=True)
    wheel = place / f"{name}-{version}-py3-none-any.whl"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    info = {
        "METADATA": metadata + (f"Requires-Dist: {needs}\n" if needs else ""),
        "WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in files.items():
            entry = zipfile.ZipInfo(path)
            entry.external_attr = 0o100755 << 16  # pip makes scripts as executable as they are in the wheel
            archive.writestr(entry, content)
        for path, text in info.items():
            archive.writestr(f"{name}-{version}.dist-info/{path}", text)
    return wheel
