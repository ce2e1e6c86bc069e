"""Heavy steps run in a process group that never outlives the step."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import dagster as dg
import psutil
import pytest

from ft_dagster.config.redaction import OF_THE_BUCKET, SECRETS
from ft_dagster.defs.runs.child_process import ChildProcess

SLEEPER = """
    import os, subprocess, sys, time
    from pathlib import Path
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(sys.argv[1]).with_suffix(".pids").write_text(str(os.getpid()) + " " + str(grandchild.pid))
    {before}
    time.sleep(600)
"""


IGNORES_INTERRUPTS = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Return a function that makes a module for a child to run and returns its name."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(body: str) -> str:
        (tmp_path / "child_module.py").write_text(textwrap.dedent(body))
        return "child_module"

    return write


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "the condition did not come true in time"
        time.sleep(0.02)


def written(path: Path) -> bool:
    return path.exists() and bool(path.read_text())


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def run_child(
    name: str,
    folder: Path,
    grace: float = 60.0,
    instance: dg.DagsterInstance | None = None,
    bucket: bool = False,
) -> dg.ExecuteInProcessResult:
    request = folder / "request.json"
    request.write_text("{}")

    @dg.asset
    def stage(context: dg.AssetExecutionContext) -> Iterator[dg.AssetObservation | dg.MaterializeResult]:
        child, log = ChildProcess(grace_seconds=grace), folder / "logs" / "child.log"
        yield from child.run(context, name, request, log, bucket=bucket)
        yield dg.MaterializeResult()

    return dg.materialize([stage], raise_on_error=False, instance=instance or dg.DagsterInstance.ephemeral())


def test_numbers_that_the_child_reports_become_observations(module: Callable[[str], str], tmp_path: Path) -> None:
    name = module("""
        from dagster_pipes import open_dagster_pipes
        with open_dagster_pipes() as pipes:
            pipes.report_custom_message({"step": 1, "loss": 0.5, "text": "left out"})
    """)
    result = run_child(name, tmp_path)
    (event,) = result.get_asset_observation_events()
    observed = event.asset_observation_data.asset_observation.metadata
    assert {key: value.value for key, value in observed.items()} == {"step": 1, "loss": 0.5}


def test_a_failing_child_fails_the_step_with_the_end_of_its_output(
    module: Callable[[str], str], tmp_path: Path
) -> None:
    result = run_child(module("import sys; print('the reason'); sys.exit(3)"), tmp_path)
    (failure,) = result.get_step_failure_events()
    message = failure.step_failure_data.user_failure_data.description
    assert "exit code 3" in message and message.endswith("the reason")


KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
ONE_OF_TWO = """
    import sys
    from pathlib import Path
    from ft_dagster.runtime.processes import run_together
    sys.exit(run_together("killed_worker", Path(sys.argv[1]), 2, 1))
