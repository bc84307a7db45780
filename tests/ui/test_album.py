"""The gallery in a real browser: found again, looked at, compared, deleted and brought back."""

import base64
import io
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import FilePayload, Locator, expect

from browsing import DESKTOP, OPENS, PHONE, Site, Visit
from fake_worker import plan_for
from qwen_image_tool import gallery
from qwen_image_tool.gallery.index import picture_id
from qwen_image_tool.types import Request, Size

FOX, CAT = "a red fox in the snow", "一只戴帽子的猫"
COLOURS = ("#7a4f9a", "#2f7d6d", "#c2643b", "#d9b64a", "#47679e", "#8f3f52")
NAMES = [f"20210101-00000{second}-seed{second}.png" for second in range(6)]
A1111 = "a stone bridge\nNegative prompt: fog\nSteps: 7, Sampler: Euler, CFG scale: 2.5, Seed: 99"


def draw(folder: Path, name: str, prompt: str, colour: str = "red", **more: Any) -> str:
    """A picture, and its id. `more`: fields of its request."""
    fields = {"model": "practice", "size": Size(96, 96), "steps": 2, "cfg": 3.0, "seed": 1}
    fields |= {"negative_prompt": " ", **more}  # as the practice model's requests are resolved
    request = Request(prompt=prompt, **fields)
    assert request.size
    image = Image.new("RGB", (request.size.width, request.size.height), colour)
    path = gallery.save_image(image, folder, request, plan_for(request), {}, "Practice model")
    path.rename(folder / name)
    return picture_id(name)


@pytest.fixture(scope="module")
def folder(site: Site) -> Path:
    return Path(site.http.get("/api/system").json()["folder"])


@pytest.fixture(autouse=True)
def pictures(site: Site, folder: Path) -> Iterator[dict[str, str]]:
    """Six pictures by name, the newest last: three foxes that differ in the seed, one in the
    steps, a cat, and one that another program made today."""
    site.settle()
    wide, tall = Size(128, 96), Size(96, 128)
    made = {
        f"fox {seed}": draw(folder, NAMES[seed], FOX, COLOURS[seed], seed=seed, size=wide)
        for seed in (1, 2, 3)
    }
    made["fox steps"] = draw(folder, NAMES[4], FOX, COLOURS[4], seed=1, steps=9, size=wide)
    made["cat"] = draw(folder, NAMES[5], CAT, COLOURS[5], seed=4, size=tall)
    chunks = PngInfo()
    chunks.add_text("parameters", A1111)
    bridge = folder / "bridge.png"
    Image.new("RGB", (96, 96), COLOURS[0]).save(bridge, pnginfo=chunks)
    os.utime(bridge, (time.time() + 3600,) * 2)  # midnight may come before the test looks
    made["bridge"] = picture_id("bridge.png")
    site.http.post("/api/gallery/sync")
    yield made
    for path in folder.glob("*.png"):
        path.unlink()
    site.http.post("/api/gallery/sync")


def album(visit: Visit) -> Visit:
    visit.go("Gallery")
    expect(visit.page.locator(".qit-album [role=status]")).to_be_visible()
    return visit


def tile(visit: Visit, picture: str) -> Locator:
    return visit.page.locator(f".qit-tiles li[data-picture='{picture}']")


def tiles(visit: Visit) -> Locator:
    return visit.page.locator(".qit-tiles li[data-picture]")


def look_at(visit: Visit, picture: str) -> Locator:
    tile(visit, picture).locator(".qit-tile").click()
    expect(detail(visit, picture)).to_be_visible()
    return detail(visit, picture)


def detail(visit: Visit, picture: str) -> Locator:
    return visit.page.locator(f".qit-detail[data-picture='{picture}']")


def pick(visit: Visit, *pictures: str) -> None:
    for picture in pictures:
        tile(visit, picture).hover()
        tile(visit, picture).locator("[data-pick]").check()


def test_search_and_filters(site: Site, pictures: dict[str, str]) -> None:
    with site.visit() as visit:
        album(visit)
        expect(tiles(visit)).to_have_count(6)
        visit.write("Search", "fox snow")
        expect(tiles(visit)).to_have_count(4)
        visit.sees("4 pictures")
        visit.write("Search", "帽子")
        expect(tiles(visit)).to_have_count(1)
        visit.sees(re.compile("^1 picture ·"))
        visit.write("Search", "unicorn")
        visit.sees("No picture is like that.")
        visit.write("Search", "")
        visit.choose("Shape", "Wide")
        expect(tiles(visit)).to_have_count(4)
        visit.choose("Shape", "Any shape")
        visit.choose("Made", "Today")
        expect(tiles(visit)).to_have_count(1)
        visit.choose("Made", "2021-01 (5)")
        expect(tiles(visit)).to_have_count(5)
        visit.choose("Made", "Any time")
        visit.choose("Model", "Practice model (5)")
        expect(tiles(visit)).to_have_count(5)
        visit.choose("Model", "All")
        tile(visit, pictures["cat"]).hover()
        tile(visit, pictures["cat"]).get_by_role("button", name="☆").click()
        expect(tile(visit, pictures["cat"])).to_have_class("starred")
        visit.field("Starred only").check()
        expect(tiles(visit)).to_have_count(1)
        assert site.http.get(f"/api/gallery/{pictures['cat']}").json()["picture"]["star"]


