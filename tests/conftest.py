"""Fixtures for all tests: a tiny base model and a finished workspace made once a session, and workspaces to change."""

import gc
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from buckets import BUCKET, Server, serving_s3, set_environment
from forks import forking
from machines import remember_machine
from postgres import serving_postgres
from reports import PROSE, chapter_text, recipe_for

from ft_dagster.base.prepare import prepare_base
from ft_dagster.config.recipe_file import resolve_recipe
from ft_dagster.runtime.allocator import spin_briefly
from ft_dagster.store.local import Artifact, Store
from ft_dagster.training.request import KIND as ADAPTER
from ft_dagster.training.request import TrainingRequest, training_key

if TYPE_CHECKING:
    import dagster as dg
    from watched import Watched

spin_briefly()  # threads that spin while they wait make a training take minutes when the machine does other work
os.environ.setdefault("OMP_NUM_THREADS", "1")  # and a tiny model computes too little to distribute

gc.disable()  # what is imported during collection lives until the end, see `pytest_collection_finish`

LONG = ("system", "test_main_job.py", "test_daemon.py", "training", "model", "evaluation", "defs")
"""Folders and modules whose tests take longest, in that order."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the long tests first, so that two workers finish at the same time."""
    items.sort(key=lambda item: next((at for at, part in enumerate(LONG) if part in item.path.parts), len(LONG)))


def pytest_collection_finish() -> None:
    """Exclude modules and tests from garbage collection, which took a tenth of all CPU time."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def forked_children() -> Iterator[None]:
    """Make runs in this process train and evaluate in forked processes."""
    with forking():
        yield


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mistral of about half a million parameters with a byte-level tokenizer of its own, as a folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-mistral")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(PROSE, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(fast),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    MistralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def without_waiting_for_the_disk() -> Iterator[None]:
    """Skip syncing to disk, for modules that use a store hundreds of times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sync", lambda: None)
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture
def tiny_recipe(tiny_base: Path) -> dict[str, Any]:
    """Return the recipe for the tiny base, which a test may change."""
    return recipe_for(tiny_base)


