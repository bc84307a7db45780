"""OpenAI's Images API, /v1: what Open WebUI, LibreChat and the `openai` package speak.

What a field asks for is done or refused with a code; nothing is ignored in silence. Source of the
shapes: developers.openai.com, Images; the extras are vLLM-Omni's.
"""

import asyncio
import base64
import contextlib
import io
import json
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from qwen_image_tool.catalog import Model
from qwen_image_tool.errors import BadRequest, ToolError
from qwen_image_tool.feed import EventNews, JobNews
from qwen_image_tool.gallery.export import Format, encode, export, on_white
from qwen_image_tool.gallery.index import Picture
from qwen_image_tool.jobs import Job
from qwen_image_tool.server.answers import NoModel, NotSupported, NotYet, openai_error
from qwen_image_tool.server.api import Here, News_
from qwen_image_tool.server.hub import Ending, Hub
from qwen_image_tool.service import Service
from qwen_image_tool.types import MAX_PROMPT, Failure, Preview, Request, Size

# Names that clients have built in; they mean the default model
ALIASES = frozenset(
    ("gpt-image-1", "gpt-image-1-mini", "gpt-image-1.5", "dall-e-2", "dall-e-3", "default")
)
Quality = Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]
KEEP_ALIVE_SECONDS = 15.0
DISCONNECT_POLL = 0.5  # seconds
USAGE = {
    "total_tokens": 0,
    "input_tokens": 0,
    "output_tokens": 0,
    "input_tokens_details": {"text_tokens": 0, "image_tokens": 0},
}


class Generation(BaseModel):
    """The body of /v1/images/generations."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(max_length=MAX_PROMPT)
    model: str | None = Field(default=None, max_length=200)
    n: int | None = Field(default=None, ge=1, le=10)
    size: str | None = Field(default=None, max_length=20, description="auto, or WIDTHxHEIGHT")
    quality: Quality | None = Field(
        default=None, description="low takes half of the model's steps; all others take all"
    )
    background: Literal["auto", "opaque", "transparent"] | None = None
    output_format: Format | None = None
    output_compression: int | None = Field(default=None, ge=0, le=100)
    response_format: Literal["b64_json", "url"] | None = None
    moderation: Literal["auto", "low"] | None = Field(default=None, description="There is none")
    user: str | None = Field(default=None, max_length=1000, description="Not kept")
    stream: bool | None = None
    partial_images: int | None = Field(default=None, ge=0, le=3)
    negative_prompt: str | None = Field(default=None, max_length=MAX_PROMPT)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    steps: int | None = Field(default=None, ge=1, le=1000)
    true_cfg_scale: float | None = Field(default=None, ge=1, le=50)

    @property
    def form(self) -> Format:
        return self.output_format or "png"

    def request(self, model: Model) -> Request:
        """Raises NotSupported or BadRequest."""
        if self.background == "transparent":
            if not draws_transparency(model):
                raise NotSupported(
                    f"{model.name} draws no transparency.", "background", "unsupported_background"
                )
            if self.form == "jpeg":
                raise NotSupported("A JPEG has no transparency.", "output_format")
        if self.output_compression is not None and self.form == "png":
            raise NotSupported("A PNG has no quality.", "output_compression")
        steps = self.steps
        if self.quality == "low" and steps is None and not model.sampling.sigmas:
            steps = max(2, model.sampling.steps // 2)
        return Request.from_user(
            model=model.id,
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            size=_size(self.size),
            steps=steps,
            cfg=self.true_cfg_scale,
            seed=self.seed,
            images=self.n or 1,
        )


openai = APIRouter(prefix="/v1", tags=["OpenAI"])


@openai.post("/images/generations", response_model=None)
async def generations(
    body: Generation, http: HttpRequest, service: Here, hub: News_
) -> Response | dict[str, Any]:
    """Make pictures. The job is cancelled when the client hangs up."""
    job = await asyncio.to_thread(_submit, service, body)
    if body.stream:
        events = _stream(service, hub, body, job)
        return StreamingResponse(_sse(events), media_type="text/event-stream")
    async with cancelled_with(service, hub, job):
        ended = await unless_gone(http, hub, job)
        if ended is None:
            return Response(status_code=499)
        raise_failure(ended)
        pictures = await asyncio.to_thread(service.pictures, ended)
        data = [await asyncio.to_thread(_datum, service, http, body, p) for p in pictures]
    return {"created": int(time.time()), "data": data, **_described(body, ended), "usage": USAGE}


@openai.post("/images/edits")
async def edits() -> Response:
    """Comes in a later version."""
    raise NotYet("This version makes pictures from text; it can't edit yet.", code="not_supported")


@openai.post("/images/variations")
async def variations() -> Response:
    """There is no such thing for these models."""
    raise NotYet("Variations don't exist for these models.", code="not_supported")


@openai.get("/models")
def models(service: Here) -> dict[str, Any]:
    """The models that are on this computer."""
    return {"object": "list", "data": [_model(model) for model in service.models_here()]}


@openai.get("/models/{model}")
def model(model: str, service: Here) -> dict[str, Any]:
    return _model(_named(service, model))


def find(service: Service, name: str | None) -> Model:
    """The model that a client names; an alias or no name is the default one."""
    if not name or name in ALIASES:
        return service.app.catalog.find(service.default_model())
    return service.app.catalog.find(name)


def _named(service: Service, name: str | None) -> Model:
    """Raises NoModel, in OpenAI's words."""
    try:
        return find(service, name)
    except BadRequest as error:
        raise NoModel(error.message, error.hint) from error


