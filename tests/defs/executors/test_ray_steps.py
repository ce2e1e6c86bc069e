"""How a step on Ray is judged in rare states of a cluster, and which events of a step count."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster import DagsterEvent
from dagster_ray.core.executor import RayStepHandler
from ray.job_submission import JobStatus

from ft_dagster.config.settings import Settings, SettingsError
from ft_dagster.defs.executors.choice import executor_for
from ft_dagster.defs.executors.ray import EventFilter
from ft_dagster.defs.executors.ray_steps import HeadSilentError, RaySteps, forwarded

HERE = os.getpid()


class Ray:
    """A cluster with one job in the state that a test sets."""

    def __init__(self) -> None:
        self.status: JobStatus | Exception = JobStatus.RUNNING
        self.error_type: str | None = None
        self.message = "what Ray says"
        self.submission: Exception | None = None
        self.submitted: list[dict[str, Any]] = []

    def get_job_info(self, job: str) -> SimpleNamespace:
        if isinstance(self.status, Exception):
            raise self.status
        return SimpleNamespace(status=self.status, error_type=self.error_type, message=self.message)

    def submit_job(self, **asked: Any) -> None:
        if self.submission:
            raise self.submission
        self.submitted.append(asked)

    def stop_job(self, job: str) -> None:
        raise HeadSilentError("ConnectTimeout")


class Step:
    """The step lora_adapter in RaySteps, handled as by Dagster's executor."""

    def __init__(self, steps: RaySteps, key: str, pool: str | None) -> None:
        self.steps = steps
        self.context: Any = SimpleNamespace(
            execute_step_args=SimpleNamespace(run_id="run", step_keys_to_execute=[key], known_state=None),
            get_step_context=lambda _: SimpleNamespace(step=SimpleNamespace(key=key, pool=pool)),
        )

    def launch(self) -> None:
        list(self.steps.launch_step(self.context))

    def why_not(self) -> str | None:
        """Return why the step is not alive."""
        return self.steps.check_step_health(self.context).unhealthy_reason


@pytest.fixture
def ray() -> Ray:
    return Ray()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the messages in the run's log; Dagster's own part of a launch is left out."""
    told: list[str] = []

    def submit(steps: RaySteps, context: Any) -> Iterator[None]:
        yield steps.client.submit_job(
            submission_id=steps._get_ray_job_submission_id(context),
            environment=steps.runtime_env["env_vars"],
            cpus=steps.num_cpus,
            gpus=steps.num_gpus,
        )

    monkeypatch.setattr(RayStepHandler, "launch_step", submit)
    monkeypatch.setattr(
        DagsterEvent, "engine_event", lambda context, message, event_specific_data: told.append(message)
    )
    return told


class Clock:
    """The clock that RaySteps reads."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("ft_dagster.defs.executors.ray_steps.time", clock)
    return clock


@pytest.fixture
def step(ray: Ray, said: list[str], workspace: Path) -> Step:
    return on(ray, ray_patience_seconds=60)


def on(ray: Ray, key: str = "lora_adapter", pool: str | None = "gpu", **settings: Any) -> Step:
    steps = RaySteps(Settings(**settings))
    steps.client = ray  # type: ignore[assignment]
    return Step(steps, key, pool)


def test_a_running_or_waiting_job_is_alive_and_waiting_is_logged_once(ray: Ray, step: Step, said: list[str]) -> None:
    step.launch()
    ray.status = JobStatus.PENDING
    assert step.why_not() is None and step.why_not() is None
    assert len(said) == 1 and said[0].endswith("waits: what Ray says")
    ray.status = JobStatus.RUNNING
    assert step.why_not() is None


