"""The recipe that this project replaces: one example per file, cut at 512 tokens; padding and end tokens are masked.

It has LoRA r 16, alpha 32, dropout 0.05 on q, k, v, o; batches of one row, four accumulated; learning rate 2e-4 after
100 steps of warm-up; 4-bit NF4 with double quantization; gradient checkpointing. Three things are replaced: its fp16 by
the number format of all contenders, its Mistral-7B by the base of this comparison, and its three epochs by the
comparison's number of epochs.
"""

from contextlib import suppress

import torch
from contender import Request, Stopwatch, TooLongError, count_in_trainer
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)


def main() -> None:
    request = Request.read()
    torch.set_num_threads(request.threads)
    tokenizer = AutoTokenizer.from_pretrained(request.base)
    tokenizer.pad_token = tokenizer.eos_token
    stopwatch = Stopwatch(tokenizer.eos_token_id, request.patience_seconds)
    count_in_trainer(stopwatch)
    model = AutoModelForCausalLM.from_pretrained(
        request.base,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, request.number_format),
        ),
        device_map={"": "cpu"},
    )
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    adapter = LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.05,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, adapter)
    tokens = tokenizer(request.texts(), truncation=True, padding="max_length", max_length=512)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=f"{request.output}/trainer",
            num_train_epochs=request.epochs,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            learning_rate=2e-4,
            warmup_steps=100,
            save_steps=100,
            save_total_limit=2,
            bf16=request.number_format == "bfloat16",
            use_cpu=True,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            report_to="none",
        ),
        train_dataset=Dataset.from_dict(dict(tokens)),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    with suppress(TooLongError):
        trainer.train()
    model.save_pretrained(request.output)
    stopwatch.write(request.output)


if __name__ == "__main__":
    main()
