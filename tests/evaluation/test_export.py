"""An exported model predicts what the adapter on its base predicts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ft_dagster.evaluation.merge import DEQUANTIZED, MERGED, OWN, merge
from ft_dagster.evaluation.request import ExportRequest
from ft_dagster.model.manifest import read_manifest
from ft_dagster.training.request import TrainingRequest


@pytest.fixture
def make_request(trained: Callable[..., TrainingRequest], tmp_path: Path) -> Callable[..., ExportRequest]:
    """Train an adapter and build a request to merge it; keyword arguments change the recipe's base part."""

    def make(**base: Any) -> ExportRequest:
        request = trained(base=base)
        adapter, output = str(Path(request.attempt) / "adapter"), str(tmp_path / "merged")
        return ExportRequest(request.base, request.recipe, adapter, request.dataset, output, str(tmp_path / "offload"))

    return make


@torch.no_grad()
def logits(folder: str | Path, base: Any = None) -> torch.Tensor:
    tokens = torch.arange(3, 120)[None]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) if base is None else base
    return model(tokens, use_cache=False).logits.float()


def test_a_merged_model_needs_no_adapter_is_stored_like_its_base_and_scores_the_same(
    make_request: Callable[..., ExportRequest],
) -> None:
    request = make_request(dtype="float32")
    about = merge(request)
    assert about["merged_into"] == OWN and about["bits_per_byte"].keys() == {"adapter", OWN}
    assert about["bits_per_byte"][OWN] == pytest.approx(about["bits_per_byte"]["adapter"], rel=1e-2)
    output = Path(request.output)
    assert json.loads((output / MERGED).read_bytes()) == about
    assert read_manifest(output).key == read_manifest(Path(request.adapter)).key
    assert AutoTokenizer.from_pretrained(output).chat_template
    assert not list(output.glob("adapter_*")) and not [path for path in output.iterdir() if path.is_dir()]
    from peft import AutoPeftModelForCausalLM

    with_adapter = AutoPeftModelForCausalLM.from_pretrained(request.adapter, dtype=torch.float32)
    wanted = logits("", with_adapter)
    rounded, untuned = ((logits(folder) - wanted).abs().mean() for folder in (output, request.base["folder"]))
    assert rounded < untuned / 5, "what rounding to bfloat16 does is small beside what the adapter does"
    assert AutoModelForCausalLM.from_pretrained(output).dtype == torch.bfloat16


def test_both_ways_to_merge_a_quantized_base_are_measured_and_the_better_one_is_kept(
    make_request: Callable[..., ExportRequest],
) -> None:
    request = make_request(quantization="nf4")
    about = merge(request)
    measured = about["bits_per_byte"]
    assert measured.keys() == {"adapter", OWN, DEQUANTIZED}
    assert measured[about["merged_into"]] == min(measured[OWN], measured[DEQUANTIZED])
    assert abs(measured[DEQUANTIZED] - measured["adapter"]) < 0.02
    assert AutoModelForCausalLM.from_pretrained(request.output).dtype == torch.bfloat16


def test_without_held_out_text_nothing_is_measured(make_request: Callable[..., ExportRequest]) -> None:
    from dataclasses import replace

    about = merge(replace(make_request(), dataset=None))
    assert about == {"merged_into": OWN, "bits_per_byte": {}}