@pytest.mark.parametrize(
    ("status", "error_type", "reason", "lost"),
    [
        (JobStatus.STOPPED, None, "was stopped by somebody", False),
        (JobStatus.FAILED, "JOB_ENTRYPOINT_COMMAND_ERROR", "failed. what Ray says", False),
        (JobStatus.FAILED, "RUNTIME_ENV_SETUP_FAILURE", "failed. what Ray says", False),
        (JobStatus.FAILED, "JOB_SUPERVISOR_ACTOR_DIED", "was lost. what Ray says", True),
        (RuntimeError("Request failed with status code 404: no"), None, "does not know its job", True),
        (RuntimeError("Request failed with status code 400: no"), None, "refuses its job", False),
    ],
)
def test_a_job_that_ends_badly_fails_its_step_and_only_a_lost_host_is_retried(
    ray: Ray, step: Step, status: Any, error_type: str | None, reason: str, lost: bool
) -> None:
    step.launch()
    ray.status, ray.error_type = status, error_type
    assert reason in str(step.why_not())
    assert ("lora_adapter" in step.steps.lost) is lost
    step.launch()
    assert not step.steps.lost, "the next failure is judged by itself"


def test_a_job_that_succeeded_is_given_time_to_report_it(ray: Ray, step: Step, clock: Clock) -> None:
    step.launch()
    ray.status = JobStatus.SUCCEEDED
    assert step.why_not() is None
    clock.now += 59
    assert step.why_not() is None
    clock.now += 2
    assert "has not reported its end" in str(step.why_not())


def test_a_silent_head_is_tolerated_for_a_while_and_then_named(ray: Ray, step: Step, clock: Clock) -> None:
    step.launch()
    for status in (HeadSilentError("ReadTimeout"), JobStatus.RUNNING, HeadSilentError("ReadTimeout")):
        ray.status = status
        assert step.why_not() is None, "it has answered since, or not been silent for long"
        clock.now += 59
    clock.now += 2
    assert "has not answered for 61 s (ReadTimeout)" in str(step.why_not())


def test_a_step_is_submitted_when_the_head_answers(ray: Ray, step: Step) -> None:
    ray.submission = HeadSilentError("ConnectTimeout")
    step.launch()
    assert step.why_not() is None and not ray.submitted
    ray.submission = None
    assert step.why_not() is None and len(ray.submitted) == 1
    assert step.why_not() is None and len(ray.submitted) == 1


def test_a_submission_whose_response_was_lost_counts_and_a_refused_one_fails(ray: Ray, step: Step) -> None:
    ray.submission = RuntimeError("Job with submission_id x already exists.")
    step.launch()
    assert step.why_not() is None
    ray.submission = RuntimeError("Request failed with status code 400: no such option")
    step.steps._followed.clear()
    step.launch()
    assert "no such option" in str(step.why_not())


def test_a_step_whose_start_times_out_in_ray_is_submitted_again(ray: Ray, step: Step) -> None:
    step.launch()
    ray.status, ray.error_type = JobStatus.FAILED, "JOB_SUPERVISOR_ACTOR_START_TIMEOUT"
    for _ in range(3):
        assert step.why_not() is None
    jobs = [asked["submission_id"] for asked in ray.submitted]
    assert len(set(jobs)) == 4
    assert step.steps._get_ray_job_submission_id(step.context) == jobs[-1]


def test_a_run_can_be_canceled_while_the_head_is_unreachable(ray: Ray, step: Step, said: list[str]) -> None:
    list(step.steps.terminate_step(step.context))
    assert any("could not be stopped" in message for message in said)


def test_training_requests_gpus_and_threads_and_light_steps_neither(ray: Ray, said: list[str], workspace: Path) -> None:
    for key, pool, settings in (
        ("lora_adapter", "gpu", {"threads": 4}),
        ("sections", None, {"threads": 4}),
        ("adapter_evaluation", "gpu", {"ray_gpus": 0, "threads": 4}),
        ("adapter_evaluation", "gpu", {"ray_gpus": 0.5}),
    ):
        on(ray, key, pool, recipe="recipe.yaml", workspace=workspace, **settings).launch()
    assert [(asked["gpus"], asked["cpus"]) for asked in ray.submitted] == [(1, 4), (None, 1), (None, 4), (0.5, 1)]
    hidden = [asked["environment"].get("CUDA_VISIBLE_DEVICES") for asked in ray.submitted]
    assert hidden == [None, "", "", None]


