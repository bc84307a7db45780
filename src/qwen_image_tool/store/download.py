"""Getting files: several at a time, resumed where they stopped, proven before they have a name."""

import errno
import functools
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_exponential_jitter

from qwen_image_tool.errors import Cancelled, DownloadFailed, Paused
from qwen_image_tool.store.hub import Body, Hub, RemoteFile, Transient
from qwen_image_tool.store.links import content
from qwen_image_tool.store.patience import sleep
from qwen_image_tool.store.record import BLOCK, Digest, Kept, partial_path, settle
from qwen_image_tool.types import DownloadProgress, Event

SPEED_WINDOW = 15.0  # seconds that the speed is an average of
REPORT_EVERY = 0.25  # seconds between two events
SPARE = 0.01  # of what is still to come: left free on the disk
AGAIN = "What came is kept: the next download goes on from there."


@dataclass(frozen=True)
class Effort:
    """How hard to try: tries in a row that bring no byte, seconds between them, files at once;
    and seconds between two looks at the disk's free space."""

    tries: int = 8
    first_wait: float = 1.0
    longest_wait: float = 60.0
    bad_hashes: int = 2
    parallel: int = 4
    look_every: float = 1.0


@dataclass
class Control:
    """Stops a download from outside. `pause` keeps what came, `cancel` is for throwing it away."""

    reason: type[Paused] | type[Cancelled] | None = None
    stopped: threading.Event = field(default_factory=threading.Event)

    def pause(self) -> None:
        self._stop(Paused)

    def cancel(self) -> None:
        self._stop(Cancelled)

    def _stop(self, reason: type[Paused] | type[Cancelled]) -> None:
        self.reason = self.reason or reason
        self.stopped.set()

    def check(self) -> None:
        if self.stopped.is_set():
            if self.reason is Cancelled:
                raise Cancelled("The download was cancelled.", "What came of it is deleted.")
            raise Paused("The download is paused.", AGAIN)


class Progress:
    """Counts bytes of all threads and tells `emit` a few times a second."""

    def __init__(self, model: str, total: int, emit: Callable[[Event], None]) -> None:
        self.fetched = 0
        self.model, self._total, self._emit = model, total, emit
        self._done = 0
        self._lock = threading.Lock()
        self._said = 0.0
        self._history: deque[tuple[float, int]] = deque()

    def have(self, count: int, file: str) -> None:
        """Bytes that need not be fetched; negative where bytes on disk turned out to be bad."""
        self._add(count, 0, file)

    def got(self, count: int, file: str) -> None:
        self._add(count, count, file)

    def _add(self, count: int, fetched: int, file: str) -> None:
        with self._lock:
            self._done += count
            self.fetched += fetched
            now = time.monotonic()
            if now - self._said > REPORT_EVERY or self._done == self._total:
                self._said = now
                self._emit(self._event(now, file))

    def _event(self, now: float, file: str) -> DownloadProgress:
        self._history.append((now, self.fetched))
        while now - self._history[0][0] > SPEED_WINDOW:
            self._history.popleft()
        then, before = self._history[0]
        speed = (self.fetched - before) / (now - then) if now > then else 0.0
        left = (self._total - self._done) / speed if speed else None
        return DownloadProgress(
            model=self.model,
            done_bytes=self._done,
            total_bytes=self._total,
            bytes_per_second=round(speed),
            seconds_left=None if left is None else round(left, 1),
            file=file,
        )


