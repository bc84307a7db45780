"""AUTOMATIC1111's API, /sdapi/v1: what SillyTavern, Open WebUI and LibreChat speak.

Clients send presets that were made for other models. What a distilled model has fixed (steps, CFG)
is taken from the model, and `info` says what was used; what can't be done at all is refused.
Source of the shapes: AUTOMATIC1111's modules/api/models.py.
"""

import asyncio
import base64
import binascii
import json
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from qwen_image_tool import gallery
from qwen_image_tool.catalog import Model
from qwen_image_tool.errors import BadRequest, NotOurPicture
from qwen_image_tool.gallery.export import decode_upload
from qwen_image_tool.jobs import Job
from qwen_image_tool.server.answers import NotSupported, NotYet
from qwen_image_tool.server.api import Here, News_
from qwen_image_tool.server.openai import cancelled_with, find, raise_failure, unless_gone
from qwen_image_tool.service import Service
from qwen_image_tool.types import MAX_PROMPT, Request, Size

ORIGIN = "a1111"
SAMPLERS = ("", "Euler", "Automatic")
SCHEDULERS = ("", "Simple", "simple", "Automatic", "automatic")
# What clients send beside a switch that is refused when it is on, or of files that we keep anyway
IDLE = {
    *(
        "denoising_strength",
        "subseed",
        "firstphase_width",
        "firstphase_height",
        "refiner_switch_at",
    ),
    *("override_settings_restore_afterwards", "seed_enable_extras", "comments", "force_task_id"),
    *("save_images", "do_not_save_samples", "do_not_save_grid"),
    *("url", "auth"),  # SillyTavern's server passes on what its page sent to itself
}
# AUTOMATIC1111's own defaults, where they are not empty
UNCHANGED = {
    "seed_resize_from_w": -1,
    "seed_resize_from_h": -1,
    "s_noise": 1.0,
    "clip_skip": 1,
    "send_images": True,
}


class TextToImage(BaseModel):
    """The body of /sdapi/v1/txt2img. Other fields are refused unless they are off."""

    model_config = ConfigDict(extra="allow")

    prompt: str = Field(default="", max_length=MAX_PROMPT)
    negative_prompt: str | None = Field(default="", max_length=MAX_PROMPT)
    width: int | None = Field(default=None, ge=1, le=99_999)
    height: int | None = Field(default=None, ge=1, le=99_999)
    steps: int | None = Field(default=None, ge=1, le=1000)
    cfg_scale: float | None = Field(default=None, ge=0, le=50)
    seed: int | None = Field(default=-1, ge=-1, lt=2**63)
    batch_size: int | None = Field(default=1, ge=1, le=100)
    n_iter: int | None = Field(default=1, ge=1, le=100)
    sampler_name: str | None = Field(default="", max_length=100)
    sampler_index: str | None = Field(default="", max_length=100)
    scheduler: str | None = Field(default="", max_length=100)
    override_settings: dict[str, Any] | None = None

    @property
    def echo(self) -> dict[str, Any]:
        """What is told again to the client: nothing that may be its password, or no JSON."""
        return self.model_dump(exclude={"override_settings", *(self.model_extra or ())})

    def request(self, model: Model) -> Request:
        """Raises NotSupported or BadRequest."""
        self._check()
        count = (self.batch_size or 1) * (self.n_iter or 1)
        guided = model.sampling.cfg > 1
        native = model.sizes.native["1:1"]
        return Request.from_user(
            model=model.id,
            prompt=self.prompt,
            negative_prompt=(self.negative_prompt or None) if guided else None,
            size=Size(self.width or native.width, self.height or native.height),
            steps=None if model.sampling.sigmas or not self.steps else max(2, self.steps),
            cfg=max(1.0, self.cfg_scale) if guided and self.cfg_scale is not None else None,
            seed=None if self.seed in (None, -1) else self.seed,
            images=count,
        )

    def _check(self) -> None:
        if (self.sampler_name or self.sampler_index or "") not in SAMPLERS:
            raise NotSupported("The only sampler is Euler.", "sampler_name")
        if (self.scheduler or "") not in SCHEDULERS:
            raise NotSupported("The only scheduler is Simple.", "scheduler")
        for name, value in (self.model_extra or {}).items():
            idle = name in IDLE or name.startswith("hr_")
            if not idle and value and value != UNCHANGED.get(name):
                raise NotSupported(f"{name} does not exist here.", name)


