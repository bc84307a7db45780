"""The page as an ASGI app: a start page at once, Gradio's app as soon as it is loaded.

Importing Gradio takes seconds, so it happens in a thread, at the first request for the page or when
`open` asks for it. Each language is an app of its own: every word on the page is then in it.
"""

import asyncio
import contextlib
import gc
import logging
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.responses import HTMLResponse, JSONResponse

from qwen_image_tool.server.plain import Language, language_of
from qwen_image_tool.service import Service
from qwen_image_tool.ui.frontend import ASSETS, Frontend
from qwen_image_tool.ui.start import READY_PATH, start_page
from qwen_image_tool.ui.words import load_words

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import Receive, Scope, Send

PATIENCE = 20.0  # seconds that one question whether the page is ready may wait
_log = logging.getLogger(__name__)


class Page:
    """Everything that no API answers. One for a service; it works in one event loop."""

    def __init__(self, service: Service, at_once: bool = False) -> None:
        """`at_once`: load when the server starts, not when the page is first asked for."""
        self._service, self._at_once = service, at_once
        self._loading: dict[Language, asyncio.Task[FastAPI]] = {}
        self._lives = contextlib.AsyncExitStack()
        self._building = asyncio.Lock()  # Gradio knows one page under construction, not two
        self._frontend = Frontend()

    async def start(self) -> None:
        if self._at_once:
            self._app("en")

    async def close(self) -> None:
        if self._loading:
            await asyncio.wait(self._loading.values())
        await self._lives.aclose()

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["path"].startswith(f"{ASSETS}/"):
            await self._frontend(scope, receive, send)
            return
        language = language_of(Headers(scope=scope))
        loading = self._app(language)
        if scope["path"] == READY_PATH:
            await (await _readiness(loading))(scope, receive, send)
        elif scope["path"] == "/" and not (loading.done() and not loading.exception()):
            self._app(language, again=True)
            page = start_page(load_words(language), self._frontend.ahead)
            await HTMLResponse(page)(scope, receive, send)
        else:
            await (await asyncio.shield(loading))(scope, receive, send)

    def _app(self, language: Language, again: bool = False) -> "asyncio.Task[FastAPI]":
        """The app in this language, loaded or on its way; `again`: also if that failed."""
        known = self._loading.get(language)
        if known is None or (again and known.done() and known.exception()):
            known = self._loading[language] = asyncio.create_task(self._load(language))
        return known

    async def _load(self, language: Language) -> "FastAPI":
        try:
            async with self._building:
                app = await asyncio.to_thread(_build, self._service, language)
            await self._lives.enter_async_context(app.router.lifespan_context(app))
        except Exception:
            _log.exception("The page can't be loaded.")
            raise
        return app


def _build(service: Service, language: Language) -> "FastAPI":
    gc.disable()  # an import makes no garbage, and looking for it takes a tenth of its time
    try:
        from qwen_image_tool.ui.page import build

        return build(service, load_words(language))
    finally:
        gc.freeze()  # what stays for good need not be looked at again
        gc.enable()


async def _readiness(loading: "asyncio.Task[FastAPI]") -> JSONResponse:
    await asyncio.wait([loading], timeout=PATIENCE)
    failure = str(loading.exception() or "") if loading.done() else ""
    return JSONResponse({"ready": loading.done() and not failure, "failure": failure})
