"""Processes that train together resume from their checkpoint after a kill or a stop, and none is left over."""

import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from processes import inheriting
from trainings import asked, made, start, start_interpreter, wait_until, weights

from ft_dagster.training.request import RESULT, TrainingRequest


def last_step(attempt: Path) -> int:
    return max((int(path.parent.name.split("-")[1]) for path in attempt.glob("checkpoint-*/complete")), default=0)


def test_processes_that_train_together_resume_exactly_where_they_were(
    request_for: Callable[..., TrainingRequest],
) -> None:
    parts = asked(2, {"lora": {"dropout": 0.1}}, epochs=3, save_every=2)
    undisturbed, stopped = request_for("undisturbed", **parts), request_for("stopped", **parts)
    expected = made(undisturbed)
    attempt = Path(stopped.attempt)
    for number, code in ((signal.SIGKILL, 1), (signal.SIGTERM, 130)):
        before = last_step(attempt)
        process = start(stopped)
        wait_until(lambda before=before: last_step(attempt) > before, process)
        ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if "RANK" in p.environ()]
        assert len(ranks) == 2
        (ranks[1] if number == signal.SIGKILL else psutil.Process(process.pid)).send_signal(number)
        said = process.communicate()[1]
        assert process.returncode == code, said
        assert not (attempt / RESULT).exists()
        psutil.wait_procs(ranks, timeout=10)
        assert not any(p.is_running() for p in ranks)
    found = made(stopped)
    assert found["resumed_from"] > 0
    assert found["history"] == expected["history"]
    assert weights(stopped) == weights(undisturbed)


def test_no_training_process_is_left_when_its_parent_is_killed(
    request_for: Callable[..., TrainingRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_for("killed", **asked(2, epochs=50))
    monkeypatch.setenv("FT_TEST_MARK", request.attempt)
    process = start_interpreter(request)
    wait_until(lambda: any(Path(request.attempt).glob("checkpoint-*/complete")), process)
    left = [p for p in inheriting("FT_TEST_MARK", request.attempt) if p.pid != process.pid]
    assert len(left) >= 3, "torchrun and its two"
    process.kill()
    process.communicate()
    psutil.wait_procs(left, timeout=30)
    assert not inheriting("FT_TEST_MARK", request.attempt)