class PngInfo(BaseModel):
    image: str = Field(max_length=90_000_000, description="Base64, also as a data URL")


class Options(BaseModel):
    model_config = ConfigDict(extra="allow")
    sd_model_checkpoint: str | None = Field(default=None, max_length=200)


a1111 = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"])


@a1111.post("/txt2img", response_model=None)
async def text_to_image(
    body: TextToImage, http: HttpRequest, service: Here, hub: News_
) -> Response | dict[str, Any]:
    """Make pictures. The job is cancelled when the client hangs up."""
    job = await asyncio.to_thread(_submit, service, body)
    async with cancelled_with(service, hub, job):
        ended = await unless_gone(http, hub, job)
        if ended is None:
            return Response(status_code=499)
        if ended.state == "cancelled":
            return {"images": [], "parameters": body.echo, "info": "{}"}
        raise_failure(ended)
        return await asyncio.to_thread(_result, service, body, ended)


@a1111.post("/img2img")
async def image_to_image() -> Response:
    """Comes in a later version."""
    raise NotYet("This version makes pictures from text only.", code="not_supported")


@a1111.get("/progress")
def progress(service: Here, skip_current_image: bool = False) -> dict[str, Any]:
    """Of the job under way, whoever asked for it."""
    running = service.supervisor.running()
    waiting = service.jobs.counts()["queued"]
    preview = service.preview
    now = running[1] if running else None
    return {
        "progress": now.fraction if now else 0.0,
        "eta_relative": (now.seconds_left or 0.0) if now else 0.0,
        "state": {
            "skipped": False,
            "interrupted": False,
            "job": running[0].id if running else "",
            "job_count": waiting + (1 if running else 0),
            "job_no": 0,
            "job_timestamp": "",
            "sampling_step": now.step if now else 0,
            "sampling_steps": now.steps if now else 0,
        },
        "current_image": preview.jpeg if running and preview and not skip_current_image else None,
        "textinfo": now.phase if now else None,
    }


@a1111.post("/interrupt")
@a1111.post("/skip")
def interrupt(service: Here) -> dict[str, Any]:
    """Cancel the job under way, where it came through this API."""
    running = service.supervisor.running()
    if running and running[0].origin == ORIGIN:
        service.cancel(running[0].id)
    return {}


@a1111.get("/options")
def options(service: Here) -> dict[str, Any]:
    return {
        "sd_model_checkpoint": service.default_model(),
        "sd_checkpoint_hash": "",
        "samples_format": "png",
        "sd_vae": "Automatic",
        "CLIP_stop_at_last_layers": 1,
    }


@a1111.post("/options")
def set_options(body: Options, service: Here) -> dict[str, Any]:
    """Choose the default model. Raises where another option is set: there is none."""
    for name, value in (body.model_extra or {}).items():
        if options(service).get(name) != value:
            raise NotSupported(f"The option {name} can't be set here.", name)
    if body.sd_model_checkpoint:
        service.remember(model=_model(service, body.sd_model_checkpoint).id)
    return {}


@a1111.get("/sd-models")
def models(service: Here) -> list[dict[str, Any]]:
    """The models that are on this computer; `filename` is an id, not a path."""
    return [
        {
            "title": model.id,
            "model_name": model.id,
            "hash": None,
            "sha256": None,
            "filename": model.id,
            "config": None,
        }
        for model in service.models_here()
    ]


@a1111.get("/samplers")
def samplers() -> list[dict[str, Any]]:
    return [{"name": "Euler", "aliases": ["euler"], "options": {}}]


@a1111.get("/schedulers")
def schedulers() -> list[dict[str, Any]]:
    return [
        {
            "name": "simple",
            "label": "Simple",
            "aliases": None,
            "default_rho": -1.0,
            "need_inner_model": False,
        }
    ]


