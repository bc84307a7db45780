"""Small files that are replaced whole; can a folder be written; what a read tells of the disk."""

import os
import secrets
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ENOUGH = 1 << 30  # bytes; the rate of fewer says little of a disk


def replace_file(path: Path, data: bytes, private: bool = False) -> None:
    """Write `data` beside `path`, then give it that name: who reads finds the old file or the new.
    Where that fails nothing is left of it.

    `private`: only the user can read it. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    handle = os.open(new, flags, 0o600 if private else 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def try_writing(folder: Path) -> None:
    """Write a byte into a temporary file of an existing folder. Raises OSError."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"\0")


def try_making(folder: Path) -> None:
    """Make a folder that need not exist, and write into it; nothing of that stays.
    Raises OSError."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try_writing(folder)
    finally:
        for made in missing:
            with suppress(OSError):  # never made, or somebody else put something into it
                made.rmdir()


def is_cached(file: int, start: int) -> bool:
    """Whether what is at byte `start` of an open file is in the system's cache; only Linux tells,
    elsewhere it seems not to be."""
    try:
        return os.preadv(file, [bytearray(1)], start, os.RWF_NOWAIT) == 1
    except (AttributeError, OSError):
        return False


class DiskMeter:
    """How fast a disk gives what several threads read from it, and what that costs the CPU.

    Of what was read, in parts of `ENOUGH` bytes, the median counts: for a part the threads may have
    waited for a core and not for the disk, and another came from a cache that does not tell.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads = 0
        self._bytes = 0
        self._since = self._seconds = self._cpu_seconds = 0.0
        self._part = (0, 0.0)  # bytes and seconds at its beginning
        self._parts: list[float] = []  # bytes a second

    @contextmanager
    def reading(self, size: int) -> Iterator[None]:
        """A thread reads so many bytes that are not in the system's cache."""
        worked = time.thread_time()
        with self._lock:
            if not self._threads:
                self._since = time.perf_counter()
            self._threads += 1
        try:
            yield
        finally:
            worked = time.thread_time() - worked
            with self._lock:
                now = time.perf_counter()
                self._seconds += now - self._since
                self._since = now
                self._threads -= 1
                self._bytes += size
                self._cpu_seconds += worked
                self._end_part()

    def _end_part(self) -> None:
        began, since = self._part
        if self._bytes - began >= ENOUGH and self._seconds > since:
            self._parts.append((self._bytes - began) / (self._seconds - since))
            self._part = self._bytes, self._seconds

    @property
    def rates(self) -> dict[str, float]:
        """What it has shown, by the names in Rates; none where too little was read to say."""
        with self._lock:
            if not self._parts:
                return {}
            reading = self._cpu_seconds / self._bytes
            return {"disk": statistics.median(self._parts), "reading": reading}
