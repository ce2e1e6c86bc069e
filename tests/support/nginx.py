"""A real nginx on loopback, with the configuration that is shipped."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from dagster_dev import wait_until

_MAIN = """
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/site.conf;
}}
"""
"""What a machine's own nginx.conf would contain."""


@contextmanager
def serving_nginx(site: Path, here: Mapping[str, str]) -> Iterator[Path]:
    """Run nginx with a site's configuration during the block; yields the folder with its logs.

    `here` maps strings of the deployment, each of which must occur in the configuration, to those of the test;
    `FOLDER` in it stands for nginx's own folder. Without nginx the test is skipped; with CI_NGINX=required it fails.
    """
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if not program:
        said = "there is no nginx here (Debian: apt-get install nginx-light)"
        pytest.fail(said) if os.environ.get("CI_NGINX") == "required" else pytest.skip(said)
    folder = Path(tempfile.mkdtemp(prefix="ft-nginx-"))
    folder.chmod(0o755)  # its workers run as another user and read the file of users
    text = site.read_text()
    for deployed, tested in here.items():
        assert deployed in text, deployed
        text = text.replace(deployed, tested.replace("FOLDER", str(folder)))
    (folder / "site.conf").write_text(text)
    (folder / "nginx.conf").write_text(_MAIN.format(folder=folder))
    command = [program, "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(folder / "nginx.conf")]
    try:
        _certify(folder)
        (folder / "users").write_text(f"reader:{_hashed('canary-of-nginx')}\n")
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            wait_until(lambda: server.poll() is not None or _listens(server.pid), "nginx listens")
            assert server.poll() is None, server.stderr and server.stderr.read().decode()
            yield folder
        finally:
            server.terminate()
            server.communicate(timeout=30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _listens(pid: int) -> bool:
    with suppress(psutil.Error):
        listening = [c for c in psutil.Process(pid).net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        assert all(c.laddr.ip == "127.0.0.1" for c in listening)
        return len(listening) == 2 and bool(psutil.Process(pid).children())
    return False


def _hashed(password: str) -> str:
    """Return a password hash as the documentation shows it."""
    return subprocess.check_output(["openssl", "passwd", "-apr1", password], text=True).strip()


def _certify(folder: Path) -> None:
    """Make a self-signed certificate for one day."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, *plain))
