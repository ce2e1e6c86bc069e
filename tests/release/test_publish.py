"""What is published to a hub: every file of the adapter as it was saved, and a card that states its origin."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub.errors import HfHubHTTPError

from ft_dagster.evaluation.request import KIND as EVALUATION
from ft_dagster.model.manifest import AdapterError, Manifest, read_manifest
from ft_dagster.release.publish import model_card, publish
from ft_dagster.release.released import ReleaseError
from ft_dagster.store.local import Store

CANARY = "hf_canary_1234567890"


class Hub:
    """A hub client that keeps the files it would upload."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def create_repo(self, repository: str, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.repository, self.private = repository, private

    def repo_info(self, repository: str) -> Any:
        return SimpleNamespace(private=self.private)

    def create_commit(self, repository: str, operations: list[Any], commit_message: str) -> Any:
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()
        return SimpleNamespace(commit_url=f"https://hub.invalid/{repository}/commit/1")


class PublicHub(Hub):
    def repo_info(self, repository: str) -> Any:
        return SimpleNamespace(private=False)


class DistantHub(Hub):
    def create_repo(self, repository: str, private: bool, exist_ok: bool) -> None:
        raise ConnectionError(f"cannot reach the hub as {CANARY}")


class ClosedHub(Hub):
    def create_repo(self, repository: str, private: bool, exist_ok: bool) -> None:
        response: Any = SimpleNamespace(headers={}, request=None)
        raise HfHubHTTPError(f"forbidden for {CANARY}", response=response)


@pytest.fixture
def adapter(finished: Path) -> tuple[Path, Manifest]:
    folder = (finished / "workspace" / "fine_tuned_model").resolve()
    return folder, read_manifest(folder)


def test_every_file_is_published_as_it_was_saved_with_its_card(adapter: tuple[Path, Manifest]) -> None:
    folder, manifest = adapter
    hub = Hub()
    address = publish(folder, manifest, "the card", "team/reports", hub, private=True)
    assert address.endswith("team/reports/commit/1") and hub.private
    assert hub.files.pop("README.md") == b"the card"
    manifest_too = [*manifest.files, "manifest.json"]
    assert hub.files == {name: (folder / name).read_bytes() for name in manifest_too}


def test_a_damaged_adapter_is_not_published(adapter: tuple[Path, Manifest]) -> None:
    folder, manifest = adapter
    hub = Hub()
    damaged = replace(manifest, files={**manifest.files, "adapter_model.safetensors": "0" * 64})
    with pytest.raises(AdapterError, match="is not the file that was saved"):
        publish(folder, damaged, "", "team/reports", hub, private=True)
    assert not hub.files


def test_a_hub_that_refuses_is_named_without_any_secret(adapter: tuple[Path, Manifest]) -> None:
    folder, manifest = adapter
    with pytest.raises(ReleaseError, match="The hub refuses team/reports") as caught:
        publish(folder, manifest, "", "team/reports", ClosedHub(), private=True)
    assert CANARY not in str(caught.value)


def test_a_private_adapter_is_not_published_to_a_public_repository(adapter: tuple[Path, Manifest]) -> None:
    folder, manifest = adapter
    hub = PublicHub()
    with pytest.raises(ReleaseError, match="team/reports already exists and is public"):
        publish(folder, manifest, "", "team/reports", hub, private=True)
    assert not hub.files
    publish(folder, manifest, "", "team/reports", hub, private=False)
    assert hub.files


def test_a_hub_that_cannot_be_reached_is_reported(adapter: tuple[Path, Manifest]) -> None:
    folder, manifest = adapter
    with pytest.raises(ReleaseError, match="cannot be published: ConnectionError") as caught:
        publish(folder, manifest, "", "team/reports", DistantHub(), private=True)
    assert CANARY not in str(caught.value)


def test_the_card_says_what_the_adapter_was_made_from_and_what_was_measured(
    adapter: tuple[Path, Manifest], finished: Path
) -> None:
    _, manifest = adapter
    evaluation = Store(finished / "workspace" / ".ft" / "store").newest(EVALUATION, adapter=manifest.key)
    assert evaluation
    card = model_card(manifest, evaluation.about)
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "peft" and "base_model" not in yaml.safe_load(front)
    for chapter in manifest.chapters:
        assert f"| {chapter} |" in text
    assert f"{evaluation.about['models']['new']['bits_per_byte']:.4f}" in text
    assert manifest.key in text and manifest.base["weights"] in text and "gain over the base" in text
    hub = replace(
        manifest, recipe={**manifest.recipe, "base": {**manifest.recipe["base"], "source": "hub", "model": "a/b"}}
    )
    assert yaml.safe_load(model_card(hub, None).split("---\n", 2)[1])["base_model"] == "a/b"
    assert "Measured" not in model_card(hub, None)
