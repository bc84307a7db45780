"""Runs the queue: one worker process, its life and its death. Never imports torch.

    take a job -> start a worker where there is none -> order -> follow its reports -> end the job

A worker that dies is explained (`exits`), its job is tried once more on the plan's next fallback,
and after three deaths in ten minutes the queue waits for a person.
"""

import collections
import contextlib
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

from pydantic import ValidationError

from qwen_image_tool import exits, lifeline
from qwen_image_tool.errors import ToolError, TroubleKind, trouble_in
from qwen_image_tool.jobs import Job, Jobs
from qwen_image_tool.messages import (
    Failed,
    Finished,
    Report,
    Run,
    Stop,
    line,
    report_adapter,
)
from qwen_image_tool.progress import Progress, Track, scaled
from qwen_image_tool.types import (
    Event,
    Failure,
    PhaseName,
    PhaseStarted,
    Planned,
    Request,
    Saved,
)

OUTPUT_KEPT = 16 << 10  # bytes of a worker's last output
DEATHS, WINDOW = 3, 600.0  # so many deaths in so many seconds are a loop
STOP_SECONDS = 30.0  # a worker that doesn't stop within this is ended
LET_GO_SECONDS = 2.0  # for the last words of a worker that has ended
FINISH_SECONDS = 60.0  # for a picture that is being developed or saved when the program ends
FALL_BACK: frozenset[TroubleKind] = frozenset(
    ("memory", "gpu memory", "GPU failed", "crashed", "killed")
)
COMMAND = (sys.executable, "-X", "utf8", "-m", "qwen_image_tool.worker")
_log = logging.getLogger(__name__)


class Host(Protocol):
    """Who is told, and asked. Called from the supervisor's thread; must not block."""

    def job_changed(self, job: Job) -> None: ...
    def happened(self, job: Job, event: Event, progress: Progress) -> None: ...
    def saved(self, job: Job, path: Path) -> None: ...
    def queue_changed(self) -> None: ...

    def seeds_saved(self, job: Job) -> set[int]:
        """Seeds of the job's pictures that are on disk already."""


@dataclass
class _Current:
    """The job under way. `wish`: why it is asked to stop."""

    job: Job
    track: Track
    plan: int = 0  # the number of the one that is tried
    wish: Literal["", "cancel", "put back"] = ""
    since: float = 0.0
    last: Event | None = None
    seconds: dict[PhaseName, float] = field(default_factory=dict)


