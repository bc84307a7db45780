"""Weights of another program for a model of ours, used where they lie and never changed."""

from collections.abc import Callable
from pathlib import Path

from qwen_image_tool.catalog import Model
from qwen_image_tool.errors import BadRequest, ModelBroken
from qwen_image_tool.store.formats import (
    HINTS,
    WORDS,
    check_model,
    check_taken,
    check_whole,
    recognise,
)
from qwen_image_tool.store.headers import SUFFIXES
from qwen_image_tool.store.links import delete, link, size_of
from qwen_image_tool.store.patience import Check
from qwen_image_tool.store.record import (
    IMPORTED,
    Kept,
    Record,
    digest_file,
    partial_path,
    read_record,
    transformer_folder,
    write_record,
)
from qwen_image_tool.store.verify import Count
from qwen_image_tool.types import Event


def check_importable(path: Path, model: Model) -> None:
    """Raises ModelBroken (also where tensors are missing), ModelUnsupported (can't be read yet) and
    BadRequest (another model's)."""
    found = recognise(path)
    check_taken(found)
    check_model(found, model)
    check_whole(path)


def take(
    path: Path, model: Model, folder: Path, emit: Callable[[Event], None], check: Check
) -> Path:
    """Take an importable file into the model's `folder`: a transformer as a variant, a text encoder
    in place of the published one. What it is, its keys and shapes say.

    It is read once, for its hash. Returns its name in the folder. Raises ModelBroken (can't be
    read), BadRequest where the published part is here, and what `check` does.
    """
    found = recognise(path)
    is_part = found.kind != "transformer"
    place = found.kind if is_part else transformer_folder(IMPORTED + found.storage)
    name = path.name if path.suffix in SUFFIXES else f"{path.name}.{found.container}"
    target = folder / place / name
    before = old = read_record(folder) or Record(model=model.id)
    if not found.unsupported:
        old = _make_way(folder, old, found.kind)
    if any(file.repo for file in old.weights(place)):
        raise BadRequest(
            f"The {WORDS[found.kind]} that {model.name} is published with is here already.",
            "There is nothing to import.",
        )
    file = _hashed(path, target.relative_to(folder), model, emit, check)
    link(path, False, target, partial_path(folder, file), by_note=True)
    files = tuple(f for f in old.files if f not in old.weights(place))
    for earlier in before.files:
        if earlier not in files and earlier.path != file.path:
            delete(folder / earlier.path)
    write_record(folder, old.model_copy(update={"files": (*files, file)}))
    return target


def _hashed(
    path: Path, name: Path, model: Model, emit: Callable[[Event], None], check: Check
) -> Kept:
    """A file of another program as a record has it."""
    size, source = path.stat().st_size, str(path.resolve())
    file = Kept(path=name.as_posix(), repo="", revision="", source=source, size=size)
    count = Count(model.id, size, emit, check)
    try:
        digest, _ = digest_file(path, file, lambda read: count.add(read, file.path))
    except OSError as error:
        raise ModelBroken(
            "unreadable", f"{path} can't be read ({error.strerror}).", HINTS["unreadable"]
        ) from error
    return file.model_copy(update={"sha256": digest.hex})


def _make_way(folder: Path, record: Record, part: str) -> Record:
    """The record without a published part whose weights are not all here: another program's file
    takes their place."""
    published = [file for file in record.weights(part) if file.repo]
    if all(size_of(folder / file.path) == file.size for file in published):
        return record
    gone = [file for file in record.within(part) if file.repo]
    variants = [name for name in record.variants if transformer_folder(name) != part]
    files = [file for file in record.files if file not in gone]
    return Record(model=record.model, variants=tuple(variants), files=tuple(files))
