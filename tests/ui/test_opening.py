"""How the page comes and goes: the start page, what closes it off, a server that ends."""

import os
from pathlib import Path

import httpx2
from playwright.sync_api import Browser, Page, expect

from browsing import OPENS, Site
from qwen_image_tool.ui.frontend import AHEAD, Frontend
from running import process


def scripts_and_styles(page: Page) -> list[str]:
    """Paths of those that the page has asked for."""
    asked = page.evaluate(
        "performance.getEntriesByType('resource').map(e => new URL(e.name).pathname)"
    )
    return sorted({path for path in asked if path.startswith("/assets/")})


def test_what_the_page_needs_is_fetched_before_it(site: Site) -> None:
    """With another Gradio, `QIT_AHEAD=1` writes the list anew."""
    with site.visit() as visit:
        expect(visit.plan).to_contain_text("Memory", timeout=OPENS)
        needed = scripts_and_styles(visit.page)
    if os.environ.get("QIT_AHEAD"):
        names = [path.removeprefix("/assets/") + "\n" for path in needed]
        AHEAD.write_text("".join(names), encoding="utf-8", newline="\n")
    assert sorted(Frontend().ahead) == needed


def test_what_is_kept_by_the_browser(site: Site) -> None:
    """Files named by their content for good, everything else not at all."""
    with site.visit() as visit:
        assets = scripts_and_styles(visit.page)
    kept = site.http.get(assets[0]).headers["cache-control"]
    assert "immutable" in kept
    assert site.http.get("/config").headers["cache-control"] == "no-store"
    assert site.http.get("/favicon.ico").text.startswith("<svg")


def test_the_gate_stands_before_the_page(site: Site) -> None:
    with httpx2.Client(base_url=site.url) as stranger:
        assert stranger.get("/", headers={"accept": "text/html"}).status_code == 401
        for path in ("/config", "/gradio_api/info", "/page/ready", "/theme.css"):
            assert stranger.get(path).status_code == 401
    for path in ("/api/nothing", "/v1/nothing", "/sdapi/v1/nothing"):
        assert site.http.get(path).status_code == 404
    assert site.http.delete("/api/queue").status_code == 405
    assert site.http.get("/gradio_api/file=/etc/passwd").status_code == 403


def test_it_opens_and_ends(tmp_path: Path, browser: Browser, shots: Path) -> None:
    """A start page at once, in the browser's language; and a word where the server is gone."""
    with process(tmp_path, "--no-browser", command="ui") as running:
        answer = running.http.get("/", headers={"accept-language": "zh-CN,en"})
        assert answer.status_code == 200
        assert "正在打开页面" in answer.text
        assert len(answer.content) < 8000
        assert all(f'"{path}"' in answer.text for path in Frontend().ahead)
        site = Site(running.url, running.http, running.child, browser, shots)
        with site.visit(watched=False) as visit:
            expect(visit.plan).to_contain_text("Memory", timeout=OPENS)
            running.child.terminate()
            visit.sees("QwenImageTool has ended, or can't be reached.")
            visit.shot("server-gone")