def fetch(
    hub: Hub,
    folder: Path,
    files: Iterable[Kept],
    progress: Progress,
    control: Control,
    effort: Effort,
) -> None:
    """Get every file of `files` into `folder`; each has its final name only when proven.

    Raises DownloadFailed, Paused or Cancelled after all threads have stopped; what came is kept.
    """
    wanted = sorted(files, key=lambda file: file.size)
    check_space(folder, to_come(folder, wanted))
    halt = Control(control.reason, threading.Event())
    with ThreadPoolExecutor(effort.parallel, thread_name_prefix="download") as pool:
        jobs = [
            pool.submit(_File(hub, folder, file, progress, _Both(control, halt), effort).get)
            for file in wanted
        ]
        try:
            while wait(jobs, effort.look_every, FIRST_EXCEPTION).not_done and not _failed(jobs):
                check_space(folder, to_come(folder, wanted))
        finally:
            halt.pause()  # one failed, or the user pressed Ctrl-C: the others keep what they have
            pool.shutdown(wait=True, cancel_futures=True)
    control.check()
    _raise_first([job.exception() for job in jobs if not job.cancelled()])


def check_space(folder: Path, needed: int) -> None:
    """Raises DownloadFailed where the disk of `folder` can't take `needed` more bytes."""
    with _disk_errors(folder):
        free = shutil.disk_usage(folder).free
    needed += int(needed * SPARE)
    if needed > free:
        raise DownloadFailed(
            "disk full",
            f"{needed / 1e9:.2f} GB are still to come, and the disk of {folder} has"
            f" {free / 1e9:.2f} GB free.",
            "Free some space, or move the models: set `models` in the config file.",
        )


def make_room(folder: Path, files: Iterable[Kept]) -> None:
    """Where files of a model are to be, empty folders go. Raises DownloadFailed, which says what to
    move away, where something else is in the way."""
    for file in files:
        path = folder / file.path
        with _disk_errors(path):
            if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
                path.rmdir()
        if path.is_dir():
            raise _in_the_way(path, "folder", "file")
        for above in list(path.parents)[: len(Path(file.path).parts) - 1]:
            if above.exists() and not above.is_dir():
                raise _in_the_way(above, "file", "folder")


def _in_the_way(path: Path, found: str, wanted: str) -> DownloadFailed:
    return DownloadFailed(
        "not writable",
        f"{path} is a {found}, and a {wanted} of the model belongs there.",
        f"Move that {found} away, or delete it; then repeat the command. Nothing was changed.",
    )


def _failed(jobs: Iterable[Future[None]]) -> bool:
    return any(job.done() and job.exception() for job in jobs)


def _raise_first(errors: list[BaseException | None]) -> None:
    """What went wrong first; that the others were told to stop says nothing."""
    found = [error for error in errors if error is not None]
    for error in [e for e in found if not isinstance(e, Paused)] + found:
        raise error


def to_come(folder: Path, files: Iterable[Kept]) -> int:
    """Bytes that the disk has yet to take; those in temporary files are there already."""
    return sum(
        max(0, file.size - _size(partial_path(folder, file)))
        for file in files
        if _size(folder / file.path) != file.size
    )


def _size(path: Path) -> int:
    try:
        return content(path).stat().st_size
    except OSError:
        return 0


@dataclass(frozen=True)
class _Both:
    """The user's control, and the one that ends all threads when one has failed."""

    user: Control
    halt: Control

    def check(self) -> None:
        self.user.check()
        self.halt.check()


