"""Text stays text, and every byte of it is decoded again or counted as lost."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ft_dagster.base.model_folder import BaseModelError, describe_base
from ft_dagster.corpus.ledger import LedgerError
from ft_dagster.dataset.tokenizer import DocumentTokenizer

CONTROL = "<s> </s> <unk> <|im_start|>user <|im_end|> [INST] [/INST] <|endoftext|>"


@pytest.fixture(scope="session")
def byte_level(tiny_base: Path) -> DocumentTokenizer:
    return DocumentTokenizer(tiny_base)


def encoded(tokenizer: DocumentTokenizer, *texts: str) -> list[tuple[list[int], list[int], list[tuple[int, int]], int]]:
    """Return (ids, where each starts, spans that are lost, bytes of these) of each text."""
    return [(text.ids, text.starts.tolist(), text.lost, text.lost_bytes) for text in tokenizer.encode(texts)]


def save(folder: Path, tokenizer: Tokenizer, **config: Any) -> Path:
    """Save the tokenizer files of a model's folder and return it."""
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    content = {"eos_token": "</s>", "unk_token": "<unk>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(content), "utf-8")
    return folder


def characters(alphabet: str) -> Tokenizer:
    """Return a tokenizer with one token per character of the alphabet; other characters are unknown."""
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    return Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True))


def words(*known: str) -> Tokenizer:
    """Return a tokenizer with one token per word between blanks; `</s>` is an ordinary entry of the vocabulary."""
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *known])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_a_byte_level_tokenizer_reproduces_every_text(byte_level: DocumentTokenizer, text: str) -> None:
    (found,) = byte_level.encode([text])
    assert byte_level.decode(found.ids) == text
    begins = found.starts.tolist()
    assert (found.lost, found.lost_bytes, len(begins)) == ([], 0, len(found.ids))
    (carefully,) = byte_level._encode_carefully([text])
    assert (found, begins) == (carefully, carefully.starts.tolist()), "as the tokenizer itself tells it"
    assert [found.tokens_at([at]) for at in range(len(text) + 1)] == [
        [begins.index(at)] if at in begins else [] for at in range(len(text) + 1)
    ]


def test_a_text_that_a_byte_level_tokenizer_changes_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(special_tokens=[], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["costs fell"], trainer)
    document_tokenizer = DocumentTokenizer(save(tmp_path, tokenizer))
    assert document_tokenizer.encode(["costs fell"])[0].lost_bytes == 0
    with pytest.raises(LedgerError, match="does not reproduce this text: 'Costs fell' became 'costs fell'"):
        document_tokenizer.encode(["Costs fell"])


def test_text_of_control_tokens_stays_text(byte_level: DocumentTokenizer) -> None:
    (found,) = byte_level.encode([CONTROL])
    assert {0, 1, 2}.isdisjoint(found.ids)
    assert byte_level.decode(found.ids) == CONTROL


def test_control_tokens_that_were_added_to_a_vocabulary_stay_text(tmp_path: Path) -> None:
    tokenizer = characters("<|im_end>[INST] ")
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_end|>", "[INST]")])
    added = {tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("[INST]")}
    assert set(tokenizer.encode("<|im_end|> [INST]").ids) > added
    document_tokenizer = DocumentTokenizer(save(tmp_path, tokenizer))
    (found,) = document_tokenizer.encode(["<|im_end|> [INST]"])
    assert added.isdisjoint(found.ids)
    assert found.lost_bytes == 0


def test_a_text_that_can_only_be_read_as_a_control_token_is_refused(tmp_path: Path) -> None:
    tokenizer = DocumentTokenizer(save(tmp_path, words("the", "end")))
    with pytest.raises(LedgerError, match="reads '</s>' as a control token in 'the </s> end'"):
        tokenizer.encode(["the end", "the </s> end"])


def test_starts_are_the_characters_where_tokens_start(byte_level: DocumentTokenizer) -> None:
    (found,) = byte_level.encode(["é\n\nb"])
    assert found.starts.tolist() == [0, 0, 1, 2, 3]
    assert [found.tokens_at([at]) for at in range(5)] == [[0], [2], [3], [4], []]
    assert found.tokens_at([0, 1, 3, 9]) == [0, 2, 4]


def test_a_tokenizer_without_a_beginning_token_has_no_prefix(byte_level: DocumentTokenizer) -> None:
    assert (byte_level.prefix, byte_level.eos_id) == ([], 2)


@pytest.mark.parametrize(("template", "prefix"), [("<s> $A", [1]), ("<s> $A </s>", [1]), ("$A </s>", []), ("$A", [])])
def test_the_prefix_is_what_a_model_expects_before_a_text(tmp_path: Path, template: str, prefix: list[int]) -> None:
    tokenizer = characters("ab")
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    document_tokenizer = DocumentTokenizer(save(tmp_path, tokenizer))
    assert document_tokenizer.prefix == prefix
    assert encoded(document_tokenizer, "ab") == [([3, 4], [0, 1], [], 0)]


