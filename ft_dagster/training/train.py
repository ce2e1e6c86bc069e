"""Train one adapter on packed rows: load the model, train or resume, save, and check what was saved."""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from peft import PeftModel, get_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME

from ft_dagster.base.model_folder import model_config
from ft_dagster.config.recipe import Recipe
from ft_dagster.dataset.dataset import load_rows, load_shards
from ft_dagster.errors import TrainingError
from ft_dagster.model import ranks
from ft_dagster.model.device import device, device_name
from ft_dagster.model.load import add_adapter, load_base
from ft_dagster.model.manifest import read_manifest, write_manifest
from ft_dagster.model.packed_model import PackedModel
from ft_dagster.model.rows import collate, loss_weights
from ft_dagster.model.scoring import score
from ft_dagster.store.local import Artifact, write_atomically
from ft_dagster.training.attempt_format import settle_format
from ft_dagster.training.attempts import step_of
from ft_dagster.training.checkpoints import CompleteCheckpoints, StopOnSignal, last_complete, require_plain_state
from ft_dagster.training.early_stopping import EarlyStopping
from ft_dagster.training.probe import Probe, ProbeResult, fullest
from ft_dagster.training.progress import Progress, peak_memory
from ft_dagster.training.request import CODE_VERSION, RESULT, TrainingRequest
from ft_dagster.training.shared_checkpoints import SharedCheckpoints
from ft_dagster.training.sizing.memory import require_memory
from ft_dagster.training.sizing.speeds import Speed, remember_speed, speed_key
from ft_dagster.training.start import go_on_from, known_sections, rows_to_learn
from ft_dagster.training.trainer import CountedRows, PackedTrainer

log = logging.getLogger(__name__)
_COMPARED_TOKENS = 64
"""The number of tokens on which the outputs of adapter and base are compared."""


class InterruptedTrainingError(Exception):
    """A signal stopped the training, after a checkpoint was saved."""


