"""The code blocks of the documentation have a known language, and their settings and recipes load."""

import sys
from pathlib import Path

import pytest
import yaml
from code_blocks import PAGES, Block, blocks_of, run_blocks, used_blocks
from dotenv import dotenv_values

from ft_dagster.config.recipe_file import load_recipe, resolve_recipe, shipped_recipes
from ft_dagster.config.settings import Settings, load_settings, variable

BASE = {"source": "embedded", "model": "smollm2-135m-instruct"}
DAGSTERS = {"DAGSTER_DISABLE_TELEMETRY"}


@pytest.mark.parametrize("page", PAGES)
def test_every_code_block_is_fenced_and_names_its_language(page: str) -> None:
    unknown = {str(block): block.info for block in blocks_of(page) if block.language is None}
    assert not unknown, "see tests/support/code_blocks.py for the words that may stand behind a fence"


@pytest.mark.parametrize("block", used_blocks("yaml"), ids=str)
def test_yaml_is_a_recipe_or_parts_of_one(block: Block) -> None:
    content = yaml.safe_load(block.code)
    recipe = resolve_recipe({"name": "page", **content, "base": BASE | content.get("base", {})}, origin=str(block))
    shown = recipe.model_dump(mode="json")
    for part, fields in content.items():
        assert fields == shown[part] if isinstance(fields, str) else fields.items() <= shown[part].items()


@pytest.mark.parametrize("block", used_blocks("dotenv"), ids=str)
def test_dotenv_lines_are_settings_that_load(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {variable(name) for name in Settings.model_fields}
    for name in known:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".env").write_text(block.code, "utf-8")
    assert dotenv_values(tmp_path / ".env").keys() <= known | DAGSTERS
    settings = load_settings(tmp_path)
    if settings.recipe in shipped_recipes():
        load_recipe(settings.recipe)


def test_a_block_that_fails_is_named_with_its_output(tmp_path: Path) -> None:
    blocks = [
        Block("page.md", 3, "sh", "export WORD=kept\nHERE=too\n"),
        Block("page.md", 8, "python", "import os\nprint('it is', os.environ['WORD'])\n"),
        Block("page.md", 12, "sh", 'echo "$HERE"; false\n'),
        Block("page.md", 15, "sh", "echo never\n"),
    ]
    (tmp_path / "copy" / ".venv").mkdir(parents=True)
    (tmp_path / "copy" / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    with pytest.raises(AssertionError, match=r"it is kept\ntoo\nThe block at page\.md:12 ended with 1\.") as caught:
        run_blocks(blocks, tmp_path / "copy", tmp_path / "recipe.yaml")
    assert "never" not in str(caught.value)


@pytest.mark.parametrize(
    ("info", "language", "used"),
    [
        ("sh", "sh", True),
        ("sh no-run: it uploads", "sh", False),
        ("yaml", "yaml", True),
        ("text", "text", False),
        ("sh no-run:", None, False),
        ("sh no-run: ", None, False),
        ("sh norun", None, False),
        ("bash", None, False),
        ("", None, False),
        (None, None, False),
    ],
)
def test_a_block_with_an_unknown_word_or_without_a_reason_does_not_pass(
    info: str | None, language: str | None, used: bool
) -> None:
    block = Block("page.md", 1, info, "true\n")
    assert (block.language, block.is_used) == (language, used)
