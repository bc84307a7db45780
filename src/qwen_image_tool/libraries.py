"""The files of Python's libraries, read many at once before they are imported.

From a cold disk an import fetches thousands of small files one after the other; beside the weights,
which keep the disk busy, each of them waits for its turn.
"""

import contextlib
import functools
import itertools
import json
import mmap
import os
import sys
import sysconfig
import threading
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from qwen_image_tool.files import is_cached, replace_file

READERS = 16  # threads
PIECE = 1 << 20  # bytes of one read
SAMPLE = 50  # where one in so many is in the system's cache, all are taken to be
Pieces = list[int] | None  # of a file, counted from its start; None: all
Known = Sequence[tuple[Path, Pieces]]


class LibraryFiles:
    """The files that an import reads, of shared libraries the parts, and the folders that it lists,
    kept in the file `path`; another list for other `versions`, another Python and another folder of
    its packages. Only Linux tells what is in its cache: elsewhere no list is kept."""

    def __init__(self, path: Path, versions: Mapping[str, str]) -> None:
        self._path = path
        self._versions = {**versions, "python": sys.version, "packages": sys.prefix}

    @contextmanager
    def imported(self) -> Iterator[None]:
        """What the block imports is in the system's cache of files before it runs. Where nothing is
        known of it yet, what it reads is kept, unless it raises."""
        if known := self._known():
            _bring(known)
            yield
        elif hasattr(os, "RWF_NOWAIT"):
            with _listening() as heard:
                yield
            self._keep(heard)
        else:
            yield

    def _keep(self, heard: Iterable[str]) -> None:
        with contextlib.suppress(OSError):
            files = _shared_libraries()
            for path in (*_of_libraries(heard), *_modules()):
                files.setdefault(str(path), None)
            kept = {"versions": self._versions, "files": files}
            replace_file(self._path, json.dumps(kept, indent=0).encode())

    def _known(self) -> Known:
        """Nothing where none were kept for these versions."""
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            files = kept["files"] if kept["versions"] == self._versions else {}
            return [(Path(path), pieces) for path, pieces in files.items()]
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return []


_listeners: list[dict[str, None]] = []  # what each has heard of, in its order


@contextmanager
def _listening() -> Iterator[Mapping[str, None]]:
    """The files that Python opens in the block, and the folders that it lists. An import also reads
    what is no module, as transformers does with the source of all its models."""
    heard: dict[str, None] = {}
    _listen()
    _listeners.append(heard)
    try:
        yield heard
    finally:
        _listeners[:] = (each for each in _listeners if each is not heard)


def _of_libraries(names: Iterable[str]) -> Iterator[Path]:
    """Those in the folders of Python, of the installed packages, and of others that are imported:
    the current folder, which Python may import from, may hold the models."""
    folders = *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")), *_packages()
    inside = tuple(f"{folder}{os.sep}" for folder in folders)
    paths = (Path(name) for name in list(names) if f"{name}{os.sep}".startswith(inside))
    return (path for path in paths if path.exists())


def _packages() -> Iterator[str]:
    """The folders of those that are imported."""
    for name, module in list(sys.modules.items()):
        if "." not in name:
            yield from (str(folder) for folder in getattr(module, "__path__", ()))


@functools.cache  # Python can't be told to forget a hook
def _listen() -> None:
    sys.addaudithook(_hear)


def _hear(event: str, arguments: tuple[object, ...]) -> None:
    if _listeners and event in ("open", "os.listdir", "os.scandir"):
        path = arguments[0]
        if isinstance(path, str):
            for heard in _listeners:
                heard[path] = None


def _modules() -> Iterator[Path]:
    """What Python read of each module: its compiled form, where there is one."""
    for module in list(sys.modules.values()):
        names = (getattr(module, "__cached__", None), getattr(module, "__file__", None))
        files = (Path(name) for name in names if isinstance(name, str))
        yield from itertools.islice((file for file in files if file.is_file()), 1)


def _shared_libraries() -> dict[str, Pieces]:
    """Of each the pieces that this process has touched. Source: the kernel's pagemap.rst."""
    found: dict[str, set[int]] = {}
    with Path("/proc/self/maps").open() as maps, Path("/proc/self/pagemap").open("rb") as pages:
        for line in maps:
            addresses, _, offset, _, _, *names = line.rstrip("\n").split(maxsplit=5)
            if not names or ".so" not in names[0]:
                continue
            start, end = (int(address, 16) // mmap.PAGESIZE for address in addresses.split("-"))
            pages.seek(start * 8)
            entries = array("Q", pages.read((end - start) * 8))
            touched = (n * mmap.PAGESIZE for n, entry in enumerate(entries) if entry >> 63)
            pieces = {(int(offset, 16) + at) // PIECE for at in touched}
            found.setdefault(names[0], set()).update(pieces)
    return {name: sorted(pieces) for name, pieces in found.items() if Path(name).is_file()}


def _bring(known: Known) -> None:
    if all(_seems_cached(path) for path, _ in known[::SAMPLE]):
        return
    ended = threading.Event()

    def fetch(share: Known) -> None:
        for path, pieces in share:
            _fetch(path, pieces, ended)

    pool = ThreadPoolExecutor(READERS, thread_name_prefix="libraries")
    try:
        for _ in pool.map(fetch, (known[first::READERS] for first in range(READERS))):
            pass
    finally:
        ended.set()
        pool.shutdown()


def _seems_cached(path: Path) -> bool:
    try:
        with path.open("rb", buffering=0) as file:
            return not path.stat().st_size or is_cached(file.fileno(), 0)
    except OSError:  # a folder, or gone
        return True


def _fetch(path: Path, pieces: Pieces, ended: threading.Event) -> None:
    """A file, until it `ended`: the largest have a gigabyte. Or a folder: what an import asks of
    the files in it."""
    if ended.is_set():
        return
    with contextlib.suppress(OSError):
        if path.is_dir():
            for entry in path.iterdir():
                entry.stat()
            return
        size = path.stat().st_size
        with path.open("rb", buffering=0) as file:
            for piece in range(-(-size // PIECE)) if pieces is None else pieces:
                start, end = piece * PIECE, min((piece + 1) * PIECE, size)
                if start < end and not is_cached(file.fileno(), end - 1):
                    file.seek(start)
                    file.read(end - start)
                if ended.is_set():
                    return
