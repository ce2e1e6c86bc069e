"""A process gets as many devices as it needs, sees no others, and holds them until it exits."""

import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from dagster_dev import wait_until
from filelock import FileLock, Timeout

from ft_dagster.config.recipe_file import load_recipe
from ft_dagster.config.settings import load_settings
from ft_dagster.defs.instance import prepare_home
from ft_dagster.runtime.lease import CPU, VISIBLE, LeaseError, leased, visible_devices
from ft_dagster.runtime.number_format import ProductRates, known_rates, remember_rates
from ft_dagster.training.sizing.speeds import speed_key

TWO = """
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa1111-0000-0000-0000-000000000000)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-bbbb2222-0000-0000-0000-000000000000)
"""
DIVIDED = """
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-aaaa1111-0000-0000-0000-000000000000)
  MIG 3g.20gb     Device  0: (UUID: MIG-cccc3333-0000-0000-0000-000000000000)
  MIG 3g.20gb     Device  1: (UUID: MIG-dddd4444-0000-0000-0000-000000000000)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-bbbb2222-0000-0000-0000-000000000000)
"""
A, B = "GPU-aaaa1111-0000-0000-0000-000000000000", "GPU-bbbb2222-0000-0000-0000-000000000000"
C, D = "MIG-cccc3333-0000-0000-0000-000000000000", "MIG-dddd4444-0000-0000-0000-000000000000"
HOLD = """
    import sys
    from pathlib import Path
    from ft_dagster.runtime.lease import leased
    with leased(Path(sys.argv[1]), int(sys.argv[2])):
        import os, subprocess
        child = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'), flush=True)"
        subprocess.run([sys.executable, "-c", child])
        sys.stdin.read()
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str | None], None]:
    """Return a function that simulates GPUs listed by a driver and a variable set by an outer scheduler."""

    def become(listed: str, visible: str | None = None) -> None:
        tool = tmp_path / "bin" / "nvidia-smi"
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f"#!/bin/sh\ncat <<'END'\n{listed.strip()}\nEND\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.delenv(VISIBLE, raising=False)
        if visible is not None:
            monkeypatch.setenv(VISIBLE, visible)

    return become


class Holder:
    """A process that holds devices until it is asked to exit, and reports what its own child sees."""

    def __init__(self, locks: Path, count: int = 1) -> None:
        command = [sys.executable, "-c", textwrap.dedent(HOLD), str(locks), str(count)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def sees(self) -> list[str]:
        assert self.process.stdout
        return self.process.stdout.readline().strip().split(",")

    def end(self) -> None:
        self.process.communicate()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.mark.parametrize(
    ("listed", "visible", "names", "words"),
    [
        (TWO, None, [A, B], [A, B]),
        (TWO, "1,0", [B, A], ["1", "0"]),
        (TWO, f"{B},0", [B, A], [B, "0"]),
        (TWO, "GPU-bbbb", [B], ["GPU-bbbb"]),
        (TWO, "1,7,0", [B], ["1"]),
        (DIVIDED, None, [C, D, B], [C, D, B]),
        (DIVIDED, D, [D], [D]),
    ],
)
def test_devices_are_those_of_the_driver_that_the_environment_leaves_visible(
    machine: Callable[..., None], listed: str, visible: str | None, names: list[str], words: list[str]
) -> None:
    machine(listed, visible)
    assert [(device.name, device.visible) for device in visible_devices()] == list(zip(names, words, strict=True))


def test_devices_have_the_model_name_of_the_driver(machine: Callable[..., None]) -> None:
    machine(DIVIDED)
    assert [device.model for device in visible_devices()] == ["MIG 3g.20gb", "MIG 3g.20gb", "NVIDIA A100-SXM4-40GB"]


def test_measurements_on_a_leased_gpu_are_found_where_all_gpus_are_visible(
    machine: Callable[..., None], tmp_path: Path
) -> None:
    machine(TWO)
    recipe = load_recipe("smollm2-135m")
    rates = ProductRates("NVIDIA H100 80GB HBM3", {"bfloat16": 1e15, "float32": 1e14})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VISIBLE, B)  # as a lease sets it
        measured = speed_key({}, recipe, None)
        remember_rates(tmp_path, rates)
    assert speed_key({}, recipe, None) == measured
    assert known_rates(tmp_path) == rates
    machine(TWO.replace("H100", "H200"))
    assert speed_key({}, recipe, None) != measured and known_rates(tmp_path) is None


@pytest.mark.parametrize("visible", ["", "-1", "7"])
def test_with_all_gpus_hidden_it_is_the_cpu(machine: Callable[..., None], visible: str) -> None:
    machine(TWO, visible)
    assert visible_devices() == [CPU]


def test_a_machine_without_a_driver_has_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(VISIBLE, raising=False)
    assert visible_devices() == [CPU]


def test_two_processes_get_one_device_each_and_see_no_other(machine: Callable[..., None], tmp_path: Path) -> None:
    machine(TWO)
    first, second = Holder(tmp_path), Holder(tmp_path)
    assert sorted([first.sees(), second.sees()]) == [[A], [B]]
    first.end()
    second.end()


def test_a_killed_process_leaves_its_device_to_the_next(machine: Callable[..., None], tmp_path: Path) -> None:
    machine(TWO, "1")
    holder = Holder(tmp_path)
    assert holder.sees() == ["1"]
    waiting = Holder(tmp_path)
    wait_until(lambda: is_held(tmp_path / f"turn-{socket.gethostname()}.lock"), "the other one waits", seconds=30)
    holder.kill()
    assert waiting.sees() == ["1"]
    waiting.end()


def test_a_process_that_needs_one_device_does_not_overtake_one_that_needs_two(
    machine: Callable[..., None], tmp_path: Path
) -> None:
    machine(TWO)
    first, second = Holder(tmp_path), Holder(tmp_path)
    assert sorted([first.sees(), second.sees()]) == [[A], [B]]
    needs_two = Holder(tmp_path, count=2)
    wait_until(
        lambda: is_held(tmp_path / f"turn-{socket.gethostname()}.lock"), "it waits first in the queue", seconds=30
    )
    needs_one = Holder(tmp_path)
    first.end()
    second.end()
    assert needs_two.sees() == [A, B]
    needs_two.end()
    assert len(needs_one.sees()) == 1
    needs_one.end()


def is_held(lock: Path) -> bool:
    if not lock.exists():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def test_more_devices_than_can_be_seen_are_refused(machine: Callable[..., None], tmp_path: Path) -> None:
    machine(TWO, "0")
    with pytest.raises(LeaseError, match=r"asks for 2 GPUs.*and 1 can be seen.*CUDA_VISIBLE_DEVICES is 0"):
        leased(tmp_path, 2).__enter__()


def test_a_new_instance_has_a_slot_for_each_device(machine: Callable[..., None], workspace: Path) -> None:
    machine(TWO)
    assert "    default_limit: 2\n" in (Path(prepare_home(load_settings())) / "dagster.yaml").read_text()
