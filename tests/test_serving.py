"""The released adapter behind OpenAI's protocol, asked by OpenAI's own client."""

import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import COMMAND, as_process, ft_dagster, on_one_line, work_in_copy
from dagster_dev import wait_until
from openai import NotFoundError, OpenAI
from processes import free_port
from servers import serving

from ft_dagster import load_released

ASKED = [{"role": "user", "content": "Which harbour was dredged?"}]
LONG = 20_000
"""More tokens than the tiny model finishes while a test does something else."""


@dataclass(frozen=True)
class Served:
    """A workspace whose released adapter is served."""

    workspace: Path
    client: OpenAI
    process: subprocess.Popen[bytes]
    log: Path


@contextmanager
def serve(workspace: Path) -> Iterator[Served]:
    """Run `ft-dagster serve` on the workspace that the environment names."""
    port, log = free_port(), workspace.parent / "server.log"
    address = f"http://127.0.0.1:{port}"
    with (
        serving([*COMMAND, "serve", "--port", str(port)], f"{address}/health", log) as process,
        OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        yield Served(workspace, client, process, log)


@pytest.fixture(scope="module")
def served(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Start a server that several tests query; the last of them stops it."""
    with pytest.MonkeyPatch.context() as patch:
        workspace = work_in_copy(finished, tmp_path_factory.mktemp("served"), patch)
        with serve(workspace) as served:
            yield served


def in_use(workspace: Path) -> str:
    return (workspace / "fine_tuned_model").resolve().name


def test_the_openai_client_gets_answers_of_the_released_adapter_and_its_key(served: Served) -> None:
    client = served.client
    key = in_use(served.workspace)
    assert {model.id for model in client.models.list()} == {"released", key}
    answer = client.chat.completions.create(model="released", messages=ASKED, max_tokens=5, temperature=0)
    assert answer.model == key
    assert answer.usage and answer.usage.completion_tokens == 5
    streamed = client.chat.completions.create(
        model="released", messages=ASKED, max_tokens=5, temperature=0, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert text == answer.choices[0].message.content
    with pytest.raises(NotFoundError, match="Ask for 'released'"):
        client.chat.completions.create(model="another/model", messages=ASKED)


def test_served_answers_are_those_of_the_adapter_and_not_of_the_base(served: Served) -> None:
    client = served.client
    model, tokenizer = load_released(served.workspace)
    inputs = tokenizer("The harbour", return_tensors="pt")

    def written() -> str:
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    answer = client.completions.create(model="released", prompt="The harbour", max_tokens=12, temperature=0)
    assert answer.choices[0].text == written()
    with model.disable_adapter():
        assert answer.choices[0].text != written()


def test_a_release_that_cannot_be_loaded_leaves_the_previous_one_serving(served: Served) -> None:
    workspace = served.workspace
    first = in_use(workspace)
    link = workspace / "fine_tuned_model"
    broken = workspace / ".ft" / "released" / "broken"
    shutil.copytree(link.resolve(), broken)
    (broken / "adapter_model.safetensors").write_bytes(b"damaged")
    link.unlink()
    link.symlink_to(broken)
    wait_until(lambda: "cannot be loaded" in served.log.read_text(), "the damage is said")
    assert served.client.completions.create(model="released", prompt="The harbour", max_tokens=3).model == first


def test_ctrl_c_stops_the_server_without_a_traceback(served: Served) -> None:
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(30) == 130
    assert "Traceback" not in served.log.read_text()


def test_a_new_release_is_served_while_an_earlier_request_is_still_being_answered(
    two_adapters: Path,
) -> None:
    first = in_use(two_adapters)
    with serve(two_adapters) as served:
        client = served.client
        with client.completions.create(
            model="released", prompt="The harbour", max_tokens=LONG, temperature=0, stream=True
        ) as stream:
            assert next(iter(stream)).model == first
            assert ft_dagster("release", "promote", "second", "--why", "a try").returncode == 0
            wait_until(lambda: "second" in {model.id for model in client.models.list()}, "the new release answers")
            later = [next(iter(stream)) for _ in range(20)]
            assert {chunk.model for chunk in later} == {first}
            assert "".join(chunk.choices[0].text for chunk in later)
        answer = client.completions.create(model="released", prompt="The harbour", max_tokens=3)
        assert answer.model == "second"
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(30) in (0, -signal.SIGTERM)


def test_a_port_in_use_is_reported_with_what_to_do(two_adapters: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = as_process("serve", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 1 and "Name another one with --port" in done.stderr


def test_serving_without_a_release_is_refused(workspace: Path) -> None:
    done = as_process("serve")
    assert done.returncode == 1 and "Nothing is released" in on_one_line(done.stderr)