@pytest.fixture
def workspace(tmp_path: Path, tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty workspace that FT_WORKSPACE names, with a recipe for the tiny base and a cache of its own."""
    folder = tmp_path / "workspace"
    (folder / "chapter_markdowns").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe), "utf-8")
    for name in ("HUGGINGFACE_TOKEN", "DAGSTER_HOME", "FT_STORE", "FT_THREADS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FT_WORKSPACE", str(folder))
    monkeypatch.setenv("FT_RECIPE", "recipe.yaml")
    monkeypatch.setenv("FT_CACHE", str(remember_machine(tmp_path / "cache")))
    return folder


@pytest.fixture
def chapters(workspace: Path) -> list[Path]:
    """Six chapters of plain prose in the workspace."""
    paths = [workspace / "chapter_markdowns" / f"chapter_{number}.md" for number in range(1, 7)]
    for number, path in enumerate(paths, start=1):
        path.write_text(chapter_text(number), "utf-8")
    return paths


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start a real S3 server on loopback."""
    with serving_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_url(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URL of an empty location on the server, whose address is set in the environment."""
    set_environment(monkeypatch, s3_server)
    return f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """Return a folder with an up-to-date `workspace` and the `home` of the instance that ran it."""
    from graphs import TOKEN, instance_on, run

    folder = tmp_path_factory.mktemp("finished")
    chapters = folder / "workspace" / "chapter_markdowns"
    chapters.mkdir(parents=True)
    for number in range(1, 7):
        (chapters / f"chapter_{number}.md").write_text(chapter_text(number), "utf-8")
    (folder / "workspace" / "recipe.yaml").write_text(yaml.safe_dump(recipe_for(tiny_base)), "utf-8")
    (folder / "workspace" / ".env").write_text(f"HUGGINGFACE_TOKEN={TOKEN}\n")
    (folder / "home").mkdir()
    with instance_on(folder / "workspace", folder / "home", folder / "cache") as instance:
        assert run(instance).success
    return folder


@pytest.fixture
def up_to_date(finished: Path, workspace: Path, tmp_path: Path) -> Iterator["dg.DagsterInstance"]:
    """Return the instance of an up-to-date workspace; both are copies that a test may change."""
    import dagster as dg
    from graphs import NO_TELEMETRY

    shutil.copytree(finished / "workspace", workspace, dirs_exist_ok=True, symlinks=True)
    shutil.copytree(finished / "home", tmp_path / "home")
    with dg.DagsterInstance.local_temp(str(tmp_path / "home"), overrides=NO_TELEMETRY) as instance:
        yield instance


@pytest.fixture
def two_adapters(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the finished workspace with a second adapter, `second`, in the store that was never released."""
    shutil.copytree(finished / "workspace", tmp_path / "workspace", symlinks=True)
    shutil.copytree(finished / "home", tmp_path / "home")
    for name in ("HUGGINGFACE_TOKEN", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "FT_WORKSPACE": tmp_path / "workspace",
        "FT_RECIPE": "recipe.yaml",
        "DAGSTER_HOME": tmp_path / "home",
        "FT_CACHE": finished / "cache",
        "DAGSTER_DISABLE_TELEMETRY": "yes",
    }.items():
        monkeypatch.setenv(name, str(value))
    store = Store(tmp_path / "workspace" / ".ft" / "store")
    first = store.newest(ADAPTER)
    assert first
    with store.staging() as folder:
        for name in first.files:
            shutil.copy(first.path / name, folder / name)
        store.commit(ADAPTER, "second", folder, first.about)
    return tmp_path / "workspace"


@pytest.fixture(scope="session")
def new_history() -> Iterator[Callable[[], dict[str, str]]]:
    """Return the variables that give Dagster an empty history of its own.

    By default there are none, as the history is in DAGSTER_HOME. With FT_TEST_STORAGE=postgres it is in a real server.
    """
    storage = os.environ.get("FT_TEST_STORAGE", "sqlite")
    assert storage in ("sqlite", "postgres"), f"FT_TEST_STORAGE={storage} is neither sqlite nor postgres"
    if storage == "sqlite":
        yield dict
    else:
        with serving_postgres() as server:
            yield lambda: server.new_database().environment


@pytest.fixture(scope="module")
def watched(
    finished: Path,
    tiny_base: Path,
    tmp_path_factory: pytest.TempPathFactory,
    new_history: Callable[[], dict[str, str]],
) -> Iterator["Watched"]:
    """Start `dagster dev` without any history on a workspace with its own chapters, store and base model."""
    from dagster_dev import DagsterDev
    from watched import Watched

    folder = tmp_path_factory.mktemp("watched")
    workspace = folder / "workspace"
    shutil.copytree(finished / "workspace", workspace, symlinks=True)
    shutil.copytree(tiny_base, workspace / tiny_base.name)
    recipe = yaml.safe_load((workspace / "recipe.yaml").read_text())
    recipe["base"]["model"] = tiny_base.name
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    dev = DagsterDev(folder, **new_history())
    found = dev.made()
    with dev:
        dev.until_up_to_date()
        yield Watched(dev, workspace, found)


@pytest.fixture
def make_dataset(tiny_base: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a builder of tokenized datasets: `make_dataset({"a": "text", "b": {"sections": ...}}, held_out=["b"])`.

    Text is Markdown and anything else is JSON; `objectives` are those of a recipe.
    """
    from ft_dagster.config.recipe import Corpus, Objectives, Tokens
    from ft_dagster.corpus.sections import make_sections
    from ft_dagster.corpus.snapshot import take_snapshot
    from ft_dagster.dataset import dataset
    from ft_dagster.dataset.held_out.record import Pinned, Split
    from ft_dagster.store.local import Store

    def make(texts: dict[str, Any], held_out: list[str], block_length: int = 64, **objectives: float) -> Path:
        reports = tmp_path / "reports"
        for name, text in texts.items():
            folder = reports / ("chapter_markdowns" if isinstance(text, str) else "outputs/consolidated")
            folder.mkdir(parents=True, exist_ok=True)
            if isinstance(text, str):
                (folder / f"{name}.md").write_text(text, "utf-8")
            else:
                (folder / f"{name}.json").write_text(json.dumps(text), "utf-8")
        sections = make_sections(take_snapshot(reports, reports / "files.db", Store(tmp_path / "store")), Corpus())
        options, split = Tokens(block_length=block_length), Split(frozenset(held_out), Pinned())
        taught = Objectives(**objectives)
        return dataset.make_dataset(
            dataset.outline_sections(sections), tiny_base, "the tiny base's", options, split, taught
        ).path

    return make


@pytest.fixture
def prose() -> Callable[[int, int], str]:
    """`prose(seed, sentences)`: plain text, different for every seed."""

    def write(seed: int, sentences: int) -> str:
        return "".join(
            PROSE[(seed + i) % len(PROSE)] + f"It was item {seed * 100 + i}. " for i in range(sentences)
        ).strip()

    return write


@pytest.fixture
def dataset(make_dataset: Callable[..., Path], prose: Callable[[int, int], str]) -> Path:
    return make_dataset({f"chapter_{n}": prose(n, 9 + n) for n in range(6)}, held_out=["chapter_5"])


@pytest.fixture
def request_for(dataset: Path, tiny_recipe: dict[str, Any], tmp_path: Path) -> Callable[..., TrainingRequest]:
    """Return a function that builds a request; keyword arguments change the recipe's parts."""

    def build(attempt: str = "attempt", **parts: dict[str, Any]) -> TrainingRequest:
        content = tiny_recipe | {name: tiny_recipe.get(name, {}) | fields for name, fields in parts.items()}
        recipe = resolve_recipe(content)
        base = prepare_base(recipe.base, tmp_path / "cache")
        version = Artifact.open(dataset).about["version"]
        return TrainingRequest(
            key=training_key(version, base.identity, recipe),
            base=base.to_json(),
            dataset=str(dataset),
            recipe=recipe.model_dump(mode="json"),
            attempt=str(tmp_path / attempt),
            logs=str(tmp_path / "logs"),
            locks=str(tmp_path / "locks"),
            cache=str(remember_machine(tmp_path / "cache")),
            speeds=str(tmp_path / "speeds"),
            lineage={"dataset": version},
        )

    return build
