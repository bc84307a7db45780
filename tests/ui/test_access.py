"""Nobody is shut out: axe-core on every tab, phone width, keyboard."""

import re
from typing import Any

import pytest
from playwright.sync_api import expect

from browsing import DESKTOP, PHONE, Site, Visit, findings

LOOKS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light", "viewport": DESKTOP},
    "dark-phone": {"color_scheme": "dark", "viewport": PHONE, "has_touch": True},
}


def tabs(visit: Visit) -> list[str]:
    return [name.strip() for name in visit.page.locator("#qit-tabs [role=tab]").all_inner_texts()]


def show(visit: Visit, tab: str) -> None:
    """All of a tab, unfolded."""
    names = visit.page.get_by_role("tab", name=tab, exact=True)
    if not names.first.is_visible():
        visit.page.locator("#qit-tabs .overflow-menu > button").click()
        visit.page.locator("#qit-tabs .overflow-dropdown button", has_text=tab).click()
    else:
        names.first.click()
    visit.page.wait_for_timeout(300)
    if tab == "Gallery":
        expect(visit.page.locator(".qit-tiles img").first).to_be_visible()
    if tab == "Models":
        expect(visit.page.locator(".qit-book.best")).to_be_visible(timeout=60_000)
    if tab == "System":
        expect(visit.page.locator("#qit-checks li").first).to_be_visible(timeout=60_000)
    visit.page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")


@pytest.mark.usefixtures("calm")
@pytest.mark.parametrize("look", LOOKS)
def test_axe_finds_nothing_grave(site: Site, look: str) -> None:
    body = {"model": "practice", "prompt": "a picture to list", "size": "256x256", "seed": 5}
    site.http.post("/api/jobs", json=body)
    with site.visit(**LOOKS[look] | {"viewport": DESKTOP}) as visit:
        every = tabs(visit)
        visit.page.set_viewport_size(LOOKS[look]["viewport"])
        assert {"Create", "Queue", "Models", "System", "Settings"} <= set(every)
        for tab in every:
            show(visit, tab)
            visit.shot(f"{tab.lower()}-{look}")
            assert findings(visit.page) == [], tab
            assert visit.overflow() == 0, tab


@pytest.mark.usefixtures("calm")
@pytest.mark.parametrize("look", LOOKS)
def test_axe_finds_nothing_grave_in_a_picture_and_in_comparisons(site: Site, look: str) -> None:
    for steps in (2, 3):
        body = {"model": "practice", "prompt": "to compare", "size": "256x256", "seed": 5}
        site.http.post("/api/jobs", json=body | {"steps": steps})
    site.settle()
    with site.visit(**LOOKS[look] | {"viewport": DESKTOP}) as visit:
        show(visit, "Gallery")
        visit.page.set_viewport_size(LOOKS[look]["viewport"])
        pictures = visit.page.locator(".qit-tiles li[data-picture]")
        pictures.first.locator(".qit-tile").click()
        looked_at(visit, ".qit-detail", f"detail-{look}")
        visit.press("Back")
        for place in (0, 1):
            pictures.nth(place).hover()
            pictures.nth(place).locator("[data-pick]").check()
        visit.press("Before / after")
        looked_at(visit, "[role=slider], input[type=range]", f"slider-{look}")
        visit.press("Back")
        visit.press("Compare in a table")
        looked_at(visit, ".qit-table.pictures", f"table-{look}")


def looked_at(visit: Visit, shown: str, name: str) -> None:
    """By axe, as a whole."""
    expect(visit.page.locator(shown).first).to_be_visible()
    visit.page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    visit.shot(name)
    assert findings(visit.page) == [], name
    assert visit.overflow() == 0, name


def test_models_by_keyboard(site: Site) -> None:
    """A fold opens by Enter, stays open and focused when the shelf is drawn anew."""
    with site.visit() as visit:
        visit.go("Models")
        fold = visit.page.locator(".qit-book details").first
        expect(fold).to_be_visible(timeout=60_000)
        fold.locator("summary").focus()
        visit.page.keyboard.press("Enter")
        expect(fold).to_have_attribute("open", "")
        visit.page.keyboard.press("Tab")
        focused = visit.page.locator(":focus")
        expect(focused).to_have_text(re.compile("Read the licence"))
