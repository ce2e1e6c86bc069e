"""A step as a Ray job: the resources that it requests, the environment that it gets, and whether it is alive."""

import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dagster import DagsterEvent
from dagster._core.events import EngineEventData  # private: no public way to add an event of the engine
from dagster._core.executor.step_delegating import (  # private: the interface of step handlers, which dagster-ray has
    CheckStepHealthResult,
    StepHandlerContext,
)
from dagster_ray.core.executor import RayStepHandler
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from requests.exceptions import ConnectionError as NoConnection
from requests.exceptions import Timeout

from ft_dagster.config.recipe_file import load_recipe
from ft_dagster.config.redaction import SECRETS
from ft_dagster.config.settings import Settings
from ft_dagster.defs.stages import LORA_ADAPTER
from ft_dagster.defs.workspace import GPU_POOL

_ANSWER_SECONDS = 10.0
_STOP_SECONDS = 75
"""Time from the signal that stops a job to SIGKILL, in which a training saves a checkpoint."""
_FORWARDED = re.compile(
    "FT_.*|HF_.*|NCCL_.*|GLOO_.*|AWS_ENDPOINT_URL.*|AWS_(DEFAULT_)?REGION|DAGSTER_HOME|DAGSTER_DISABLE_TELEMETRY"
    "|MLFLOW_EXPERIMENT_NAME|PYTHONPATH"
)
_PASSWORD = re.compile("://[^/@]*:[^/@]*@")
_HOST_LOST = {"JOB_SUPERVISOR_ACTOR_DIED", "JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE", "JOB_SUPERVISOR_ACTOR_START_FAILURE"}
_SUBMITTED_BEFORE = "already exists"
_NO_PLACE = "JOB_SUPERVISOR_ACTOR_START_TIMEOUT"


def forwarded(environment: Mapping[str, str], settings: Settings) -> dict[str, str]:
    """Return the environment variables that a step gets: this process's settings and paths, but no secrets.

    Ray shows the environment of a job to anyone who can reach its dashboard. Secrets come from the `.env` of the
    workspace, or from the environment of each host.
    """
    public = {
        name: value
        for name, value in environment.items()
        if _FORWARDED.fullmatch(name) and name not in SECRETS and not _PASSWORD.search(value)
    }
    return public | {
        "FT_WORKSPACE": str(settings.workspace),
        "DAGSTER_HOME": str(settings.dagster_home.absolute()),
        "PYTHONHASHSEED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "PATH": f"{Path(sys.executable).parent}:${{PATH}}",  # the command that Ray starts is `dagster`
    }


class HeadSilentError(Exception):
    """The head of the cluster does not answer, or answers with a server error."""


class _Head(JobSubmissionClient):
    """Ray's client, without a connection to the head before there is a job, and with a timeout for every answer."""

    def _check_connection_and_version(self, min_version: str = "", version_error_message: str = "") -> None:
        pass

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        try:
            answer = super()._do_request(method, endpoint, timeout=_ANSWER_SECONDS, **options)
        except (NoConnection, Timeout) as error:
            raise HeadSilentError(type(error).__name__) from error
        if answer.status_code >= 500 and _SUBMITTED_BEFORE not in answer.text:
            raise HeadSilentError(f"status {answer.status_code}, {answer.text.strip()[-200:]}")
        return answer


