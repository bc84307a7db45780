"""How the page is served, without Gradio: loading, failing, languages."""

import asyncio
from collections.abc import Awaitable, Callable
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import httpx2
import pytest
from fastapi import FastAPI

from qwen_image_tool.service import Service
from qwen_image_tool.ui import host
from qwen_image_tool.ui.host import Page

HTML = {"accept": "text/html"}


def build(service: Service, language: str) -> FastAPI:
    """In place of Gradio's app."""
    app = FastAPI()

    @app.get("/")
    def main() -> str:
        return f"the page in {language}"

    return app


def visit(do: Callable[[httpx2.AsyncClient], Awaitable[None]]) -> None:
    async def run() -> None:
        page = Page(cast("Service", None))
        await page.start()
        transport = httpx2.ASGITransport(page)
        async with httpx2.AsyncClient(transport=transport, base_url="http://here") as http:
            await do(http)
        await page.close()

    asyncio.run(run())


def test_a_start_page_that_becomes_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_build", build)

    async def do(http: httpx2.AsyncClient) -> None:
        first = await http.get("/", headers=HTML)
        assert "Opening the page" in first.text
        assert (await http.get("/page/ready")).json() == {"ready": True, "failure": ""}
        assert (await http.get("/")).json() == "the page in en"

    visit(do)


def test_scripts_come_without_gradio(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> FastAPI:
        raise AssertionError("Gradio is loaded")

    monkeypatch.setattr(host, "_build", never)
    folder = Path(str(files("gradio"))) / "templates/frontend"
    name = next(folder.glob("assets/index-*.js")).name

    async def do(http: httpx2.AsyncClient) -> None:
        whole = await http.get(f"/assets/{name}")
        assert whole.content == (folder / "assets" / name).read_bytes()
        assert "content-encoding" not in whole.headers
        assert whole.headers["content-type"].startswith("text/javascript")
        for nowhere in (
            "/assets/nothing.js",
            "/assets/%2e%2e/index.html",
            "/assets/..%2findex.html",
        ):
            assert (await http.get(nowhere)).status_code == 404

    visit(do)


def test_what_can_not_be_loaded_is_told_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> FastAPI:
        raise ImportError("no gradio")

    async def do(http: httpx2.AsyncClient) -> None:
        monkeypatch.setattr(host, "_build", broken)
        await http.get("/")
        said = (await http.get("/page/ready")).json()
        assert said == {"ready": False, "failure": "no gradio"}
        monkeypatch.setattr(host, "_build", build)
        assert "Opening the page" in (await http.get("/")).text
        assert (await http.get("/page/ready")).json()["ready"]

    visit(do)


def test_the_language_that_was_chosen_else_the_browsers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_build", build)

    async def do(http: httpx2.AsyncClient) -> None:
        for headers, language in (
            ({"accept-language": "zh-CN,zh;q=0.9,en;q=0.8"}, "zh"),
            ({"accept-language": "zh-TW"}, "zh"),
            ({"accept-language": "de,zh;q=0.5"}, "en"),
            ({"accept-language": "zh", "cookie": "qit_language=en"}, "en"),
            ({"cookie": "qit_language=zh"}, "zh"),
            ({}, "en"),
        ):
            await http.get("/page/ready", headers=headers)
            assert (await http.get("/", headers=headers)).json() == f"the page in {language}"

    visit(do)
