"""TRL's SFTTrainer with packing. Options: `strategy` (bfd, its default, or a lossless one) and `best`, see below.

If `best` is false, everything else is TRL's default: weights in float32, computed in bfloat16 under autocast if that is
the number format, and gradient checkpointing. If `best` is true, frozen weights are in the number format, the adapter
is in float32, and there is no checkpointing.
"""

from contextlib import suppress
from typing import Any

import torch
from contender import Request, Stopwatch, TooLongError, count_in_trainer
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main() -> None:
    request = Request.read()
    torch.set_num_threads(request.threads)
    recipe, options = request.recipe, request.options
    tokenizer = AutoTokenizer.from_pretrained(request.base)
    stopwatch = Stopwatch(tokenizer.eos_token_id, request.patience_seconds)
    count_in_trainer(stopwatch)
    best: dict[str, Any] = {"gradient_checkpointing": False, "model_init_kwargs": {"dtype": request.number_format}}
    trainer = SFTTrainer(
        model=request.base,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"text": request.texts()}),
        peft_config=LoraConfig(
            r=recipe["rank"],
            lora_alpha=recipe["alpha"],
            lora_dropout=recipe["dropout"],
            target_modules=recipe["targets"],
            task_type="CAUSAL_LM",
        ),
        args=SFTConfig(
            output_dir=f"{request.output}/trainer",
            packing=True,
            packing_strategy=options["strategy"],
            max_length=recipe["block_length"],
            num_train_epochs=request.epochs,
            per_device_train_batch_size=recipe["rows_per_device"],
            gradient_accumulation_steps=recipe["rows_per_step"] // recipe["rows_per_device"],
            learning_rate=recipe["learning_rate"],
            lr_scheduler_type=recipe["schedule"],
            warmup_steps=recipe["warmup"],
            weight_decay=recipe["weight_decay"],
            max_grad_norm=recipe["gradient_clip"],
            seed=recipe["seed"],
            use_cpu=True,
            bf16=request.number_format == "bfloat16",
            logging_steps=1,
            report_to="none",
            **(best if options["best"] else {}),
        ),
    )
    with suppress(TooLongError):
        trainer.train()
    trainer.save_model(request.output)
    stopwatch.write(request.output)


if __name__ == "__main__":
    main()
