"""Is a model whole? Quick: names, sizes, headers, indexes. Full: every byte's hash."""

import json
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_image_tool.errors import Cancelled, FaultKind, ModelBroken
from qwen_image_tool.store import updates
from qwen_image_tool.store.headers import Header, read_header
from qwen_image_tool.store.links import content, weight_files
from qwen_image_tool.store.patience import Check
from qwen_image_tool.store.record import (
    VARIANTS,
    Kept,
    Record,
    digest_file,
    partial_path,
    transformer_folder,
)
from qwen_image_tool.types import Event, Value, VerifyProgress

MAX_JSON = 32 << 20  # bytes; a tokenizer's file has 11 MB
REPORT_EVERY = 64 << 20  # bytes between two events
CONFIGS = {  # of the components without weights
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
    "processor": "tokenizer_config.json",  # the part of it that is read
}
# Of a tokenizer, which without them makes nothing of a prompt, and says nothing
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
PAGE = 4096  # bytes that a disk is written by


class Fault(Value):
    """A file that is not what was published, and how."""

    path: str
    kind: FaultKind
    message: str


def quick(folder: Path, record: Record | None, components: Iterable[str]) -> tuple[Fault, ...]:
    """Faults that show without reading a tensor: in well under a second for any model.

    Without a record (a folder that somebody put there) the files are checked against their own
    headers and indexes alone.
    """
    parts = read_components(folder, record, components)
    return *faults_of(folder, record, parts), *_absent(folder, record, parts, components)


def _absent(
    folder: Path, record: Record | None, parts: dict[str, "Component"], components: Iterable[str]
) -> Iterable[Fault]:
    """Components of which nothing is here, nor in the record, whose files `_sizes` names."""
    for name in components:
        places = [name, *(p for p in parts if name == "transformer" and p.startswith(VARIANTS))]
        imported = name == "transformer" and record and record.imported
        recorded = record and any(record.within(place) for place in places)
        if not imported and not recorded and not any(_is_there(name, parts.get(p)) for p in places):
            message = f"The component {name!r} is missing: {folder / name} does not hold it."
            yield Fault(path=name, kind="missing", message=message)


def _is_there(name: str, part: "Component | None") -> bool:
    return part is not None and bool(name in CONFIGS or part.weights or part.faults)


def faults_of(
    folder: Path, record: Record | None, parts: dict[str, "Component"]
) -> tuple[Fault, ...]:
    """Like `quick`, of components that have been read."""
    if unfinished := updates.unfinished(folder):
        return tuple(_not_updated(folder, file) for file in unfinished)
    faults = {fault.path: fault for fault in (_sizes(folder, record) if record else ())}
    for part in parts.values():
        for fault in part.faults:
            if fault.kind == "swapped":  # says more than that the size is another
                faults[fault.path] = fault
            faults.setdefault(fault.path, fault)
    return tuple(faults.values())


def _not_updated(folder: Path, file: Kept) -> Fault:
    message = f"The file {folder / file.path} is not yet that of the update which was begun."
    return Fault(path=file.path, kind="interrupted", message=message)


@dataclass(frozen=True)
class Component:
    """A component's folder by its headers. `weights`: the files that it consists of and that are
    sound; `faults`: the others."""

    weights: dict[str, Header]
    faults: tuple[Fault, ...]


def read_components(
    folder: Path, record: Record | None, components: Iterable[str]
) -> dict[str, Component]:
    """The sub-folders `components` that are there, and those of the transformer's variants."""
    variants = [transformer_folder(name) for name in record.variants] if record else []
    return {
        name: _read_component(folder / name, f"{name}/", _recorded(record, name))
        for name in dict.fromkeys((*components, *variants))
        if (folder / name).is_dir()
    }


def _recorded(record: Record | None, place: str) -> set[str]:
    """The names of a sub-folder's weight files, as far as they are known."""
    return {Path(file.path).name for file in record.weights(place)} if record else set()


