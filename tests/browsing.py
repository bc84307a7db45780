"""A real browser on a real server: what the tests of the page do, in a person's words."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, Page, expect

from running import TOKEN

OPENS = 60_000  # milliseconds that Gradio may take to be there
SOON = 30_000
PREDICT = "**/gradio_api/run/predict"  # where the page's events are answered
PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1280, "height": 900}
LAPTOP = {"width": 1366, "height": 768}
CHROMIUM = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# Said by Chromium itself when a page that loads is left
HARMLESS = re.compile(r"net::ERR_ABORTED")


GRAVE = ("serious", "critical")  # what axe-core must not find


def findings(page: Page) -> list[str]:
    """What axe-core has against the page as it is."""
    found: dict[str, Any] = Axe().run(page, options={"resultTypes": ["violations"]}).response
    return [
        f"{each['impact']}: {each['help']}: {node['html'][:200]} {node['target']}"
        for each in found["violations"]
        if each["impact"] in GRAVE
        for node in each["nodes"]
    ]


class Visit:
    """One browser tab on the page."""

    def __init__(self, page: Page, shots: Path) -> None:
        self.page, self._shots = page, shots

    # Controls

    def choose(self, label: str, choice: str) -> None:
        """In a dropdown; `choice` may be the beginning of its words."""
        self.field(label).click()
        self.page.locator("ul[role=listbox] li", has_text=choice).first.click()

    def step(self, label: str, key: str) -> None:
        """To the next choice of a dropdown, or the one before: ArrowDown, ArrowUp."""
        field = self.field(label)
        field.focus()
        field.press(key)
        field.press("Enter")

    def field(self, label: str) -> Locator:
        return self.page.get_by_label(label, exact=True).filter(visible=True).first

    def write(self, label: str, text: str) -> None:
        self.field(label).fill(text)

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).first.click()

    def advanced(self) -> None:
        """Unfold what is folded."""
        if not self.field("Steps").is_visible():
            self.page.get_by_role("button", name="Advanced").click()

    def reload(self) -> None:
        self.page.reload()
        self.page.wait_for_selector("#qit-tabs", timeout=OPENS)

    def go(self, tab: str) -> None:
        self.page.get_by_role("tab", name=tab, exact=True).click()

    def look_away(self, away: bool = True) -> None:
        """As if another tab of the browser came to the front, or this one again."""
        self.page.evaluate(
            "value => { Object.defineProperty(document, 'hidden', {value, configurable: true});"
            " document.dispatchEvent(new Event('visibilitychange')); }",
            away,
        )

    # What is shown

    @property
    def stage(self) -> Locator:
        return self.page.locator("#qit-stage .qit-stage")

    @property
    def plan(self) -> Locator:
        return self.page.locator("#qit-plan .qit-plan")

    def sees(self, text: str | re.Pattern[str], seconds: float = SOON / 1000) -> None:
        expect(self.page.get_by_text(text).first).to_be_visible(timeout=seconds * 1000)

    def state(self, state: str, seconds: float = 30) -> None:
        """The stage's job comes into this state."""
        expect(self.stage).to_have_attribute("data-state", state, timeout=seconds * 1000)

    def shot(self, name: str) -> None:
        """A picture of the whole page, for people to look at."""
        self._shots.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=self._shots / f"{name}.png", full_page=True)

    def overflow(self) -> int:
        """Pixels by which something is wider than the window."""
        wider = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        return int(self.page.evaluate(wider))


class Site:
    """A server with its browser. `http`: a client of the API that has the token."""

    def __init__(self, url: str, http: Any, child: Any, browser: Browser, shots: Path) -> None:
        self.url, self.http, self.child = url, http, child
        self._browser, self._shots = browser, shots

    @contextmanager
    def visit(self, watched: bool = True, **options: Any) -> Iterator[Visit]:
        """A page of its own, with no cookies; at its end it must have had no error on the console
        and asked no other host, unless it is not `watched`. `options`: Playwright's, of a context.
        """
        options = {"viewport": DESKTOP, "locale": "en-US", "reduced_motion": "reduce"} | options
        with self._browser.new_context(**options) as context:
            context.set_default_timeout(SOON)
            page, problems = context.new_page(), list[str]()
            self._watch(page, problems)
            page.goto(f"{self.url}/?__t={TOKEN}")
            page.wait_for_selector("#qit-tabs", timeout=OPENS)
            yield Visit(page, self._shots)
            assert not (watched and problems), problems

    def settle(self) -> None:
        """Nothing runs, and no job is remembered."""
        counts = lambda: self.http.get("/api/queue").json()["counts"]  # noqa: E731
        self.wait_for(counts, lambda found: not found["queued"] and not found["running"])
        self.http.delete("/api/jobs")

    def wait_for(
        self, ask: Callable[[], Any], good: Callable[[Any], bool], seconds: float = 20
    ) -> Any:
        """What `ask` gives as soon as it is `good`."""
        end = time.monotonic() + seconds
        while not good(found := ask()):
            assert time.monotonic() < end, f"it stayed {found}"
            time.sleep(0.05)
        return found

    def another(self, visit: Visit) -> Visit:
        """A second tab of the same browser."""
        page = visit.page.context.new_page()
        page.goto(self.url)
        page.wait_for_selector("#qit-tabs", timeout=OPENS)
        return Visit(page, self._shots)

    def _watch(self, page: Page, problems: list[str]) -> None:
        def said(message: Any) -> None:
            if message.type == "error" and not HARMLESS.search(message.text):
                problems.append(message.text)

        def asked(request: Any) -> None:
            if not request.url.startswith((self.url, "data:", "blob:")):
                problems.append(f"asked {request.url}")

        page.on("console", said)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", asked)
