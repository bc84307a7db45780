"""How the page comes and goes: the start page, what closes it off, a server that ends."""

from pathlib import Path

import httpx2
from playwright.sync_api import Browser, expect

from browsing import Site
from running import process


def test_what_is_kept_by_the_browser(site: Site) -> None:
    """Files named by their content for good, everything else not at all."""
    with site.visit() as visit:
        assets = visit.page.evaluate(
            "performance.getEntriesByType('resource').map(e => e.name)"
            ".filter(n => n.includes('/assets/'))"
        )
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
        assert len(answer.content) < 5000
        site = Site(running.url, running.http, running.child, browser, shots)
        with site.visit(watched=False) as visit:
            expect(visit.plan).to_contain_text("Memory")
            running.child.terminate()
            visit.sees("QwenImageTool has ended, or can't be reached.")
            visit.shot("server-gone")
