"""Our own API, /api: what the page and the desktop shell are made of."""

import secrets
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, File, Query, Response, UploadFile
from fastapi.sse import EventSourceResponse
from pydantic import BaseModel, Field
from starlette.requests import Request as HttpRequest

from qwen_image_tool import __version__, gallery
from qwen_image_tool.app import SEEDS
from qwen_image_tool.doctor import Check
from qwen_image_tool.feed import News, QueueState
from qwen_image_tool.gallery.export import (
    FORMATS,
    MEDIA_TYPES,
    QUALITY,
    Format,
    decode_upload,
    export,
    thumbnail,
)
from qwen_image_tool.gallery.index import Changes, Filter, Page, Picture, Shape
from qwen_image_tool.jobs import STATES, Job, State
from qwen_image_tool.progress import Progress
from qwen_image_tool.server.hub import Hub
from qwen_image_tool.service import Service, Startup
from qwen_image_tool.transfers import Transfer
from qwen_image_tool.types import Device, Plan, Request, Value

JobId = Annotated[str, Field(max_length=40)]
Number = Annotated[int | None, Field(ge=1, le=2**62)]
Side = Annotated[int, Query(ge=16, le=1024)]


class JobView(Value):
    """A job as it stands. `ahead`: jobs before it in the queue."""

    job: Job
    ahead: int = 0
    progress: Progress | None = None
    pictures: tuple[Picture, ...] = ()


class JobList(Value):
    jobs: tuple[JobView, ...]
    next: int | None = Field(default=None, description="`before` of the following page")


class Planned(Value):
    """The request with every choice made, how it would run, and what would be tried after that."""

    request: Request
    plan: Plan
    fallbacks: tuple[Plan, ...] = ()


class PictureInfo(Value):
    """What a picture file says of itself. `request`: fields of a new request like it."""

    picture: Picture | None = None
    info: gallery.ImageInfo
    request: dict[str, Any]


class System(Value):
    version: str
    startup: Startup
    rescued: tuple[str, ...]
    default_model: str
    pictures: int
    folder: str


class Again(BaseModel):
    seed: int | None = Field(default=None, ge=0, lt=2**63, description="None: a new random one")


class Move(BaseModel):
    before: str | None = Field(default=None, max_length=40, description="None: to the end")


class Star(BaseModel):
    star: bool


class Ids(BaseModel):
    ids: list[Annotated[str, Field(max_length=40)]] = Field(max_length=1000)


class Download(BaseModel):
    variant: str = Field(default="", max_length=40)
    accept_licence: bool = False
    how: Literal["download", "update", "again"] = Field(
        default="download",
        description="update: go on to the newest revision; again: delete all and fetch it anew",
    )


class Default(BaseModel):
    model: str = Field(max_length=100)


def service_of(request: HttpRequest) -> Service:
    service: Service = request.app.state.service
    return service


def hub_of(request: HttpRequest) -> Hub:
    hub: Hub = request.app.state.hub
    return hub


Here = Annotated[Service, Depends(service_of)]
News_ = Annotated[Hub, Depends(hub_of)]


def known_job(job: JobId, service: Here) -> Job:
    """Before a stream begins: afterwards it is too late for a 404."""
    return service.jobs.get(job)


Known = Annotated[Job, Depends(known_job)]
api = APIRouter(prefix="/api")


# Jobs


@api.post("/jobs", status_code=201, tags=["jobs"])
def submit(request: Request, service: Here, anyway: bool = False) -> JobView:
    """Queue a request. Its model is an id of the catalogue. `anyway`: also where no plan is sure to
    fit this computer."""
    return view(service, service.submit(by_id(service, request), "api", anyway))


@api.get("/jobs", tags=["jobs"])
def list_jobs(
    service: Here,
    state: Annotated[list[State] | None, Query()] = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    before: Annotated[Number, Query()] = None,
) -> JobList:
    """The newest jobs first. What waits, in its order, is at /api/queue/jobs."""
    found = service.jobs.latest(state or STATES, limit + 1, before)
    more = found[limit - 1].number if len(found) > limit else None
    return JobList(jobs=tuple(view(service, job) for job in found[:limit]), next=more)


@api.delete("/jobs", tags=["jobs"])
def clear_jobs(service: Here) -> dict[Literal["cleared"], int]:
    """Forget the jobs that have ended. Their pictures stay."""
    cleared = service.jobs.clear()
    service.queue_changed()
    return {"cleared": cleared}


@api.get("/jobs/{job}", tags=["jobs"])
def get_job(job: JobId, service: Here) -> JobView:
    return view(service, service.jobs.get(job))


@api.post("/jobs/{job}/cancel", tags=["jobs"])
def cancel(job: JobId, service: Here) -> JobView:
    """Stop it; one that runs stops within a step."""
    return view(service, service.cancel(job))


@api.post("/jobs/{job}/retry", status_code=201, tags=["jobs"])
def retry(job: JobId, service: Here) -> JobView:
    """A new job with the same request."""
    return view(service, service.repeat(job, origin="api"))


