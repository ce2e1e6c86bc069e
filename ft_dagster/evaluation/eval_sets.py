"""Eval sets: texts other than the reports on which a new adapter is measured, general prose and conversations.

An adapter may learn the reports and forget other things. Both sets are small, ship with the project, and can be
replaced by a folder. Imports no torch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ft_dagster.config.recipe import Evaluation
from ft_dagster.config.recipe_file import RecipeError
from ft_dagster.corpus.chapter import Section
from ft_dagster.corpus.markdown import byte_length
from ft_dagster.dataset.chat import ChatTokenizer, Message
from ft_dagster.dataset.shard import Document
from ft_dagster.dataset.table import PlacedPiece, pack_pieces
from ft_dagster.dataset.tokenized import tokenize_sections
from ft_dagster.dataset.tokenizer import DocumentTokenizer
from ft_dagster.store.hashing import digest

if TYPE_CHECKING:
    from datasets import Dataset

SHIPPED = "shipped"
_SUFFIXES = {"general": (".md", ".txt"), "chat": (".json",)}


class _Turn(BaseModel):
    model_config = ConfigDict(extra="ignore")
    role: str
    content: str


class _Conversation(BaseModel):
    messages: list[_Turn] = Field(min_length=2)


@dataclass(frozen=True)
class EvalSet:
    """The files of one eval set."""

    kind: str
    """`general` or `chat`."""
    files: Mapping[str, str]
    """Name -> text."""
    folder: Path

    @property
    def ships(self) -> bool:
        """Whether this is the eval set that ships with the project."""
        return self.folder == _shipped(self.kind)

    @property
    def version(self) -> str:
        """Hash of the texts and of their file names."""
        return digest([self.kind, dict(sorted(self.files.items()))])


def load_eval_sets(options: Evaluation, workspace: Path, instruct: bool) -> dict[str, EvalSet]:
    """Return the eval sets that the recipe names, by kind.

    Args:
        options: part of the recipe that names the folders.
        workspace: folder to which paths are relative.
        instruct: whether the base has a chat template. Without one, the conversations that ship are left out.

    Raises:
        RecipeError: a folder does not exist or contains no text of the kind, or a file is not UTF-8.
    """
    folders = {"general": options.general, "chat": options.chat}
    if not instruct and options.chat == SHIPPED:
        folders["chat"] = None
    return {kind: _load(kind, folder, workspace) for kind, folder in folders.items() if folder is not None}


def _shipped(kind: str) -> Path:
    return Path(str(resources.files("ft_dagster"))) / "evaluation" / "texts" / kind


def _load(kind: str, named: str, workspace: Path) -> EvalSet:
    folder = _shipped(kind) if named == SHIPPED else workspace / Path(named).expanduser()
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES[kind])
        files = {path.name: path.read_text("utf-8") for path in paths}
    except OSError as error:
        raise RecipeError(
            f"evaluation.{kind}: {folder} cannot be read ({error.strerror}). Name a folder, or `{SHIPPED}`."
        ) from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"evaluation.{kind}: a file in {folder} is not UTF-8 text: {error}.") from error
    if not any(text.strip() for text in files.values()):
        raise RecipeError(f"evaluation.{kind}: {folder} contains no text in {' or '.join(_SUFFIXES[kind])} files.")
    return EvalSet(kind, files, folder)


def tokenize_eval_set(found: EvalSet, base: Path, block_length: int) -> tuple["Dataset", list[Document]]:
    """Return the rows of an eval set and the documents in them, in the form of a dataset's.

    In a conversation each of the assistant's messages is a document, whose prompt is everything before it. A document
    of a conversation that is longer than a block is left out.

    Args:
        found: the eval set.
        base: folder of the base model, which contains its tokenizer and chat template.
        block_length: number of tokens in a row.

    Raises:
        CorpusError: a text cannot be tokenized without loss.
        RecipeError: a conversation cannot be read, the base's template cannot render it, or no text fits into a block.
    """
    from datasets import Dataset

    make = _text_pieces if found.kind == "general" else _answer_pieces
    documents: list[Document] = []
    pieces: list[PlacedPiece] = []
    for document, ids, prompt in make(found, base, block_length):
        for place, piece in enumerate(ids):
            key = (document.section, place)
            pieces.append(PlacedPiece(key, len(documents), piece, prompt, document.objective))
        documents.append(document)
    if not pieces:
        raise RecipeError(f"evaluation.{found.kind}: no text in {found.folder} fits a block of {block_length} tokens.")
    return Dataset(pack_pieces(pieces, block_length)), documents


_Pieces = Iterator[tuple[Document, Sequence[np.ndarray], int]]


def _text_pieces(found: EvalSet, base: Path, block_length: int) -> _Pieces:
    sections = [
        Section(name, "", 0, (), text.strip(), str(found.folder / name), digest(text))
        for name, text in found.files.items()
        if text.strip()
    ]
    tokenized = dict(tokenize_sections(sections, DocumentTokenizer(base), block_length))
    for section in sections:
        text = tokenized[section.hash]
        yield _document(section.chapter, section.hash, "text", text.tokens, text.scored_bytes), text.pieces, text.prompt


def _answer_pieces(found: EvalSet, base: Path, block_length: int) -> _Pieces:
    chat = ChatTokenizer(base, without="evaluation: {chat: null}")
    for name, text in found.files.items():
        try:
            turns = _Conversation.model_validate_json(text).messages
        except ValidationError as error:
            raise RecipeError(
                f"evaluation.chat: {found.folder / name} is not a conversation of the form "
                '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}: '
                f"{error.errors()[0]['msg']}."
            ) from error
        messages: list[Message] = [{"role": turn.role, "content": turn.content} for turn in turns]
        places = [index for index, turn in enumerate(turns) if index and turn.role == "assistant"]
        encoded = chat.encode([(messages[:index], messages[index]["content"]) for index in places])
        for index, exchange in zip(places, encoded, strict=True):
            if isinstance(exchange, str):
                raise RecipeError(f"evaluation.chat: message {index + 1} of {found.folder / name}: {exchange}.")
            ids = np.asarray([*exchange.prompt, *exchange.answer], dtype=np.int32)
            if len(ids) <= block_length:
                key, size = digest(messages[: index + 1]), byte_length(exchange.text)
                yield _document(name, key, "rewrite", len(exchange.answer) - 1, size), [ids], len(exchange.prompt)


def _document(name: str, key: str, objective: str, tokens: int, size: int) -> Document:
    return Document(name, "", key, name, "held_out", tokens, size, size, 0, objective)
