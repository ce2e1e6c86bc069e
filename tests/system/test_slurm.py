"""The batch job of deploy/slurm on a Slurm of two nodes: restarted elsewhere, it gives the undisturbed result."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest
import yaml
from commands import COMMAND, on_one_line
from dagster_dev import PROJECT, wait_until
from hosts import Host, hosts
from slurm import Slurm, slurm

from ft_dagster.config.settings import load_settings
from ft_dagster.defs.instance import open_instance
from ft_dagster.store.local import Artifact, Store
from ft_dagster.training.request import KIND as ADAPTER
from ft_dagster.training.request import WEIGHTS

SCRIPT = PROJECT / "deploy" / "slurm" / "retrain.sbatch"


@pytest.fixture
def cluster(tmp_path: Path, workspace: Path, chapters: list[Path], tiny_recipe: dict[str, Any]) -> Iterator[Slurm]:
    """Start a controller and two nodes that share the workspace, whose recipe requests many steps."""
    tiny_recipe["training"] |= {"epochs": 20, "save_every": 5}
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe))
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    (tmp_path / "cache").mkdir(exist_ok=True)
    with hosts(3) as (controller, *nodes), slurm(tmp_path / "slurm", controller, nodes, tmp_path / "cache") as cluster:
        yield cluster


def checkpoints(workspace: Path) -> list[Path]:
    return list((workspace / ".ft" / "attempts").glob("**/checkpoint-*/complete"))


def last_step(workspace: Path) -> int:
    return max(int(path.parent.name.rpartition("-")[2]) for path in checkpoints(workspace))


def adapter_of(workspace: Path) -> Artifact:
    (adapter,) = Store(workspace / ".ft" / "store").all(ADAPTER)
    adapter.verify()
    return adapter


def runs() -> list[dg.DagsterRun]:
    """Return all runs, oldest first."""
    with open_instance(load_settings()) as instance:
        pool = instance.event_log_storage.get_concurrency_info("gpu")
        assert len(pool.claimed_slots) <= 1
        return list(reversed(instance.get_runs()))


def of_ft_dagster(host: Host) -> list[psutil.Process]:
    found = []
    for process in host.processes():
        with suppress(psutil.NoSuchProcess):
            if any("ft_dagster" in word or "ft-dagster" in word for word in process.cmdline()):
                found.append(process)
    return found


def test_a_job_on_a_lost_node_restarts_resumes_and_is_unharmed_by_orphaned_processes(
    cluster: Slurm, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(workspace, tmp_path / "undisturbed")
    job = cluster.submit(SCRIPT, tmp_path)
    wait_until(lambda: checkpoints(workspace), "a checkpoint is there")
    lost = cluster.node_of(job)
    lost.cut_off()
    lost.freeze(load_settings().dagster_home)
    with monkeypatch.context() as patch:
        patch.setenv("FT_WORKSPACE", str(tmp_path / "undisturbed"))
        subprocess.run([*COMMAND, "run"], check=True, capture_output=True)

    wait_until(lambda: cluster.job(job)["Restarts"] == "1", "it is queued again")
    cluster.start_elsewhere(job, lost)
    wait_until(lambda: len(runs()) == 2, "it runs on the other node")
    lost.thaw()
    wait_until(lambda: not of_ft_dagster(lost), "what is left on the lost node has ended by itself")
    wait_until(lambda: cluster.job(job)["JobState"] not in ("RUNNING", "COMPLETING"), "the job has ended")

    said = (tmp_path / f"ft-dagster-{job}.log").read_text()
    assert cluster.job(job)["JobState"] == "COMPLETED", said
    assert "This run was ended from elsewhere" in said
    first, second = runs()
    assert (first.status, second.status) == (dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.SUCCESS)
    adapter = adapter_of(workspace)
    assert adapter.about["resumed_from"] > 0
    assert adapter.files[WEIGHTS] == adapter_of(tmp_path / "undisturbed").files[WEIGHTS]
    assert (workspace / "fine_tuned_model").resolve().name == adapter.key


def test_a_job_that_reaches_its_time_limit_is_requeued_and_a_canceled_one_is_not(
    cluster: Slurm, workspace: Path, tmp_path: Path
) -> None:
    job = cluster.submit(SCRIPT, tmp_path)
    wait_until(lambda: checkpoints(workspace), "a checkpoint is there")
    node = cluster.node_of(job)
    cluster.tell("scancel", "--batch", "--signal=USR1", job)  # as `#SBATCH --signal` does
    wait_until(lambda: cluster.job(job)["Restarts"] == "1", "it is queued again")
    stopped_at = last_step(workspace)
    cluster.start_elsewhere(job, node)
    wait_until(lambda: last_step(workspace) > stopped_at, "it has gone on")
    cluster.tell("scancel", job)
    wait_until(lambda: cluster.job(job)["JobState"] not in ("RUNNING", "COMPLETING"), "it has ended")
    assert (cluster.job(job)["JobState"], cluster.job(job)["Restarts"]) == ("CANCELLED", "1")
    said = (tmp_path / f"ft-dagster-{job}.log").read_text()
    assert on_one_line(said).count("training continues from its last checkpoint") == 2, said
    assert [run.status for run in runs()] == [dg.DagsterRunStatus.FAILURE] * 2, "neither keeps its slot of the pool"