@api.post("/jobs/{job}/repeat", status_code=201, tags=["jobs"])
def repeat(job: JobId, again: Again, service: Here) -> JobView:
    """A new job with another seed."""
    seed = secrets.randbelow(SEEDS) if again.seed is None else again.seed
    return view(service, service.repeat(job, seed, "api"))


@api.post("/jobs/{job}/move", tags=["jobs"])
def move(job: JobId, move: Move, service: Here) -> JobView:
    """Put a waiting job before another one."""
    return view(service, service.move(job, move.before))


@api.get("/jobs/{job}/events", response_class=EventSourceResponse, tags=["jobs"])
async def job_events(job: Known, hub: News_) -> AsyncIterator[News]:
    """The job's news up to its end, as server-sent events."""
    async for news in hub.job(job.id):
        yield news


@api.get("/events", response_class=EventSourceResponse, tags=["jobs"])
async def events(hub: News_) -> AsyncIterator[News]:
    """All news, as server-sent events."""
    async for news in hub.everything():
        yield news


@api.get("/queue", tags=["queue"])
def queue(service: Here) -> QueueState:
    return service.queue()


@api.get("/queue/jobs", tags=["queue"])
def waiting(service: Here, limit: Annotated[int, Query(ge=1, le=10_000)] = 100) -> tuple[Job, ...]:
    """The jobs that wait, the next one first."""
    return tuple(service.jobs.waiting(limit))


@api.post("/queue/pause", tags=["queue"])
def pause(service: Here) -> QueueState:
    """Stop working and free all memory of the GPU; the job under way goes back to the queue."""
    service.supervisor.pause()
    return service.queue()


@api.post("/queue/resume", tags=["queue"])
def resume(service: Here) -> QueueState:
    """Go on after a pause, or after the queue has stopped by itself."""
    service.supervisor.resume()
    return service.queue()


@api.post("/plan", tags=["plan"])
def plan(request: Request, service: Here, anyway: bool = False) -> Planned:
    """How a request would run on this machine. The first call takes seconds: it asks the GPU."""
    resolved, (first, *others) = service.plans(by_id(service, request), anyway)
    return Planned(request=resolved, plan=first, fallbacks=tuple(others))


# Models


@api.get("/models", tags=["models"])
def models(service: Here) -> list[dict[str, Any]]:
    """The catalogue, with what is here of it."""
    return service.described()


@api.get("/models/{model}", tags=["models"])
def model(model: str, service: Here) -> dict[str, Any]:
    """All that is known of one model."""
    entry = service.app.catalog.find(model)
    return entry.model_dump(mode="json") | service.describe(entry, service.app.seen())


@api.post("/models/{model}/download", status_code=202, tags=["models"])
def download(model: str, what: Download, service: Here) -> Transfer:
    """Fetch it in the background, or go on with that."""
    entry = service.app.catalog.find(model)
    return service.transfers.start(entry, what.how, what.variant, what.accept_licence)


@api.post("/models/{model}/verify", status_code=202, tags=["models"])
def verify(model: str, service: Here, quick: bool = False) -> Transfer:
    """Compare every file with its hash, in the background. `quick`: sizes and headers alone."""
    entry = service.app.catalog.find(model)
    return service.transfers.start(entry, "check" if quick else "verify")


@api.post("/models/{model}/repair", status_code=202, tags=["models"])
def repair(model: str, service: Here) -> Transfer:
    """Fetch what is damaged, and nothing else."""
    return service.transfers.start(service.app.catalog.find(model), "repair")


@api.post("/models/{model}/pause", tags=["models"])
def pause_transfer(model: str, service: Here) -> Transfer:
    """Stop the work on it; what came is kept."""
    return service.transfers.stop(model, keep=True)


@api.post("/models/{model}/cancel", tags=["models"])
def cancel_transfer(model: str, service: Here) -> Transfer:
    """Stop the download and throw away what came."""
    return service.transfers.stop(model, keep=False)


@api.delete("/models/{model}", tags=["models"])
def remove(
    model: str, service: Here, variant: Annotated[str, Query(max_length=40)] = ""
) -> dict[Literal["freed_bytes"], int]:
    """Delete it from this computer, or one variant alone. Files that other models share stay."""
    entry = service.app.catalog.find(model)
    return {"freed_bytes": service.app.library.remove(entry, variant)}


@api.get("/transfers", tags=["models"])
def transfers(service: Here) -> tuple[Transfer, ...]:
    """Downloads, checks and repairs of this start."""
    return service.transfers.all()


# Gallery