class RaySteps(RayStepHandler):
    """Starts, follows and stops steps as dagster-ray does, but also detects failures for which that waits forever."""

    def __init__(self, settings: Settings) -> None:
        os.environ.pop("RAY_ADDRESS", None)  # it would override the address below
        super().__init__(_Head(settings.ray_address), None, None, None, None, None, None)
        self._settings = settings
        self._followed: dict[str, _Followed] = {}
        self.lost: set[str] = set()
        """Steps whose last failure was the loss of their host."""

    @property
    def name(self) -> str:
        return "RaySteps"

    def launch_step(self, step_handler_context: StepHandlerContext) -> Iterator[DagsterEvent]:
        job = self._get_ray_job_submission_id(step_handler_context)
        step = step_handler_context.get_step_context(self._get_step_key(step_handler_context)).step
        followed = self._followed.setdefault(job, _Followed())
        self.lost.discard(step.key)
        only_waits = self._only_waits(step.key)
        computes = step.pool == GPU_POOL and not only_waits
        gpus = self._settings.ray_gpus if computes else 0.0
        environment = forwarded(os.environ, self._settings) | {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_SECONDS)}
        for_workers = only_waits and self._settings.ray_gpus  # workers get their GPUs from Ray
        self.runtime_env = {"env_vars": environment | ({} if gpus or for_workers else {"CUDA_VISIBLE_DEVICES": ""})}
        self.num_gpus = gpus or None
        self.num_cpus = (self._settings.threads if computes else None) or 1
        try:
            yield from super().launch_step(step_handler_context)
            followed.submitted = True
        except HeadSilentError as error:  # the next health check tries again
            followed.mark_silent(error)
        except (RuntimeError, AuthenticationError) as error:
            followed.submitted = _SUBMITTED_BEFORE in str(error)  # then only the answer was lost
            followed.refused = None if followed.submitted else str(error)

    def check_step_health(self, step_handler_context: StepHandlerContext) -> CheckStepHealthResult:
        job = self._get_ray_job_submission_id(step_handler_context)
        followed = self._followed.setdefault(job, _Followed(submitted=True))
        try:
            if not followed.submitted and not followed.refused:
                list(self.launch_step(step_handler_context))
            if followed.submitted:
                return self._judge(step_handler_context, job, followed, self.client.get_job_info(job))
        except HeadSilentError as error:
            followed.mark_silent(error)
        except AuthenticationError as error:
            followed.refused = str(error)
        except RuntimeError as error:
            if "status code 404" not in str(error):
                followed.refused = str(error)
            else:
                self.lost.add(self._get_step_key(step_handler_context))
                return _unhealthy(f"Ray does not know its job {job} any more; the cluster was restarted.")
        if followed.refused:
            return _unhealthy(f"Ray at {self._settings.ray_address} refuses its job: {followed.refused}")
        silent = time.monotonic() - followed.silent_since if followed.silent_since else 0.0
        if silent > self._settings.ray_patience_seconds:
            return _unhealthy(
                f"The head of the Ray cluster, {self._settings.ray_address}, has not answered for {silent:.0f} s "
                f"({followed.silence}). Start it, or fix FT_RAY_ADDRESS, and run again: training continues from "
                "its last checkpoint."
            )
        return CheckStepHealthResult.healthy()

    def terminate_step(self, step_handler_context: StepHandlerContext) -> Iterator[DagsterEvent]:
        try:
            yield from super().terminate_step(step_handler_context)
        except (HeadSilentError, RuntimeError) as error:
            step = step_handler_context.get_step_context(self._get_step_key(step_handler_context))
            message = f"Its Ray job could not be stopped: {error}"
            yield DagsterEvent.engine_event(step, message, EngineEventData())

    def _only_waits(self, step: str) -> bool:
        """Whether a step only waits for several training processes, Ray workers that request GPUs themselves."""
        recipe = load_recipe(self._settings.recipe, self._settings.workspace)
        return step == LORA_ADAPTER.name and recipe.training.processes > 1

    def _get_ray_job_submission_id(self, step_handler_context: StepHandlerContext) -> str:
        job = super()._get_ray_job_submission_id(step_handler_context)
        while (followed := self._followed.get(job)) and followed.asked_again:
            job += "-again"
        return job

    def _judge(
        self, step_handler_context: StepHandlerContext, job: str, followed: "_Followed", found: JobDetails
    ) -> CheckStepHealthResult:
        followed.silent_since = None
        match found.status:
            case JobStatus.STOPPED:
                return _unhealthy(f"Its Ray job {job} was stopped by somebody, but not through Dagster.")
            case JobStatus.SUCCEEDED:
                followed.ended_at = followed.ended_at or time.monotonic()
                if time.monotonic() - followed.ended_at > self._settings.ray_patience_seconds:
                    return _unhealthy(
                        f"Its Ray job {job} ended, but the step has not reported its end. Its host may not be able to "
                        "reach Dagster's storage."
                    )
            case JobStatus.FAILED if found.error_type in _HOST_LOST:
                self.lost.add(self._get_step_key(step_handler_context))
                return _unhealthy(f"The host of its Ray job {job} was lost. {found.message}")
            case JobStatus.FAILED if found.error_type == _NO_PLACE:  # Ray gave up waiting for resources
                followed.asked_again = True
                list(self.launch_step(step_handler_context))
            case JobStatus.FAILED:
                return _unhealthy(f"Its Ray job {job} failed. {found.message}")
            case JobStatus.PENDING if not followed.said_to_wait:
                followed.said_to_wait = True
                step = step_handler_context.get_step_context(self._get_step_key(step_handler_context))
                DagsterEvent.engine_event(step, f"Its Ray job {job} waits: {found.message}", EngineEventData())
        return CheckStepHealthResult.healthy()


@dataclass
class _Followed:
    """The state of a job that was or will be submitted."""

    submitted: bool = False
    refused: str | None = None
    """Ray's message, if it refused the job."""
    asked_again: bool = False
    """Whether Ray found no resources for the job and gave up, so that another job replaces it."""
    said_to_wait: bool = False
    silent_since: float | None = None
    silence: str = ""
    ended_at: float | None = None

    def mark_silent(self, error: HeadSilentError) -> None:
        self.silent_since = self.silent_since or time.monotonic()
        self.silence = str(error)


def _unhealthy(reason: str) -> CheckStepHealthResult:
    return CheckStepHealthResult.unhealthy(reason)
