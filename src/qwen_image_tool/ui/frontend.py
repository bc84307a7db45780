"""Gradio's scripts and styles, served without Gradio."""

import mimetypes
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

ASSETS = "/assets"
AHEAD = Path(__file__).parent / "frontend.txt"  # what the page needs to open, in one Gradio
# Windows' registry may call a script text/plain, and no browser would run it
KINDS = {".js": "text/javascript", ".css": "text/css"}


class Frontend:
    """The files as they lie on disk: Gradio compresses each at each load, which takes longer than
    sending it to this computer. They are small, so each is read in the event loop at one go.

    `ahead`: the paths of those that the page needs to open; of another Gradio fewer are known.
    """

    def __init__(self) -> None:
        """Raises ModuleNotFoundError where Gradio is not installed."""
        found = find_spec("gradio")
        if not (found and found.origin):
            raise ModuleNotFoundError("gradio is not installed")
        folder = Path(found.origin).parent / "templates/frontend"
        self._files = {path.name: path for path in (folder / "assets").iterdir()}
        wanted = AHEAD.read_text(encoding="utf-8").split()
        self.ahead = [f"{ASSETS}/{name}" for name in wanted if name in self._files]
        self._router = Router([Route(f"{ASSETS}/{{name}}", self._send)])

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        await self._router(scope, receive, send)

    async def _send(self, request: Request) -> Response:
        path = self._files.get(request.path_params["name"])
        if path is None:
            return Response(status_code=404)
        kind = KINDS.get(path.suffix) or mimetypes.guess_type(path.name)[0]
        return Response(path.read_bytes(), media_type=kind)
