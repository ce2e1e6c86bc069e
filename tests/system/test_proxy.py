"""The UI behind a real nginx, as docs/operating.md sets it up: a login, TLS, and no requests from other sites."""

import json
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
import requests
from nginx import serving_nginx
from processes import free_port, inheriting
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from ft_dagster.defs.runs.state import SENSOR

SITE = Path(__file__).parents[2] / "deploy" / "nginx" / "ft_dagster.conf"
READER = ("reader", "canary-of-nginx")
QUESTION = {"query": "{ assetNodes { assetKey { path } } }"}
ORDER = {"query": f'mutation {{ stopSensor(id: "{SENSOR}") {{ __typename }} }}'}


@dataclass(frozen=True)
class Proxy:
    """nginx in front of the UI."""

    address: str
    plain: str
    """The address without TLS."""
    folder: Path
    ui: str
    """The UI's own address."""

    def ask(self, method: str, path: str, **options: object) -> requests.Response:
        return requests.request(
            method, self.address + path, verify=self.folder / "certificate.pem", timeout=60, **options
        )


@pytest.fixture
def proxy(user_interface: str) -> Iterator[Proxy]:
    tls, plain = free_port(), free_port()
    here = {
        "listen 443 ssl": f"listen 127.0.0.1:{tls} ssl",
        "listen 80": f"listen 127.0.0.1:{plain}",
        "https://$host$request_uri": f"https://$host:{tls}$request_uri",
        "http://127.0.0.1:3000": user_interface,
        "/etc/nginx/ft_dagster/": "FOLDER/",
    }
    with serving_nginx(SITE, here) as folder:
        yield Proxy(f"https://127.0.0.1:{tls}", f"http://127.0.0.1:{plain}", folder, user_interface)


def subscribed(proxy: Proxy, **headers: str) -> str:
    """Return the first answer to a page that subscribes to news."""
    trusted = ssl.create_default_context(cafile=proxy.folder / "certificate.pem")
    address = proxy.address.replace("https", "wss") + "/graphql"
    with connect(address, ssl=trusted, subprotocols=["graphql-ws"], additional_headers=headers) as socket:
        socket.send(json.dumps({"type": "connection_init"}))
        return str(json.loads(socket.recv(timeout=30))["type"])


def listening(address: str) -> set[str]:
    """Return where the processes of the Dagster behind this address listen."""
    connections = psutil.net_connections("tcp")
    (server,) = {c.pid for c in connections if c.status == "LISTEN" and c.laddr.port == urlsplit(address).port}
    ours = {process.pid for process in inheriting("DAGSTER_HOME", psutil.Process(server).environ()["DAGSTER_HOME"])}
    return {c.laddr.ip for c in connections if c.status == "LISTEN" and c.pid in ours}


def test_the_ui_requires_a_login_and_rejects_requests_from_other_sites(proxy: Proxy) -> None:
    for reader in (None, ("reader", "guess"), ("somebody", READER[1])):
        for method, path in (("GET", "/"), ("GET", "/server_info"), ("POST", "/graphql"), ("GET", "/js/main.js")):
            assert proxy.ask(method, path, auth=reader).status_code == 401, (reader, method, path)
    with pytest.raises(InvalidStatus, match="401"):
        subscribed(proxy)
    moved = requests.get(proxy.plain + "/runs", allow_redirects=False, timeout=60)
    assert moved.status_code == 301 and moved.headers["Location"] == proxy.address + "/runs"

    page = proxy.ask("GET", "/runs", auth=READER)
    assert page.status_code == 200 and "Dagster" in page.text and page.headers["X-Frame-Options"] == "DENY"
    own = {"Origin": proxy.address, "Sec-Fetch-Site": "same-origin"}
    for headers in ({}, own):  # a program, a page of the UI
        answer = proxy.ask("POST", "/graphql", auth=READER, json=QUESTION, headers=headers).json()
        assert ["lora_adapter"] in [node["assetKey"]["path"] for node in answer["data"]["assetNodes"]]
    basic = requests.Request("GET", proxy.address, auth=READER).prepare().headers["Authorization"]
    assert subscribed(proxy, Authorization=basic, Origin=proxy.address) == "connection_ack"

    elsewhere = {"Origin": "https://elsewhere.example"}
    assert proxy.ask("GET", "/runs", auth=READER, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200, "a link"
    for headers in (elsewhere, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "null"}):
        assert proxy.ask("POST", "/graphql", auth=READER, json=ORDER, headers=headers).status_code == 403, headers
        assert proxy.ask("GET", "/graphql", auth=READER, params=ORDER, headers=headers).status_code == 403, headers
    with pytest.raises(InvalidStatus, match="403"):
        subscribed(proxy, Authorization=basic, **elsewhere)
    assert proxy.ask("POST", "/report_asset_materialization/lora_adapter", auth=READER).status_code == 403

    heard = (proxy.folder / "access.log").read_text() + (proxy.folder / "error.log").read_text()
    assert "reader" in heard and READER[1] not in heard
    assert listening(proxy.ui) == {"127.0.0.1"}, "who is not here comes through the proxy"
