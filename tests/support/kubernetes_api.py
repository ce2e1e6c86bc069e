"""The part of Kubernetes' API that runs and steps need. Jobs are kept as they were sent and run as processes here."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import yaml

_BATCH = ["apis", "batch", "v1", "namespaces"]
_CORE = ["api", "v1", "namespaces"]
Variables = Mapping[str, Mapping[str, str]]


@dataclass
class Cluster:
    """What was requested from the cluster, and how to reach it."""

    kubeconfig: Path
    variables: Variables
    """Name of a Secret or a ConfigMap -> its content."""
    jobs: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of Jobs, in the order in which they came."""
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    """Name of a Job -> its pod."""

    deleted: list[str] = field(default_factory=list)
    """Names of Jobs that were deleted, whose pods have received SIGTERM."""

    def of_step(self, step: str) -> dict[str, Any]:
        """Return the last Job of a step."""
        return [job for job in self.jobs if job["metadata"]["labels"].get("dagster/op") == step][-1]

    def deleted_steps(self) -> list[str]:
        """Return the names of deleted Jobs of steps."""
        return [name for name in self.deleted if name.startswith("dagster-step-")]

    def start(self, job: dict[str, Any]) -> None:
        """Run a pod's arguments in the environment that it declares, and in no other."""
        (container,) = job["spec"]["template"]["spec"]["containers"]
        environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": os.environ["HOME"]}
        if "PYTHONPATH" in os.environ:
            environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
        for source in container.get("envFrom") or []:
            reference = source.get("secretRef") or source["configMapRef"]
            environment |= self.variables[reference["name"]]
        for variable in container["env"]:
            if "valueFrom" in variable:
                key = variable["valueFrom"]["secretKeyRef"]
                environment[variable["name"]] = self.variables[key["name"]][key["key"]]
            else:
                environment[variable["name"]] = variable.get("value", "")
        self.jobs.append(job)
        name = job["metadata"]["name"]
        (self.kubeconfig.parent / f"{name}.json").write_text(json.dumps(job, indent=1))
        with (self.kubeconfig.parent / f"{name}.log").open("wb") as output:
            self.processes[name] = subprocess.Popen(
                container["args"], env=environment, stdout=output, stderr=subprocess.STDOUT
            )

    def status(self, name: str) -> dict[str, int]:
        ended = self.processes[name].poll()
        return {"active": 1} if ended is None else {"succeeded": 1} if ended == 0 else {"failed": 1}


@contextmanager
def kubernetes_api(folder: Path, variables: Variables) -> Iterator[Cluster]:
    """Run a cluster on loopback during the block, with a kubeconfig for it."""
    cluster = Cluster(folder / "kubeconfig.yaml", variables)

    class Handler(_Handler):
        kubernetes = cluster

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    cluster.kubeconfig.write_text(_kubeconfig(f"http://127.0.0.1:{server.server_port}"))
    try:
        yield cluster
    finally:
        server.shutdown()
        server.server_close()
        for process in cluster.processes.values():
            process.kill()
            process.wait()


def _kubeconfig(address: str) -> str:
    named = {"cluster": "test", "user": "test"}
    return yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": address}}],
            "users": [{"name": "test", "user": {"token": "test"}}],
            "contexts": [{"name": "test", "context": named}],
        }
    )


class _Handler(BaseHTTPRequestHandler):
    kubernetes: Cluster

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        match self._steps():
            case [*prefix, _, "jobs"] if prefix == _BATCH:
                job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if job["metadata"]["name"] in self.kubernetes.processes:
                    self._answer(409, {"message": "there is one of this name"})
                else:
                    self.kubernetes.start(job)
                    self._answer(201, job)
            case _:
                self._answer(404, {})

    def do_GET(self) -> None:
        match self._steps():
            case [*prefix, _, "jobs", name, "status"] if prefix == _BATCH and name in self.kubernetes.processes:
                self._answer(200, {"metadata": {"name": name}, "status": self.kubernetes.status(name)})
            case [*prefix, _, "pods" | "events"] if prefix == _CORE:
                self._answer(200, {"items": []})
            case _:
                self._answer(404, {})

    def do_DELETE(self) -> None:
        match self._steps():
            case [*prefix, _, "jobs", name] if prefix == _BATCH and name in self.kubernetes.processes:
                with suppress(ProcessLookupError):
                    self.kubernetes.processes[name].send_signal(signal.SIGTERM)
                self.kubernetes.deleted.append(name)
                self._answer(200, {})
            case _:
                self._answer(404, {})

    def _steps(self) -> list[str]:
        return self.path.partition("?")[0].strip("/").split("/")

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
