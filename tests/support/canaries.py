"""Plants secrets in a test and searches everything that was written for them."""

import gzip
import json
import re
import threading
import zipfile
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from urllib.parse import quote, quote_plus
from xml.sax.saxutils import escape

import psutil
from processes import inheriting

_HEX = re.compile(r"\\\\?x([0-9a-f]{16,})")
_SAMPLE_SECONDS = 0.1


@lru_cache
def spellings(secret: str) -> tuple[bytes, ...]:
    """Return a secret verbatim, as spelled in URLs, JSON and hexadecimal digits, and within anything in base64."""
    data = secret.encode()
    found = {data, quote(secret).encode(), quote(secret, safe="").encode(), quote_plus(secret).encode()}
    found |= {json.dumps(secret)[1:-1].encode(), data.hex().encode(), data.hex().upper().encode()}
    for before in range(3):  # bytes of the triple in which it starts
        whole = b64encode(b"\0" * before + data)
        own = whole[-(-8 * before // 6) : 8 * (before + len(data)) // 6]  # the characters that depend on no neighbor
        found |= {own, own.replace(b"+", b"-").replace(b"/", b"_"), quote(own, safe="").encode()}
    return tuple(sorted(found))


def secrets_in(data: bytes, secrets: Mapping[str, str]) -> set[str]:
    """Return the names of the secrets that can be read in the data, also if it is compressed."""
    found = {name for name, secret in secrets.items() if any(form in data for form in spellings(secret))}
    for inner in _unpacked(data):
        found |= secrets_in(inner, secrets)
    return found


def _unpacked(data: bytes) -> Iterator[bytes]:
    with suppress(zlib.error, OSError, EOFError):
        if data[:2] == b"\x1f\x8b":
            yield gzip.decompress(data)
        elif data[:1] == b"\x78":
            yield zlib.decompress(data)
    if data[:2] == b"PK":
        with suppress(zipfile.BadZipFile), zipfile.ZipFile(BytesIO(data)) as archive:
            for name in archive.namelist():
                yield archive.read(name)


def files_with(folder: Path, secrets: Mapping[str, str], except_for: Iterable[Path] = ()) -> dict[str, set[str]]:
    """Return the files below a folder in whose name or content a secret can be read, and which secret it is."""
    found = {}
    spared = set(except_for)
    for path in folder.rglob("*"):
        told = secrets_in(str(path.relative_to(folder)).encode(), secrets)
        if path.is_file() and path not in spared:
            told |= secrets_in(path.read_bytes(), secrets)
        if told:
            found[str(path.relative_to(folder))] = told
    return found


def rows_with(tables: Mapping[str, str], secrets: Mapping[str, str]) -> dict[str, set[str]]:
    """Return the tables of a database, as text, in which a secret can be read, and which. Bytes are digits there."""
    found = {}
    for name, rows in tables.items():
        told = secrets_in(rows.encode(), secrets)
        for match in _HEX.finditer(rows):
            told |= secrets_in(bytes.fromhex(match[1][: len(match[1]) // 2 * 2]), secrets)
        if told:
            found[name] = told
    return found


@dataclass
class Watched:
    """Every process that worked on a workspace, as `ps` and /proc showed it."""

    commands: dict[int, str] = field(default_factory=dict)
    given: dict[str, set[str]] = field(default_factory=dict)
    """Module or program -> variables with a secret in the environment of its processes."""

    def given_to(self, module: str) -> set[str]:
        """Return the variables with a secret that processes of a module had. Fails if there was no such process."""
        assert module in self.given, f"no process of {module} was seen, but of {sorted(self.given)}"
        return self.given[module]


@contextmanager
def processes_watched(workspace: Path, secrets: Mapping[str, str]) -> Iterator[Watched]:
    """Watch the processes of a workspace repeatedly during the block."""
    watched, over = Watched(), threading.Event()

    def watch() -> None:
        while not over.wait(_SAMPLE_SECONDS):
            for process in inheriting("FT_WORKSPACE", str(workspace)):
                with suppress(psutil.Error):
                    command, environment = process.cmdline(), process.environ()
                    watched.commands[process.pid] = f"{watched.commands.get(process.pid, '')} {' '.join(command)}"
                    module = command[command.index("-m") + 1] if "-m" in command else " ".join(command[:2])
                    told = {n for n, v in environment.items() if any(secret in v for secret in secrets.values())}
                    watched.given.setdefault(module, set()).update(told)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield watched
    finally:
        over.set()
        thread.join()


@contextmanager
def echoing() -> Iterator[str]:
    """Run a server that refuses every request and quotes all that it was sent, as one with verbose errors does."""

    class Echo(BaseHTTPRequestHandler):
        def _refuse(self) -> None:
            sent = f"{self.command} {self.path} {dict(self.headers)}"
            if "AWS4" in self.headers.get("Authorization", ""):
                kind, body = (
                    "application/xml",
                    f"<Error><Code>AccessDenied</Code><Message>{escape(sent)}</Message></Error>",
                )
            else:
                about = {"error": sent, "error_code": "PERMISSION_DENIED", "message": sent}
                kind, body = "application/json", json.dumps(about)
            self.send_response(403)
            self.send_header("Content-Type", kind)
            self.send_header("X-Error-Message", sent)
            self.send_header("Content-Length", str(len(body.encode())))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body.encode())

        def __getattr__(self, name: str) -> Callable[[], None]:
            if name.startswith("do_"):  # GET, POST and the other methods
                return self._refuse
            raise AttributeError(name)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