class _File:
    """One file on its way."""

    def __init__(
        self, hub: Hub, folder: Path, file: Kept, progress: Progress, control: _Both, effort: Effort
    ) -> None:
        self._hub, self._file = hub, file
        self._progress, self._control, self._effort = progress, control, effort
        self._final = folder / file.path
        self._partial = partial_path(folder, file)
        self._size = 0
        self._fruitless = 0
        self._bad_hashes = 0
        self._digest = Digest(file)

    def get(self) -> None:
        """Raises DownloadFailed, Paused or Cancelled."""
        self._control.check()
        with _disk_errors(self._partial):
            self._partial.parent.mkdir(parents=True, exist_ok=True)
            self._final.parent.mkdir(parents=True, exist_ok=True)
            retrying = Retrying(
                retry=retry_if_exception_type(Transient),
                stop=lambda _: self._fruitless >= self._effort.tries,
                wait=self._pause,
                sleep=functools.partial(sleep, check=self._control.check),
                retry_error_callback=self._give_up,
            )
            retrying(self._try)

    def _try(self) -> None:
        with self._partial.open("ab+", buffering=0) as stream:
            self._resume(stream)
            before = self._size
            self._fruitless += 1
            try:
                if self._size < self._file.size:
                    self._stream_into(stream)
            finally:
                if self._size > before:
                    self._fruitless = 0
        self._prove()

    def _resume(self, stream: BinaryIO) -> None:
        """Hash what an earlier try left; no byte of it is fetched again."""
        size = stream.seek(0, 2)
        if size > self._file.size:
            stream.truncate(0)
            size = 0
        if size == self._size:
            return
        self._digest = Digest(self._file)
        stream.seek(0)
        while data := stream.read(BLOCK):
            self._digest.update(data)
            self._control.check()
        self._progress.have(size - self._size, self._file.path)
        self._size = size

    def _stream_into(self, stream: BinaryIO) -> None:
        remote = RemoteFile(
            self._file.source, self._file.size, self._file.sha256, self._file.git_sha1
        )
        ours = self._file.hub == self._hub.kind  # the other hub has the content, not the commit
        revision = self._file.revision if ours else self._hub.branch
        check = self._control.check
        with self._hub.open(self._file.repo, revision, remote, self._size, check) as body:
            for piece in _from_offset(body, self._size):
                self._control.check()
                self._take(stream, piece[: self._file.size - self._size])
                if self._size == self._file.size:
                    return
        raise Transient("network", f"the server stopped in the middle of {self._file.path}")

    def _take(self, stream: BinaryIO, piece: memoryview) -> None:
        """To disk before it counts as here: so it is here after a kill as well."""
        self._digest.update(piece)
        write_all(stream, piece)
        self._size += len(piece)
        self._progress.got(len(piece), self._file.path)

    def _prove(self) -> None:
        if self._digest.agrees:
            settle(self._partial, self._final)
            return
        self._partial.unlink()
        self._progress.have(-self._size, self._file.path)
        self._size, self._digest = 0, Digest(self._file)
        self._bad_hashes += 1
        if self._bad_hashes > self._effort.bad_hashes:
            raise DownloadFailed(
                "hash",
                f"{self._file.path} came with wrong bytes {self._bad_hashes} times.",
                "Try again later, or from another hub: something on the way changes the file.",
            )
        raise Transient("hash", f"{self._file.path} came with wrong bytes")

    def _pause(self, state: RetryCallState) -> float:
        """Seconds until the next try: what the server asks for, else longer each time."""
        error = state.outcome.exception() if state.outcome else None
        asked = error.retry_after if isinstance(error, Transient) else 0.0
        first, longest = self._effort.first_wait, self._effort.longest_wait
        state.attempt_number = max(self._fruitless, 1)
        return max(
            asked, wait_exponential_jitter(multiplier=first, max=longest, jitter=first)(state)
        )

    def _give_up(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if not isinstance(error, Transient):
            raise TypeError(f"unexpected: {error!r}")
        raise DownloadFailed(
            error.kind,
            f"{self._file.path} can't be fetched: {error}, {self._fruitless} times in a row.",
            AGAIN,
        ) from error


def write_all(stream: BinaryIO, piece: memoryview) -> None:
    """An unbuffered file takes less than it is given where the disk is nearly full."""
    while piece:
        piece = piece[stream.write(piece) :]


def _from_offset(body: Body, offset: int) -> Iterator[memoryview]:
    """The bytes from `offset` on, where the server began earlier than asked."""
    behind = offset - body.start
    for piece in body.pieces:
        known = min(behind, len(piece))
        behind -= known
        yield piece[known:]


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DownloadFailed(
                "disk full", f"The disk of {path.parent} is full.", f"Free some space. {AGAIN}"
            ) from error
        raise DownloadFailed(
            "not writable",
            f"{path} can't be written ({error.strerror}).",
            "Check who may write there.",
        ) from error
