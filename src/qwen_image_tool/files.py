"""Small files that are replaced whole."""

import os
import secrets
from pathlib import Path


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


def is_cached(file: int, start: int) -> bool:
    """Whether what is at byte `start` of an open file is in the system's cache; only Linux tells,
    elsewhere it seems not to be."""
    try:
        return os.preadv(file, [bytearray(1)], start, os.RWF_NOWAIT) == 1
    except (AttributeError, OSError):
        return False