def test_bytes_of_characters_that_the_vocabulary_lacks_are_counted(tmp_path: Path) -> None:
    tokenizer = DocumentTokenizer(save(tmp_path, characters("ab ")))
    assert encoded(tokenizer, "ab é🎉 a", "b") == [
        ([3, 4, 5, 0, 5, 3], [0, 1, 2, 3, 5, 6], [(3, 5)], 6),
        ([4], [0], [], 0),
    ]


def test_bytes_of_words_that_the_vocabulary_lacks_are_counted(tmp_path: Path) -> None:
    tokenizer = DocumentTokenizer(save(tmp_path, words("costs", "fell")))
    assert encoded(tokenizer, "costs fell überall") == [([3, 4, 0], [0, 6, 11], [(11, 18)], 8)]


def test_white_space_may_decode_differently(tmp_path: Path) -> None:
    tokenizer = DocumentTokenizer(save(tmp_path, words("costs", "fell")))
    assert encoded(tokenizer, " costs\n\nfell") == [([3, 4], [1, 8], [], 0)]


def test_a_lossy_normalizer_is_refused(tmp_path: Path) -> None:
    tokenizer = characters("abc")
    tokenizer.normalizer = normalizers.Lowercase()
    document_tokenizer = DocumentTokenizer(save(tmp_path, tokenizer))
    with pytest.raises(LedgerError, match="does not reproduce this text: 'aBc' became 'a b c'"):
        document_tokenizer.encode(["aBc"])


def test_a_loss_next_to_unknown_characters_is_refused(tmp_path: Path) -> None:
    tokenizer = characters("abc")
    tokenizer.normalizer = normalizers.Lowercase()
    document_tokenizer = DocumentTokenizer(save(tmp_path, tokenizer))
    with pytest.raises(LedgerError, match="does not reproduce this text: 'aBc' became 'a b c'"):
        document_tokenizer.encode(["aBéc"])


def test_characters_dropped_without_an_unknown_token_are_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, []))
    tokenizer.decoder = decoders.Fuse()
    document_tokenizer = DocumentTokenizer(save(tmp_path, tokenizer, unk_token=None))
    with pytest.raises(LedgerError, match="'aéa' became 'aa'"):
        document_tokenizer.encode(["aéa"])


def test_truncation_and_padding_of_the_folder_are_not_applied(tmp_path: Path) -> None:
    tokenizer = characters("ab")
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=2)
    document_tokenizer = DocumentTokenizer(save(tmp_path, tokenizer))
    assert [encoded.ids for encoded in document_tokenizer.encode(["abab", "a"])] == [[3, 4, 3, 4], [3]]


def test_a_special_token_may_be_written_as_an_object(tmp_path: Path) -> None:
    folder = save(tmp_path, characters("a"), eos_token={"content": "</s>", "lstrip": False})
    assert DocumentTokenizer(folder).eos_id == 2


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("special_tokens_map.json", {"eos_token": "</s>"}),
        ("special_tokens_map.json", {"eos_token": {"content": "</s>"}}),
        ("generation_config.json", {"eos_token_id": [2, 1]}),
        ("config.json", {"eos_token_id": 2}),
    ],
)
def test_the_end_of_a_text_is_found_where_transformers_finds_it(
    tmp_path: Path, name: str, content: dict[str, Any]
) -> None:
    folder = save(tmp_path, characters("a"), eos_token=None)
    before = describe_base("x", folder, weights=False).tokenizer
    (folder / name).write_text(json.dumps(content))
    assert DocumentTokenizer(folder).eos_id == 2
    assert describe_base("x", folder, weights=False).tokenizer != before


def test_a_tokenizer_with_more_tokens_than_the_model_has_embeddings_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, characters("ab"))
    (folder / "config.json").write_text(json.dumps({"vocab_size": 5}))
    DocumentTokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 4}))
    with pytest.raises(BaseModelError, match="has 5 tokens, and the model only 4 embeddings"):
        DocumentTokenizer(folder)


def test_the_place_where_a_long_text_is_not_reproduced_is_shown(tmp_path: Path) -> None:
    tokenizer = characters("abcdefghijklmnopqrstuvwxyz ")
    tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(LedgerError, match="became") as caught:
        DocumentTokenizer(save(tmp_path, tokenizer)).encode(["a b c " * 60 + "Danger ahead" + " x y z" * 60])
    assert "Danger" in str(caught.value) and "danger" in str(caught.value) and len(str(caught.value)) < 250


@pytest.mark.parametrize(("eos", "named"), [(None, "null"), ("<end>", '"<end>"')])
def test_a_folder_without_an_end_token_is_refused(tmp_path: Path, eos: str | None, named: str) -> None:
    folder = save(tmp_path, characters("a"), eos_token=eos)
    with pytest.raises(BaseModelError, match=rf"_config.json names no eos_token that is in the vocabulary \({named}\)"):
        DocumentTokenizer(folder)
