"""No code in a file is run: weights are safetensors, state is read as numbers, and a base's code is ignored."""

import ast
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as shares

import ft_dagster
from ft_dagster.base.model_folder import BaseModelError
from ft_dagster.base.prepare import base_version, prepare_base
from ft_dagster.config.recipe import Base
from ft_dagster.config.recipe_file import RecipeError, resolve_recipe
from ft_dagster.errors import TrainingError
from ft_dagster.model.load import load_base
from ft_dagster.training.attempts import last_checkpoint, mark_complete
from ft_dagster.training.checkpoints import require_plain_state
from ft_dagster.training.request import TrainingRequest
from ft_dagster.training.train import train


class Payload:
    """An object that makes a folder when its pickle is loaded carelessly."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


class DiedError(Exception):
    """Stands for a process that dies."""


@pytest.fixture
def stopped(request_for: Callable[..., TrainingRequest]) -> TrainingRequest:
    """Return the request of a training that died and left a checkpoint."""

    def die(metrics: dict[str, Any]) -> None:
        if metrics.get("step") == 3:
            raise DiedError

    request = request_for("stopped", training={"save_every": 2})
    with pytest.raises(DiedError):
        train(request, die)
    return request


def checkpoint_of(request: TrainingRequest) -> Path:
    found = last_checkpoint(Path(request.attempt))
    assert found is not None
    return found


def test_the_payload_runs_when_it_is_unpickled_carelessly(tmp_path: Path) -> None:
    torch.save({"state": Payload(tmp_path / "ran")}, tmp_path / "optimizer.pt")
    torch.load(tmp_path / "optimizer.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_with_a_payload_is_refused_by_name_and_the_payload_is_not_run(
    stopped: TrainingRequest, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # makes PyTorch less careful
    checkpoint = checkpoint_of(stopped)
    plain = (checkpoint / name).read_bytes()
    torch.save({"state": Payload(tmp_path / "ran")}, checkpoint / name)
    mark_complete(checkpoint)  # an attacker who can write there also writes the hashes
    with pytest.raises(TrainingError) as caught:
        train(stopped, lambda _: None)
    assert str(caught.value).startswith(f"{checkpoint / name} is not plain training state")
    assert f"Delete the folder {checkpoint}" in str(caught.value)
    assert not (tmp_path / "ran").exists()
    (checkpoint / name).write_bytes(plain)
    mark_complete(checkpoint)
    assert train(stopped, lambda _: None)["resumed_from"] == 2


def test_checkpoints_contain_no_pickled_objects(stopped: TrainingRequest) -> None:
    names = {path.name for path in checkpoint_of(stopped).iterdir()}
    assert "training_args.bin" not in names and "adapter_model.safetensors" in names


def test_checkpoints_of_fsdp_processes_are_inspected_before_pytorch_reads_them(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1" / "optimizer_0"
    weights = {"a": torch.ones(3, 2, dtype=torch.bfloat16), "step": 4, "groups": [{"rate": 0.1}]}
    shares.save(weights, checkpoint_id=folder, no_dist=True)
    require_plain_state(folder.parent)
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(TrainingError, match=r"\.metadata is not plain training state, .*names posix\.mkdir"):
        require_plain_state(folder.parent)
    (folder / ".metadata").write_bytes(b"ctorch.serialization\nload\n(S'x'\ntR.")
    with pytest.raises(TrainingError, match=r"names torch\.serialization\.load"):
        require_plain_state(folder.parent)
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def folder(tiny_base: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny base that a test may change."""
    return shutil.copytree(tiny_base, tmp_path / "model")


def base_in(folder: Path) -> Base:
    return Base(source="folder", model=str(folder))


def test_a_base_with_pickled_weights_only_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"state": Payload(tmp_path / "ran")}, folder / "pytorch_model.bin")
    for look in (base_version, lambda base: prepare_base(base, tmp_path / "cache")):
        with pytest.raises(BaseModelError, match=rf"^{folder}/pytorch_model\.bin is a pickle"):
            look(base_in(folder))
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_next_to_safetensors_are_ignored(
    folder: Path, tmp_path: Path, tiny_recipe: dict[str, Any]
) -> None:
    torch.save({"state": Payload(tmp_path / "ran")}, folder / "pytorch_model.bin")
    prepared = prepare_base(base_in(folder), tmp_path / "cache")
    load_base(prepared, resolve_recipe(tiny_recipe), tmp_path / "offload")
    assert not (tmp_path / "ran").exists()


def test_weights_that_no_hash_covers_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    with pytest.raises(BaseModelError, match=r"no model\.safetensors\.index\.json"):
        prepare_base(base_in(folder), tmp_path / "cache")
    for name in ("pytorch_model.bin", "../elsewhere.safetensors"):
        index = {"weight_map": {"a": "model-1.safetensors", "b": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(BaseModelError, match=rf"index\.json names {name}, which is not one of"):
            prepare_base(base_in(folder), tmp_path / "cache")


def test_code_that_comes_with_a_base_is_not_run(folder: Path, tmp_path: Path, tiny_recipe: dict[str, Any]) -> None:
    (folder / "modeling_own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own", "AutoConfig": "modeling_own.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    prepared = prepare_base(base_in(folder), tmp_path / "cache")
    model = load_base(prepared, resolve_recipe(tiny_recipe), tmp_path / "offload")
    assert type(model).__name__ == "MistralForCausalLM" and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("part", ["base", "training"])
def test_no_recipe_field_enables_remote_code(tiny_recipe: dict[str, Any], part: str) -> None:
    tiny_recipe[part] = tiny_recipe[part] | {"trust_remote_code": True}
    with pytest.raises(RecipeError, match=rf"{part}\.trust_remote_code is not a field of a recipe"):
        resolve_recipe(tiny_recipe)


def test_every_call_that_could_run_remote_code_forbids_it() -> None:
    wanted = {"AutoTokenizer": "trust_remote_code", "AutoModelForCausalLM": "trust_remote_code"}
    calls = 0
    for path in Path(ft_dagster.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            says = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if node.func.attr == "from_pretrained" and owner in wanted:
                assert says.get("trust_remote_code") == "False", path
                calls += 1
            if (owner, node.func.attr) == ("torch", "load"):
                assert says.get("weights_only") == "True", path
                calls += 1
            assert (owner, node.func.attr) not in {("pickle", "load"), ("pickle", "loads")}, path
    assert calls >= 8
