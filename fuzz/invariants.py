"""The invariants of a chapter, which hold whatever its bytes are. A check that raises has found a bug in the program.

Bytes that are not a valid report must result in a file with a stated problem. They must never raise an exception,
because that would also stop the processing of the other chapters.
"""

import json
from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from ft_dagster.config.recipe import Corpus
from ft_dagster.corpus.chapter import Chapter, read_chapter
from ft_dagster.corpus.files import Kind, SourceFile
from ft_dagster.corpus.report_json import describe_content
from ft_dagster.corpus.secrets import find_secrets
from ft_dagster.dataset.held_out.record import Pinned, Split
from ft_dagster.dataset.shard import Teaching, pack_chapters
from ft_dagster.dataset.table import flat
from ft_dagster.dataset.tokenizer import DocumentTokenizer, comparable

CONTROL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "[INST]", "[/INST]", "<<SYS>>")
BLOCK = 32


def check_markdown(data: bytes, options: Corpus | None = None) -> Chapter:
    """Check a Markdown file: each byte is in a section or left out, and no section has text that the file lacks."""
    chapter = read(data, "markdown", options)
    if not chapter.files[0].problem:
        available = Counter(data.decode().replace("\r\n", "\n").replace("\r", "\n"))
        for section in chapter.sections:
            added = any(count > available[letter] for letter, count in Counter(section.text).items())
            _require(not added, f"text that the source lacks: {section.text!r}")  # cleaning only deletes
            _require(bool(section.text.strip("\n")), "a section without text")
    return chapter


def check_json(data: bytes, options: Corpus | None = None) -> Chapter:
    """Check a JSON report, or a file that claims to be one."""
    return read(data, "json", options or Corpus(drafts=True))


def check_tokens(text: str) -> None:
    """Check the rows of a chapter with this text: they contain every byte, and no control token but ends of text."""
    chapter = check_markdown(text.encode("utf-8", "replace"))
    for tokenizer in tokenizers():
        teaching = Teaching(tokenizer, BLOCK)
        packed = pack_chapters([chapter], teaching, Split(frozenset(), Pinned()))
        used = sum(section.used_bytes for section in chapter.sections)
        _require(packed.used.total() + packed.left_out.total() == used, "the ledger of tokens does not balance")
        ids = flat(packed.rows["train"], "input_ids") if packed.rows else np.zeros(0, np.int32)
        control = np.isin(ids, sorted(tokenizer._control_ids - {tokenizer.eos_id}))
        _require(not control.any(), "a text was encoded as a control token")
        ends = int((ids == tokenizer.eos_id).sum())
        _require(ends == len(chapter.sections), f"{ends} ends of text for {len(chapter.sections)} texts")
        for section, found in zip(
            chapter.sections, tokenizer.encode([s.markdown for s in chapter.sections]), strict=True
        ):
            if not found.lost:
                _require(
                    comparable(tokenizer.decode(found.ids)) == comparable(section.markdown),
                    "the tokens do not decode to the text",
                )


def check_secrets(text: str) -> None:
    """Check that findings name existing lines, and that no text hides an IBAN in a line of its own."""
    lines = text.count("\n") + 1
    for line, kind in find_secrets(text):
        _require(1 <= line <= lines and bool(kind), f"a finding in line {line} of {lines}")
    _require((lines + 1, "IBAN") in find_secrets(f"{text}\nDE89 3704 0044 0532 0130 00"), "an IBAN was not found")


def read(data: bytes, kind: Kind, options: Corpus | None = None) -> Chapter:
    """Read one file as a chapter, check its byte ledger, and check that its sections can be stored."""
    suffix = ".md" if kind == "markdown" else ".json"
    file = SourceFile(f"reports/a{suffix}", "a", kind, len(data), "", *describe_content(kind, "a", data))
    chapter = read_chapter(file.chapter, [file], lambda _: data, options or Corpus())
    (ledger,) = chapter.files
    ledger.check()
    used = sum(section.used_bytes for section in chapter.sections)
    _require(ledger.used == used, f"{ledger.used} bytes used, {used} in sections")
    _require(not ledger.problem or not chapter.sections, "sections of a file that cannot be read")
    json.dumps([section.text for section in chapter.sections], ensure_ascii=False).encode()  # can be stored
    return chapter


@cache
def tokenizers() -> tuple[DocumentTokenizer, ...]:
    """Return a tokenizer of each family: byte-level (as SmolLM's), and pieces with a fallback to bytes."""
    letters = Tokenizer(models.BPE())
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    letters.train_from_iterator(
        ["## The end\n\nof it"], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False)
    )
    vocabulary = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"etaoinshr<|>[/]_IST"]
    pieces = Tokenizer(
        models.BPE({token: n for n, token in enumerate(vocabulary)}, [], unk_token="<unk>", byte_fallback=True)
    )
    pieces.normalizer = normalizers.Replace(" ", "▁")
    pieces.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tuple(map(_document_tokenizer, (letters, pieces)))


def _document_tokenizer(tokenizer: Tokenizer) -> DocumentTokenizer:
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in CONTROL])
    with TemporaryDirectory() as folder:
        tokenizer.save(f"{folder}/tokenizer.json")
        config = {"eos_token": "<|im_end|>", "bos_token": "<s>", "unk_token": "<unk>"}
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
        return DocumentTokenizer(Path(folder))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