def test_a_picture_with_its_settings(site: Site, pictures: dict[str, str]) -> None:
    with site.visit() as visit:
        album(visit)
        shown = look_at(visit, pictures["fox steps"])
        for said in (FOX, "Steps", "9", "128x96", "practice", "Standard"):
            expect(shown).to_contain_text(said)
        expect(shown.locator("dl").first).not_to_contain_text("Negative prompt")
        visit.page.keyboard.press("s")
        expect(shown.get_by_role("button", name="★ Starred")).to_be_visible()
        visit.page.keyboard.press("ArrowRight")
        expect(
            detail(visit, pictures["fox 3"]).get_by_role("button", name="☆ Star")
        ).to_be_visible()
        visit.page.keyboard.press("ArrowLeft")
        expect(shown).to_be_visible()
        visit.press("Restore settings")
        expect(visit.field("Prompt")).to_have_value(FOX)
        expect(visit.field("Size")).to_have_value("128 x 96 pixels")
        expect(visit.field("Seed")).to_have_value("1")
        visit.advanced()
        expect(visit.field("Steps")).to_have_value("9")


def test_again_with_another_seed(site: Site, pictures: dict[str, str]) -> None:
    with site.visit() as visit:
        album(visit)
        look_at(visit, draw_small(site, visit))
        visit.press("Again with another seed")
        visit.sees("It is in the queue")
        visit.press("Back")
        expect(tiles(visit)).to_have_count(8)
        job = site.http.get("/api/jobs?limit=1").json()["jobs"][0]["job"]
        assert (job["request"]["prompt"], job["request"]["steps"]) == ("a small one", 3)
        assert job["request"]["seed"] != 5


def draw_small(site: Site, visit: Visit) -> str:
    """A picture of a size that the practice model draws; it comes into an open list by itself."""
    folder = Path(site.http.get("/api/system").json()["folder"])
    made = draw(folder, "small.png", "a small one", "green", seed=5, steps=3, size=Size(64, 64))
    site.http.post("/api/gallery/sync")
    expect(tile(visit, made)).to_be_visible()
    return made


def test_tables_by_one_setting_and_by_two(site: Site, pictures: dict[str, str]) -> None:
    with site.visit() as visit:
        album(visit)
        look_at(visit, pictures["fox 1"])
        visit.press("Seed (3)")
        table = visit.page.locator(".qit-table.pictures")
        expect(table.locator("thead th")).to_have_text(["1", "2", "3"])
        expect(table.locator("img")).to_have_count(3)
        visit.press("Back")
        expect(detail(visit, pictures["fox 1"])).to_be_visible()
        visit.press("Back")
        pick(visit, *(pictures[name] for name in ("fox 1", "fox 2", "fox steps")))
        visit.sees("3 picked")
        visit.shot("gallery-picked")
        visit.press("Compare in a table")
        expect(table.locator("thead th")).to_have_text(["1", "2"])
        expect(table.locator("tbody th")).to_have_text(["2", "9"])
        visit.shot("gallery-table")
        visit.page.get_by_label("Columns").select_option("steps")
        expect(table.locator("thead th")).to_have_text(["2", "9"])
        table.locator(f"[data-picture='{pictures['fox 2']}']").click()
        expect(
            visit.page.locator(f".qit-detail[data-picture='{pictures['fox 2']}']")
        ).to_be_visible()
        visit.press("Back")
        expect(table).to_be_visible()
        visit.press("Back")
        pick(visit, pictures["bridge"])
        visit.press("Compare in a table")
        visit.sees("does not say what it was made from")


def test_a_series_fills_its_table(site: Site, pictures: dict[str, str]) -> None:
    with site.visit() as visit:
        album(visit)
        look_at(visit, draw_small(site, visit))
        form = visit.page.locator("[data-form=series]")
        form.get_by_label("Columns").select_option("steps")
        form.get_by_label("Values").first.fill("many")
        visit.press("Queue the series")
        visit.sees(re.compile("steps"))
        expect(form.get_by_label("Values").first).to_have_value("many")
        visit.press("Close")
        form.get_by_label("Values").first.fill("2, 4")
        form.get_by_label("Rows").select_option("seed")
        form.get_by_label("Values").last.fill("5, 6")
        visit.press("Queue the series")
        table = visit.page.locator(".qit-table.pictures")
        expect(table.locator("thead th")).to_have_text(["2", "3", "4"])
        expect(table.locator("tbody th")).to_have_text(["5", "6"])
        expect(table.locator("img")).to_have_count(5)


