"""Traces an adapter back to the text that it was trained on."""

import json
from pathlib import Path
from typing import Any

from ft_dagster.config.settings import Settings
from ft_dagster.corpus.chapter import Section
from ft_dagster.corpus.sections import all_chapters
from ft_dagster.store.local import Store


def manifest(adapter: Path) -> dict[str, Any]:
    """Return the manifest in an adapter's folder."""
    return json.loads((adapter / "manifest.json").read_text("utf-8"))


def sections(workspace: Path, key: str) -> list[Section]:
    """Return the sections that the store has under a key."""
    artifact = Store(Settings(workspace=workspace).store_root).get("sections", key)
    return [section for chapter in all_chapters(artifact) for section in chapter.sections]


def trained_on(workspace: Path, adapter: Path | None = None) -> dict[str, str]:
    """Return the text by chapter that an adapter was trained on, by default the released one.

    The manifest has the hashes of the sections; their text is read from the sections that it says it was made from.
    """
    content = manifest(adapter or workspace / "fine_tuned_model")
    texts = {section.hash: section.text for section in sections(workspace, content["made_from"]["sections"])}
    found: dict[str, str] = {}
    for row in content["trained_on"]:
        found[row["chapter"]] = found.get(row["chapter"], "") + texts[row["section"]]
    return found
