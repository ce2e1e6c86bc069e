"""A model hub on loopback, with the part of the real interface that downloading a model needs."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

MODEL, COMMIT, TOKEN = "owner/tiny", "0123456789abcdef0123456789abcdef01234567", "hf_tokenOfTheLocalHub"


@dataclass
class Hub:
    """A hub that serves a folder as MODEL at COMMIT to clients that send TOKEN."""

    folder: Path
    address: str = ""
    fetched: list[str] = field(default_factory=list)
    """Files whose bytes were sent, in order."""

    def entry(self, path: Path) -> dict[str, object]:
        """Return the listing of a file. Weights are large files, identified by SHA-256 and not by their git hash."""
        data = path.read_bytes()
        known: dict[str, object] = {"type": "file", "path": path.name, "size": len(data), "oid": git_sha1(data)}
        if path.suffix == ".safetensors":
            known["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return known

    def headers(self, path: Path) -> dict[str, str]:
        data = path.read_bytes()
        found = {"X-Repo-Commit": COMMIT, "ETag": f'"{git_sha1(data)}"', "Content-Length": str(len(data))}
        if path.suffix == ".safetensors":
            found |= {"X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
        return found


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serving_hub(folder: Path) -> Iterator[Hub]:
    """Run a hub during the block; clients find it with HF_ENDPOINT=its address."""
    hub = Hub(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(with_bytes=False)

        def do_GET(self) -> None:
            self.answer(with_bytes=True)

        def answer(self, with_bytes: bool) -> None:
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.send(401, {"X-Error-Code": "GatedRepo"}, b"")
            match urlsplit(self.path).path.removeprefix("/").split("/"):
                case ["api", "models", owner, name, "tree", commit] if [f"{owner}/{name}", commit] == [MODEL, COMMIT]:
                    listing = [hub.entry(path) for path in sorted(hub.folder.iterdir())]
                    return self.send(200, {"Content-Type": "application/json"}, json.dumps(listing).encode())
                case [owner, name, "resolve", commit, file] if [f"{owner}/{name}", commit] == [MODEL, COMMIT]:
                    path = hub.folder / file
                    if path.is_file():
                        if with_bytes:
                            hub.fetched.append(file)
                        return self.send(200, hub.headers(path), path.read_bytes() if with_bytes else b"")
            return self.send(404, {"X-Error-Code": "EntryNotFound"}, b"")

        def send(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
