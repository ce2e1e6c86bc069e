"""A real browser on the Dagster UI, and pictures of what it shows."""

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from dagster_dev import DagsterDev, wait_until
from dagster_ui import Run
from PIL import Image
from playwright.sync_api import FloatRect, Locator, Page, expect, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_SCREEN = (2000, 900)
"""Wide enough for the graph to show each asset with its state, not only with its name."""
_GROUP = "/locations/ft_dagster/asset-groups/ft_dagster/lineage"
_WATCHER = "/locations/ft_dagster/sensors/keep_up_to_date"
_PATIENCE_SECONDS = 60
_RUN_SECONDS = 1800
"""The pictures show a real training, perhaps on a machine that also does other work."""
_ENDED = ("SUCCESS", "FAILURE", "CANCELED")


def find_chromium() -> str:
    """Return the browser of this machine. Without one the test is skipped; with CI_BROWSER=required it fails."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        said = f"no browser: none of {', '.join(_NAMES)} is on the PATH (Debian: apt-get install chromium)"
        if os.environ.get("CI_BROWSER") == "required":
            pytest.fail(said)
        pytest.skip(said)
    return found


@contextmanager
def open_page() -> Iterator[Page]:
    """Open an empty page in a browser of its own, which is closed afterwards with all of its processes."""
    chromium = find_chromium()
    before = set(psutil.Process().children(recursive=True))
    with sync_playwright() as playwright:
        sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium has none for root
        browser = playwright.chromium.launch(executable_path=chromium, args=sandbox)
        try:
            page = browser.new_page(timezone_id="UTC", locale="en-US")
            page.set_default_timeout(_PATIENCE_SECONDS * 1000)
            yield page
        finally:
            browser.close()
    wait_until(lambda: set(psutil.Process().children(recursive=True)) <= before, "the browser has ended", seconds=30)


class UserInterface:
    """The UI as a user operates and sees it."""

    def __init__(self, dev: DagsterDev, page: Page) -> None:
        self.dev = dev
        self.page = page
        expect.set_options(timeout=_PATIENCE_SECONDS * 1000)

    # Pages

    def open(self, path: str, width: int = 1400, height: int = 1000) -> None:
        self.page.set_viewport_size({"width": width, "height": height})
        self.page.goto(self.dev.address + path)

    def open_graph(self) -> None:
        """Open the page of the asset group, which shows only the graph."""
        self.open(_GROUP, *_SCREEN)
        expect(self.node("report_files")).to_be_visible()

    def open_asset(self, name: str, width: int = 1400, height: int = 1000) -> None:
        self.open(f"/assets/{name}", width, height)
        expect(self.page.get_by_role("button", name="Plots")).to_be_visible()

    # The graph

    def node(self, asset: str) -> Locator:
        """Return an asset in the graph: name, last event, checks, whether it is unsynced."""
        return self.page.locator("foreignObject", has=self.page.get_by_text(asset, exact=True))

    def place(self, asset: str) -> FloatRect:
        """Return the position of an asset in the graph, in pixels of the window."""
        box = self.node(asset).bounding_box()
        assert box is not None, f"{asset} is not shown"
        return box

    def materialize_all(self) -> Run:
        """Click the button and return the run that it started."""
        before = {run.id for run in self.dev.runs()}
        self.page.get_by_role("button", name="Materialize all").click()
        (started,) = wait_until(lambda: [run for run in self.dev.runs() if run.id not in before], "a run was started")
        return started

    def end_of(self, started: Run) -> Run:
        """Wait for the run to finish and return it."""
        return wait_until(
            lambda: next((run for run in self.dev.runs() if run.id == started.id and run.status in _ENDED), None),
            "the run has ended",
            seconds=_RUN_SECONDS,
        )

    # Other things

    def turn_sensor(self, on: bool) -> None:
        """Click the switch of the sensor `keep_up_to_date`."""
        self.open(_WATCHER)
        switch = self.page.get_by_role("checkbox")
        expect(switch).to_be_checked(checked=not on)
        self.page.locator("label", has=switch).click()  # which draws the switch; the checkbox itself is hidden
        wait_until(lambda: self.dev.watches() is on, f"the sensor is {'on' if on else 'off'}")

    def row(self, key: str) -> Locator:
        """Return a line of an asset's metadata."""
        return self.page.get_by_role("row").filter(has=self.page.get_by_text(key, exact=True))


class Album:
    """Takes the pictures of the documentation while tests look at the same pages. Without a folder it takes none."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def take(self, page: Page, name: str, clip: FloatRect | None = None) -> None:
        """Take a picture of the window, or of a part of it, in few colors, which makes some tens of kB."""
        if self.folder is None:
            return
        page.mouse.move(0, 0)  # so that nothing under the pointer is highlighted
        taken = Image.open(io.BytesIO(page.screenshot(clip=clip, animations="disabled"))).convert("RGB")
        self.folder.mkdir(parents=True, exist_ok=True)
        few = taken.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(self.folder / f"{name}.png", optimize=True)

    def take_graph(self, shown: UserInterface, name: str) -> None:
        """Take a picture of the graph without the empty space around it."""
        boxes = [box for node in shown.page.locator("foreignObject").all() if (box := node.bounding_box())]
        left, top = (min(box[side] for box in boxes) - 12 for side in ("x", "y"))
        right = max(box["x"] + box["width"] for box in boxes) + 12
        bottom = max(box["y"] + box["height"] for box in boxes) + 12
        self.take(shown.page, name, {"x": left, "y": top, "width": right - left, "height": bottom - top})
