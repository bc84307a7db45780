"""The running service around an App: queue, worker, gallery, downloads. The server calls it.

It is started once for a data folder; what it was doing when it died goes on at the next start.
"""

import contextlib
import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from qwen_image_tool import device
from qwen_image_tool.app import App
from qwen_image_tool.catalog import DEFAULT_MODEL, Model
from qwen_image_tool.diagnostics import LOG_LINES, discreet, report
from qwen_image_tool.errors import Busy, Cancelled, NotWritten, ToolError
from qwen_image_tool.feed import (
    EventNews,
    Feed,
    JobNews,
    PictureNews,
    QueueNews,
    QueueState,
    TransferNews,
)
from qwen_image_tool.files import replace_file
from qwen_image_tool.gallery.index import Index, Picture
from qwen_image_tool.gauges import Gauge, read_gauges
from qwen_image_tool.jobs import KEPT_JOBS, Job, Jobs
from qwen_image_tool.logs import tail
from qwen_image_tool.progress import Progress
from qwen_image_tool.supervisor import COMMAND, Supervisor
from qwen_image_tool.transfers import Transfers
from qwen_image_tool.types import Device, Event, Failure, Plan, Preview, Request, Value

_log = logging.getLogger(__name__)


class Startup(Value):
    """How far the start is, for a splash screen. `fraction`: 0 to 1."""

    step: Literal["gallery", "ready"]
    label: str
    fraction: float


