"""The host of a run's process: the machine and, under Slurm, the job and how often it was started."""

import os
import re
import socket
from dataclasses import dataclass

import dagster as dg

RUN_HOST_TAG = "ft_dagster/place"
"""Tag of a run: the host of its process."""
_WRITTEN = re.compile(r"(?P<host>.+?)(?:, Slurm job (?P<job>\d+), start (?P<start>\d+))?")


@dataclass(frozen=True)
class RunHost:
    """A machine's name and, on a node of Slurm, the job and how often Slurm had started it before."""

    host: str
    job: int | None = None
    start: int = 0

    def __str__(self) -> str:
        return f"{self.host}, Slurm job {self.job}, start {self.start}" if self.job is not None else self.host

    def was_given_up_for(self, other: "RunHost") -> bool:
        """Whether Slurm restarted the job on the other host, which it does only after this start was lost or ended."""
        return self.job is not None and self.job == other.job and self.start < other.start


def this_host() -> RunHost:
    """Return the host of this process."""
    job = os.environ.get("SLURM_JOB_ID")
    start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return RunHost(socket.gethostname(), int(job), start) if job else RunHost(socket.gethostname())


def host_of(run: dg.DagsterRun) -> RunHost | None:
    """Return the host of a run's process; None if the run has no such tag."""
    found = _WRITTEN.fullmatch(run.tags.get(RUN_HOST_TAG, ""))
    if found is None:
        return None
    return RunHost(found["host"], int(found["job"]), int(found["start"])) if found["job"] else RunHost(found["host"])


def record_host(instance: dg.DagsterInstance, run: dg.DagsterRun) -> None:
    """Tag a run with this host. It may already have the tag of another run that it was copied from."""
    if host_of(run) != this_host():
        instance.add_run_tags(run.run_id, {RUN_HOST_TAG: str(this_host())})
