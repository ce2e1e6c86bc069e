"""Tokenizers for tests of several modules."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from report_workspaces import LIMIT
from tokenizers import Tokenizer, models, processors

from ft_dagster.corpus import snapshot as snapshot_room
from ft_dagster.corpus.shards import group_names
from ft_dagster.dataset.tokenizer import DocumentTokenizer


@pytest.fixture(scope="session")
def tokenizer(tiny_base: Path) -> DocumentTokenizer:
    return DocumentTokenizer(tiny_base)


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    """Return the folder of a tokenizer with a, b and blanks that starts texts with `<s>`; all else is unknown to it."""
    folder = tmp_path / "letters"
    folder.mkdir()
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", "a", "b", " "])}
    model = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    model.add_special_tokens(["<unk>", "<s>", "</s>"])
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    model.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder


@pytest.fixture(scope="module")
def small_groups(without_waiting_for_the_disk: None) -> Iterator[None]:
    """Make groups of few chapters, so that a small report has several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshot_room, "group_names", partial(group_names, limit=LIMIT))
        yield