@pytest.mark.parametrize(("gpus", "visible"), [(1, None), (0, "")])
def test_a_training_by_several_processes_waits_for_workers_without_a_gpu_of_its_own(
    ray: Ray, said: list[str], workspace: Path, tiny_recipe: dict[str, Any], gpus: float, visible: str | None
) -> None:
    tiny_recipe["training"] |= {"processes": 2, "rows_per_device": 1}
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe))
    for key in ("lora_adapter", "adapter_evaluation"):
        on(ray, key, recipe="recipe.yaml", workspace=workspace, threads=4, ray_gpus=gpus).launch()
    training, evaluation = ray.submitted
    assert (training["gpus"], training["cpus"]) == (None, 1)
    assert training["environment"].get("CUDA_VISIBLE_DEVICES") == visible, "what it says holds for its workers, too"
    assert (evaluation["gpus"], evaluation["cpus"]) == (gpus or None, 4)


def test_settings_are_sent_to_the_step_and_secrets_are_not(workspace: Path) -> None:
    environment = {
        "FT_RECIPE": "recipe.yaml",
        "HF_ENDPOINT": "https://hub.example",
        "AWS_ENDPOINT_URL": "http://10.0.0.1:9000",
        "AWS_SECRET_ACCESS_KEY": "canary",
        "AWS_SESSION_TOKEN": "canary",
        "HF_TOKEN": "canary",
        "HUGGINGFACE_TOKEN": "canary",
        "MLFLOW_TRACKING_URI": "canary",
        "MLFLOW_TRACKING_PASSWORD": "canary",
        "FT_DATABASE": "postgresql://user:canary@10.0.0.1/dagster",
        "HOME": "/canary",
    }
    told = forwarded(environment, Settings(workspace=workspace))
    assert "canary" not in str(told)
    assert told["FT_RECIPE"] == "recipe.yaml" and told["AWS_ENDPOINT_URL"] and told["HF_ENDPOINT"]
    assert told["FT_WORKSPACE"] == str(workspace), "also where it is only the current folder"
    assert told["DAGSTER_HOME"] == str(workspace / ".dagster")


def event(kind: dg.DagsterEventType, pid: int) -> Any:
    """Return a stand-in for one of Dagster's events."""
    return SimpleNamespace(event_type=kind, step_key="lora_adapter", pid=pid)


STARTING = event(dg.DagsterEventType.STEP_WORKER_STARTING, HERE)
RETRY = event(dg.DagsterEventType.STEP_UP_FOR_RETRY, HERE)


def started(pid: int) -> Any:
    return event(dg.DagsterEventType.STEP_WORKER_STARTED, pid)


def ended(pid: int) -> Any:
    return event(dg.DagsterEventType.STEP_SUCCESS, pid)


def test_events_of_an_abandoned_step_are_ignored_whenever_they_arrive() -> None:
    given_up, now = HERE + 1, HERE + 2
    event_filter = EventFilter()
    before = [STARTING, started(given_up), RETRY]
    assert list(event_filter.current(before)) == before
    assert list(event_filter.current([ended(given_up)])) == [], "before it is started again"
    assert list(event_filter.current([STARTING, ended(given_up), started(now)])) == [STARTING, started(now)]
    assert list(event_filter.current([ended(given_up), started(given_up), ended(now)])) == [ended(now)]
    assert list(event_filter.current([ended(given_up), event(dg.DagsterEventType.STEP_FAILURE, HERE)])) == []


def test_the_first_of_two_final_events_of_a_step_counts() -> None:
    event_filter = EventFilter()
    failed = event(dg.DagsterEventType.STEP_FAILURE, HERE)
    told = [STARTING, started(HERE + 1), ended(HERE + 1), failed]
    assert list(event_filter.current(told)) == told[:-1]


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ft_dagster.defs.executors.choice.find_spec", lambda _: None)
    with pytest.raises(SettingsError, match=r"pip install 'ft_dagster\[ray\]'"):
        executor_for(Settings(executor="ray"))
