"""What users see in the UI of `make dev`, in a real browser, on chapters of the example report.

With FT_SCREENSHOTS=FOLDER the tests take the pictures of the documentation (`make screenshots`), of the complete
example report with the real base model and the shipped recipe, in a workspace whose path reveals nothing about
the machine.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from browser import Album, UserInterface, open_page
from dagster_dev import MakeDev, wait_until
from dagster_ui import Run, steps
from playwright.sync_api import expect
from real_base import CHAPTERS, cache, quick_recipe

from ft_dagster.config.recipe_file import load_recipe
from ft_dagster.defs.stages import BASE_MODEL, REPORT_FILES, STAGES
from ft_dagster.model.manifest import read_manifest

QUICK = ("chapter_1.md", "chapter_7.md", "chapter_9.md")
PICTURES = os.environ.get("FT_SCREENSHOTS")
ASSETS = [BASE_MODEL.to_user_string(), REPORT_FILES.to_user_string(), *(stage.name for stage in STAGES)]
UNSYNCED = "Unsynced (1)"
"""The UI's word for an asset that was made from earlier content of its parent."""
HELD_BACK = "the minimum interval is"
"""Why the sensor starts no second run, so that a test can look at what an edit made stale."""

album = Album(Path(PICTURES) if PICTURES else None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if not PICTURES:
        yield tmp_path_factory.mktemp("browser")
        return
    shown = Path(tempfile.gettempdir()) / "ft_dagster-demo"
    shutil.rmtree(shown, ignore_errors=True)
    shown.mkdir()
    yield shown
    shutil.rmtree(shown)


@pytest.fixture(scope="module")
def ui(folder: Path, tiny_base: Path) -> Iterator[UserInterface]:
    """Start `make dev` on a workspace without chapters, and a browser."""
    workspace = folder / "workspace"
    (workspace / "chapter_markdowns").mkdir(parents=True)
    if PICTURES:
        recipe = load_recipe("smollm2-135m").model_dump(mode="json")
    else:
        recipe = quick_recipe(workspace, learning_rate=0.02)
        recipe["base"] = {"source": "folder", "model": str(tiny_base)}
        recipe["tokens"]["held_out"] = 0.3  # one of three chapters
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    settings = {"FT_CACHE": str(cache()), "FT_MINIMUM_INTERVAL_SECONDS": "3600"}
    with open_page() as page, MakeDev(folder, **settings) as dev:  # the converted base is kept
        yield UserInterface(dev, page)


@pytest.fixture(scope="module")
def first_run(ui: UserInterface) -> Run:
    """Turn the sensor off, add chapters, click 'Materialize all', and turn the sensor on again."""
    ui.turn_sensor(on=False)
    chapters = ui.dev.workspace / "chapter_markdowns"
    if PICTURES:
        shutil.copytree(CHAPTERS, chapters, dirs_exist_ok=True)
        shutil.copytree(CHAPTERS.parent / "outputs", ui.dev.workspace / "outputs")
    else:
        for name in QUICK:
            shutil.copy(CHAPTERS / name, chapters)
    ui.open_graph()
    run = ui.materialize_all()
    expect(ui.node("tokenized_dataset")).to_contain_text("Materialized")
    expect(ui.node("lora_adapter")).to_contain_text("Materializing")
    album.take_graph(ui, "lineage-running")
    run = ui.end_of(run)
    ui.turn_sensor(on=True)
    return run


def test_the_lineage_page_shows_the_complete_graph_from_reports_to_release(
    ui: UserInterface,
) -> None:
    ui.open("/", 1600, 900)
    ui.page.get_by_role("link", name="Lineage").click()
    expect(ui.node("released_adapter")).to_be_visible()
    for asset in ASSETS:
        place = ui.place(asset)
        assert place["x"] > 0 and place["x"] + place["width"] < 1600, f"{asset} is within the window"
        assert place["y"] > 0 and place["y"] + place["height"] < 900, f"{asset} is within the window"
    for stage in STAGES:
        for parent in stage.parents:
            before = ui.place(parent.to_user_string())
            assert before["x"] + before["width"] < ui.place(stage.name)["x"], f"{parent} stands left of {stage.name}"


def test_materialize_all_trains_and_releases_an_adapter_and_leaves_nothing_stale(
    ui: UserInterface, first_run: Run
) -> None:
    assert first_run.status == "SUCCESS"
    assert first_run.tags["dagster/from_ui"] == "true"
    ui.dev.until_up_to_date()
    assert [run.id for run in ui.dev.runs()] == [first_run.id]
    ui.open_graph()
    for asset in ASSETS:
        expect(ui.node(asset)).to_contain_text("Materialized")
        expect(ui.node(asset)).not_to_contain_text("Unsynced")
    expect(ui.node("lora_adapter")).to_contain_text("4 / 4 Passed")
    expect(ui.node("adapter_evaluation")).to_contain_text("4 / 4 Passed")
    expect(ui.node("released_adapter")).to_contain_text("1 / 1 Passed")
    album.take_graph(ui, "lineage")
    assert (ui.dev.workspace / "fine_tuned_model" / "adapter_model.safetensors").exists()


def held_out(ui: UserInterface) -> str:
    """Return the chapter that the released adapter was not trained on."""
    (name,) = read_manifest(ui.dev.workspace / "fine_tuned_model").held_out
    return name


def test_the_adapters_page_shows_its_loss_curve_its_chapters_its_checks_and_its_code(
    ui: UserInterface, first_run: Run
) -> None:
    ui.open_asset("lora_adapter")
    trained_on = ui.row("chapters trained on")
    expect(trained_on).to_contain_text("chapter_7")
    expect(trained_on).not_to_contain_text(held_out(ui))
    expect(ui.page.get_by_text("Open lora_adapter.py")).to_be_visible()
    ui.row("loss curve").get_by_text("Show Markdown").click()
    curve = ui.page.get_by_role("img", name="loss by step")
    expect(curve).to_be_visible()
    wait_until(lambda: curve.evaluate("img => img.naturalWidth > 300 && img.naturalHeight > 150"), "it is a picture")
    album.take(ui.page, "adapter")
    ui.page.get_by_role("button", name="Close").click()
    ui.page.get_by_role("tab", name="Checks").click()
    for check in (
        "loss_is_finite",
        "adapter_reloads_and_differs_from_base",
        "every_token_is_supervised_once_an_epoch",
        "pieces_in_a_row_do_not_see_each_other",
    ):
        expect(ui.page.get_by_text(check).first).to_be_attached()  # only both ends of a long name are visible
    expect(ui.page.get_by_text("Succeeded")).to_have_count(4)


def test_the_evaluations_page_shows_a_table_of_chapters_the_rules_and_the_checks(
    ui: UserInterface, first_run: Run
) -> None:
    ui.open_asset("adapter_evaluation", width=1900)  # the table of rules is wide
    by_chapter = ui.row("bits per byte by chapter")
    expect(by_chapter.get_by_role("columnheader")).to_have_text(["chapter", "bytes", "base", "new"])
    expect(by_chapter.get_by_role("cell", name=held_out(ui), exact=True)).to_be_visible()
    rules = ui.row("rules")
    for rule in ("gain over the base", "loss on general text", "loss on chat", "passages recited"):
        expect(rules).to_contain_text(rule)
    rules.scroll_into_view_if_needed()
    album.take(ui.page, "evaluation")
    ui.page.get_by_role("tab", name="Checks").click()
    expect(ui.page.get_by_text("Succeeded")).to_have_count(4)
    album.take(ui.page, "checks")


def test_an_edit_is_marked_in_the_graph_until_a_run_has_trained_on_it(ui: UserInterface, first_run: Run) -> None:
    chapter = ui.dev.workspace / "chapter_markdowns" / "chapter_1.md"
    text = chapter.read_text()
    chapter.write_text(text + "\n\n")
    (automatic,) = wait_until(lambda: ui.dev.runs()[1:], "the sensor started a run")
    assert ui.end_of(automatic).status == "SUCCESS"
    assert steps(ui.dev.address, automatic.id).keys() == {"raw_chapters", "sections"}, "no word has changed"

    ui.open_graph()
    chapter.write_text(text.replace("at great expense", "at an expense that few can bear"))
    ui.dev.until_skipped(HELD_BACK)
    expect(ui.node("raw_chapters")).to_contain_text(UNSYNCED)
    album.take_graph(ui, "lineage-unsynced")
    ui.node("raw_chapters").get_by_text(UNSYNCED).hover()
    expect(ui.page.get_by_text("has a new data version")).to_be_visible()
    before = ui.dev.made().adapters
    assert ui.end_of(ui.materialize_all()).status == "SUCCESS"
    for asset in ASSETS:
        expect(ui.node(asset)).not_to_contain_text("Unsynced")
    assert len(ui.dev.made().adapters - before) == 1
    assert ui.dev.not_fresh() == set()


def test_numbers_are_plotted_over_materializations(ui: UserInterface, first_run: Run) -> None:
    ui.open_asset("adapter_evaluation", height=1600)
    ui.page.get_by_role("button", name="Plots").click()
    for number in ("bits per byte: base", "bits per byte: new", "gain over base"):
        expect(ui.page.get_by_text(number, exact=True)).to_be_visible()
    expect(ui.page.locator("canvas").first).to_be_visible()
    album.take(ui.page, "plots")
