"""The files of Python's libraries, read all at once before they are imported.

From a cold disk an import fetches thousands of small files one after the other; beside the weights,
which keep the disk busy, each of them waits for its turn.
"""

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from qwen_image_tool.files import is_cached, replace_file

READERS = 8  # threads: small files keep a disk waiting
PIECE = 8 << 20  # bytes of one read
USED = 0.5  # of a shared library: one that is used less is left to the system


class LibraryFiles:
    """The files that an import read the last time, kept in the file `path`; another list for other
    `versions`. Only Linux tells what is in its cache: elsewhere no list is kept."""

    def __init__(self, path: Path, versions: Mapping[str, str]) -> None:
        self._path, self._versions = path, dict(versions)

    def read(self) -> None:
        """Bring them into the system's cache of files, unless the largest is there already."""
        files = self._known()
        if not files or _is_there(files[0]):
            return
        with ThreadPoolExecutor(READERS, thread_name_prefix="libraries") as pool:
            list(pool.map(_read_through, files))

    def remember(self) -> None:
        """That they are those which this process has loaded by now."""
        if self._known() or not hasattr(os, "RWF_NOWAIT"):
            return
        files = sorted(_modules() | _shared_libraries(), key=lambda file: -file.stat().st_size)
        kept = {"versions": self._versions, "files": [str(file) for file in files]}
        with contextlib.suppress(OSError):
            replace_file(self._path, json.dumps(kept, indent=0).encode())

    def _known(self) -> list[Path]:
        """The largest first; none where none were kept for these versions."""
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            return [*map(Path, kept["files"])] if kept["versions"] == self._versions else []
        except (OSError, ValueError, TypeError, KeyError):
            return []


def _modules() -> set[Path]:
    """What Python read of each module: its compiled form, where there is one."""
    found = set()
    for module in list(sys.modules.values()):
        names = (getattr(module, "__cached__", None), getattr(module, "__file__", None))
        files = (Path(name) for name in names if isinstance(name, str))
        found |= set(itertools.islice((file for file in files if file.is_file()), 1))
    return found


def _shared_libraries() -> set[Path]:
    """Those that are used for the most part."""
    try:
        maps = psutil.Process().memory_maps()
    except (AttributeError, psutil.Error):  # macOS has none
        return set()
    files = ((Path(each.path), each.rss) for each in maps)
    return {file for file, used in files if file.is_file() and used >= USED * file.stat().st_size}


def _is_there(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return is_cached(file.fileno(), 0)
    except OSError:
        return False


def _read_through(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
        while file.read(PIECE):
            pass
