"""The content of another file under a name of ours, without a second copy.

A hard link where both lie on one volume. Else, for files of other programs, a symbolic link; where
the system allows none (Windows, for most people), a note that says where the file lies, which
`content` follows. Ours are not linked to that way: they may be deleted.
"""

import os
import stat
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from qwen_image_tool.store.headers import SUFFIXES

NOTE = ".where"  # what the name of a note ends in


def content(path: Path) -> Path:
    """Where the content of `path` lies: there, or where a note in its place says."""
    if path.exists():
        return path
    try:
        named = Path(_note(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return path
    is_other = named.exists() and not named.is_file()  # a pipe or a device is never read
    return path if is_other else named


def size_of(path: Path) -> int:
    """Bytes of the content; -1 where there is none."""
    try:
        return content(path).stat().st_size
    except OSError:
        return -1


def weight_files(folder: Path) -> dict[str, Path]:
    """The weight files of a component by name, and where their content lies."""
    names = sorted({path.name.removesuffix(NOTE) for path in folder.iterdir()})
    return {name: content(folder / name) for name in names if Path(name).suffix in SUFFIXES}


def link(source: Path, own: bool, target: Path, partial: Path, by_note: bool = False) -> bool:
    """Give `target` the content of `source`, `own`: a file of ours; False where that takes a copy.
    `partial` is a name on the target's volume that is free. `by_note`: those who read `target`
    follow notes."""
    for folder in (target.parent, partial.parent):
        folder.mkdir(parents=True, exist_ok=True)
    source = source.resolve()
    if target.exists() and target.samefile(source):
        return True
    for make in (os.link,) if own else (os.link, os.symlink):
        partial.unlink(missing_ok=True)
        try:
            make(source, partial)
        except OSError:
            continue
        partial.replace(target)
        _note(target).unlink(missing_ok=True)
        return True
    if own or not by_note:
        return False
    partial.write_text(str(source), encoding="utf-8")
    partial.replace(_note(target))
    return True


def delete(path: Path) -> int:
    """Delete what has this name, but nothing that it leads to; returns the bytes that became free:
    none where the content has another name."""
    _note(path).unlink(missing_ok=True)
    try:
        found = path.lstat()
    except FileNotFoundError:
        return 0
    path.unlink()
    return found.st_size if found.st_nlink == 1 and stat.S_ISREG(found.st_mode) else 0


def move(source: Path, target: Path) -> None:
    """Give `target` what `source` is: a file, a link or a note; nothing, where it was moved before.
    Both lie on one volume."""
    for one, place in zip(names(source), names(target), strict=True):
        if one.exists() or one.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            one.replace(place)
            for other in {*names(target)} - {place}:
                other.unlink(missing_ok=True)


def freed_by(paths: Iterable[Path]) -> int:
    """Bytes that become free when all these names are deleted."""
    contents: dict[tuple[int, int], list[os.stat_result]] = defaultdict(list)
    for path in paths:
        try:
            found = path.lstat()
        except OSError:  # a note stands in its place, or it is gone already
            continue
        if stat.S_ISREG(found.st_mode):
            contents[found.st_dev, found.st_ino].append(found)
    whole = (names for names in contents.values() if names[0].st_nlink == len(names))
    return sum(names[0].st_size for names in whole)


def names(path: Path) -> tuple[Path, Path]:
    """Of the file and of a note in its place."""
    return path, _note(path)


def _note(path: Path) -> Path:
    return path.with_name(path.name + NOTE)