def test_before_and_after(site: Site, pictures: dict[str, str]) -> None:
    with site.visit() as visit:
        album(visit)
        pick(visit, pictures["fox 1"])
        expect(visit.page.get_by_role("button", name="Before / after")).to_be_hidden()
        pick(visit, pictures["fox steps"])
        visit.press("Before / after")
        slider = visit.page.get_by_role("slider")
        slider.focus()
        visit.page.keyboard.press("Home")
        edge = "e => e.parentElement.querySelector('img + img').computedStyleMap().get('clip-path')"
        assert "100%" in str(slider.evaluate(f"e => String(({edge})(e))"))
        visit.page.keyboard.press("End")
        assert "inset(0px 0%" in str(slider.evaluate(f"e => String(({edge})(e))"))
        visit.page.keyboard.press("PageDown")
        expect(visit.page.locator(".qit-table tr").last).to_have_text("Steps29")
        visit.shot("gallery-slider")


def test_deleted_and_brought_back(site: Site, folder: Path, pictures: dict[str, str]) -> None:
    with site.visit() as visit:
        album(visit)
        site.http.post(f"/api/gallery/{pictures['fox 1']}/star", json={"star": True})
        pick(visit, pictures["fox 1"], pictures["fox 2"])
        visit.press("Delete")
        expect(tiles(visit)).to_have_count(4)
        visit.sees("2 in the trash now.")
        assert len(list(folder.glob("*.png"))) == 4
        visit.shot("gallery-deleted")
        second = album(site.another(visit))
        second.press("Undo")
        for one in (visit, second):
            expect(tiles(one)).to_have_count(6)
            expect(tile(one, pictures["fox 1"])).to_have_class("starred")
        expect(visit.page.locator(".qit-deleted")).to_be_hidden()
        visit.page.bring_to_front()  # a tab that lies behind another draws rarely
        shown = look_at(visit, pictures["cat"])
        shown.get_by_role("button", name="Delete").click()
        expect(shown).to_be_hidden()
        second.page.bring_to_front()
        look_at(second, pictures["fox 3"])
        site.http.post("/api/gallery/delete", json={"ids": [pictures["fox 3"]]})
        expect(second.page.locator(".qit-detail")).to_be_hidden()
        visit.page.bring_to_front()
        visit.reload()
        album(visit).press("Undo")
        expect(tiles(visit)).to_have_count(5)


def test_saved_in_every_form(site: Site, pictures: dict[str, str]) -> None:
    with site.visit() as visit:
        album(visit)
        shown = look_at(visit, pictures["fox 2"])
        for form in ("png", "jpeg", "webp"):
            for bare in (False, True):
                shown.get_by_label("Format").select_option(form)
                shown.get_by_label("without its settings").set_checked(bare)
                with visit.page.expect_download() as saved:
                    visit.press("Save as")
                assert saved.value.suggested_filename == f"{pictures['fox 2']}.{form}"
                data = saved.value.path().read_bytes()
                assert Image.open(io.BytesIO(data)).format == form.upper()
                assert (gallery.read_info(data).request is None) == bare


def drop(visit: Visit, name: str, data: bytes) -> None:
    """As if dragged from a folder onto the page."""
    carried = visit.page.evaluate_handle(
        """([name, data]) => {
            const carried = new DataTransfer();
            const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
            carried.items.add(new File([bytes], name, {type: 'image/png'}));
            return carried;
        }""",
        [name, base64.b64encode(data).decode()],
    )
    body = visit.page.locator("body")
    body.dispatch_event("dragover", {"dataTransfer": carried})
    visit.sees("Drop a picture to read its settings")
    body.dispatch_event("drop", {"dataTransfer": carried})


def test_a_dropped_picture_is_read(site: Site, folder: Path, pictures: dict[str, str]) -> None:
    with site.visit() as visit:
        expect(visit.plan).to_contain_text("Memory", timeout=OPENS)
        drop(visit, "bridge.png", (folder / "bridge.png").read_bytes())
        shown = visit.page.locator(".qit-detail")
        expect(shown).to_contain_text("a stone bridge")
        expect(shown.locator("img")).to_be_visible()
        visit.shot("gallery-read")
        visit.press("Restore settings")
        expect(visit.field("Prompt")).to_have_value("a stone bridge")
        expect(visit.field("Negative prompt")).to_have_value("fog")
        expect(visit.field("Seed")).to_have_value("99")
        plain = io.BytesIO()
        Image.new("RGB", (9, 9)).save(plain, "PNG")
        with visit.page.expect_file_chooser() as chooser:
            visit.press("Read a picture's settings")
        file = FilePayload(name="plain.png", mimeType="image/png", buffer=plain.getvalue())
        chooser.value.set_files([file])
        expect(shown).to_contain_text("This file does not say what it was made from.")
        drop(visit, "broken.png", b"no picture")
        visit.sees("The picture can't be read")
        assert len(list(folder.glob("*.png"))) == 6


