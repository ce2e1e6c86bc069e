"""Models, texts and requests for the benchmark, made from nothing but a checkout."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from benchmarks.gpu.setup import Setup
from benchmarks.gpu.timing import on_gpu
from ft_dagster.base.prepare import prepare_base
from ft_dagster.config.recipe import Corpus, Objectives, Recipe, Tokens
from ft_dagster.config.recipe_file import load_recipe, resolve_recipe
from ft_dagster.corpus.sections import make_sections
from ft_dagster.corpus.snapshot import take_snapshot
from ft_dagster.dataset.dataset import load_rows, make_dataset, outline_sections
from ft_dagster.dataset.held_out.record import Pinned, Split
from ft_dagster.model.device import device
from ft_dagster.model.rows import collate
from ft_dagster.store.local import Artifact, Store
from ft_dagster.training.request import TrainingRequest

DOCUMENTATION = Path(__file__).parents[2] / "docs"
HELD_OUT = ("memory", "training")
"""Pages of the documentation that are held out."""
_VOCABULARY = 4096
Row = dict[str, Any]


def large_config(setup: Setup) -> MistralConfig:
    """Return the configuration of a model with the shape of Mistral-7B-Instruct-v0.2; with --tiny, a small one."""
    if setup.tiny:
        return small_config()
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return MistralConfig(num_hidden_layers=setup.layers, rope_parameters=rope, **_alike())


def small_config() -> MistralConfig:
    """Return the configuration of a small model with all parts of the large one, which runs anywhere within seconds."""
    sizes = {"vocab_size": _VOCABULARY, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    return MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=64, **_alike())


def _alike() -> dict[str, Any]:
    return {"sliding_window": None, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "dtype": "bfloat16"}


def random_model(config: MistralConfig) -> MistralForCausalLM:
    """Return a model with random weights in bfloat16, made on the device."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device()):
            return MistralForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)


def random_base(setup: Setup, config: MistralConfig) -> Path:
    """Return a folder with a random model and a byte-level tokenizer trained on the documentation; it is made once."""
    folder = setup.folder / f"base-{config.num_hidden_layers}-layers-of-{config.hidden_size}"
    if (folder / "tokenizer.json").exists():
        return folder
    random_model(config).save_pretrained(folder)
    if on_gpu():
        torch.cuda.empty_cache()  # the processes that read the folder need the memory
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([page.read_text("utf-8") for page in sorted(DOCUMENTATION.glob("*.md"))], trainer)
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    return folder


def dataset(setup: Setup, base: Path, block_length: int) -> Artifact:
    """Return the documentation as a dataset that the pipeline has packed."""
    store, reports = Store(setup.folder / "store"), setup.folder / "reports"
    chapters = reports / "chapter_markdowns"
    chapters.mkdir(parents=True, exist_ok=True)
    for page in DOCUMENTATION.glob("*.md"):
        (chapters / page.name).write_bytes(page.read_bytes())
    sections = make_sections(take_snapshot(reports, setup.folder / "files.db", store), Corpus())
    split = Split(frozenset(HELD_OUT), Pinned())
    tokens = Tokens(block_length=block_length)
    return make_dataset(outline_sections(sections), base, f"of {base.name}", tokens, split, Objectives())


def recipe(setup: Setup, base: Path, changes: Mapping[str, Any]) -> Recipe:
    """Return the recipe with a base in a folder; `changes` are values by field, such as `training.epochs`."""
    content = load_recipe(setup.recipe).model_dump(mode="json")
    content["base"] |= {"source": "folder", "model": str(base), "revision": None}
    for path, value in changes.items():
        part, _, field = path.partition(".")
        content[part][field] = value
    return resolve_recipe(content)


def training_request(setup: Setup, recipe: Recipe, trained_on: Artifact, attempt: str) -> TrainingRequest:
    """Return a request for a training that keeps everything in the benchmark's folder."""
    return TrainingRequest(
        key="0" * 64,
        base=prepare_base(recipe.base, setup.folder / "cache").to_json(),
        dataset=str(trained_on.path),
        recipe=recipe.model_dump(mode="json"),
        attempt=str(setup.folder / attempt),
        logs=str(setup.folder / "logs"),
        locks=str(setup.folder / "locks"),
        lineage={"dataset": trained_on.about["version"]},
    )


def real_rows(trained_on: Artifact, count: int) -> list[Row]:
    """Return the first `count` rows of a dataset that contain more than one piece."""
    return [row for row in load_rows(trained_on, "train") if len(row["lengths"]) > 1][:count]


def random_rows(count: int, length: int, vocabulary: int) -> list[Row]:
    """Return full rows of random tokens, in pieces of a sixteenth to three quarters of a row; the same each time."""
    chance = random.Random(length)  # noqa: S311 - the same each time
    rows = []
    for _ in range(count):
        lengths: list[int] = []
        while missing := length - sum(lengths):
            lengths.append(min(missing, chance.randint(length // 16, 3 * length // 4)))
        ids = [chance.randrange(3, vocabulary) for _ in range(length)]
        rows.append(
            {"input_ids": ids, "lengths": lengths, "prompts": [1] * len(lengths), "objectives": [0] * len(lengths)}
        )
    return rows


def as_one_piece(row: Row) -> Row:
    """Return the row as one piece, so that its tokens attend across the former pieces."""
    return row | {"lengths": [len(row["input_ids"])], "prompts": [1], "objectives": [0]}


def batch(rows: list[Row]) -> dict[str, torch.Tensor]:
    """Return rows as tensors on the device; see `collate` for their shapes."""
    return {name: tensor.to(device()) for name, tensor in collate(rows, pad_id=2).items()}
