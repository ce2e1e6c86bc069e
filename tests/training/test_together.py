"""Several processes that train together give the result of a single one.

How they are stopped and resume is tested in tests/system/test_together_ended.py.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import shared_base
import torch
from datasets import Dataset
from safetensors.torch import load_file
from trainings import asked, made

from ft_dagster.errors import TrainingError
from ft_dagster.runtime.processes import run_together
from ft_dagster.training.request import WEIGHTS, TrainingRequest
from ft_dagster.training.train import train

NF4 = {"base": {"quantization": "nf4"}}
FLOAT32 = {"base": {"dtype": "float32"}, "lora": {"dropout": 0.0}}
"""Float32, in which the order of sums is not visible; in bf16 it shows in the fourth digit."""


@pytest.mark.parametrize("base", [{}, NF4], ids=["whole", "nf4"])
def test_two_processes_have_the_losses_of_one_to_five_digits(
    request_for: Callable[..., TrainingRequest], base: dict[str, Any]
) -> None:
    alone_request = request_for("alone", **asked(1, FLOAT32, base))
    together_request = request_for("together", **asked(2, FLOAT32, base))
    alone, together = made(alone_request), made(together_request)
    rows = json.loads((Path(alone_request.dataset) / "artifact.json").read_bytes())["about"]["splits"]["train"]["rows"]
    assert rows % 2, "the last row of an epoch leaves one process without any"
    assert [row["supervised_tokens"] for row in together["history"]] == [
        row["supervised_tokens"] for row in alone["history"]
    ]
    for one, two in zip(alone["history"], together["history"], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    mine, theirs = (load_file(Path(r.attempt) / "adapter" / WEIGHTS) for r in (alone_request, together_request))
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], atol=1e-5, rtol=1e-3)
    assert together["reloads"] and together["largest_logit_change"] > 0


def test_a_sharded_base_has_the_loss_and_gradients_of_a_whole_one(
    request_for: Callable[..., TrainingRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_for("shared", **asked(2, FLOAT32, fused=False))
    path = request.write(Path(request.attempt) / "request.json")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    assert run_together("shared_base", path, 2, 1) == 0
    parts = [json.loads(Path(f"{path}.{rank}").read_bytes()) for rank in range(2)]
    alone = shared_base.look(request, shared=False)
    assert sum(part["nats"] for part in parts) == pytest.approx(alone["nats"], rel=1e-6)
    for name, gradient in alone["gradients"].items():
        assert parts[0]["gradients"][name] == parts[1]["gradients"][name] == pytest.approx(gradient, abs=1e-4), name


def test_one_process_where_two_were_requested_is_refused(request_for: Callable[..., TrainingRequest]) -> None:
    with pytest.raises(TrainingError, match=r"asks for 2 processes.*and 1 train"):
        train(request_for("refused", **asked(2)), lambda _: None)


def test_fsdp_is_refused_on_a_cpu(request_for: Callable[..., TrainingRequest]) -> None:
    with pytest.raises(TrainingError, match=r"training.strategy: fsdp needs GPUs"):
        train(request_for("refused", **asked(2, strategy="fsdp")), lambda _: None)


@pytest.mark.parametrize("rows", range(1, 14))
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_shares_of_all_processes_are_the_rows_of_one_process_in_order(
    rows: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.data_loader import SeedableRandomSampler

    from ft_dagster.model import ranks
    from ft_dagster.training import shares

    monkeypatch.setattr(ranks, "count", lambda: processes)
    for epoch in (0, 3):
        alone = SeedableRandomSampler(Dataset.from_dict({"row": list(range(rows))}), data_seed=17)
        alone.set_epoch(epoch)
        order = list(alone)
        taken = []
        for rank in range(processes):
            monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
            mine = shares.Shares(rows, at_once=2, seed=17)
            mine.set_epoch(epoch)
            taken.append(list(mine))
            assert len(taken[-1]) == len(mine)
        passes = zip(*taken, strict=True)
        assert [row for one_pass in passes for share in one_pass for row in share] == order