def draws_transparency(model: Model) -> bool:
    return model.family == "qwen-image-2.1"


def _submit(service: Service, body: Generation) -> Job:
    return service.submit(body.request(_named(service, body.model)), "openai")


def _size(text: str | None) -> Size | None:
    if text in (None, "", "auto"):
        return None
    try:
        return Size.parse(text)
    except ValueError as error:
        raise NotSupported(f"{error}.", "size", "invalid_value") from error


@contextlib.asynccontextmanager
async def cancelled_with(service: Service, hub: Hub, job: Job) -> AsyncIterator[None]:
    """The job ends with its client, however that ends; where the server ends, it is kept."""
    try:
        yield
    finally:
        if not hub.closed:
            with contextlib.suppress(BadRequest):
                service.cancel(job.id)


async def unless_gone(http: HttpRequest, hub: Hub, job: Job) -> Job | None:
    """The ended job; None where the client hung up before."""
    ending = asyncio.ensure_future(hub.end_of(job.id))
    try:
        while not (await asyncio.wait([ending], timeout=DISCONNECT_POLL))[0]:
            if await http.is_disconnected():
                return None
        return ending.result()
    finally:
        ending.cancel()


def raise_failure(job: Job) -> None:
    """Raises where it is not done: its news ended before it, it was cancelled, or it failed."""
    if not job.has_ended:
        raise Ending
    if job.state == "cancelled":
        raise NotSupported("The job was cancelled.", code="cancelled")
    if job.failure:
        raise _error(job.failure)


def _error(failure: Failure) -> ToolError:
    return ToolError(failure.message, failure.hint, failure.kind)


def _datum(
    service: Service, http: HttpRequest, body: Generation, picture: Picture
) -> dict[str, Any]:
    if body.response_format == "url":
        path = f"/api/gallery/{picture.id}/file"
        form = f"&format={body.form}" if body.form != "png" else ""
        key = http.app.state.access.signature(path)
        return {"url": f"{http.base_url}{path[1:]}?key={key}{form}"}
    return {"b64_json": _encoded(service, body, picture)}


def _encoded(service: Service, body: Generation, picture: Picture) -> str:
    from PIL import Image

    path = service.index.path(picture.id)
    quality = max(1, 92 if body.output_compression is None else body.output_compression)
    if body.background == "opaque":
        with Image.open(path) as image:
            data = encode(on_white(image), body.form, quality)
    else:
        data = export(path, body.form, quality)
    return base64.b64encode(data).decode()


def _described(body: Generation, job: Job) -> dict[str, Any]:
    return {
        "background": body.background or "auto",
        "output_format": body.form,
        "quality": body.quality or "auto",
        "size": str(job.request.size),
    }


async def _stream(
    service: Service, hub: Hub, body: Generation, job: Job
) -> AsyncIterator[dict[str, Any]]:
    """Partial pictures as they become clear, then every picture. Fewer partial ones than asked for
    where steps or previews are few."""
    wanted, sent = body.partial_images or 0, 0
    async with cancelled_with(service, hub, job):
        async for news in hub.job(job.id):
            if isinstance(news, EventNews) and isinstance(news.event, Preview):
                due = news.event.step * (wanted + 1) >= (sent + 1) * (job.request.steps or 1)
                if sent < wanted and due:
                    picture = await asyncio.to_thread(_partial, news.event, body)
                    yield _event("partial_image", body, job, picture) | {
                        "partial_image_index": sent
                    }
                    sent += 1
            elif isinstance(news, JobNews) and news.job.has_ended:
                job = news.job
        raise_failure(job)
        for found in await asyncio.to_thread(service.pictures, job):
            picture = await asyncio.to_thread(_encoded, service, body, found)
            yield _event("completed", body, job, picture) | {"usage": USAGE}


def _event(kind: str, body: Generation, job: Job, picture: str) -> dict[str, Any]:
    return {
        "type": f"image_generation.{kind}",
        "b64_json": picture,
        "created_at": int(time.time()),
        **_described(body, job),
    }


def _partial(preview: Preview, body: Generation) -> str:
    from PIL import Image

    if body.form == "jpeg":
        return preview.jpeg
    with Image.open(io.BytesIO(base64.b64decode(preview.jpeg))) as image:
        return base64.b64encode(encode(image, body.form)).decode()


async def _sse(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """Server-sent events with a comment where nothing else was sent for a while, so that no proxy
    or client gives up. An error is the last event."""
    queue: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def pump() -> None:
        try:
            async for event in events:
                await queue.put(format_sse_event(data_str=json.dumps(event), event=event["type"]))
        except ToolError as error:
            text = json.dumps({"type": "error", "error": openai_error(error)})
            await queue.put(format_sse_event(data_str=text, event="error"))
        finally:
            await queue.put(None)

    task = asyncio.create_task(pump())
    try:
        while True:
            try:
                item = await asyncio.wait_for(queue.get(), KEEP_ALIVE_SECONDS)
            except TimeoutError:
                item = KEEPALIVE_COMMENT
            if item is None:
                return
            yield item
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _model(model: Model) -> dict[str, Any]:
    made = int(time.mktime(time.strptime(model.released, "%Y-%m-%d"))) if model.released else 0
    return {"id": model.id, "object": "model", "created": made, "owned_by": "qwen-image-tool"}
