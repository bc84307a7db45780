"""A model's weights in the system's cache of files before they are loaded: the disk works while
Python imports its libraries, and while what was read is computed with."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from qwen_image_tool.errors import ToolError
from qwen_image_tool.files import DiskMeter, is_cached
from qwen_image_tool.store.headers import read_header
from qwen_image_tool.store.links import weight_files

PIECE = 32 << 20  # bytes of one read: between two, a thread waits for the one that imports
READERS = 2  # threads; more do not raise an NVMe disk's rate
SHARE = 0.5  # of the RAM that is available: what is loaded has to go there as well
Piece = tuple[Path, int, int]  # file, first byte, bytes


@dataclass(frozen=True)
class Wanted:
    """The weights in `folder` whose names have `part` in them, and not `without`, if given."""

    folder: Path
    part: str = ""
    without: str = ""

    def has(self, name: str) -> bool:
        return self.part in name and not (self.without and self.without in name)


@contextmanager
def read_ahead(components: Sequence[Wanted], disk: DiskMeter) -> Iterator[None]:
    """While the block runs, read these weights in their order, until they fill half of the RAM that
    is available. What can't be read is left to the loader, which says so."""
    ended, lock = threading.Event(), threading.Lock()
    waiting = pieces(components, int(psutil.virtual_memory().available * SHARE))

    def read() -> None:
        buffer = memoryview(bytearray(PIECE))
        while not ended.is_set():
            with lock:
                piece = next(waiting, None)
            if piece is None:
                return
            _read(piece, buffer, disk)

    pool = ThreadPoolExecutor(READERS, thread_name_prefix="ahead")
    for _ in range(READERS):
        pool.submit(read)
    try:
        yield
    finally:
        ended.set()
        pool.shutdown()


def pieces(components: Sequence[Wanted], limit: int) -> Iterator[Piece]:
    """These weights, piece by piece, of no more than `limit` bytes."""
    left = limit
    for wanted in components:
        for file in _files(wanted.folder):
            for start, end in _spans(file, wanted):
                for at in range(start, end, PIECE):
                    size = min(PIECE, end - at)
                    left -= size
                    if left < 0:
                        return
                    yield file, at, size


def _files(folder: Path) -> list[Path]:
    return [*weight_files(folder).values()] if folder.is_dir() else []


def _spans(file: Path, wanted: Wanted) -> list[tuple[int, int]]:
    """First byte, and one past the last, of what lies together."""
    try:
        tensors = read_header(file).tensors
    except (OSError, ToolError):
        return []
    places = sorted((t.offset, t.bytes) for name, t in tensors.items() if wanted.has(name))
    found: list[tuple[int, int]] = []
    for start, size in places:
        if found and found[-1][1] == start:
            found[-1] = found[-1][0], start + size
        else:
            found.append((start, start + size))
    return found


def _read(piece: Piece, buffer: memoryview, disk: DiskMeter) -> None:
    path, start, size = piece
    try:
        with path.open("rb", buffering=0) as file:
            # Its last byte: the system itself reads on, past the piece before and past the header
            if is_cached(file.fileno(), start + size - 1):
                return
            file.seek(start)
            with disk.reading(size):
                file.readinto(buffer[:size])
    except OSError:
        return
