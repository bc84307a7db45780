"""An update beside what is here: the old files stay and run until every new one is proven.

The new files wait in a folder that is laid out like the model's own and has a record of its own.
When none is missing, that folder gets another name in one step; from then on its files take the
places of the old ones, and whoever finds it, after a crash, goes on with that.
"""

import shutil
from pathlib import Path

from qwen_image_tool.store.links import delete, move
from qwen_image_tool.store.record import (
    PRIVATE,
    Kept,
    Record,
    read_record,
    sync_folder,
    write_record,
)

COMING, READY = f"{PRIVATE}/coming", f"{PRIVATE}/ready"  # in a model's folder


def stage(folder: Path) -> Path:
    """Where the new files of an update wait. It is named as the model's folder is."""
    return folder / COMING / folder.name


def changes(old: Record, new: Record) -> tuple[Kept, ...]:
    """Files of `new` that `old` does not have, or not surely with that content."""
    had = {file.path: file.identity for file in old.files}
    return tuple(f for f in new.files if not f.identity or had.get(f.path) != f.identity)


def begin(folder: Path, new: Record) -> None:
    """What an earlier update fetched stays as far as it is in the new one."""
    place = stage(folder)
    if earlier := read_record(place):
        for file in changes(new, earlier):
            delete(place / file.path)
    write_record(place, new)


def discard(folder: Path) -> None:
    """Give up an update that is not ready."""
    shutil.rmtree(folder / COMING, ignore_errors=True)


def put_in_place(folder: Path) -> None:
    """Every new file is proven: let them take the places of the old ones."""
    (folder / COMING).replace(folder / READY)
    finish(folder)


def finish(folder: Path) -> None:
    """Go on with what `put_in_place` began, if anything. Raises OSError."""
    place = folder / READY / folder.name
    new = read_record(place)
    if new is None:
        return
    old = read_record(folder) or Record(model=new.model)
    for file in changes(old, new):
        move(place / file.path, folder / file.path)
    for parent in {(folder / file.path).parent for file in new.files}:
        sync_folder(parent)
    paths = {file.path for file in new.files}
    for file in old.files:
        if file.path not in paths:
            delete(folder / file.path)
    write_record(folder, new)
    shutil.rmtree(folder / READY, ignore_errors=True)


def unfinished(folder: Path) -> tuple[Kept, ...]:
    """Files that another content is ready for, of an update that was stopped at its last step."""
    new = read_record(folder / READY / folder.name)
    return changes(read_record(folder) or Record(model=new.model), new) if new else ()
