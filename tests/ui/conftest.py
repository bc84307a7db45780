"""One browser for all tests of the page; one server for each module of them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from browsing import SOON, Site
from dev import find_browser
from running import process

ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    found = find_browser()
    assert found, "no Chromium: `./qit test` says how to install it"
    expect.set_options(timeout=SOON)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pictures of the page go: $QIT_TEST_SHOTS, to keep them."""
    kept = os.environ.get("QIT_TEST_SHOTS")
    return Path(kept) if kept else tmp_path_factory.mktemp("shots")


@pytest.fixture(scope="module")
def site(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    browser: Browser,
    shots: Path,
) -> Iterator[Site]:
    """`qit ui` in an empty home, over the fake worker; the real one where the module says
    `REAL_WORKER = True`."""
    home = tmp_path_factory.mktemp("home")
    fake = not getattr(request.module, "REAL_WORKER", False)
    with process(home, "--no-browser", command="ui", fake=fake) as running:
        yield Site(running.url, running.http, running.child, browser, shots)