class Supervisor:
    """The thread that runs the queue. `idle_seconds`: a worker without work for so long is ended,
    which frees all its memory."""

    def __init__(
        self,
        jobs: Jobs,
        output: Path,
        host: Host,
        idle_seconds: float = 600.0,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self._jobs, self._output, self._host = jobs, output, host
        self._idle_seconds, self._command = idle_seconds, command
        self._lock = threading.RLock()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        self._stopping = False
        self._paused = False
        self._unloading = False
        self._halted: Failure | None = None
        self._worker: WorkerProcess | None = None
        self._current: _Current | None = None
        self._deaths: collections.deque[float] = collections.deque(maxlen=DEATHS)
        # Of a job whose process died: the number of the plan that failed, and by what
        self._failed: dict[str, tuple[int, TroubleKind]] = {}

    # What others ask for, from any thread

    def start(self) -> None:
        """Once; a second call does nothing."""
        if not self._thread.is_alive() and not self._stopping:
            self._thread.start()

    def wake(self) -> None:
        """Look at the queue: something was put in."""
        self._wake.set()

    def cancel(self, job: str) -> Job:
        """Stop a queued or running job. Raises Unknown, or BadRequest where it has ended."""
        with self._lock:
            current = self._current
            if current and current.job.id == job and self._jobs.get(job).state == "running":
                self._ask(current, "cancel")
                return current.job
            cancelled = self._jobs.cancel(job)
        self._host.job_changed(cancelled)
        return cancelled

    def pause(self) -> None:
        """Stop working and give all memory back; the running job goes back to the queue."""
        self._paused = True
        self.unload()

    def unload(self) -> None:
        """Give all memory back; the running job goes back to the queue, and loads again."""
        with self._lock:
            self._unloading = True
            if self._current:
                self._ask(self._current, "put back")
        self._wake.set()
        self._host.queue_changed()

    def resume(self) -> None:
        """Go on after a pause or after a crash loop."""
        with self._lock:
            self._paused, self._halted = False, None
            self._deaths.clear()
        self._wake.set()
        self._host.queue_changed()

    def stop(self) -> None:
        """End the worker and the thread: a picture that is nearly done is finished, any other job
        goes back to the queue."""
        with self._lock:
            self._stopping = True
            current = self._current
            nearly = current is not None and current.track.phase in ("decode", "save")
            if current and not nearly:
                self._ask(current, "put back")
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(FINISH_SECONDS)
        with self._lock:
            if self._worker:
                self._worker.end()

    @property
    def paused(self) -> bool:
        return self._paused

    @property
    def halted(self) -> Failure | None:
        """Why the queue waits for a person."""
        return self._halted

    @property
    def worker_pid(self) -> int | None:
        worker = self._worker
        return worker.pid if worker and worker.alive else None

    def running(self) -> tuple[Job, Progress, Event | None] | None:
        """The job under way, where it is, and its last event."""
        with self._lock:
            current = self._current
            return (current.job, current.track.progress(), current.last) if current else None

    def expected(self, request: Request) -> dict[PhaseName, float]:
        """Seconds a phase of a resolved request, from the last job like it; empty if none was."""
        alike = next(
            (
                job
                for job in self._jobs.latest(["done"], limit=20)
                if job.request.model == request.model and job.plan and job.seconds
            ),
            None,
        )
        if alike is None or alike.plan is None:
            return {}
        return scaled(alike.seconds, (alike.request, alike.plan), (request, None))

    # The thread

    def _run(self) -> None:
        while not self._stopping:
            try:
                if self._unloading:
                    self._unloading = False
                    self._end_worker()
                if not self._work():
                    self._rest()
            except ToolError as error:  # the record can't be written: nothing is lost, try again
                _log.error("The queue waits: %s", error)
                self._wake.wait(2.0)
                self._wake.clear()
            except Exception as error:  # noqa: BLE001  the thread's last word is not silence
                _log.exception("The queue stops.")
                self._halted = Failure.from_table("other", f"({error})")
                self._host.queue_changed()
        self._end_worker()

    def _work(self) -> bool:
        """Run the next job to its end. False where there is none, or none may run."""
        with self._lock:
            if self._paused or self._halted or self._stopping:
                return False
            job = self._jobs.take()
            if job is None:
                return False
            self._current = current = _Current(job, Track({}))
        ended = None
        try:
            ended = self._insist(self._safely(current))
        finally:
            with self._lock:
                self._current = None
        if ended:
            self._host.job_changed(ended)
        return True

    def _rest(self) -> None:
        woken = self._wake.wait(self._idle_seconds if self._worker else None)
        self._wake.clear()
        if not woken:
            self._end_worker()

    def _safely(self, current: _Current) -> Callable[[], Job]:
        """A fault of ours, or a record that can't be read, ends this job with a sentence: it would
        be running for ever, and nobody would draw it."""
        try:
            return self._outcome(current)
        except Exception as error:  # noqa: BLE001
            _log.exception("Job %s could not be followed.", current.job.id)
            self._end_worker()
            said = Failure.of(error) if isinstance(error, ToolError) else None
            failure = said or Failure.from_table("other", f"({error})")
            return lambda: self._jobs.fail(current.job.id, failure)

    def _outcome(self, current: _Current) -> Callable[[], Job]:
        """Run the job; returns how to write down what came of it."""
        job = current.job
        self._host.job_changed(job)
        current.track = Track(self.expected(job.request))
        saved, seeds = self._host.seeds_saved(job), job.request.seeds
        # They are saved in their order: one that is gone before the last was deleted since
        begun = max((place for place, seed in enumerate(seeds, 1) if seed in saved), default=0)
        missing = [*seeds[begun:]]
        if not missing:  # it was interrupted after its last picture
            return lambda: self._jobs.done(job.id, {})
        report = self._drawn(current, missing)
        if isinstance(report, Finished):
            seconds = report.seconds
            return lambda: self._jobs.done(job.id, seconds)
        if current.wish == "put back":
            return lambda: self._jobs.put_back(job.id, died=False)
        if current.wish == "cancel" or report.stopped:
            return lambda: self._jobs.cancel(job.id, ("running",))
        return self._after_failure(current, report)

    def _drawn(self, current: _Current, missing: list[int]) -> Finished | Failed:
        """What a worker makes of the order."""
        try:
            worker = self._living_worker()
        except OSError as error:  # a process can't be started
            kind = trouble_in(str(error)) or "crashed"
            return self._lost(current, Failure.from_table(kind, f"({error})"))
        with self._lock:
            worker.send(self._order(current.job, missing))
            if current.wish:  # it came when there was no worker to tell
                worker.send(Stop(job=current.job.id))
        return self._follow(current, worker)

    def _after_failure(self, current: _Current, report: Failed) -> Callable[[], Job]:
        job, failure = current.job, report.failure
        _log.warning("Job %s: %s", job.id, failure.message)
        if failure.kind in FALL_BACK and not report.foreseen:
            self._end_worker()  # the only sure way to have the memory back, and whole libraries
            if job.again == 0:
                self._failed[job.id] = current.plan, failure.kind
                return lambda: self._jobs.put_back(job.id, died=True, why=failure)
        return lambda: self._jobs.fail(job.id, failure)

    def _follow(self, current: _Current, worker: "WorkerProcess") -> Finished | Failed:
        """Pass the events on until the run ends in one way or another."""
        while True:
            report = worker.next_report(1.0)
            if isinstance(report, Finished | Failed):
                return report
            if isinstance(report, Exit):
                return self._died(current, report)
            if report is not None:
                self._tell(current, report.event)
            with self._lock:
                overdue = current.wish and time.monotonic() - current.since > STOP_SECONDS
            if overdue:
                worker.end()

    def _tell(self, current: _Current, event: Event) -> None:
        with self._lock:
            current.track.follow(event)
            if isinstance(event, PhaseStarted) or current.last is None:
                current.last = event
        if isinstance(event, Planned):
            current.plan = event.number
            self._insist(lambda: self._jobs.planned(current.job.id, event.plan))
        elif isinstance(event, Saved):
            self._host.saved(current.job, Path(event.path))
        self._host.happened(current.job, event, current.track.progress())

    def _died(self, current: _Current, end: "Exit") -> Failed:
        self._end_worker()
        failure = exits.explain(end.code, end.output, end.oom_kills, current.track.phase)
        _log.warning("The worker ended. %s Its last output:\n%s", failure.message, end.output)
        return self._lost(current, failure)

    def _lost(self, current: _Current, failure: Failure) -> Failed:
        """The job has no process, unasked; three such jobs stop the queue."""
        if not current.wish:
            now = time.monotonic()
            self._deaths.append(now)
            if len(self._deaths) == DEATHS and now - self._deaths[0] < WINDOW:
                self._halted = Failure.from_table("crash loop", failure.message)
                self._host.queue_changed()
        return Failed(job=current.job.id, failure=failure, foreseen=False)

    def _insist(self, record: Callable[[], Job | None]) -> Job | None:
        """Write down what happened, again and again while the disk is full: it is the truth."""
        while True:
            try:
                return record()
            except ToolError as error:
                if error.trouble == "request" or self._stopping:  # it was cleared, or is over
                    raise
                _log.error("Not written down yet: %s", error)
                time.sleep(1.0)

    def _ask(self, current: _Current, wish: Literal["cancel", "put back"]) -> None:
        if not current.wish:
            current.since = time.monotonic()
        current.wish = wish if current.wish != "cancel" else "cancel"
        if self._worker:
            self._worker.send(Stop(job=current.job.id))

    def _order(self, job: Job, missing: list[int]) -> Run:
        rest = job.request.model_copy(update={"seed": missing[0], "images": len(missing)})
        tried, trouble = self._failed.pop(job.id, (0, "other"))
        return Run(
            job=job.id,
            request=rest,
            output=str(self._output),
            anyway=job.anyway,
            tried=tried,
            trouble=trouble,
        )

    def _living_worker(self) -> "WorkerProcess":
        if self._worker and not self._worker.alive:  # it died while it had nothing to do
            self._end_worker()
        with self._lock:
            self._worker = self._worker or WorkerProcess(self._command)
            return self._worker

    def _end_worker(self) -> None:
        worker = self._worker
        if worker:
            worker.end()
            with self._lock:
                self._worker = None
            self._host.queue_changed()


@dataclass(frozen=True)
class Exit:
    """A worker has ended. `oom_kills`: processes killed for memory since it was started."""

    code: int
    output: str
    oom_kills: int


class WorkerProcess:
    """One child process: what it says, and that it does not outlive us. Raises OSError where it
    can't be started."""

    def __init__(self, command: Sequence[str]) -> None:
        self._oom_kills = exits.oom_kills()
        self._process = subprocess.Popen(
            [*command, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
        lifeline.adopt(self._process)
        self._output = collections.deque[bytes]()
        self._reports: queue.SimpleQueue[Report | None] = queue.SimpleQueue()
        self._orders: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        work = (self._write_orders, self._read_reports, self._read_output)
        self._threads = [threading.Thread(target=each, daemon=True) for each in work]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def send(self, order: Run | Stop) -> None:
        """Returns at once: a worker that starts or hangs reads later. One that is gone says so by
        its end."""
        self._orders.put(line(order))

    def next_report(self, seconds: float) -> Report | Exit | None:
        """The next report; Exit once the worker has ended; None where nothing came in time."""
        try:
            report = self._reports.get(timeout=seconds)
        except queue.Empty:
            return None if self.alive else self._exit()
        return report or self._exit()

    def end(self) -> None:
        """End the process now; it keeps nothing that is not on disk."""
        with contextlib.suppress(OSError):
            self._process.kill()
        self._process.wait()
        self._let_go()

    def _exit(self) -> Exit:
        code = self._process.wait()
        self._let_go()
        output = b"".join(self._output)[-OUTPUT_KEPT:].decode(errors="replace")
        return Exit(code, output, exits.oom_kills() - self._oom_kills)

    def _let_go(self) -> None:
        """Processes that a library has started may hold the pipes when the worker is gone: their
        threads end with them."""
        self._orders.put(b"")
        end = time.monotonic() + LET_GO_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _write_orders(self) -> None:
        with contextlib.suppress(OSError), _pipe(self._process.stdin) as pipe:
            while text := self._orders.get():
                pipe.write(text)
                pipe.flush()

    def _read_reports(self) -> None:
        with _pipe(self._process.stdout) as pipe:
            for text in pipe:
                try:
                    self._reports.put(report_adapter.validate_json(text))
                except ValidationError:
                    _log.warning("The worker said something unknown: %.200r", text)
        self._reports.put(None)

    def _read_output(self) -> None:
        kept = 0
        with _pipe(self._process.stderr) as pipe:
            for text in pipe:
                self._output.append(text[-OUTPUT_KEPT:])
                kept += len(self._output[-1])
                while kept - len(self._output[0]) >= OUTPUT_KEPT:
                    kept -= len(self._output.popleft())


def _pipe(pipe: object) -> BinaryIO:
    assert pipe is not None
    return pipe  # type: ignore[return-value]
