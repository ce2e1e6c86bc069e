"""The documentation says what the program does."""

import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from docs.tables import licences_table, pods_table, recipe_table, settings_table, with_tables
from ft_dagster.config.settings import Settings, variable

PROJECT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("page", "table"),
    [("recipes.md", recipe_table), ("settings.md", settings_table), ("kubernetes.md", pods_table)],
)
def test_a_table_of_fields_is_what_make_docs_writes(page: str, table: Callable[[], str]) -> None:
    text = (PROJECT / "docs" / page).read_text("utf-8")
    assert table() in text, "`make docs` writes it anew"
    assert with_tables(text) == text


def test_every_package_of_the_lock_names_a_license() -> None:
    text = (PROJECT / "docs" / "licences.md").read_text("utf-8")
    assert licences_table() in text, "`make docs` writes it anew"
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in licences_table().splitlines()[2:]]
    assert len(rows) > 200
    assert [name for name, _, licence in rows if "UNKNOWN" in licence or not licence] == []


def test_the_lock_has_what_is_tested_and_a_hash_for_each() -> None:
    lock = "".join(path.read_text() for path in PROJECT.glob("requirements*.lock"))
    assert "\ntorch==" in lock
    for pinned in re.findall(r"^([\w.-]+)==([\w.+]+)([^\n]*)\n((?:    --hash=sha256:[0-9a-f]{64}.*\n)*)", lock, re.M):
        name, version, marker, hashes = pinned
        assert hashes, f"{name} has no hash"
        if ";" not in marker:
            assert metadata.version(name).partition("+")[0] == version, f"{name}: `make` installs the lock"


def test_every_field_has_a_description_and_its_values() -> None:
    for row in (recipe_table() + settings_table() + pods_table()).splitlines():
        name, _, values, description = (cell.strip() for cell in row.split("|")[1:-1])
        assert name in ("field", "variable", "---") or description.endswith("."), row
        assert name.startswith("**") or values, row


def test_a_table_shows_defaults_bounds_and_choices() -> None:
    rows = recipe_table().splitlines() + settings_table().splitlines()
    assert "| `held_out` | `0.1` | number above 0, below 1 | Share of the text that is" in "\n".join(rows)
    for row in (
        "| `model` | required | text, not empty |",
        "| `revision` | `null` | text or `null` |",
        "| `minimum_score` | `null` | number from 0 to 1 or `null` |",
        "| `quantization` | `none` | `none`, `nf4`, `int8` |",
        "| `targets` | `all-linear` | `all-linear`, list of texts |",
        "| `fused` | `true` | `true`, `false` |",
        "| `FT_STORE` | `.ft/store` | text |",
        "| `FT_THREADS` | | whole number from 1 |",
        "| `HUGGINGFACE_TOKEN` | | text |",
    ):
        assert len([line for line in rows if line.startswith(row)]) == 1, row


def test_every_setting_is_explained() -> None:
    explained = (PROJECT / ".env.example").read_text()
    for name in Settings.model_fields:
        assert variable(name) in explained, name


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (PROJECT / "docs").glob("*.md"))]
)
def test_every_link_has_a_target(page: str) -> None:
    text = (PROJECT / page).read_text()
    targets = [part.split(")")[0] for part in text.split("](")[1:]]
    local = [target for target in targets if not target.startswith(("http", "#"))]
    missing = [target for target in local if not leads_somewhere((PROJECT / page).parent, target)]
    assert not missing


def leads_somewhere(folder: Path, target: str) -> bool:
    """Return whether a file exists and has the heading behind the #, if one is named."""
    path, _, anchor = target.partition("#")
    if not anchor or not (folder / path).exists():
        return (folder / path).exists()
    headings = [line.lstrip("# ") for line in (folder / path).read_text().splitlines() if line.startswith("#")]
    return anchor in {"-".join(re.sub(r"[^\w\s-]", "", h.lower()).split()) for h in headings}