@api.get("/gallery", tags=["gallery"])
def search(
    service: Here,
    text: Annotated[str, Query(max_length=1000)] = "",
    model: Annotated[str, Query(max_length=200)] = "",
    starred: bool = False,
    shape: Shape = "",
    since: Annotated[str, Query(max_length=40)] = "",
    until: Annotated[str, Query(max_length=40)] = "",
    limit: Annotated[int, Query(ge=1, le=500)] = 60,
    after: Annotated[str | None, Query(max_length=40)] = None,
) -> Page:
    """Pictures with all these words, the newest first."""
    wanted = Filter(text=text, model=model, starred=starred, shape=shape, since=since, until=until)
    return service.index.search(wanted, limit, after)


@api.get("/gallery/models", tags=["gallery"])
def gallery_models(service: Here) -> dict[str, int]:
    """How many pictures each model made."""
    return service.index.models()


@api.post("/gallery/sync", tags=["gallery"])
def sync(service: Here) -> Changes:
    """Look at the folder again."""
    return service.index.sync()


@api.post("/gallery/delete", tags=["gallery"])
def delete(ids: Ids, service: Here) -> dict[Literal["deleted"], list[str]]:
    """Put pictures into the system's trash."""
    return {"deleted": service.index.delete(ids.ids)}


@api.post("/gallery/undo", tags=["gallery"])
def undo(service: Here) -> dict[Literal["restored"], list[str]]:
    """Bring back what was deleted last, within ten minutes."""
    return {"restored": service.index.undo()}


@api.post("/gallery/inspect", tags=["gallery"])
def inspect(picture: Annotated[UploadFile, File()], service: Here) -> PictureInfo:
    """Read the request back from a picture that is sent: ours or AUTOMATIC1111's."""
    data = picture.file.read()
    decode_upload(data)
    return described(service, gallery.read_info(data))


@api.get("/gallery/{picture}", tags=["gallery"])
def get_picture(picture: str, service: Here) -> PictureInfo:
    """What a picture was made from."""
    found = described(service, service.index.info(picture))
    return found.model_copy(update={"picture": service.index.get(picture)})


@api.post("/gallery/{picture}/star", tags=["gallery"])
def star(picture: str, star: Star, service: Here) -> Picture:
    return service.index.star(picture, star.star)


@api.get("/gallery/{picture}/file", response_class=Response, tags=["gallery"])
def file(
    picture: str,
    service: Here,
    form: Annotated[Literal["", "png", "jpeg", "webp"], Query(alias="format")] = "",
    quality: Annotated[int, Query(ge=1, le=100)] = QUALITY,
    metadata: bool = True,
    download: bool = False,
) -> Response:
    """The picture: as it is, or as PNG, JPEG (on white) or WebP, with its request or without."""
    path = service.index.path(picture)
    own = path.suffix.lower().replace(".jpg", ".jpeg").removeprefix(".")
    wanted: Format = form or (own if own in FORMATS else "png")
    data = (
        path.read_bytes() if metadata and wanted == own else export(path, wanted, quality, metadata)
    )
    headers = {"cache-control": "private, max-age=31536000, immutable"}
    if download:
        headers["content-disposition"] = f'attachment; filename="{picture}.{wanted}"'
    return Response(data, media_type=MEDIA_TYPES[wanted], headers=headers)


@api.get("/gallery/{picture}/thumbnail", response_class=Response, tags=["gallery"])
def small(picture: str, service: Here, side: Side = 320) -> Response:
    """A small WebP of it."""
    data = thumbnail(service.index.path(picture), side, service.app.settings.cache / "thumbnails")
    headers = {"cache-control": "private, max-age=86400"}
    return Response(data, media_type="image/webp", headers=headers)


# System


@api.get("/system", tags=["system"])
def system(service: Here) -> System:
    return System(
        version=__version__,
        startup=service.startup,
        rescued=tuple(service.rescued),
        default_model=service.default_model(),
        pictures=service.index.count(),
        folder=str(service.index.folder),
    )


@api.put("/system/default-model", tags=["system"])
def set_default(default: Default, service: Here) -> System:
    """The model that clients get which name none."""
    service.remember(model=service.app.catalog.find(default.model).id)
    return system(service)


@api.get("/system/device", tags=["system"])
def device(service: Here) -> Device:
    """This machine. The first call takes seconds: it asks the GPU."""
    return service.device()


@api.get("/system/checks", tags=["system"])
def checks(service: Here) -> tuple[Check, ...]:
    """Is this machine ready? It takes seconds."""
    return service.app.examine()


def view(service: Service, job: Job) -> JobView:
    return JobView(
        job=job,
        ahead=service.jobs.ahead(job.id) if job.state == "queued" else 0,
        progress=service.progress(job.id),
        pictures=tuple(service.pictures(job)) if job.state != "queued" else (),
    )


def described(service: Service, info: gallery.ImageInfo) -> PictureInfo:
    """Its settings, with the model only where the catalogue knows it by its id or name."""
    return PictureInfo(info=info, request=service.app.fields_of(info))


def by_id(service: Service, request: Request) -> Request:
    """Clients name models by their ids, never by folders of this computer. Raises BadRequest."""
    model = service.app.catalog.find(request.model[:200])
    return request.model_copy(update={"model": model.id})
