"""Every field of a recipe is used: another value for it changes something observable."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import torch
from graphs import run
from pydantic import BaseModel
from reports import chapter_text, recipe_for
from sections_of import draft, reviewed

from ft_dagster.base.model_folder import BaseModelError
from ft_dagster.base.prepare import base_version, prepare_base
from ft_dagster.config.recipe import Recipe
from ft_dagster.config.recipe_file import resolve_recipe
from ft_dagster.corpus.sections import make_sections
from ft_dagster.corpus.snapshot import take_snapshot
from ft_dagster.dataset.dataset import all_documents, make_dataset, outline_sections
from ft_dagster.dataset.held_out.choice import choose_split
from ft_dagster.dataset.held_out.record import Pinned
from ft_dagster.defs.stages import LORA_ADAPTER, RELEASED_ADAPTER, SECTIONS, describe
from ft_dagster.errors import TrainingError
from ft_dagster.evaluation.eval_sets import load_eval_sets
from ft_dagster.evaluation.evaluate import evaluate
from ft_dagster.evaluation.find_or_evaluate import InUse, commit
from ft_dagster.evaluation.request import EvaluationRequest
from ft_dagster.model.load import add_adapter, load_base
from ft_dagster.model.manifest import read_manifest
from ft_dagster.store.hashing import file_digest
from ft_dagster.store.local import Artifact, Store
from ft_dagster.training.request import TrainingRequest, adapter_to_go_on_from
from ft_dagster.training.train import train

Fields = dict[str, Any]
HUB = {"base.source": "hub", "base.model": "owner/name", "base.revision": "0" * 40}


class Laboratory:
    """Reports and a base model, and what can be observed of them with a recipe."""

    def __init__(self, folder: Path, tiny_base: Path) -> None:
        self.folder = folder
        self.content = recipe_for(tiny_base)
        self.content["training"]["epochs"] = 1
        self.store = Store(folder / "store")
        reports = folder / "reports"
        for number in range(1, 7):
            _write(reports / "chapter_markdowns" / f"chapter_{number}.md", chapter_text(number))
        review = "### Citation Accuracy Analysis\n\nOverall Score: 0.5\n\n---\n\n"
        extra = f"## RESULTS\n\n{review}They are good.\n\n## REFERENCES\n\n[1] Smith, The Book.\n"
        _write(reports / "chapter_markdowns" / "chapter_7.md", extra)
        json_folder = reports / "outputs" / "consolidated"
        _write(json_folder / "chapter_8_draft.json", json.dumps(draft(A="a first draft")))
        scored = reviewed(9, "B", "a reviewed text") | {"iterations": [{"panel_scores": {"clarity": 0.4}}]}
        _write(json_folder / "chapter_9_b.json", json.dumps(scored))
        rewritten = reviewed(10, "C", "a better text", original="a good text")
        _write(json_folder / "chapter_10_c.json", json.dumps(rewritten))
        _write(folder / "texts" / "general.md", "Rivers carry sediment downstream.")
        turns = [{"role": "user", "content": "Who met?"}, {"role": "assistant", "content": "They."}]
        _write(folder / "texts" / "chat.json", json.dumps({"messages": turns}))
        self.snapshot = take_snapshot(reports, reports / "files.db", self.store)
        self.seen: dict[str, Any] = {}
        self.runs = 0

    def recipe(self, fields: Fields) -> Recipe:
        """Return the tiny recipe with some fields, given as `part.field`, changed."""
        content = json.loads(json.dumps(self.content))
        for path, value in fields.items():
            *part, field = path.split(".")
            (content.setdefault(part[0], {}) if part else content)[field] = value
        return resolve_recipe(content)

    def look(self, see: Callable[["Laboratory", Recipe], Any], fields: Fields, again: bool = False) -> Any:
        """Return what `see` observes with these fields; the result is cached unless `again` is set."""
        key = see.__name__ + json.dumps(fields, sort_keys=True)
        if again or key not in self.seen:
            self.runs += 1
            self.seen[key] = see(self, self.recipe(fields))
        return self.seen[key]

    def sections(self, recipe: Recipe) -> Artifact:
        return make_sections(self.snapshot, recipe.corpus)

    def dataset(self, recipe: Recipe) -> Artifact:
        sections = self.sections(recipe)
        tokens, objectives = recipe.tokens, recipe.objectives
        outline = outline_sections(sections)
        split = choose_split(outline, tokens, Pinned(), objectives)
        return make_dataset(outline, Path(self.content["base"]["model"]), "tiny", tokens, split, objectives)

    def request(self, recipe: Recipe) -> TrainingRequest:
        return TrainingRequest(
            key=f"run-{self.runs}",
            base=prepare_base(recipe.base, self.folder / "cache").to_json(),
            dataset=str(self.dataset(recipe).path),
            recipe=recipe.model_dump(mode="json"),
            attempt=str(self.folder / f"run-{self.runs}"),
            logs=str(self.folder / "logs"),
            locks=str(self.folder / "locks"),
        )


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def metadata(lab: Laboratory, recipe: Recipe) -> Any:
    """Return the metadata that users read on an asset."""
    return describe(SECTIONS, lab.sections(recipe), recipe, "1", {}).metadata


def base(lab: Laboratory, recipe: Recipe) -> Any:
    """Return which base is requested."""
    try:
        return base_version(recipe.base)
    except BaseModelError as error:
        return str(error)


def loaded_base(lab: Laboratory, recipe: Recipe) -> Any:
    """Return how the base is stored in memory."""
    model = load_base(prepare_base(recipe.base, lab.folder / "cache"), recipe, lab.folder / "offload")
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    return type(layer).__name__, str(model.dtype), model.config._attn_implementation


def text(lab: Laboratory, recipe: Recipe) -> Any:
    """Return the text that is used."""
    return lab.sections(recipe).about["version"]


def unreadable_file(lab: Laboratory, recipe: Recipe) -> Any:
    """Return whether a file that cannot be read stops a run."""
    return _checked(lab, recipe, b"\xff")


def personal_data(lab: Laboratory, recipe: Recipe) -> Any:
    """Return whether an e-mail address stops a run."""
    return _checked(lab, recipe, b"Write to ann@reports.org.")


def _checked(lab: Laboratory, recipe: Recipe, chapter: bytes) -> Any:
    """Return the name, outcome and severity of the checks on sections with this chapter."""
    workspace = lab.folder / f"checked-{lab.runs}"
    _write(workspace / "chapter_markdowns" / "a.md", "# A\n\nText.\n")
    (workspace / "chapter_markdowns" / "b.md").write_bytes(chapter)
    _write(workspace / "recipe.yaml", recipe.model_dump_json())
    with pytest.MonkeyPatch.context() as patch, dg.DagsterInstance.ephemeral() as instance:
        patch.setenv("FT_WORKSPACE", str(workspace))
        patch.setenv("FT_RECIPE", "recipe.yaml")
        result = run(instance, "raw_chapters", "sections")
        return {(c.check_name, c.passed, c.severity.value) for c in result.get_asset_check_evaluations()}


def rows(lab: Laboratory, recipe: Recipe) -> Any:
    """Return the packed rows and their split."""
    about = lab.dataset(recipe).about
    return about["version"], about["held_out"]


def adapter(lab: Laboratory, recipe: Recipe) -> Any:
    """Return the untrained adapter."""
    prepared = prepare_base(recipe.base, lab.folder / "cache")
    model = add_adapter(load_base(prepared, recipe, lab.folder / "offload"), prepared, recipe)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    trained = [(name, tuple(w.shape), w.sum().item()) for name, w in model.named_parameters() if w.requires_grad]
    return trained, layer.scaling, str(layer.lora_dropout)


def weights(lab: Laboratory, recipe: Recipe) -> Any:
    """Return the trained adapter."""
    request = lab.request(recipe)
    train(request, lambda _: None)
    return file_digest(Path(request.attempt) / "adapter" / "adapter_model.safetensors")


def start(lab: Laboratory, recipe: Recipe) -> Any:
    """Return whether training continues from an adapter when there is new text."""
    request = lab.request(recipe)
    train(request, lambda _: None)
    in_use = Path(request.attempt) / "adapter"
    return adapter_to_go_on_from(recipe, in_use, request.prepared_base(), {"new"}) is not None


def warm_start(lab: Laboratory, recipe: Recipe) -> Any:
    """Return how much is trained on when starting from an adapter that was trained on all of the text."""
    first = lab.request(recipe)
    known = [{"section": document.section} for document in all_documents(Artifact.open(Path(first.dataset)))]
    train(replace(first, lineage={"trained_on": known}), lambda _: None)
    again = replace(first, attempt=f"{first.attempt}-again", start=f"{first.attempt}/adapter")
    return train(again, lambda _: None)["supervised_tokens"]


def checkpoints(lab: Laboratory, recipe: Recipe) -> Any:
    """Return the checkpoints that a training leaves."""
    request = lab.request(recipe)
    train(request, lambda _: None)
    return {path.name for path in Path(request.attempt).glob("checkpoint-*")}


def computed_layers(lab: Laboratory, recipe: Recipe) -> Any:
    """Return how often a decoder layer of transformers and a norm are computed."""
    calls = {"MistralDecoderLayer": 0, "MistralRMSNorm": 0}

    def count(module: torch.nn.Module, inputs: Any) -> None:
        if type(module).__name__ in calls:
            calls[type(module).__name__] += 1

    request = lab.request(recipe)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        train(request, lambda _: None)
    finally:
        hook.remove()
    return calls


def measurements(lab: Laboratory, recipe: Recipe) -> Any:
    """Return what is measured during training, and when training stops."""
    request = lab.request(recipe)
    result = train(request, lambda _: None)
    assert read_manifest(Path(request.attempt) / "adapter").step == result["kept_step"]
    return [row["step"] for row in result["held_out"]], result["steps"]


def measured(lab: Laboratory, recipe: Recipe) -> Any:
    """Return what is measured on an adapter, and what it generates."""
    if "adapter" not in lab.seen:
        request = lab.request(recipe)
        train(request, lambda _: None)
        lab.seen["adapter"] = request
    request = lab.seen["adapter"]
    eval_sets = load_eval_sets(recipe.evaluation, lab.folder, instruct=True)
    asked = EvaluationRequest(
        base=request.base,
        dataset=request.dataset,
        recipe=recipe.model_dump(mode="json"),
        adapters={"new": str(Path(request.attempt) / "adapter")},
        known={},
        output=str(lab.folder / f"evaluation-{lab.runs}"),
        offload=str(lab.folder / "offload"),
        locks=request.locks,
        texts={kind: {"files": dict(found.files), "folder": str(found.folder)} for kind, found in eval_sets.items()},
    )
    return evaluate(asked)["models"]["new"]


def refusal(lab: Laboratory, recipe: Recipe) -> Any:
    """Return the error of a single process on a CPU for a training that it cannot run alone."""
    try:
        return train(lab.request(recipe), lambda _: None)["steps"]
    except TrainingError as error:
        return str(error)


def verdict(lab: Laboratory, recipe: Recipe) -> Any:
    """Return the verdict on an adapter slightly better than the released one that forgot and recites a little."""
    return _judged(lab, recipe, {"released": 0.901})


def when_released(lab: Laboratory, recipe: Recipe) -> Any:
    """Return what the release depends on; tests/defs/test_refit.py shows what it then does."""
    return RELEASED_ADAPTER.recipe_hash(recipe)


def verdict_on_another_base(lab: Laboratory, recipe: Recipe) -> Any:
    """Return whether a good adapter replaces one of another base."""
    return _judged(lab, recipe, {})[0]


def _judged(lab: Laboratory, recipe: Recipe, others: dict[str, float]) -> Any:
    folder = lab.folder / f"verdict-{lab.runs}"
    models = {name: _scored(value, recited=1) for name, value in (others | {"base": 1.0}).items()}
    models["new"] = _scored(0.9, recited=2, spread=0.02, beside=1.05)
    _write(folder / "evaluation.json", json.dumps({"models": models}))
    _write(folder.with_name(f"{folder.name}-adapter") / "weights", "")
    new = lab.store.commit(LORA_ADAPTER.name, folder.name, folder.with_name(f"{folder.name}-adapter"), {})
    taken = commit(folder.name, folder, new, InUse(Path("another")), recipe, measured="")
    found = taken.about["verdict"]
    return found["decision"], [(rule["field"], rule["passed"], rule["low"]) for rule in found["rules"]]


def _scored(bits_per_byte: float, recited: int, spread: float = 0.0, beside: float = 1.0) -> dict[str, Any]:
    def text(value: float) -> dict[str, Any]:
        bits = {f"c{n}": value + (spread if n % 2 else -spread) for n in range(8)}
        return {"bits_per_byte": value, "sections": {c: {"s": [b * math.log(2) * 100, 100]} for c, b in bits.items()}}

    train_side = {"passages": 100, "recited": recited}
    return {**text(bits_per_byte), "general": text(beside), "chat": text(beside), "train": train_side}


EARLY = {"training.evaluate_every": 2, "training.learning_rate": 0.05, "training.schedule": "constant"}
UNFUSED = {"training.fused": False, "lora.dropout": 0.0}
BOTH = {"objectives.rewrite": 1.0, "tokens.block_length": 256}

FIELDS: dict[str, tuple[Callable[[Laboratory, Recipe], Any], Any, Fields]] = {
    # field: (what to observe, another value, fields that differ from the tiny recipe in both cases)
    "name": (metadata, "another", {}),
    "base.source": (base, "embedded", {}),
    "base.model": (base, "owner/other", HUB),
    "base.revision": (base, "1" * 40, HUB),
    "base.quantization": (loaded_base, "nf4", {}),
    "base.dtype": (loaded_base, "bfloat16", {"base.dtype": "float32"}),
    "corpus.unreadable": (unreadable_file, "skip", {}),
    "corpus.secrets": (personal_data, "block", {}),
    "corpus.drafts": (text, True, {}),
    "corpus.bibliographies": (text, True, {}),
    "corpus.review_blocks": (text, True, {}),
    "corpus.minimum_score": (text, 0.9, {}),
    "tokens.block_length": (rows, 32, {}),
    "tokens.held_out": (rows, 0.5, {}),
    "objectives.text": (weights, 0.5, BOTH),
    "objectives.rewrite": (weights, 0.5, BOTH),
    "lora.rank": (adapter, 2, {}),
    "lora.alpha": (adapter, 16, {}),
    "lora.dropout": (adapter, 0.2, {}),
    "lora.targets": (adapter, ["q_proj"], {}),
    "lora.rslora": (adapter, True, {}),
    "lora.dora": (adapter, True, {}),
    "training.start": (start, "last", {}),
    "training.replay": (warm_start, 0.5, {"training.replay": 1.0}),
    "training.epochs": (weights, 0.5, {}),
    "training.learning_rate": (weights, 0.01, {}),
    "training.schedule": (weights, "linear", {}),
    "training.warmup": (weights, 0.5, {}),
    "training.rows_per_device": (weights, 1, {}),
    "training.rows_per_step": (weights, 2, {}),
    "training.processes": (refusal, 2, {}),
    "training.strategy": (refusal, "fsdp", {"training.processes": 2}),
    "training.mixed_precision": (weights, "bf16", {"base.dtype": "float32"}),
    "training.optimizer": (weights, "adamw_bnb_8bit", {}),
    "training.weight_decay": (weights, 0.1, {}),
    "training.gradient_clip": (weights, 0.01, {}),
    "training.neftune": (weights, 5.0, {}),
    "training.seed": (weights, 18, {}),
    "training.gradient_checkpointing": (computed_layers, True, UNFUSED),
    "training.fused": (computed_layers, True, UNFUSED),
    "training.attention": (loaded_base, "eager", {}),
    "training.save_every": (checkpoints, 5, {}),
    "training.evaluate_every": (measurements, 3, EARLY),
    "training.patience": (measurements, 1, EARLY | {"training.epochs": 4}),
    "evaluation.prompts": (measured, ["Rivers"], {}),
    "evaluation.sample_tokens": (measured, 2, {}),
    "evaluation.general": (measured, "texts", {}),
    "evaluation.chat": (measured, "texts", {}),
    "evaluation.train_tokens": (measured, 64, {}),
    "release.minimum_gain": (verdict, 0.2, {}),
    "release.confidence": (verdict, 0.5, {}),
    "release.worst_loss": (verdict, 0.001, {}),
    "release.general_loss": (verdict, 0.01, {}),
    "release.chat_loss": (verdict, 0.01, {}),
    "release.recited": (verdict, 0.001, {}),
    "release.minimum_held_out": (verdict, 10**6, {}),
    "release.other_base": (verdict_on_another_base, True, {}),
    "release.refit": (when_released, True, {}),
}


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("laboratory"), tiny_base)


def leaves(part: type[BaseModel], prefix: str = "") -> set[str]:
    """Return `part.field` for every field that is not a part itself."""
    found = set()
    for name, field in part.model_fields.items():
        kind = field.annotation
        is_part = isinstance(kind, type) and issubclass(kind, BaseModel)
        found |= leaves(kind, f"{prefix}{name}.") if is_part else {prefix + name}
    return found


def test_the_table_has_every_field_and_no_other() -> None:
    assert FIELDS.keys() == leaves(Recipe)


@pytest.mark.parametrize("field", FIELDS)
def test_another_value_of_a_field_changes_its_effect(laboratory: Laboratory, field: str) -> None:
    see, other, always = FIELDS[field]
    assert laboratory.look(see, always) != laboratory.look(see, always | {field: other})


@pytest.mark.parametrize("see", dict.fromkeys(see for see, _, _ in FIELDS.values()), ids=lambda see: see.__name__)
def test_the_same_values_have_the_same_effect(laboratory: Laboratory, see: Callable[[Laboratory, Recipe], Any]) -> None:
    always = next(fields for other, _, fields in FIELDS.values() if other == see)
    assert laboratory.look(see, always) == laboratory.look(see, always, again=True)
