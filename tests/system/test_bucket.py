"""The main job on a bucket: it gives the same bytes as on a folder, and other machines reuse what one made."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import psutil
import pytest
import yaml
from buckets import KEY_ID, SECRET_KEY, SESSION_TOKEN, Server, set_environment, wire_to
from commands import COMMAND, ft_dagster
from dagster_dev import wait_until
from graphs import instance_on, run
from processes import accept_ctrl_c, command_of

from ft_dagster.defs.clean import find_removable
from ft_dagster.defs.stages import stale_stages
from ft_dagster.defs.workspace import Workspace
from ft_dagster.release.lineage import adapters
from ft_dagster.store.bucket import Bucket
from ft_dagster.store.hashing import digest
from ft_dagster.store.local import Store, StoreError
from ft_dagster.training.request import KIND as ADAPTER
from ft_dagster.training.request import WEIGHTS

LIGHT = ("raw_chapters", "sections", "tokenized_dataset")
CANARIES = (SECRET_KEY, SESSION_TOKEN)


@dataclass(frozen=True)
class Machine:
    """A workspace with its own cache and history, which shares only the bucket."""

    folder: Path
    instance: dg.DagsterInstance

    @property
    def trainings(self) -> list[str]:
        """Return the names of the logs of training processes."""
        logs = self.folder / "workspace" / "logs"
        return sorted(path.name for path in logs.glob("*.log") if not path.name.startswith("evaluation-"))

    def released(self) -> bytes:
        return (self.folder / "workspace" / "fine_tuned_model" / WEIGHTS).read_bytes()


@contextmanager
def machine(
    name: str, of: Path, folder: Path, server: Server, url: str, through: str | None = None
) -> Iterator[Machine]:
    """Make a machine with the reports and the recipe of the finished workspace, and nothing that was made of them."""
    here = folder / name
    for part in ("chapter_markdowns", "recipe.yaml"):
        source, target = of / "workspace" / part, here / "workspace" / part
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    (here / "home").mkdir()
    with pytest.MonkeyPatch.context() as patch, instance_on(here / "workspace", here / "home", here / "cache") as found:
        set_environment(patch, server, through)
        patch.setenv("FT_STORE", url)
        patch.setenv("DAGSTER_HOME", str(here / "home"))
        patch.delenv("FT_THREADS", raising=False)
        yield Machine(here, found)


def weights_of(finished: Path) -> bytes:
    """Return the weights of the adapter that the same reports and recipe make in a folder."""
    store = Store(finished / "workspace" / ".ft" / "store")
    (adapter,) = store.all(ADAPTER)
    return (adapter.path / WEIGHTS).read_bytes()


def without(*canaries: str, bucket: Bucket, folders: list[Path]) -> None:
    """Require that no secret was written anywhere."""
    for name, data in bucket.read_many(bucket.list("")).items():
        assert not any(canary.encode() in data for canary in canaries), name
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        assert not any(canary.encode() in path.read_bytes() for canary in canaries), path


def test_a_bucket_gives_the_same_adapter_as_a_folder_and_another_machine_reuses_it(
    finished: Path, tmp_path: Path, s3_server: Server, s3_url: str
) -> None:
    with machine("here", finished, tmp_path, s3_server, s3_url) as here:
        assert run(here.instance).success
        assert here.released() == weights_of(finished)
        assert len(here.trainings) == 1
        assert stale_stages(here.instance, Workspace()) == []
        assert Bucket(s3_url).list("attempts") == {}, "checkpoints are of no use any more"
    with machine("there", finished, tmp_path, s3_server, s3_url) as there:
        result = run(there.instance)
        assert result.success
        (made,) = result.asset_materializations_for_node("lora_adapter")
        assert made.metadata["reused"].value is True
        assert there.trainings == []
        assert there.released() == weights_of(finished)
        assert stale_stages(there.instance, Workspace()) == []
        assert ft_dagster("plan").returncode == 0
        assert [manifest.key for manifest in adapters(Workspace().store)] == [made.metadata["artifact"].value]
        with pytest.raises(StoreError, match=f"{s3_url} is not cleaned"):
            find_removable(there.instance, Workspace())
        assert not (there.folder / "workspace" / ".ft" / "store").exists()
    without(*CANARIES, KEY_ID, bucket=Bucket(s3_url), folders=[tmp_path])


def test_an_adapter_whose_upload_is_cut_off_is_not_half_stored_and_not_retrained(
    finished: Path, tmp_path: Path, s3_server: Server, s3_url: str
) -> None:
    with wire_to(s3_server) as wire, machine("here", finished, tmp_path, s3_server, s3_url, wire.address) as here:
        assert run(here.instance, *LIGHT).success
        wire.cut_after(100_000)  # after the requests that look for the adapter
        failed = run(here.instance, "lora_adapter")
        assert not failed.success and wire.cuts
        (event,) = failed.get_step_failure_events()
        assert f"The store {s3_url} cannot be used" in str(event.step_failure_data.error)
        with pytest.MonkeyPatch.context() as patch:
            set_environment(patch, s3_server)
            assert list(Workspace().store.all(ADAPTER)) == []
        wire.restore()
        log = here.folder / "workspace" / "logs" / here.trainings[0]
        before = log.stat().st_size
        assert run(here.instance, "lora_adapter").success
        assert log.stat().st_size == before, "it was only taken in"
        (adapter,) = Workspace().store.all(ADAPTER)
        assert adapter.files[WEIGHTS] == digest(weights_of(finished))


def test_a_killed_run_resumes_on_another_machine_and_no_secret_is_shown(
    finished: Path, tmp_path: Path, s3_server: Server, s3_url: str
) -> None:
    def longer(workspace: Path) -> None:
        path = workspace / "recipe.yaml"
        recipe = yaml.safe_load(path.read_text())
        recipe["training"]["epochs"] = 12
        path.write_text(yaml.safe_dump(recipe))

    bucket = Bucket(s3_url)
    with machine("here", finished, tmp_path, s3_server, s3_url) as here:
        longer(here.folder / "workspace")
        killed = subprocess.Popen([*COMMAND, "run"], preexec_fn=accept_ctrl_c, stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: any(name.endswith("/complete") for name in bucket.list("attempts")), "a checkpoint")
            children = psutil.Process(killed.pid).children(recursive=True)
            commands = [command_of(process) for process in (psutil.Process(killed.pid), *children)]
            assert any("ft_dagster.training" in command for command in commands)
            assert not any(canary in str(commands) for canary in (*CANARIES, KEY_ID))
        finally:
            killed.kill()
            killed.wait()
        wait_until(lambda: not any(process.is_running() for process in children), "the training has ended")
    with machine("there", finished, tmp_path, s3_server, s3_url) as there:
        longer(there.folder / "workspace")
        result = run(there.instance, *LIGHT, "lora_adapter")
        assert result.success
        (made,) = result.asset_materializations_for_node("lora_adapter")
        assert made.metadata["resumed from step"].value > 0
    assert bucket.list("attempts") == {}
    without(*CANARIES, KEY_ID, bucket=bucket, folders=[tmp_path])