class Service:
    """Owns the data folder. `command` starts a worker; `trash` takes deleted pictures.

    Raises Busy where another service has this data folder, ToolError where it can't be used.
    """

    def __init__(
        self,
        app: App,
        command: Sequence[str] = COMMAND,
        trash: Callable[[Path], None] | None = None,
    ) -> None:
        self.app = app
        self.data = app.settings.data
        self._lock = self._locked()
        self.feed = Feed()
        self.jobs = Jobs(self.data / "jobs.db")
        self.index = Index(app.settings.output, self.data / "pictures.db", trash)
        self.transfers = Transfers(
            app.library, lambda t: self.feed.publish(TransferNews(transfer=t))
        )
        idle = app.settings.idle_seconds
        self.supervisor = Supervisor(self.jobs, self.index.folder, self, idle, command)
        self.startup = Startup(step="gallery", label="Looking at the pictures", fraction=0.0)
        self.preview: Preview | None = None
        self._remembering = threading.Lock()
        self._facts: device.TorchFacts | None = None
        self._asking = threading.Lock()
        self._closing = False
        self._starter = threading.Thread(target=self._start, name="start", daemon=True)

    def start(self) -> None:
        """Look at the gallery, put right what the last end interrupted, begin to work; returns at
        once. `startup` says how far it is."""
        self._starter.start()

    def close(self) -> None:
        """End in order: the job under way goes back to the queue."""
        self._closing = True
        if self._starter.is_alive():
            self._starter.join()
        self.transfers.close()
        self.supervisor.stop()
        self.jobs.close()
        self.index.close()
        self._lock.release()

    @property
    def rescued(self) -> list[str]:
        """What was damaged at the start, and what was kept of it."""
        return [said for said in (self.jobs.database.rescued, self.index.database.rescued) if said]

    # Jobs

    def submit(self, request: Request, origin: str = "", anyway: bool = False) -> Job:
        """Queue a request; its open choices are decided now. `anyway`: also where no plan is sure
        to fit. Raises BadRequest, ModelMissing."""
        return self._queued(self.jobs.submit(self.app.ready(request), origin, anyway))

    def repeat(self, job: str, seed: int | None = None, origin: str = "") -> Job:
        """Queue a job's request again, or with another seed. Raises Unknown."""
        return self._queued(self.jobs.repeat(job, seed, origin))

    def move(self, job: str, before: str | None) -> Job:
        moved = self.jobs.move(job, before)
        self.queue_changed()
        return moved

    def cancel(self, job: str) -> Job:
        return self.supervisor.cancel(job)

    def queue(self) -> QueueState:
        running = self.supervisor.running()
        return QueueState(
            counts=self.jobs.counts(),
            paused=self.supervisor.paused,
            halted=self.supervisor.halted,
            running=running[0].id if running else None,
            loaded=self.supervisor.worker_pid is not None,
        )

    def progress(self, job: str) -> Progress | None:
        """Where a job is; None where it is not under way."""
        running = self.supervisor.running()
        return running[1] if running and running[0].id == job else None

    # Models and plans

    def device(self) -> Device:
        """This machine. The first call asks torch in a child process, which takes seconds."""
        with self._asking:
            if self._facts is None or self._facts.error:
                self._facts = self.app.look()
            return self.app.with_rates(device.probe(self._facts))

    @property
    def knows_device(self) -> bool:
        """Whether torch was asked already, so that `device` need not wait for it."""
        return self._facts is not None

    def plans(self, request: Request, anyway: bool = False) -> tuple[Request, tuple[Plan, ...]]:
        """The request with every choice made; how it would run, and what would be tried next."""
        return self.app.plans(request, self.device(), anyway)

    def described(self) -> list[dict[str, Any]]:
        """Every model: see `describe`."""
        here = self.app.seen()
        return [self.describe(model, here) for model in self.app.catalog.models]

    def describe(self, model: Model, here: Device | None) -> dict[str, Any]:
        """A model, with what it needs on this machine where that was looked at; its seconds by the
        last job, else as planned."""
        row = self.app.describe(model, here)
        if row["needs"] and row["needs"]["runs"]:
            usual = model.resolve(Request(model=model.id, prompt="a prompt"), seed=0)
            row["needs"]["seconds"] = self.seconds(usual, row["needs"]["seconds"])
        return row

    def seconds(self, request: Request, planned: float | None) -> float | None:
        """What a resolved request will take, by the last job like it, else as `planned`; None where
        neither can tell."""
        return sum(self.supervisor.expected(request).values()) or planned

    def gauges(self) -> tuple[Gauge, ...]:
        """Memory and disks as they are now."""
        return read_gauges(self.folders)

    @property
    def folders(self) -> dict[str, Path]:
        """What we keep, and where."""
        settings = self.app.settings
        return {
            "models": settings.models.absolute(),
            "pictures": self.index.folder,
            "data": self.data,
            "logs": settings.logs.absolute(),
        }

    def diagnostics(self, secrets: Iterable[str] = ()) -> str:
        """What somebody who helps needs to know; neither `secrets` nor the user's name are in it.
        It takes seconds where torch was not asked yet."""
        settings = self.app.settings
        text = report(
            settings,
            self.app.examine(again=False),
            self.app.seen(),
            self.gauges(),
            self.queue(),
            [f"{each['id']}: {each['state']} {each['revision']}" for each in self.described()],
            tail(settings.logs, LOG_LINES),
        )
        return discreet(text, secrets)

    def default_model(self) -> str:
        """The one that was chosen, else the newest that is here, else the practice model."""
        chosen = self.remembered().get("model")
        if chosen and (model := self.app.catalog.get(str(chosen))) and self.app.is_ready(model):
            return model.id
        here = [model for model in self.models_here() if model.id != DEFAULT_MODEL]
        return max(here, key=lambda model: model.released).id if here else DEFAULT_MODEL

    def models_here(self) -> list[Model]:
        return [model for model in self.app.catalog.models if self.app.is_ready(model)]

    # What outlives the process

    def remembered(self) -> dict[str, Any]:
        """Small choices: the model, the port. Nothing of worth: a damaged file is an empty one."""
        with contextlib.suppress(OSError, ValueError):
            found = json.loads((self.data / "remembered.json").read_text(encoding="utf-8"))
            return found if isinstance(found, dict) else {}
        return {}

    def remember(self, **choices: object) -> None:
        """Raises NotWritten."""
        path = self.data / "remembered.json"
        with self._remembering:
            text = json.dumps(self.remembered() | choices)
            try:
                replace_file(path, text.encode())
            except OSError as error:
                raise NotWritten.of(path, error) from error

    # What the supervisor tells (supervisor.Host)

    def job_changed(self, job: Job) -> None:
        if job.state == "running":
            self.preview = None
        self.feed.publish(JobNews(job=job))
        self.queue_changed()

    def happened(self, job: Job, event: Event, progress: Progress) -> None:
        if isinstance(event, Preview):
            self.preview = event
        self.feed.publish(EventNews(job=job.id, event=event, progress=progress))

    def saved(self, job: Job, path: Path) -> None:
        try:
            picture = self.index.add(path)
        except (OSError, ToolError) as error:  # moved away already, or damaged
            _log.warning("%s is not in the gallery: %s", path, error)
        else:
            self.feed.publish(PictureNews(job=job.id, picture=picture))

    def queue_changed(self) -> None:
        self.feed.publish(QueueNews(queue=self.queue()))

    def seeds_saved(self, job: Job) -> set[int]:
        """Asks the files too where the job was begun before: the index may not have been written,
        and looking at a large folder takes a while."""
        known = self._seeds_known(job)
        begun = job.again or job.plan
        if begun and (missing := set(job.request.seeds) - known):
            self.index.add_by_seed(job.id, missing)
            known = self._seeds_known(job)
        return known

    def pictures(self, job: Job) -> list[Picture]:
        """The job's pictures, in the order of its seeds."""
        order = {seed: place for place, seed in enumerate(job.request.seeds)}
        found = self.index.of_job(job.id)
        return sorted(found, key=lambda picture: order.get(picture.seed or 0, len(order)))

    def _seeds_known(self, job: Job) -> set[int]:
        return {picture.seed for picture in self.index.of_job(job.id) if picture.seed is not None}

    def _queued(self, job: Job) -> Job:
        self.feed.publish(JobNews(job=job))
        self.queue_changed()
        self.supervisor.wake()
        return job

    def _start(self) -> None:
        """Only where a job was interrupted, work waits until it is known which of its pictures
        exist."""
        interrupted: list[Job] = []
        try:
            with _going_on():
                interrupted = self.jobs.running()
            if not interrupted:
                self.supervisor.start()
            with _going_on():
                self.index.clean()
                self.index.sync(self._looked)
        except Cancelled:
            return
        with _going_on():
            self._put_right(interrupted)
            self.jobs.clear(keep=KEPT_JOBS)
        self.supervisor.start()
        self.startup = Startup(step="ready", label="Ready", fraction=1.0)

    def _looked(self, done: int, total: int) -> None:
        if self._closing:
            raise Cancelled(
                "The service ends.", "The gallery is looked at again at the next start."
            )
        label = f"Looking at the pictures: {done} of {total}"
        self.startup = Startup(step="gallery", label=label, fraction=done / max(total, 1))

    def _put_right(self, interrupted: Sequence[Job]) -> None:
        """Jobs that ran when the last service died: done where all their pictures are there, else
        back to the queue, once."""
        for job in interrupted:
            saved: set[int] = set()
            with _going_on():  # it is asked again before the job is drawn
                saved = self.seeds_saved(job)
            if saved >= set(job.request.seeds):
                righted = self.jobs.done(job.id, {})
            elif job.again == 0:
                righted = self.jobs.put_back(job.id, died=True)
            else:
                righted = self.jobs.fail(job.id, Failure.from_table("twice interrupted"))
            self.job_changed(righted)

    def _locked(self) -> FileLock:
        try:
            self.data.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.data / "service.lock")
            lock.acquire(timeout=0)
        except Timeout as error:
            raise Busy(
                "QwenImageTool is running already.",
                "Use that one: `qit token` prints its address and token.",
            ) from error
        except OSError as error:
            raise ToolError(
                f"{self.data} can't be used: {error}.",
                "Allow writing to it, or set QIT_DATA to another folder.",
            ) from error
        return lock


@contextlib.contextmanager
def _going_on() -> Iterator[None]:
    """A part of the start that fails is logged, and the next one follows."""
    try:
        yield
    except Cancelled:
        raise
    except Exception:  # noqa: BLE001
        _log.exception("The start is not complete.")