def test_by_keyboard_alone(site: Site, pictures: dict[str, str]) -> None:
    # A star outlasts its file: another test may have given one to a picture of the same name
    site.http.post(f"/api/gallery/{pictures['fox 1']}/star", json={"star": False})
    with site.visit() as visit:
        album(visit)
        keyboard = visit.page.keyboard
        visit.field("Starred only").focus()
        keyboard.press("Tab")
        focused = visit.page.locator("*:focus")
        expect(focused).to_have_attribute("data-key", f"show-{pictures['bridge']}")
        keyboard.press("End")
        expect(focused).to_have_attribute("data-key", f"show-{pictures['fox 1']}")
        keyboard.press("x")
        visit.sees("1 picked")
        keyboard.press("s")
        expect(tile(visit, pictures["fox 1"])).to_have_class(re.compile("starred"))
        expect(focused).to_have_attribute("data-key", f"show-{pictures['fox 1']}")
        keyboard.press("Enter")
        expect(visit.page.locator(".qit-detail")).to_be_visible()
        expect(focused).to_have_attribute("data-do", "back")
        keyboard.press("Escape")
        expect(focused).to_have_attribute("data-key", f"show-{pictures['fox 1']}")
        keyboard.press("Delete")
        expect(tile(visit, pictures["fox 1"])).to_be_hidden()


def test_many_pictures_are_few_tiles(site: Site, folder: Path, pictures: dict[str, str]) -> None:
    data = (folder / "bridge.png").read_bytes()
    for number in range(600):
        (folder / f"20200101-{number // 60:02}{number % 60:02}00-seed{number}.png").write_bytes(
            data
        )
    site.http.post("/api/gallery/sync")
    oldest = picture_id("20200101-000000-seed0.png")
    with site.visit() as visit:
        album(visit)
        visit.sees("606 pictures")
        expect(tile(visit, pictures["cat"])).to_be_visible()
        assert visit.page.locator(".qit-tiles li").count() < 120
        tile(visit, pictures["bridge"]).locator(".qit-tile").focus()
        visit.page.keyboard.press("End")
        expect(tile(visit, oldest)).to_be_in_viewport()
        assert visit.page.locator(".qit-tiles li").count() < 120
        look_at(visit, oldest)
        visit.press("Back")
        expect(tile(visit, oldest)).to_be_in_viewport()
        visit.choose("Made", "2020-01 (600)")
        visit.sees("600 pictures")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("light", {"viewport": DESKTOP}),
        ("dark", {"viewport": DESKTOP, "color_scheme": "dark"}),
        ("phone", {"viewport": PHONE, "has_touch": True}),
        ("phone-dark", {"viewport": PHONE, "color_scheme": "dark"}),
    ],
)
def test_it_fits_and_is_seen(
    site: Site, pictures: dict[str, str], name: str, options: dict[str, Any]
) -> None:
    with site.visit(**options) as visit:
        album(visit)
        expect(tiles(visit)).to_have_count(6)
        visit.page.wait_for_function("[...document.images].every(i => i.complete)")
        visit.shot(f"gallery-{name}")
        assert visit.overflow() == 0
        look_at(visit, pictures["fox 1"])
        visit.page.wait_for_function("[...document.images].every(i => i.complete)")
        visit.shot(f"gallery-picture-{name}")
        assert visit.overflow() == 0


def test_in_chinese(site: Site, pictures: dict[str, str]) -> None:
    with site.visit(locale="zh-CN") as visit:
        visit.go("图库")
        visit.write("搜索", "帽子")
        visit.sees(re.compile("^1 张 ·"))
        visit.write("搜索", "")
        look_at(visit, pictures["fox 1"])
        expect(detail(visit, pictures["fox 1"])).to_contain_text("标准")
        visit.shot("gallery-chinese")
        site.http.post("/api/gallery/delete", json={"ids": [pictures["cat"]]})
        kept = site.http.get("/api/system").json()["folder"]
        draw(Path(kept), NAMES[5], CAT, seed=4)
        visit.press("返回")
        visit.press("撤销")
        visit.sees(re.compile(r"无法恢复 .*：已有同名文件。"))
        english = visit.page.evaluate(
            "[...document.querySelectorAll('#qit-picture :is(button, dt, h3), #qit-dropped')]"
            ".map(e => e.innerText.trim()).filter(t => /^[A-Za-z ]{4,}$/.test(t))"
        )
        assert english == []
