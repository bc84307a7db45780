"""MCP, /mcp: three tools for language models. Over stdio `qit mcp` passes the same messages on."""

import asyncio
import contextlib
import io
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, ValidationError

from qwen_image_tool import __version__
from qwen_image_tool.errors import ToolError
from qwen_image_tool.feed import EventNews, JobNews
from qwen_image_tool.server.api import by_id
from qwen_image_tool.server.hub import Hub
from qwen_image_tool.server.openai import cancelled_with, find, raise_failure
from qwen_image_tool.service import Service
from qwen_image_tool.types import MAX_PROMPT, Request, Size, wrong_field

if TYPE_CHECKING:
    from mcp.server.mcpserver import MCPServer
    from starlette.types import ASGIApp, Receive, Scope, Send

SHOWN_SIDE = 1024  # pixels of a picture that is shown to a language model, at most
Prompt = Annotated[str, Field(description="What the picture shows", max_length=MAX_PROMPT)]
Model = Annotated[str | None, Field(description="An id of the tool `models`; None: the default")]
Negative = Annotated[
    str | None, Field(description="What it should not show", max_length=MAX_PROMPT)
]
Pixels = Annotated[str | None, Field(description="WIDTHxHEIGHT; None: the model's own")]
Steps = Annotated[int | None, Field(ge=1, le=1000)]
Cfg = Annotated[float | None, Field(ge=1, le=50)]
Seed = Annotated[int | None, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(ge=1, le=10, description="How many pictures")]


def tools(service: Service, hub: Hub) -> "MCPServer[Any]":
    """The server of the three tools."""
    from mcp.server.mcpserver import Context, Image
    from mcp.server.mcpserver.exceptions import ToolError as Refusal

    server = _server()

    @server.tool(name="generate", structured_output=False)
    async def generate(
        prompt: Prompt,
        context: Context[Any, Any],
        model: Model = None,
        negative_prompt: Negative = None,
        size: Pixels = None,
        steps: Steps = None,
        cfg: Cfg = None,
        seed: Seed = None,
        images: Count = 1,
    ) -> list[Any]:
        """Make pictures from a sentence. Takes seconds to minutes."""
        try:
            request = _request(
                service, prompt, model, negative_prompt, size, steps, cfg, seed, images
            )
            job = await asyncio.to_thread(service.submit, request, "mcp")
            async with cancelled_with(service, hub, job):
                async for news in hub.job(job.id):
                    if isinstance(news, EventNews):
                        await context.report_progress(news.progress.fraction, 1.0)
                    elif isinstance(news, JobNews):
                        job = news.job
                raise_failure(job)
                pictures = await asyncio.to_thread(service.pictures, job)
        except ToolError as error:
            raise Refusal(str(error)) from error
        paths = [service.index.path(picture.id) for picture in pictures]
        shown = [await asyncio.to_thread(_shown, path.read_bytes()) for path in paths]
        said = [f"{path.name}, seed {p.seed}" for path, p in zip(paths, pictures, strict=True)]
        return [*(Image(data=data, format="webp") for data in shown), "Saved: " + "; ".join(said)]

    @server.tool(name="plan")
    async def plan(
        prompt: Prompt = "a prompt",
        model: Model = None,
        size: Pixels = None,
        steps: Steps = None,
        images: Count = 1,
    ) -> dict[str, Any]:
        """What a picture would need on this computer, without making it."""
        try:
            request = _request(service, prompt, model, None, size, steps, None, None, images)
            resolved, (found, *_) = await asyncio.to_thread(service.plans, request)
        except ToolError as error:
            raise Refusal(str(error)) from error
        return {
            "request": resolved.model_dump(mode="json"),
            "plan": found.model_dump(mode="json"),
            "ram_bytes": found.ram_bytes,
            "vram_bytes": found.vram_bytes,
            "seconds": found.seconds,
        }

    @server.tool(name="models")
    async def models() -> dict[str, Any]:
        """The models: which are here, what they do, their licences."""
        default = await asyncio.to_thread(service.default_model)
        return {"default": default, "models": await asyncio.to_thread(service.described)}

    return server