def train(request: TrainingRequest, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Make the requested adapter, or resume from its last checkpoint.

    Writes `<attempt>/adapter/` (weights, configuration, tokenizer, manifest) and, last, `<attempt>/result.json`. If
    several processes train together (model/ranks.py), each of them calls this, and the first one writes and reports.

    Args:
        request: the adapter to make.
        report: called with metrics from time to time.

    Returns:
        The content of result.json: steps, tokens, loss by step, seconds, memory, and the facts that asset checks use.

    Raises:
        TrainingError: there is nothing to learn from, or the loss is not finite.
        InterruptedTrainingError: a signal stopped the training.
    """
    if request.threads:
        torch.set_num_threads(max(1, request.threads // ranks.count()))
    finished = Path(request.attempt) / RESULT
    if finished.exists():  # another process made it while this one waited for a device
        return json.loads(finished.read_bytes())
    return _Training(request, report).run()


def _write_no_card(_: str) -> None:
    """Replace the method that writes peft's model card, a template with blanks, at every checkpoint.

    The manifest contains the card's facts, and `ft-dagster release push` writes its own card.
    """


class _Training:
    """One training; most methods are one step of it."""

    def __init__(self, request: TrainingRequest, report: Callable[[dict[str, Any]], None]) -> None:
        self.request = request
        self.report = report
        self.recipe: Recipe = request.resolved_recipe()
        self.base = request.prepared_base()
        self.attempt = Path(request.attempt)
        self.shared = SharedCheckpoints(request.checkpoints) if request.checkpoints else None
        self.rows = self._rows()
        self.stop = StopOnSignal()

    def _require_processes(self) -> None:
        """Raise TrainingError if the training processes are not as the recipe asks for."""
        options = self.recipe.training
        if options.strategy == "fsdp" and device().type == "cpu":
            raise TrainingError(
                "training.strategy: fsdp needs GPUs: on a CPU, transformers' Trainer would silently use ddp. Set "
                "training.strategy: ddp."
            )
        if ranks.count() != options.processes:
            raise TrainingError(
                f"The recipe asks for {options.processes} processes (training.processes), and {ranks.count()} train. "
                "Start training with `python -m ft_dagster.training REQUEST.json`, which starts them."
            )

    def _rows(self) -> Dataset:
        dataset = Artifact.open(Path(self.request.dataset))
        if self.request.start is None:
            return load_rows(dataset, "train")
        known, replay = known_sections(Path(self.request.start)), self.recipe.training.replay
        return concatenate_datasets([rows_to_learn(*group, known, replay) for group in load_shards(dataset, "train")])

    def run(self) -> dict[str, Any]:
        self._require_processes()
        if sum(len(row["input_ids"]) - sum(row["prompts"]) for row in self.rows) == 0:
            raise TrainingError("No token of the dataset is supervised, so there is nothing to learn from.")
        if self.shared and ranks.is_first():
            self.shared.fetch(self.attempt)
        ranks.wait_for_all()
        cache = Path(self.request.cache) if self.request.cache else None
        self.recipe = settle_format(self.recipe, self.attempt, cache, self.shared)
        memory = require_memory(self.base, self.recipe)
        self.estimate: dict[str, float | None] = {"memory_bytes": memory.total if memory else None, "seconds": None}
        began = time.monotonic()
        tokenizer = AutoTokenizer.from_pretrained(self.base.folder, trust_remote_code=False)
        model = add_adapter(load_base(self.base, self.recipe, offload=None), self.base, self.recipe)
        model.create_or_update_model_card = _write_no_card
        rows = CountedRows(tokenizer.eos_token_id, loss_weights(self.recipe.objectives))
        progress = Progress(
            self.attempt, lambda: trainer.tokens, self.report, self.request.expected_seconds, self.request.run
        )
        if self.request.start is not None:
            go_on_from(model, Path(self.request.start), self.base)
        packed = PackedModel(model, self.recipe)
        self._require_layout(packed)
        stopping = self._stopping(packed, tokenizer)
        trainer = self._trainer(packed, tokenizer, rows, progress, stopping)
        checkpoint = last_complete(self.attempt)
        if checkpoint:
            require_plain_state(checkpoint)
            log.info("Resuming from %s", checkpoint.name)
            trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            if stopping:
                stopping.restore(checkpoint)
        if checkpoint and (trainer.state.global_step >= trainer.state.max_steps or (stopping and stopping.over)):
            set_peft_model_state_dict(model, load_peft_weights(str(checkpoint), device="cpu"))  # no steps are left
        else:
            if not ranks.is_first():
                torch.manual_seed(self.recipe.training.seed + ranks.rank())  # so that dropout differs between processes
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if self.stop.stopped and trainer.state.global_step < trainer.state.max_steps:
            raise InterruptedTrainingError(f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}")
        history = self._history(trainer)
        kept = trainer.state.global_step
        if stopping:
            set_peft_model_state_dict(model, stopping.weights)
            kept = stopping.best["step"]
        adapter = self._save(model, tokenizer, kept)
        result = {
            "key": self.request.key,
            "steps": trainer.state.global_step,
            "planned_steps": trainer.state.max_steps,
            "kept_step": kept,
            "held_out": stopping.measured if stopping else [],
            "resumed_from": step_of(checkpoint) if checkpoint else 0,
            "history": history,
            "final_loss": history[-1]["loss"],
            "supervised_tokens": sum(row["supervised_tokens"] for row in history),
            "tokens_since_resume": trainer.tokens,
            "seconds_since_resume": time.monotonic() - began,
            "measuring_seconds_since_resume": stopping.seconds if stopping else 0.0,
            "tokens_per_second": progress.history[-1]["tokens_per_second"] if progress.history else None,
            "peak_memory_bytes": peak_memory(),
            "estimate": self.estimate,
            "trainable_parameters": model.get_nb_trainable_parameters()[0],
            "device": device_name(),
            "number_format": self.recipe.compute_dtype,
            "layout": packed.layout,
            "leak": packed.probe(),
            **self._check_saved(model, adapter),
        }
        if result["tokens_per_second"]:
            self._remember(result["tokens_per_second"], result["peak_memory_bytes"])
        if ranks.is_first():
            write_atomically(self.attempt / RESULT, json.dumps(result, indent=1))
        return result

    def _require_layout(self, packed: PackedModel) -> None:
        """Raise TrainingError if the base needs another layout than the one in the adapter's key."""
        if packed.layout != self.base.layout:
            raise TrainingError(
                f"{self.base.name} needs {packed.layout} rows here (pieces change each other's losses by "
                f"{packed.leak:.3f} nats), and {self.base.layout} ones were found before. Delete the folder layouts in "
                "FT_CACHE and run again."
            )

    def _stopping(self, packed: PackedModel, tokenizer: PreTrainedTokenizerBase) -> EarlyStopping | None:
        """Return the callback that measures held-out text as the evaluation does; None if the recipe wants none."""
        options = self.recipe.training
        if options.evaluate_every is None:
            return None
        held_out = list(load_shards(Artifact.open(Path(self.request.dataset)), "held_out"))

        def measure() -> float:
            return score(packed, held_out, tokenizer.eos_token_id)["bits_per_byte"]

        return EarlyStopping(options.evaluate_every, options.patience, measure, self.report)

    def _trainer(
        self,
        packed: PackedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: CountedRows,
        progress: Progress,
        stopping: EarlyStopping | None,
    ) -> PackedTrainer:
        options = self.recipe.training
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(self.request.logs) / self.request.key[:12])
        on_cpu = device().type == "cpu"
        checkpointing = options.gradient_checkpointing and packed.not_fused is not None  # the fused layers do their own
        if checkpointing and self.recipe.base.quantization == "none":
            packed.model.enable_input_require_grads()
        arguments = TrainingArguments(
            output_dir=str(self.attempt),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.rows_per_device,
            gradient_accumulation_steps=options.accumulation,
            learning_rate=options.learning_rate,
            # The library's `constant` has no warm-up.
            lr_scheduler_type="constant_with_warmup" if options.schedule == "constant" else options.schedule,
            warmup_steps=options.warmup,
            optim=options.optimizer,
            weight_decay=options.weight_decay,
            max_grad_norm=options.gradient_clip,
            neftune_noise_alpha=options.neftune,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
            fp16=self.recipe.compute_dtype == "float16",  # for gradient scaling; PackedModel sets the precision
            use_cpu=on_cpu,
            fsdp=True if options.strategy == "fsdp" else None,
            ddp_find_unused_parameters=False,
            seed=options.seed,
            data_seed=options.seed,
            save_strategy="steps",
            save_steps=options.save_every,
            save_total_limit=2,
            logging_strategy="steps",
            logging_steps=1,
            logging_nan_inf_filter=False,  # losses that are not numbers must not be hidden
            report_to=["tensorboard"],
            remove_unused_columns=False,
            dataloader_pin_memory=not on_cpu,
            label_names=["labels"],
            disable_tqdm=True,
        )
        batch = collate(fullest(self.rows, options.rows_per_device), rows.pad_id)
        probe = Probe(batch, packed.summed_nats, lambda result: self._on_probe(result, progress))
        checkpoints = CompleteCheckpoints(self.recipe.base.dtype, self.shared)
        trainer = PackedTrainer(
            packed,
            model=packed.model,
            args=arguments,
            train_dataset=self.rows,
            data_collator=rows,
            processing_class=tokenizer,
            callbacks=[probe, progress, *filter(None, [stopping]), checkpoints, self.stop],
        )
        trainer.remove_callback(PrinterCallback)  # Progress reports the same
        return trainer

    def _on_probe(self, result: ProbeResult, progress: Progress) -> None:
        """Report how long training will take, before its first step."""
        progress.expected_seconds = self.estimate["seconds"] = result.seconds_of_training
        progress.compare(result.seconds_of_training)
        self._remember(ranks.count() * result.tokens / result.seconds, result.peak_memory_bytes)
        log.info(
            "A full batch took %.1f s, so training takes up to %.0f s.", result.seconds, result.seconds_of_training
        )
        measured = {"estimated_seconds": result.seconds_of_training, "peak_memory_bytes": result.peak_memory_bytes}
        self.report(measured | {"estimated_memory_bytes": self.estimate["memory_bytes"]})

    def _remember(self, tokens_per_second: float, peak_memory_bytes: int) -> None:
        if self.request.speeds is None or not ranks.is_first():
            return
        key = speed_key(model_config(Path(self.base.folder)), self.recipe, self.request.threads)
        remember_speed(Path(self.request.speeds), key, Speed(tokens_per_second, peak_memory_bytes, device_name()))

    def _history(self, trainer: PackedTrainer) -> list[dict[str, float]]:
        """Return loss, learning rate and supervised tokens of every step, including those before a resume."""
        names = ("step", "loss", "learning_rate", "supervised_tokens")
        return [{name: row[name] for name in names} for row in trainer.state.log_history if "loss" in row]

    def _save(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, step: int) -> Path:
        adapter = self.attempt / "adapter"
        trained = {name: ranks.whole(weight) for name, weight in model.named_parameters() if weight.requires_grad}
        if not ranks.is_first():
            ranks.wait_for_all()
            return adapter
        shutil.rmtree(adapter, ignore_errors=True)
        model.save_pretrained(str(adapter), state_dict=trained if self.recipe.training.strategy == "fsdp" else None)
        tokenizer.save_pretrained(str(adapter))
        request = self.request
        lineage = request.lineage | ({"started_from": read_manifest(Path(request.start)).key} if request.start else {})
        lineage |= {"number_format": self.recipe.compute_dtype}
        write_manifest(adapter, request.key, self.base, request.recipe, CODE_VERSION, step, lineage)
        ranks.wait_for_all()
        return adapter

    def _check_saved(self, model: PeftModel, adapter: Path) -> dict[str, Any]:
        """Check that the saved weights equal the trained ones, and measure how much they change the base's logits.

        With ddp, the saved weights are loaded back into the model before the logits are computed.
        """
        saved = load_peft_weights(str(adapter), device="cpu")
        trained = {name: ranks.whole(weight) for name, weight in get_peft_model_state_dict(model).items()}
        same = saved.keys() == trained.keys() and all(torch.equal(saved[name], trained[name]) for name in saved)
        if self.recipe.training.strategy == "ddp":
            set_peft_model_state_dict(model, saved)
        model.eval()
        tokens = torch.tensor([self.rows[0]["input_ids"][:_COMPARED_TOKENS]], device=device())
        with torch.no_grad():
            tuned = model(tokens, use_cache=False).logits
            with model.disable_adapter():
                untuned = model(tokens, use_cache=False).logits
        return {"reloads": same, "largest_logit_change": (tuned - untuned).abs().max().item()}
