"""The pictures of docs/tour.md: made here, so that they show the page as it is.

`QIT_TOUR=docs/tour ./qit test tests/ui/test_tour.py` writes them anew.
"""

import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, expect

from browsing import PHONE, Site, Visit
from running import process

TOUR = Path(__file__).parents[2] / "docs" / "tour.md"
MOST = 150_000  # bytes of a picture
WINDOW = {"width": 1180, "height": 900}


@pytest.fixture(scope="module")
def site(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A first start with the practice model; where its pictures are to be shown, in a folder whose
    name tells nothing."""
    shown = "QIT_TOUR" in os.environ
    home = Path(tempfile.gettempdir(), "qwen-image-tour") if shown else tmp_path_factory.mktemp("t")
    shutil.rmtree(home, ignore_errors=True)
    try:
        with process(home, "--no-browser", command="ui", fake=False) as running:
            yield Site(running.url, running.http, running.child, browser, home)
    finally:
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    named = os.environ.get("QIT_TOUR")
    found = Path(named).absolute() if named else tmp_path_factory.mktemp("tour")
    found.mkdir(parents=True, exist_ok=True)
    return found


def keep(visit: Visit, folder: Path, name: str) -> None:
    """What the window shows, in the 256 colours that suit it."""
    visit.page.wait_for_timeout(400)
    shown = Image.open(io.BytesIO(visit.page.screenshot())).convert("RGB")
    path = folder / f"{name}.png"
    shown.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    assert path.stat().st_size < MOST, name


def test_the_tour(site: Site, folder: Path) -> None:
    with site.visit(viewport=WINDOW) as visit:
        visit.sees("Three steps to your own pictures")
        expect(visit.plan).to_contain_text("Runs on", timeout=60_000)
        keep(visit, folder, "first-run")
        visit.press("Draw a first picture now")
        visit.state("done", 120)
        expect(visit.page.locator("#qit-stage img").first).to_be_visible()
        visit.press("Close the walk-through")
        expect(visit.page.locator(".qit-guide")).to_have_count(0)
        keep(visit, folder, "create")
        visit.go("Queue")
        expect(visit.page.locator("#qit-board")).to_contain_text("Done in ")
        keep(visit, folder, "queue")
        visit.go("Gallery")
        expect(visit.page.locator(".qit-tiles img").first).to_be_visible()
        keep(visit, folder, "gallery")
        visit.go("Models")
        expect(visit.page.locator(".qit-book.best")).to_be_visible(timeout=60_000)
        keep(visit, folder, "models")
        visit.go("System")
        expect(visit.page.locator("#qit-checks")).to_contain_text("The practice model is complete.")
        keep(visit, folder, "system")
        visit.go("Settings")
        expect(visit.field("Model hub")).to_have_value("Hugging Face")
        keep(visit, folder, "settings")
    with site.visit(viewport=PHONE, color_scheme="dark") as visit:
        visit.state("done")
        keep(visit, folder, "phone")
    shown = set(re.findall(r"\(tour/([\w-]+)\.png\)", TOUR.read_text("utf-8")))
    assert shown == {path.stem for path in folder.glob("*.png")}


def test_the_pictures_that_are_kept_are_small() -> None:
    kept = list((TOUR.parent / "tour").glob("*.png"))
    assert kept
    assert all(path.stat().st_size < MOST for path in kept)