"""


@pytest.mark.parametrize("body", [KILLED, ONE_OF_TWO], ids=["the child", "one of several processes"])
def test_the_error_for_a_child_killed_by_the_system_suspects_memory_and_gives_advice(
    module: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    (tmp_path / "killed_worker.py").write_text(KILLED)  # as the kernel does when memory has run out
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(__file__).parents[3])]))
    (failure,) = run_child(module(body), tmp_path).get_step_failure_events()
    message = failure.step_failure_data.user_failure_data.description
    assert "was killed, most likely by the system because memory ran out. Lower training.rows_per_device" in message


def test_processes_that_a_crashed_child_leaves_behind_are_killed(module: Callable[[str], str], tmp_path: Path) -> None:
    run_child(module(SLEEPER.format(before="sys.exit(1)")), tmp_path)
    pids = [int(pid) for pid in (tmp_path / "request.pids").read_text().split()]
    wait_until(lambda: all(gone(pid) for pid in pids))


@pytest.mark.parametrize("bucket", [False, True])
def test_a_child_gets_no_secret_except_the_keys_of_a_bucket_that_it_uses(
    bucket: bool, module: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, "canary")
    found = tmp_path / "found.json"
    code = "import json, os, pathlib; pathlib.Path({!r}).write_text(json.dumps([n for n, v in os.environ.items() if v"
    assert run_child(module(code.format(str(found)) + " == 'canary']))"), tmp_path, bucket=bucket).success
    assert set(json.loads(found.read_text())) == (set(OF_THE_BUCKET) if bucket else set())


def test_a_child_is_killed_if_another_process_ended_its_run(
    module: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ft_dagster.defs.runs.child_process._ASK_SECONDS", 0.1)
    name = module(SLEEPER.format(before=IGNORES_INTERRUPTS))
    with dg.instance_for_test() as instance, ThreadPoolExecutor() as thread:
        result = thread.submit(run_child, name, tmp_path, instance=instance)
        wait_until(lambda: written(tmp_path / "request.pids"))
        pids = [int(pid) for pid in (tmp_path / "request.pids").read_text().split()]
        (run,) = instance.get_runs()
        instance.report_run_failed(run, "Another machine goes on.")
        try:
            wait_until(lambda: all(map(gone, pids)), seconds=30)
        finally:  # otherwise the thread would wait for them
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        (failure,) = result.result().get_step_failure_events()
    assert "ended from elsewhere" in failure.step_failure_data.user_failure_data.description


CANCELLED_WHILE_STORING = """
    import os, signal, sys
    from pathlib import Path
    import dagster as dg
    from ft_dagster.defs.runs.child_process import ChildProcess

    folder = Path({folder!r})
    (folder / "request.json").write_text("{{}}")

    @dg.asset
    def stage(context: dg.AssetExecutionContext, child: ChildProcess):
        yield from child.run(context, "child_module", folder / "request.json", folder / "child.log")
        yield dg.MaterializeResult()

    with dg.instance_for_test() as instance:
        store = instance.event_log_storage.store_event
        def interrupted(event):
            store(event)
            if event.dagster_event and event.dagster_event.event_type_value == "ASSET_OBSERVATION":
                os.kill(os.getpid(), signal.SIGINT)
        instance.event_log_storage.store_event = interrupted
        dg.materialize([stage], resources={{"child": ChildProcess()}}, instance=instance, raise_on_error=False)
"""


def test_a_child_can_save_when_its_run_is_canceled_while_a_message_is_stored(
    module: Callable[[str], str], tmp_path: Path
) -> None:
    module("""
        import sys, time
        from pathlib import Path
        from dagster_pipes import open_dagster_pipes
        with open_dagster_pipes() as pipes:
            pipes.report_custom_message({"step": 1})
            try:
                time.sleep(600)
            except KeyboardInterrupt:
                time.sleep(1)
                Path(sys.argv[1]).with_name("saved").touch()
    """)
    script = textwrap.dedent(CANCELLED_WHILE_STORING.format(folder=str(tmp_path)))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (tmp_path / "saved").exists(), done.stderr


PARENT = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_child_process import run_child
    run_child("child_module", Path({folder!r}), grace=2.0)
"""


@pytest.mark.parametrize("ignores", ["", IGNORES_INTERRUPTS])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_child_exits_with_the_process_that_started_it(
    module: Callable[[str], str], tmp_path: Path, number: signal.Signals, ignores: str
) -> None:
    module(SLEEPER.format(before=ignores))
    script = textwrap.dedent(PARENT.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    parent = subprocess.Popen([sys.executable, "-c", script], env=os.environ.copy())
    try:
        wait_until(lambda: written(tmp_path / "request.pids"))
        child, grandchild = (int(pid) for pid in (tmp_path / "request.pids").read_text().split())
        parent.send_signal(number)
        parent.wait(30)
        wait_until(lambda: gone(child))
        if number == signal.SIGINT:  # a killed parent cannot kill the grandchild; the child's own code must
            wait_until(lambda: gone(grandchild))
        elif not gone(grandchild):
            os.kill(grandchild, signal.SIGKILL)
    finally:
        parent.kill()
