"""A model's weights in the system's cache of files before they are loaded: the disk works while
Python imports its libraries, and while what was read is computed with."""

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil

from qwen_image_tool.store.links import weight_files

PIECE = 8 << 20  # bytes of one read: soon done when the reading is to end
READERS = 2  # threads; more do not raise an NVMe disk's rate
SHARE = 0.5  # of the RAM that is available: what is loaded has to go there as well
Piece = tuple[Path, int]


@contextmanager
def read_ahead(components: Sequence[Path]) -> Iterator[None]:
    """While the block runs, read the weights in these folders in their order, until they fill half
    of the RAM that is available. What can't be read is left to the loader, which says so."""
    ended, lock = threading.Event(), threading.Lock()
    waiting = pieces(components, int(psutil.virtual_memory().available * SHARE))

    def read() -> None:
        buffer = memoryview(bytearray(PIECE))
        while not ended.is_set():
            with lock:
                piece = next(waiting, None)
            if piece is None:
                return
            _read(piece, buffer)

    pool = ThreadPoolExecutor(READERS, thread_name_prefix="ahead")
    for _ in range(READERS):
        pool.submit(read)
    try:
        yield
    finally:
        ended.set()
        pool.shutdown()


def pieces(components: Sequence[Path], limit: int) -> Iterator[Piece]:
    """The weight files of these folders, piece by piece, of no more than `limit` bytes."""
    files = [file for folder in components if folder.is_dir() for file in _files(folder)]
    left = limit
    for file, size in files:
        for start in range(0, size, PIECE):
            left -= min(PIECE, size - start)
            if left < 0:
                return
            yield file, start


def _files(folder: Path) -> list[tuple[Path, int]]:
    found = weight_files(folder).values()
    return [(file, file.stat().st_size) for file in found if file.is_file()]


def _read(piece: Piece, buffer: memoryview) -> None:
    path, start = piece
    try:
        with path.open("rb", buffering=0) as file:
            if _is_cached(file.fileno(), start):
                return
            file.seek(start)
            file.readinto(buffer)
    except OSError:
        return


def _is_cached(file: int, start: int) -> bool:
    """Whether the piece from `start` on is there already; only Linux tells."""
    try:
        return os.preadv(file, [bytearray(1)], start, os.RWF_NOWAIT) == 1
    except (AttributeError, OSError):
        return False
