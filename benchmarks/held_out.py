"""Measure held-out bits per byte of a base and of any adapters: `python benchmarks/held_out.py REQUEST.json`.

This measures the same as `ft_dagster.evaluation`, but also accepts adapters without a manifest. The request is an
EvaluationRequest; the result, bits per byte by name, is printed as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from ft_dagster.dataset.dataset import load_shards
from ft_dagster.evaluation.request import EvaluationRequest
from ft_dagster.model.load import load_base
from ft_dagster.model.packed_model import PackedModel
from ft_dagster.model.scoring import score
from ft_dagster.store.local import Artifact


def main() -> None:
    request = EvaluationRequest.read(Path(sys.argv[1]))
    if request.threads:
        torch.set_num_threads(request.threads)
    recipe, base = request.resolved_recipe(), request.prepared_base()
    held_out = list(load_shards(Artifact.open(Path(request.dataset)), "held_out"))
    end_id = AutoTokenizer.from_pretrained(base.folder).eos_token_id
    (first, folder), *others = request.adapters.items()
    model: Any = PeftModel.from_pretrained(load_base(base, recipe, Path(request.offload)), folder, adapter_name=first)
    for name, other in others:
        model.load_adapter(other, adapter_name=name)
    packed = PackedModel(model, recipe)
    with model.disable_adapter():
        found = {"base": score(packed, held_out, end_id)["bits_per_byte"]}
    for name in request.adapters:
        model.set_adapter(name)
        found[name] = score(packed, held_out, end_id)["bits_per_byte"]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
