"""LitGPT's LoRA finetuning, with one chapter per optimizer step, cut only at the model's context length.

It has no packing, so each chapter is a sequence, and nothing is padded. Precision is bf16-true or 32-true, including
the adapter. A chapter is about as long as a step of the recipe, so one chapter per step comes nearest to the recipe's
number of tokens per step.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from contender import Request, Stopwatch, TooLongError
from litgpt import Config
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import JSON
from litgpt.finetune import lora
from litgpt.prompts import Default
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from litgpt.tokenizer import Tokenizer
from safetensors.torch import save_file

MODEL = "SmolLM2-135M-Instruct"
LAYERS = {"attn.proj": "self_attn.o_proj", "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj"} | {
    "mlp.proj": "mlp.down_proj"
}
"""Names of linear layers: LitGPT's -> those of transformers. LitGPT's attn.qkv is three layers in transformers."""


def main() -> None:
    request = Request.read()
    torch.set_num_threads(request.threads)
    recipe = request.recipe
    output = Path(request.output)
    checkpoint = output / "base"
    shutil.copytree(request.base, checkpoint)
    convert_hf_checkpoint(checkpoint, model_name=MODEL)
    stopwatch = Stopwatch(int(Tokenizer(checkpoint).eos_id), request.patience_seconds)
    _count(stopwatch)
    lora.save_hyperparameters = lora.merge_lora = lambda *_, **__: (
        None
    )  # called after training; the former parses sys.argv
    texts = request.texts()
    (output / "data").mkdir()
    rows = [{"instruction": "", "output": text} for text in texts]
    (output / "data" / "train.json").write_text(json.dumps(rows), "utf-8")
    unused = [{"instruction": "Report", "output": "None."}]  # LitGPT requires data for validation and a sample
    (output / "data" / "val.json").write_text(json.dumps(unused), "utf-8")
    steps = stopwatch.expected_steps = len(texts) * request.epochs
    try:
        lora.setup(
            checkpoint_dir=checkpoint,
            out_dir=output / "trainer",
            precision={"bfloat16": "bf16-true", "float32": "32-true"}[request.number_format],
            lora_r=recipe["rank"],
            lora_alpha=recipe["alpha"],
            lora_dropout=recipe["dropout"],
            lora_key=True,
            lora_projection=True,
            lora_mlp=True,
            data=JSON(output / "data", prompt_style=Default(), num_workers=0),
            train=TrainArgs(
                save_interval=None,
                global_batch_size=1,
                micro_batch_size=1,
                lr_warmup_steps=max(1, round(recipe["warmup"] * steps)),
                epochs=request.epochs,
                max_seq_length=Config.from_name(MODEL).block_size,
            ),
            eval=EvalArgs(interval=steps + 1, max_new_tokens=1, max_iters=1, final_validation=False),
            optimizer={
                "class_path": "torch.optim.AdamW",
                "init_args": {"lr": recipe["learning_rate"], "weight_decay": recipe["weight_decay"]},
            },
            seed=recipe["seed"],
        )
    except TooLongError:
        stopwatch.write(request.output)
        return
    weights = torch.load(output / "trainer" / "final" / "lit_model.pth.lora")["model"]
    _save(weights, Config.from_name(MODEL), recipe, request)
    stopwatch.write(request.output)
    shutil.rmtree(checkpoint)
    shutil.rmtree(output / "trainer")


def _count(stopwatch: Stopwatch) -> None:
    loss = lora.chunked_cross_entropy

    def counted(logits: Any, targets: Any, *more: Any, **options: Any) -> Any:
        if torch.is_grad_enabled():  # not during validation
            labels = torch.nn.functional.pad(targets, (1, 0), value=-100)  # they are shifted already
            stopwatch.saw(labels, labels)
        return loss(logits, targets, *more, **options)

    lora.chunked_cross_entropy = counted


def _save(weights: dict[str, torch.Tensor], config: Config, recipe: dict[str, Any], request: Request) -> None:
    """Save the adapter in peft's format, so that the same code measures all adapters."""
    sizes = [config.n_head * config.head_size, *[config.n_query_groups * config.head_size] * 2]
    found: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        _, _, layer, rest = name.split(".", 3)  # transformer.h.LAYER.PART.lora_A
        part, _, kind = rest.rpartition(".lora_")
        own = {LAYERS[part]: weight} if part in LAYERS else _three(weight, kind, sizes)
        for target, matrix in own.items():
            found[f"base_model.model.model.layers.{layer}.{target}.lora_{kind}.weight"] = matrix.contiguous()
    save_file(found, Path(request.output, "adapter_model.safetensors"))
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": request.base,
        "r": recipe["rank"],
        "lora_alpha": recipe["alpha"],
        "target_modules": sorted({name.split(".lora_")[0].rpartition(".")[2] for name in found}),
    }
    Path(request.output, "adapter_config.json").write_text(json.dumps(about), "utf-8")


def _three(weight: torch.Tensor, kind: str, sizes: list[int]) -> dict[str, torch.Tensor]:
    """Split a joint q, k, v matrix: A (3 r, in) into equal parts, and B (out, r) by the sizes of the outputs."""
    parts = weight.chunk(3) if kind == "A" else weight.split(sizes)
    return {f"self_attn.{letter}_proj": part for letter, part in zip("qkv", parts, strict=True)}


if __name__ == "__main__":
    main()