@a1111.get("/upscalers")
def upscalers() -> list[dict[str, Any]]:
    none = {"name": "None", "model_name": None, "model_path": None, "model_url": None}
    return [none | {"scale": 1.0}]


@a1111.get("/latent-upscale-modes")
@a1111.get("/sd-vae")
@a1111.get("/sd-modules")
@a1111.get("/loras")
@a1111.get("/hypernetworks")
@a1111.get("/face-restorers")
@a1111.get("/prompt-styles")
@a1111.get("/script-info")
def nothing() -> list[dict[str, Any]]:
    """There is none of these; clients fill a menu with it."""
    return []


@a1111.get("/embeddings")
def embeddings() -> dict[str, Any]:
    return {"loaded": {}, "skipped": {}}


@a1111.get("/scripts")
def scripts() -> dict[str, Any]:
    return {"txt2img": [], "img2img": []}


@a1111.get("/cmd-flags")
def flags() -> dict[str, Any]:
    return {"api": True}


@a1111.get("/memory")
def memory() -> dict[Literal["ram", "cuda"], dict[str, Any]]:
    from qwen_image_tool.device import memory as ram

    total, free = ram()
    return {"ram": {"free": free, "used": total - free, "total": total}, "cuda": {}}


@a1111.post("/refresh-checkpoints")
@a1111.post("/refresh-loras")
@a1111.post("/refresh-vae")
@a1111.post("/reload-checkpoint")
def refresh() -> dict[str, Any]:
    """Models are looked for at every question, and loaded when a job needs them."""
    return {}


@a1111.post("/unload-checkpoint")
def unload(service: Here) -> dict[str, Any]:
    """Free all memory; the next job loads again. The job under way goes back to the queue."""
    service.supervisor.unload()
    return {}


@a1111.post("/png-info")
def png_info(body: PngInfo) -> dict[str, Any]:
    """What a picture was made from."""
    try:
        data = base64.b64decode(body.image.partition(",")[2] or body.image, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest("The picture is not in base64.", "Send it as base64.") from error
    decode_upload(data)
    try:
        info = gallery.read_info(data)
    except NotOurPicture:
        return {"info": "", "items": {}, "parameters": {}}
    return {
        "info": info.parameters,
        "items": {"parameters": info.parameters} if info.parameters else {},
        "parameters": info.request.model_dump(mode="json") if info.request else {},
    }


def _submit(service: Service, body: TextToImage) -> Job:
    settings = body.override_settings or {}
    ours = options(service)
    title = settings.get("sd_model_checkpoint") or ""
    for name in settings.keys() - ({"sd_model_checkpoint"} if isinstance(title, str) else set()):
        if name not in ours or settings[name] != ours[name]:
            raise NotSupported(f"The setting {name!r} can't be changed.", "override_settings")
    model = _model(service, title)
    return service.submit(body.request(model), ORIGIN)


def _model(service: Service, title: str) -> Model:
    """Titles of AUTOMATIC1111 end in a hash."""
    return find(service, title.partition(" [")[0].strip())


def _result(service: Service, body: TextToImage, job: Job) -> dict[str, Any]:
    pictures = [service.index.path(picture.id) for picture in service.pictures(job)]
    texts = [gallery.read_image_info(path).parameters for path in pictures]
    request = job.request
    seeds = list(request.seeds)
    size = request.size or Size(1, 1)
    info = {
        "prompt": request.prompt,
        "all_prompts": [request.prompt] * len(seeds),
        "negative_prompt": request.negative_prompt or "",
        "all_negative_prompts": [request.negative_prompt or ""] * len(seeds),
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": seeds[0],
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": size.width,
        "height": size.height,
        "sampler_name": "Euler",
        "cfg_scale": request.cfg,
        "steps": request.steps,
        "batch_size": len(seeds),
        "restore_faces": False,
        "sd_model_name": request.model,
        "sd_model_hash": "",
        "extra_generation_params": {"Schedule type": "Simple"},
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": [],
        "job_timestamp": "",
        "clip_skip": 1,
    }
    return {
        "images": [base64.b64encode(path.read_bytes()).decode() for path in pictures],
        "parameters": body.echo,
        "info": json.dumps(info, ensure_ascii=False),
    }
