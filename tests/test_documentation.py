"""The documentation says what the program does."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from ft_dagster.recipe import Recipe
from ft_dagster.settings import Settings

PROJECT = Path(__file__).parents[1]


def test_every_field_of_a_recipe_and_its_default_stand_in_the_table() -> None:
    cells = [
        [cell.strip(" *`") for cell in line.split("|")[1:-1]]
        for line in (PROJECT / "docs" / "recipes.md").read_text().splitlines()
        if line.startswith("|")
    ]
    documented = {name: default for name, default, _ in cells[2:]}
    fields: dict[str, Any] = {}
    for name, field in Recipe.model_fields.items():
        part = field.annotation
        if isinstance(part, type) and issubclass(part, BaseModel):
            fields |= part.model_fields
        assert name in documented
    assert fields.keys() <= documented.keys()
    for name, field in fields.items():
        if isinstance(field.default, (int, float)) and not isinstance(field.default, bool):
            assert float(documented[name]) == field.default, name
        elif isinstance(field.default, str):
            assert documented[name] == field.default, name


def test_every_setting_is_explained() -> None:
    explained = (PROJECT / ".env.example").read_text()
    for name, field in Settings.model_fields.items():
        assert str(field.validation_alias or f"FT_{name.upper()}") in explained, name


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (PROJECT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page: str) -> None:
    text = (PROJECT / page).read_text()
    targets = [part.split(")")[0] for part in text.split("](")[1:]]
    local = [target for target in targets if not target.startswith(("http", "#"))]
    missing = [target for target in local if not ((PROJECT / page).parent / target).exists()]
    assert not missing