def _read_component(folder: Path, prefix: str, recorded: set[str]) -> Component:
    """Every weight file has a sound header, and holds the tensors its index says. One that the
    index does not name is not read; where there is no index, all are, so there must be no other
    than those `recorded`."""
    faults: list[Fault] = []
    headers: dict[str, Header] = {}
    files = weight_files(folder)
    for name, file in files.items():
        try:
            headers[name] = read_header(file)
        except ModelBroken as error:
            faults.append(Fault(path=prefix + name, kind=error.kind, message=error.message))
    known = {fault.path for fault in faults}
    named: set[str] = set()
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            shards = _shards(index)
        except ModelBroken as error:
            found = [Fault(path=prefix + index.name, kind=error.kind, message=error.message)]
        else:
            found = _check_shards(folder, shards, headers, prefix)
            named |= set(shards)
        faults += [fault for fault in found if fault.path not in known]
    ours = named or recorded or set(files)
    others = {prefix + name for name in files.keys() - ours}
    faults = [fault for fault in faults if fault.path not in others]
    faults += [_stray(folder, prefix, path) for path in sorted(others) if not named]
    weights = {name: header for name, header in headers.items() if name in ours}
    return Component(weights, tuple(faults))


def _stray(folder: Path, prefix: str, path: str) -> Fault:
    file = folder / path.removeprefix(prefix)
    message = f"The file {file} is no part of the model, and would be read: move it away."
    return Fault(path=path, kind="swapped", message=message)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ModelBroken."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise ModelBroken("unreadable", f"The file {path} is too long.", AGAIN)
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelBroken("missing", f"The file {path} is missing.", AGAIN) from None
    except (ValueError, OSError, RecursionError) as error:
        raise ModelBroken(
            "unreadable", f"The file {path} can't be read ({error}).", AGAIN
        ) from error
    if not isinstance(data, dict):
        raise ModelBroken("unreadable", f"The file {path} is not what it should be.", AGAIN)
    return data


AGAIN = "Download the model again, or give --model a folder that is complete."


def _sizes(folder: Path, record: Record) -> Iterable[Fault]:
    for file in record.files:
        kind, what = _size_fault(folder, file)
        if kind:
            path = content(folder / file.path)
            yield Fault(path=file.path, kind=kind, message=f"The file {path} {what}.")


def _size_fault(folder: Path, file: Kept) -> tuple[FaultKind | None, str]:
    path = content(folder / file.path)
    try:
        size = path.stat().st_size
    except OSError:
        begun = partial_path(folder, file)
        if begun.exists():
            have = begun.stat().st_size
            return "interrupted", f"was not fetched to its end ({have} of {file.size} bytes)"
        return "missing", "is missing"
    if path.is_dir():
        return "swapped", "is a folder, and a file of the model belongs there"
    if size == file.size:
        return None, ""
    if file.is_weights and (kind := _impostor(path)):
        return kind
    kind_of_size: FaultKind = "truncated" if size < file.size else "too long"
    return kind_of_size, f"has {size} bytes, and {file.size} were published"


def _impostor(path: Path) -> tuple[FaultKind, str] | None:
    """A web page, a pointer or zeros in place of weights say so in their first bytes."""
    try:
        read_header(path)
    except ModelBroken as error:
        if error.kind in ("web page", "pointer", "zero-filled"):
            return error.kind, error.message.partition(str(path))[2].strip(" .")
    return None


def _check_shards(
    folder: Path, shards: dict[str, set[str]], headers: dict[str, Header], prefix: str
) -> list[Fault]:
    faults = []
    for name, tensors in shards.items():
        path = content(folder / name)
        if not path.is_file():
            message = f"The file {path} is missing."
            faults.append(Fault(path=prefix + name, kind="missing", message=message))
        elif name in headers and tensors != set(headers[name].tensors):
            faults.append(_wrong_shard(prefix, path, set(headers[name].tensors), shards))
    return faults


