"""Eval sets: the shipped texts, and a folder that replaces them."""

import json
from pathlib import Path

import pytest

from ft_dagster.base.prepare import prepare_base
from ft_dagster.config.recipe import Evaluation
from ft_dagster.config.recipe_file import RecipeError, load_recipe
from ft_dagster.config.settings import Settings
from ft_dagster.dataset.tokenizer import DocumentTokenizer
from ft_dagster.evaluation.eval_sets import load_eval_sets, tokenize_eval_set


def conversation(*turns: str) -> str:
    roles = ("user", "assistant")
    return json.dumps({"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]})


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "general").mkdir()
    (tmp_path / "general" / "a.md").write_text("Rivers carry sediment downstream.\n", "utf-8")
    (tmp_path / "general" / "notes.csv").write_text("not read", "utf-8")
    (tmp_path / "chat").mkdir()
    (tmp_path / "chat" / "b.json").write_text(
        conversation("Who met?", "The committee.", "When?", "On Tuesday."), "utf-8"
    )
    return tmp_path


def test_the_shipped_texts_fit_the_embedded_base(tmp_path: Path) -> None:
    base = Path(prepare_base(load_recipe("smollm2-135m").base, Settings().cache).folder)
    eval_sets = load_eval_sets(Evaluation(), tmp_path, instruct=True)
    assert {kind: len(found.files) for kind, found in eval_sets.items()} == {"general": 24, "chat": 24}
    general, passages = tokenize_eval_set(eval_sets["general"], base, 512)
    assert len(passages) == 24
    assert sum(document.tokens for document in passages) > 4000
    decode = DocumentTokenizer(base).decode
    written = {decode(row["input_ids"][:-1]) for row in general if len(row["lengths"]) == 1}
    assert written <= {text.strip() for text in eval_sets["general"].files.values()}
    _, answers = tokenize_eval_set(eval_sets["chat"], base, 512)
    assert len(answers) == 30, "six conversations have two answers, and none is too long"


def test_a_folder_replaces_the_shipped_texts(texts: Path, tiny_base: Path) -> None:
    eval_sets = load_eval_sets(Evaluation(general="general", chat="chat"), texts, instruct=True)
    assert eval_sets["general"].files == {"a.md": "Rivers carry sediment downstream.\n"}
    rows, documents = tokenize_eval_set(eval_sets["chat"], tiny_base, 256)
    begun = "[assistant] "  # this template does not start the answer, so the model has to write it
    answers = [begun + "The committee.", begun + "On Tuesday."]
    assert [document.scored_bytes for document in documents] == [len(answer) for answer in answers]
    decode = DocumentTokenizer(tiny_base).decode
    shown, start = [], 0
    for length, prompt in zip(rows[0]["lengths"], rows[0]["prompts"], strict=True):
        shown.append((decode(rows[0]["input_ids"][start : start + prompt]), length))
        start += length
    assert any("[assistant] The committee." in text and "When?" in text for text, _ in shown), (
        "the first answer is shown"
    )


def test_another_text_is_another_version_and_the_same_text_elsewhere_is_not(texts: Path) -> None:
    def version() -> str:
        return load_eval_sets(Evaluation(general="general", chat=None), texts, instruct=True)["general"].version

    before = version()
    (texts / "general" / "a.md").write_text("Rivers carry sediment upstream.\n", "utf-8")
    changed = version()
    (texts / "general" / "a.md").write_text("Rivers carry sediment downstream.\n", "utf-8")
    (texts / "general").rename(texts / "elsewhere")
    moved = load_eval_sets(Evaluation(general="elsewhere", chat=None), texts, instruct=True)["general"].version
    assert before == moved != changed


def test_a_base_without_a_chat_template_skips_the_shipped_conversations(texts: Path) -> None:
    assert set(load_eval_sets(Evaluation(), texts, instruct=False)) == {"general"}
    assert load_eval_sets(Evaluation(general=None, chat=None), texts, instruct=True) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Evaluation(general="nowhere"), "evaluation.general: .*nowhere cannot be read .No such file.*`shipped`"),
        (Evaluation(chat="general"), "evaluation.chat: .*general contains no text in .json files"),
    ],
)
def test_a_folder_that_cannot_be_used_is_named(texts: Path, options: Evaluation, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_eval_sets(options, texts, instruct=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"messages": []}', "b.json is not a conversation"),
        ("no JSON", "b.json is not a conversation"),
        (conversation("Who?", "</s>"), "message 2 of .*b.json: control token"),
    ],
)
def test_a_file_that_is_not_a_conversation_is_named(texts: Path, tiny_base: Path, content: str, message: str) -> None:
    (texts / "chat" / "b.json").write_text(content, "utf-8")
    eval_sets = load_eval_sets(Evaluation(general=None, chat="chat"), texts, instruct=True)
    with pytest.raises(RecipeError, match=message):
        tokenize_eval_set(eval_sets["chat"], tiny_base, 256)


def test_text_that_is_not_utf_8_is_named(texts: Path) -> None:
    (texts / "general" / "a.md").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_eval_sets(Evaluation(general="general"), texts, instruct=True)
