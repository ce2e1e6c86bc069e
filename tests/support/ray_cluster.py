"""A Ray cluster on hosts of one machine."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from hosts import Host
from machines import remember_machine

_RAY = Path(sys.executable).with_name("ray")
_PORT, _DASHBOARD = 6379, 8265
_NOTICES_SOON = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "4",
}
"""The head considers a host lost after some 15 seconds instead of the default minute."""
_WITH_A_CACHE_OF_ITS_OWN = 'mount --bind "$1" "$2"; shift 2; exec "$@"'
"""`ip netns exec` gives a command its own view of what is mounted."""


class RayCluster:
    """A head and workers, each on its own host with its own processes, network and FT_CACHE."""

    def __init__(self, hosts: Sequence[Host], cache: Path, **variables: str) -> None:
        """`cache` is what FT_CACHE names on all hosts."""
        self.head, *self.workers = hosts
        self._written = TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True)  # a short name: it holds sockets
        self._cache = cache
        ours = ("FT_", "DAGSTER_", "RAY_", "HUGGINGFACE_", "PYTEST_", "PYTHONPATH")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        self._environment = clean | {"RAY_AUTH_MODE": "disabled"} | _NOTICES_SOON | variables

    @property
    def address(self) -> str:
        """Return the address of its dashboard, which accepts jobs."""
        return f"http://{self.head.address}:{_DASHBOARD}"

    def start_head(self, **resources: int) -> None:
        listening = [f"--port={_PORT}", f"--dashboard-host={self.head.address}", f"--dashboard-port={_DASHBOARD}"]
        self._start(self.head, "--head", *listening, **resources)

    def start_worker(self, host: Host, **resources: int) -> None:
        self._start(host, f"--address={self.head.address}:{_PORT}", **resources)

    def jobs(self, *arguments: str) -> str:
        """Run `ray job ...` on the head's host."""
        command = self.head.command(_RAY, "job", *arguments)
        environment = self._environment | {"RAY_API_SERVER_ADDRESS": self.address}
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    def _start(self, host: Host, *options: str, **resources: int) -> None:
        own = Path(self._written.name) / host.name.rpartition("-")[2]
        cache = own / "cache"
        remember_machine(cache)
        self._cache.mkdir(parents=True, exist_ok=True)
        asked = [f"--{name.replace('_', '-')}={number}" for name, number in resources.items()]
        bound = [f"--node-ip-address={host.address}", f"--temp-dir={own / 'ray'}"]
        lean = ["--object-store-memory=200000000", "--disable-usage-stats"]
        command = [_RAY, "start", *options, *bound, *lean, *asked]
        done = subprocess.run(
            host.command("sh", "-c", _WITH_A_CACHE_OF_ITS_OWN, "sh", cache, self._cache, *command),
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
