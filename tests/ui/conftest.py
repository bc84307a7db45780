"""One browser for all tests of the page; one server."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from browsing import CHROMIUM, SOON, Site
from dev import find_browser
from running import process


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A browser on a busy machine is late at times: a test of the page that fails is run once more,
    and the summary says that it was."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.flaky(reruns=1))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    found = find_browser()
    assert found, "no Chromium: `./qit test` says how to install it"
    expect.set_options(timeout=SOON)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(CHROMIUM))
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pictures of the page go: $QIT_TEST_SHOTS, to keep them."""
    kept = os.environ.get("QIT_TEST_SHOTS")
    return Path(kept) if kept else tmp_path_factory.mktemp("shots")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, browser: Browser, shots: Path) -> Iterator[Site]:
    """`qit ui` in an empty home, over the fake worker; one for the tests of a module."""
    home = tmp_path_factory.mktemp("home")
    # Processes that other tests let the kernel kill are none of this one's
    alone = "import pathlib\nfrom qwen_image_tool import exits\nexits.ROOT = pathlib.Path('/none')"
    with process(home, "--no-browser", command="ui", first=alone) as running:
        yield Site(running.url, running.http, running.child, browser, shots)
    assert faults(home) == []


@pytest.fixture(scope="module")
def real_site(
    tmp_path_factory: pytest.TempPathFactory, browser: Browser, shots: Path
) -> Iterator[Site]:
    """The same over the real worker with the practice model."""
    home = tmp_path_factory.mktemp("home")
    with process(home, "--no-browser", command="ui", fake=False) as running:
        yield Site(running.url, running.http, running.child, browser, shots)
    assert faults(home) == []


def faults(home: Path) -> list[str]:
    """What went wrong in the page's own code, by the log."""
    lines = (home / "logs" / "qit.log").read_text("utf-8").splitlines()
    return [line for line in lines if "ERROR qwen_image_tool.ui" in line]


@pytest.fixture
def calm(site: Site) -> None:
    """No job of another test is left, and nothing is paused."""
    site.http.post("/api/queue/resume")
    for view in site.http.get("/api/jobs?state=queued&state=running").json()["jobs"]:
        site.http.post(f"/api/jobs/{view['job']['id']}/cancel")
    site.settle()