def _wrong_shard(prefix: str, path: Path, found: set[str], shards: dict[str, set[str]]) -> Fault:
    """A sound file that is not the one the index means."""
    twin = next((name for name, tensors in shards.items() if tensors == found), "")
    if twin:
        return Fault(
            path=prefix + path.name,
            kind="swapped",
            message=f"The file {path} has the content of {twin}.",
        )
    return Fault(
        path=prefix + path.name,
        kind="index",
        message=f"The file {path} holds other tensors than its index says.",
    )


def _shards(index: Path) -> dict[str, set[str]]:
    """File name -> the tensors it has to hold. Raises ModelBroken; no name leaves the folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelBroken("index", f"The file {index} names no weights.", AGAIN)
    shards: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or ":" in name:
            raise ModelBroken("index", f"The file {index} names a file outside its folder.", AGAIN)
        shards.setdefault(name, set()).add(tensor)
    return shards


def full(
    folder: Path,
    record: Record,
    emit: Callable[[Event], None] = lambda _: None,
    is_cancelled: Callable[[], bool] = lambda: False,
    workers: int | None = None,
) -> tuple[Fault, ...]:
    """Hash every file of the record, on all cores. Raises Cancelled."""
    total = sum(file.size for file in record.files)
    count = Count(record.model, total, emit, check_cancelled(is_cancelled))

    def check(file: Kept) -> Fault | None:
        return _check_hash(folder, file, record, lambda n: count.add(n, file.path))

    largest_first = sorted(record.files, key=lambda file: -file.size)
    with ThreadPoolExecutor(workers or os.cpu_count() or 1, thread_name_prefix="verify") as pool:
        jobs = [pool.submit(check, file) for file in largest_first]
        try:
            return tuple(fault for job in jobs if (fault := job.result()))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def check_cancelled(is_cancelled: Callable[[], bool]) -> Check:
    def check() -> None:
        if is_cancelled():
            raise Cancelled("Stopped.", "Nothing was changed.")

    return check


class Count:
    """Of `total` bytes that are hashed, in several threads; tells `emit` how far it is. `check`
    may raise to end it."""

    def __init__(self, model: str, total: int, emit: Callable[[Event], None], check: Check) -> None:
        self._model, self._total, self._emit, self._check = model, total, emit, check
        self._done = self._said = 0
        self._lock = threading.Lock()

    def add(self, count: int, file: str) -> None:
        self._check()
        with self._lock:
            self._done += count
            if self._done - self._said >= REPORT_EVERY or self._done >= self._total:
                self._said = self._done
                self._emit(
                    VerifyProgress(
                        model=self._model,
                        done_bytes=self._done,
                        total_bytes=self._total,
                        file=file,
                    )
                )


def _check_hash(
    folder: Path, file: Kept, record: Record, progress: Callable[[int], None]
) -> Fault | None:
    kind, what = _size_fault(folder, file)
    path = content(folder / file.path)
    if not kind:
        try:
            digest, zeros = digest_file(path, file, progress)
        except OSError as error:
            kind, what = "unreadable", f"can't be read ({error.strerror})"
        else:
            if digest.agrees:
                return None
            kind, what = _diagnose(path, file, digest.hex, zeros, record)
    return Fault(path=file.path, kind=kind, message=f"The file {path} {what}.")


def _ends_in_zeros(path: Path) -> bool:
    """As after a power cut: the last page was given to the file and never written."""
    with path.open("rb") as file:
        file.seek(-min(PAGE, path.stat().st_size), os.SEEK_END)
        return not file.read().strip(b"\0")


def _diagnose(
    path: Path, file: Kept, found: str, zeros: bool, record: Record
) -> tuple[FaultKind, str]:
    """How a file of the right size came to have the wrong hash."""
    twin = next((other.path for other in record.files if other.identity == found), "")
    if twin:
        return "swapped", f"has the content of {twin}"
    if file.is_weights and (impostor := _impostor(path)):
        return impostor
    if zeros or _ends_in_zeros(path):
        return "zero-filled", "has zeros where bytes were never written"
    return "changed", "has changed: its hash is not the published one"
