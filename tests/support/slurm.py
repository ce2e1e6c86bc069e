"""A Slurm cluster of a controller and nodes, each on its own host; all that it writes is in one folder."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from dagster_dev import wait_until
from hosts import Host
from machines import remember_machine

_DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare")
_CONTROLLER_PORT, _NODE_PORT = 6817, 6818
_CONFIGURATION = """
ClusterName=test
SlurmctldHost=controller({controller})
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n/slurmd.pid
SlurmdLogFile={folder}/%n/slurmd.log
SlurmdSpoolDir={folder}/%n
# What needs control groups, which a container may not have.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
# A node that does not answer for so many seconds is down, and its job is tried elsewhere.
SlurmdTimeout={patience}
MessageTimeout=5
BatchStartTimeout=5
KillWait=60
SchedulerParameters=batch_sched_delay=0,sched_interval=1
GresTypes=gpu
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


_SIZE = "CPUs=8 RealMemory=65536 Gres=gpu:1"


@dataclass(frozen=True)
class Slurm:
    """A cluster that accepts jobs."""

    folder: Path
    controller: Host
    nodes: Mapping[str, Host]

    def submit(self, script: Path, folder: Path, *options: str) -> str:
        """Submit a batch script from a folder, with the environment of this process, and return the job's number."""
        return self.tell("sbatch", "--parsable", *options, str(script), folder=folder)

    def tell(self, *command: str, folder: Path | None = None) -> str:
        """Return the output of one of Slurm's commands on the controller."""
        done = subprocess.run(
            self.controller.command(*command),
            env=os.environ | self.environment,
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def job(self, number: str) -> dict[str, str]:
        """Return what Slurm reports about a job."""
        words = self.tell("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.partition("=")[::2] for word in words)

    def start_elsewhere(self, number: str, node: Host) -> None:
        """Start a requeued job at once on another node, because a node does not accept the same job so soon."""
        (name,) = [name for name, host in self.nodes.items() if host == node]
        if self.job(number)["JobState"] != "PENDING":  # on a slow machine it has been queued long enough
            return
        self.tell("scontrol", "update", f"JobId={number}", "StartTime=now", f"ExcNodeList={name}")

    def node_of(self, number: str) -> Host:
        """Return the host that a job runs on."""
        return self.nodes[self.job(number)["NodeList"]]


@contextmanager
def slurm(folder: Path, controller: Host, nodes: Sequence[Host], local: Path, patience: int = 10) -> Iterator[Slurm]:
    """Run a cluster during the block; what is left of its jobs is killed with the hosts.

    For Slurm each node has more cores and memory than the machine, and a fake GPU. The test is skipped if Slurm
    is not installed; with CI_SLURM=required it fails.

    Args:
        folder: for all that the daemons write.
        controller: where jobs are submitted.
        nodes: where they run, as node1, node2, ...
        local: the FT_CACHE that each node has on its own; all other folders are shared.
        patience: seconds of silence after which a node is down.
    """
    if missing := [name for name in _DAEMONS if shutil.which(name) is None]:
        said = f"no {', '.join(missing)} (Debian: apt-get install slurmctld slurmd slurm-client munge)"
        pytest.fail(said) if os.environ.get("CI_SLURM") == "required" else pytest.skip(said)
    cluster = Slurm(folder, controller, {f"node{number}": host for number, host in enumerate(nodes, start=1)})
    (folder / "state").mkdir(parents=True)
    lines = [f"NodeName={name} NodeAddr={host.address} {_SIZE}" for name, host in cluster.nodes.items()]
    (folder / "slurm.conf").write_text(
        _CONFIGURATION.format(
            controller=controller.address,
            controller_port=_CONTROLLER_PORT,
            node_port=_NODE_PORT,
            folder=folder,
            patience=patience,
            nodes="\n".join(lines),
        )
    )
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    started: list[subprocess.Popen[bytes]] = []
    try:
        started.append(_munged(folder))
        wait_until((folder / "munge.socket").exists, "munged listens", 30)
        environment = os.environ | cluster.environment
        for name, host in {"controller": controller, **cluster.nodes}.items():
            remember_machine(folder / name / "local")
            daemon = ["slurmctld", "-D"] if host is controller else ["slurmd", "-D", "-N", name]
            with (folder / name / "output").open("wb") as output:
                command = host.command(*_as_machine(name, folder / name / "local", local), *daemon)
                started.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
        wait_until(lambda: _idle(cluster) == len(nodes), "the nodes are idle", 60)
        yield cluster
    finally:
        for process in reversed(started):
            with suppress(psutil.NoSuchProcess):
                for member in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                    with suppress(psutil.NoSuchProcess):
                        member.kill()
            process.wait()


def _as_machine(name: str, disk: Path, mounted: Path) -> list[str]:
    """Return the command that gives a process its own host name and folder, as on a separate machine."""
    script = 'hostname "$1" && mount --bind "$2" "$3" && shift 3 && exec "$@"'
    return ["unshare", "--uts", "--mount", "sh", "-c", script, "sh", name, str(disk), str(mounted)]


def _munged(folder: Path) -> subprocess.Popen[bytes]:
    """Run the daemon that signs Slurm's messages, with the test's own key."""
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    files = {"key-file": key} | {name: folder / f"munge.{name}" for name in ("socket", "log-file", "pid-file")}
    options = [f"--{name}={path}" for name, path in files.items()]
    command = ["munged", "--foreground", "--force", f"--seed-file={folder}/munge.seed", *options]
    with (folder / "munge.output").open("wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=output)


def _idle(cluster: Slurm) -> int:
    try:
        return cluster.tell("sinfo", "--noheader", "--Node", "--format=%t").split().count("idle")
    except AssertionError:  # until the controller listens
        return 0