class Mounted:
    """The tools as an ASGI app that is made at its first request: importing mcp takes a second."""

    def __init__(self, service: Service, hub: Hub) -> None:
        self._service, self._hub = service, hub
        self._ready = asyncio.Lock()
        self._app: ASGIApp | None = None
        self._ended = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        async with self._ready:
            if self._app is None:
                self._app = await self._made()
        await self._app({**scope, "path": "/mcp", "root_path": ""}, receive, send)

    async def close(self) -> None:
        self._ended.set()
        if self._task:
            await self._task

    async def _made(self) -> "ASGIApp":
        from mcp.server.transport_security import TransportSecuritySettings

        server = await asyncio.to_thread(tools, self._service, self._hub)
        # The gate has looked at Host and Origin already
        trusting = TransportSecuritySettings(enable_dns_rebinding_protection=False)
        app = server.streamable_http_app(transport_security=trusting)
        running = asyncio.Event()

        async def run() -> None:
            async with server.session_manager.run():
                running.set()
                await self._ended.wait()

        self._task = asyncio.create_task(run())
        await running.wait()
        return app


async def bridge(url: str, token: str) -> None:
    """Pass the messages of stdin and stdout on to the server at `url`, until stdin ends."""
    import anyio
    import httpx2
    from mcp.client.streamable_http import streamable_http_client
    from mcp.server.stdio import stdio_server

    async def passed(source: Any, target: Any) -> None:
        async with target:
            async for message in source:
                if not isinstance(message, Exception):
                    await target.send(message)

    headers = {"authorization": f"Bearer {token}"}
    async with (
        httpx2.AsyncClient(headers=headers, timeout=None) as client,
        stdio_server() as (mouth, ear),
        streamable_http_client(url, http_client=client) as (answers, questions, *_),
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(passed, answers, ear)
        await passed(mouth, questions)
        tasks.cancel_scope.cancel()


def _request(
    service: Service,
    prompt: str,
    model: str | None,
    negative: str | None,
    size: str | None,
    steps: int | None,
    cfg: float | None,
    seed: int | None,
    images: int,
) -> Request:
    fields: dict[str, Any] = {"negative_prompt": negative, "steps": steps, "cfg": cfg, "seed": seed}
    if size:
        with contextlib.suppress(ValueError):
            fields["size"] = Size.parse(size)
        if "size" not in fields:
            raise ToolError(f"{size!r} is no size.", "Write it as WIDTHxHEIGHT: 1024x768.")
    request = Request.from_user(
        model=find(service, model).id, prompt=prompt, images=images, **fields
    )
    return by_id(service, request)


def _server() -> "MCPServer[Any]":
    """One without tools, that says in our words which arguments a tool does not take."""
    from mcp.server.mcpserver import MCPServer
    from mcp.server.mcpserver.exceptions import ToolError as Refusal

    class Server(MCPServer[Any]):
        async def call_tool(self, *given: Any, **named: Any) -> Any:
            try:
                return await super().call_tool(*given, **named)
            except Refusal as error:
                raise _plain(error) from error.__cause__

    return Server(
        "QwenImageTool",
        version=__version__,
        instructions="Makes pictures with Qwen-Image models on this computer.",
    )


def _plain(error: Exception) -> Exception:
    """The SDK would send pydantic's own text; its other refusals are ours already."""
    wrong = error.__cause__
    if not isinstance(wrong, ValidationError):
        return error
    first = wrong.errors()[0]
    return type(error)(str(wrong_field(first, ".".join(map(str, first["loc"])))))


def _shown(data: bytes) -> bytes:
    from PIL import Image

    from qwen_image_tool.gallery.export import encode

    with Image.open(io.BytesIO(data)) as image:
        image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        return encode(image, "webp")
