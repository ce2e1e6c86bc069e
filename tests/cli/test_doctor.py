"""`ft-dagster doctor` reports what this machine can run and what prevents training the recipe."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import ft_dagster, on_one_line

from ft_dagster.cli.examination import examine
from ft_dagster.config.settings import load_settings

GPU = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa1111-0000-0000-0000-000000000000)"


@pytest.fixture(scope="module")
def machine() -> dict[str, Any]:
    from ft_dagster.model.inspection import inspect

    return inspect()


def test_a_machine_that_can_train_the_recipe_has_no_problem(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUGGINGFACE_TOKEN", "hf_canary")
    done = ft_dagster("doctor", "--json")
    assert done.returncode == 0, done.stderr
    seen = {finding["subject"]: finding for finding in json.loads(done.stdout)}
    assert {finding["status"] for finding in seen.values()} <= {"ok", "warning"}
    assert "for CPUs" in seen["libraries"]["text"] and "GiB for a process" in seen["device"]["text"]
    assert seen["nf4 weights"]["text"] == seen["int8 weights"]["text"] == "yes"
    assert seen["recipe"]["text"].startswith("tiny (") and "GiB" in seen["memory"]["text"]
    assert seen["HUGGINGFACE_TOKEN"]["text"] == "set" and "canary" not in done.stdout
    assert not (workspace / ".ft").exists() and not (workspace / ".dagster").exists(), "it changes nothing"


@pytest.mark.parametrize(
    ("parts", "subject", "said"),
    [
        ({"base": {"dtype": "float16"}}, "recipe", "float16 needs a GPU"),
        ({"training": {"processes": 2, "strategy": "fsdp"}}, "recipe", "fsdp needs GPUs"),
        ({"base": {"model": "/nowhere"}}, "base model", "/nowhere"),
        ({"tokens": {"block_length": 2**24}}, "memory", "each process of training takes about"),
        ({"training": {"epoch": 1}}, "recipe", "did you mean epochs?"),
    ],
)
def test_what_prevents_training_the_recipe_is_a_problem(
    workspace: Path, tiny_recipe: dict[str, Any], machine: dict[str, Any], parts: Any, subject: str, said: str
) -> None:
    content = tiny_recipe | {name: tiny_recipe.get(name, {}) | fields for name, fields in parts.items()}
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(content), "utf-8")
    finding = next(found for found in examine(load_settings(), machine) if found.subject == subject)
    assert finding.status == "problem" and said in finding.text


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (
            {"FT_EXECUTOR": "ray", "FT_RAY_ADDRESS": "http://127.0.0.1:9"},
            "the head at http://127.0.0.1:9 does not answer",
        ),
        ({"FT_EXECUTOR": "k8s", "FT_K8S": "pods.yaml"}, "No such file"),
    ],
)
def test_an_engine_that_cannot_be_reached_is_a_problem(
    workspace: Path, machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    finding = next(found for found in examine(load_settings(), machine) if found.subject == "FT_EXECUTOR")
    assert finding.status == "problem" and said in finding.text


def test_a_problem_is_exit_code_1(workspace: Path, machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ft_dagster.cli.examination._inspect", lambda: machine)
    (workspace / "recipe.yaml").unlink()
    done = ft_dagster("doctor")
    assert done.returncode == 1 and "There is no recipe 'recipe.yaml'" in on_one_line(done.stdout)


def test_a_gpu_that_torch_does_not_see_is_reported(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\necho '{GPU}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    done = ft_dagster("doctor")
    assert done.returncode == 0, done.stderr
    assert "nvidia-smi lists 1 GPUs, torch sees 0." in on_one_line(done.stdout)
