"""The files of Python's libraries, read many at once while they are imported.

From a cold disk an import fetches thousands of small files one after the other; beside the weights,
which keep the disk busy, each of them waits for its turn.
"""

import contextlib
import itertools
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil

from qwen_image_tool.files import is_cached, replace_file

READERS = 32  # threads: small files keep a disk waiting
PIECE = 8 << 20  # bytes of one read
USED = 0.5  # of a shared library: one that is used less is left to the system


class LibraryFiles:
    """The files that an import read the last time, kept in the file `path`; another list for other
    `versions`, another Python and another folder of its packages. Only Linux tells what is in its
    cache: elsewhere no list is kept."""

    def __init__(self, path: Path, versions: Mapping[str, str]) -> None:
        self._path = path
        self._versions = {**versions, "python": sys.version, "packages": sys.prefix}

    @contextmanager
    def read(self) -> Iterator[None]:
        """While the block runs, bring them into the system's cache of files, in the order in which
        they were imported: an import in the block finds them there."""
        ended = threading.Event()
        pool = ThreadPoolExecutor(READERS, thread_name_prefix="libraries")
        for file in self._known():
            pool.submit(_read_through, file, ended)
        try:
            yield
        finally:
            ended.set()
            pool.shutdown(cancel_futures=True)

    def remember(self) -> None:
        """That they are those which this process has loaded by now."""
        if self._known() or not hasattr(os, "RWF_NOWAIT"):
            return
        files = dict.fromkeys((*_shared_libraries(), *_modules()))
        kept = {"versions": self._versions, "files": [str(file) for file in files]}
        with contextlib.suppress(OSError):
            replace_file(self._path, json.dumps(kept, indent=0).encode())

    def _known(self) -> list[Path]:
        """None where none were kept for these versions."""
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            return [*map(Path, kept["files"])] if kept["versions"] == self._versions else []
        except (OSError, ValueError, TypeError, KeyError):
            return []


def _modules() -> Iterator[Path]:
    """What Python read of each module: its compiled form, where there is one."""
    for module in list(sys.modules.values()):
        names = (getattr(module, "__cached__", None), getattr(module, "__file__", None))
        files = (Path(name) for name in names if isinstance(name, str))
        yield from itertools.islice((file for file in files if file.is_file()), 1)


def _shared_libraries() -> list[Path]:
    """Those that are used for the most part."""
    try:
        maps = psutil.Process().memory_maps()
    except (AttributeError, psutil.Error):  # macOS has none
        return []
    files = ((Path(each.path), each.rss) for each in maps)
    return [file for file, used in files if file.is_file() and used >= USED * file.stat().st_size]


def _read_through(path: Path, ended: threading.Event) -> None:
    """Until it `ended`: the largest have a gigabyte."""
    with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
        if not is_cached(file.fileno(), 0):
            while not ended.is_set() and file.read(PIECE):
                pass
