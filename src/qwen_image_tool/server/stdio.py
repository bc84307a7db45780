"""MCP over stdio: a bridge to the service that is running, or to one of its own."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from qwen_image_tool.app import App
from qwen_image_tool.errors import ToolError, Unknown
from qwen_image_tool.server import run
from qwen_image_tool.server.mcp import bridge
from qwen_image_tool.service import Service
from qwen_image_tool.settings import Settings

START_SECONDS = 60.0


def speak(settings: Settings) -> None:
    """Until stdin ends. Raises ToolError where no service can be had."""
    with _service(settings) as where:
        asyncio.run(bridge(f"{where.url}/mcp", where.token))


@contextmanager
def _service(settings: Settings) -> Iterator[run.Running]:
    try:
        yield run.running(settings.data)
        return
    except Unknown:
        pass
    with _own(Service(App(settings))) as where:
        yield where


@contextmanager
def _own(service: Service) -> Iterator[run.Running]:
    """A service on a free port, in a thread of this process."""
    found: list[run.Running] = []
    up = threading.Event()
    stopper = run.Stopper()

    def ready(where: run.Running) -> None:
        found.append(where)
        up.set()

    def serve() -> None:
        try:
            run.serve(service, port=0, ready=ready, stopper=stopper)
        finally:
            up.set()

    thread = threading.Thread(target=serve, name="server")
    thread.start()
    try:
        if not up.wait(START_SECONDS) or not found:
            raise ToolError("The service did not start.", "`qit serve` says why.")
        yield found[0]
    finally:
        stopper.stop()
        thread.join()
        service.close()
