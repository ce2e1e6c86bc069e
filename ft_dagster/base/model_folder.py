"""A base model's folder: which files of it count, what they say, and the hashes it is known by. Imports no torch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ft_dagster.errors import UserError
from ft_dagster.store.hashing import digest, file_digest

WEIGHT_FILES = ("model*.safetensors", "model*.safetensors.index.json")
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template*", "config.json", "generation_config.json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
"""What PyTorch itself saves. These files are never read, whatever they contain."""


class BaseModelError(UserError):
    """The base model is missing, or is not the one that the recipe names."""


@dataclass(frozen=True)
class PreparedBase:
    """A base model in a plain folder, ready to be loaded."""

    name: str
    """Its name for people: `smollm2-135m-instruct`, or `repository@revision`."""
    folder: str
    weights: str
    """Hash over the weight files and the model's configuration; empty while only the tokenizer has been fetched."""
    tokenizer: str
    """Hash over tokenizer.json and the special tokens that tokenizer_config.json names."""
    template: str
    """SHA-256 of the chat template; of the empty string if there is none."""
    layout: str = "packed"
    """How pieces of rows are given to the model, `packed` or `padded`, if that has been tried (model/layout.py)."""

    def to_json(self) -> dict[str, str]:
        return asdict(self)

    @property
    def identity(self) -> dict[str, str]:
        """What an adapter is bound to: all fields except the folder, which differs between machines.

        The layout counts only if it is not the usual one: adapters of models whose pieces saw each other are made anew.
        """
        usual = ("folder", "layout") if self.layout == "packed" else ("folder",)
        return {key: value for key, value in self.to_json().items() if key not in usual}


def describe_base(name: str, folder: Path, weights: bool) -> PreparedBase:
    """Describe the model in a folder; its weights are hashed only if `weights` is set.

    Raises:
        BaseModelError: the folder has no tokenizer.json, or weights that cannot be used.
    """
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.is_file():
        raise BaseModelError(f"{folder} has no tokenizer.json; a model with a fast tokenizer is needed.")
    return PreparedBase(
        name=name,
        folder=str(folder),
        weights=weights_hash(folder) if weights else "",
        tokenizer=digest([known_digest(tokenizer), _special_tokens(folder)]),
        template=digest(chat_template(folder).encode()),
    )


def model_config(folder: Path) -> dict[str, Any]:
    """Return config.json without fields that do not affect the computation. Raises BaseModelError if it is missing."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except FileNotFoundError:
        raise BaseModelError(f"{folder} has no config.json.") from None
    for noise in ("transformers_version", "_name_or_path"):  # the program that wrote it, and where
        config.pop(noise, None)
    return config


def chat_template(folder: Path) -> str:
    """Return the chat template of a tokenizer folder; empty if there is none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    found = tokenizer_config(folder).get("chat_template") or ""
    if isinstance(found, list):  # several templates, each with a name
        found = next((item["template"] for item in found if item["name"] == "default"), "")
    return str(found)


def tokenizer_config(folder: Path) -> Mapping[str, Any]:
    """Return tokenizer_config.json of a folder; empty if there is none."""
    file = folder / "tokenizer_config.json"
    return json.loads(file.read_bytes()) if file.is_file() else {}


def token_text(token: object) -> str:
    """Return the text of a special token, which a configuration contains as a string or as an object."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def end_of_text(folder: Path) -> str | int | None:
    """Return the end-of-sequence token of a model folder: its text, or its id if only the model names it.

    The places are those of transformers, in its order: tokenizer_config.json, special_tokens_map.json, and the model's
    generation_config.json and config.json (GPT-2 on a hub).
    """
    for content in (tokenizer_config(folder), _json(folder / "special_tokens_map.json")):
        if found := token_text(content.get("eos_token")):
            return found
    for name in ("generation_config.json", "config.json"):
        number = _json(folder / name).get("eos_token_id")
        if isinstance(number, list) and number:
            number = number[0]
        if isinstance(number, int):
            return number
    return None


def _json(file: Path) -> Mapping[str, Any]:
    return json.loads(file.read_bytes()) if file.is_file() else {}


def _special_tokens(folder: Path) -> dict[str, Any]:
    """Return the special tokens, for the hash of the tokenizer. The end counts from elsewhere only if it must."""
    found = {name: value for name, value in tokenizer_config(folder).items() if name.endswith("_token")}
    return found if token_text(found.get("eos_token")) else found | {"eos_token": end_of_text(folder)}


def refuse_pickles(folder: Path) -> None:
    """Raise BaseModelError if the only weights are pickles, which can run code when they are read."""
    pickles = [path for pattern in _PICKLES for path in sorted(folder.glob(pattern))]
    if pickles and not any(folder.glob("model*.safetensors")):
        raise BaseModelError(
            f"{pickles[0]} is a pickle, and reading one can run code that is hidden in it. Weights are read from "
            "model*.safetensors only: save the model with `save_pretrained` of transformers, where you trust it."
        )


def _require_known_names(folder: Path, files: Sequence[Path]) -> None:
    """Raise BaseModelError if transformers would read weights that are not among the hashed ones."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_bytes())["weight_map"].values())
        if unknown := named - {path.name for path in files}:
            raise BaseModelError(
                f"{index} names {min(unknown)}, which is not one of the folder's model*.safetensors. Bring the whole "
                "model again."
            )
    elif not (folder / "model.safetensors").is_file():
        raise BaseModelError(
            f"{folder} has several weights and no model.safetensors.index.json that says what they are parts of. "
            "Bring the whole model again."
        )


def weights_hash(folder: Path) -> str:
    """Return a hash over config.json and the weight files. Raises BaseModelError if they cannot be used."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        refuse_pickles(folder)
        raise BaseModelError(f"{folder} holds no model*.safetensors weights.")
    _require_known_names(folder, files)
    return digest([model_config(folder), *([path.name, known_digest(path)] for path in files)])


def known_digest(path: Path) -> str:
    """Return the SHA-256 of a file, which is read again only if its status changed since this process last read it."""
    status = path.stat()
    return _digest_of_state(str(path), status.st_size, status.st_mtime_ns, status.st_ino)


@lru_cache(maxsize=1024)
def _digest_of_state(path: str, size: int, modified: int, inode: int) -> str:
    del size, modified, inode  # part of the cache's key only
    return file_digest(Path(path))
