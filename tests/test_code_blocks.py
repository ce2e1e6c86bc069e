"""The code blocks of the documentation do what it says, for a reader who types them in from the top of a page."""

import shutil
import sys
from pathlib import Path

import pytest
import yaml
from code_blocks import DEMO, PAGES, RUN, Block, blocks_of, copy_project, run_blocks, used_blocks
from dotenv import dotenv_values

from ft_dagster.recipe import load_recipe, resolve_recipe, shipped_recipes
from ft_dagster.settings import Settings, load_settings, variable

BASE = {"source": "embedded", "model": "smollm2-135m-instruct"}
QUICK = {
    "name": "quick",
    "base": BASE,
    "tokens": {"held_out": 0.05},
    "lora": {"rank": 8, "alpha": 16},
    "training": {"epochs": 0.3, "learning_rate": 2e-3, "rows_per_device": 1, "rows_per_step": 1},
    "evaluation": {"general": None, "chat": None, "train_tokens": 128, "sample_tokens": 4, "prompts": ["The most"]},
}
"""What pages train here in place of the shipped recipe: enough of it for a release."""
RUNNING = [page for page in PAGES if any(block.is_used and block.language in RUN for block in blocks_of(page))]
DAGSTERS = {"DAGSTER_DISABLE_TELEMETRY"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "quick.yaml"
    path.write_text(yaml.safe_dump(QUICK), "utf-8")
    return path


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """The workspace that `make demo` makes in a fresh clone."""
    folder = copy_project(tmp_path_factory.mktemp("demo") / "ft_dagster")
    written = run_blocks([Block("make demo", 1, "sh", "make demo\n")], folder, recipe)
    assert "verdict" in written and (folder / "demo" / "fine_tuned_model" / "manifest.json").is_file()
    return folder / "demo"


@pytest.mark.parametrize("page", PAGES)
def test_every_code_block_is_fenced_and_says_what_it_is(page: str) -> None:
    unknown = {str(block): block.info for block in blocks_of(page) if block.language is None}
    assert not unknown, "see tests/support/code_blocks.py for the words that may stand behind a fence"


@pytest.mark.parametrize("page", RUNNING)
def test_a_page_runs_from_its_top(page: str, recipe: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    blocks = [block for block in blocks_of(page) if block.is_used and block.language in RUN]
    folder = copy_project(tmp_path / "ft_dagster")
    if any(DEMO.search(block.code) for block in blocks):
        shutil.copytree(request.getfixturevalue("demo"), folder / "demo", symlinks=True)
    run_blocks(blocks, folder, recipe)


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


def test_a_block_that_fails_is_named_with_what_it_wrote(recipe: Path, tmp_path: Path) -> None:
    blocks = [
        Block("page.md", 3, "sh", "export WORD=kept\nHERE=too\n"),
        Block("page.md", 8, "python", "import os\nprint('it is', os.environ['WORD'])\n"),
        Block("page.md", 12, "sh", 'echo "$HERE"; false\n'),
        Block("page.md", 15, "sh", "echo never\n"),
    ]
    (tmp_path / "copy" / ".venv").mkdir(parents=True)
    (tmp_path / "copy" / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    with pytest.raises(AssertionError, match=r"it is kept\ntoo\nThe block at page\.md:12 ended with 1\.") as caught:
        run_blocks(blocks, tmp_path / "copy", recipe)
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
def test_a_word_that_is_not_known_or_a_reason_that_is_missing_does_not_pass(
    info: str | None, language: str | None, used: bool
) -> None:
    block = Block("page.md", 1, info, "true\n")
    assert (block.language, block.is_used) == (language, used)
