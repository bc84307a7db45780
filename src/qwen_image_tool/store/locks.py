"""One process at a time changes a model's folder, and another one may ask it to pause."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from qwen_image_tool.errors import DownloadFailed
from qwen_image_tool.store.download import Control
from qwen_image_tool.store.record import PRIVATE

PAUSE_POLL = 0.3  # seconds
LOCK, PAUSE = f"{PRIVATE}/lock", f"{PRIVATE}/pause"  # in a model's folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time changes a model; a killed one's lock is void. Raises DownloadFailed
    where another one does, and where what is done within can't be written."""
    with writing(folder):
        (folder / PRIVATE).mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise DownloadFailed(
                "locked",
                f"Another process is working on {folder}.",
                "Wait for it, or stop it with `qit models pause`.",
            ) from None
        try:
            yield
        finally:
            lock.release()


def is_locked(folder: Path) -> bool:
    """Whether a process changes the model now."""
    path = folder / LOCK
    if not path.exists():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def ask_to_pause(folder: Path) -> None:
    """What works in `folder` stops within a second or so, and keeps what came."""
    (folder / PAUSE).touch()


@contextmanager
def pausable(folder: Path, control: Control) -> Iterator[None]:
    """Pause when another process leaves the sign to."""
    sign = folder / PAUSE
    sign.unlink(missing_ok=True)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(PAUSE_POLL):
            if sign.exists():
                control.pause()
                return

    watcher = threading.Thread(target=watch, name="pause", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        sign.unlink(missing_ok=True)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raises DownloadFailed where `folder` can't be written."""
    try:
        yield
    except OSError as error:
        raise DownloadFailed(
            "not writable",
            f"{error.filename or folder} can't be written ({error.strerror}).",
            "Check who may write there, or set `models` in the config file.",
        ) from error
