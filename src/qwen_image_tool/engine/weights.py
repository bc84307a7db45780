"""Weights from files: safetensors shards opened once, tensors read by threads into their place.

A block's weights are one packed buffer (a slab): one copy moves a block, and a module's parameters
are views of it. File format: https://github.com/huggingface/safetensors (8 bytes of header length,
a JSON header, then the data).
"""

import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwen_image_tool.errors import Cancelled, ModelMissing, unless_memory
from qwen_image_tool.files import DiskMeter, is_cached
from qwen_image_tool.store.formats import check_dtype, model_keys
from qwen_image_tool.store.links import content, weight_files

ALIGNMENT = 256  # bytes; what CUDA's vectorised loads and cuBLAS ask of a tensor's start
PIECE = 16 << 20  # bytes of one read: large enough for a disk, small enough to cancel
READERS = 8  # threads; more do not raise an NVMe disk's rate
MAX_HEADER = 100 << 20  # bytes, as in the safetensors library
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
AGAIN = "Download the model again."


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies: `offset` and `bytes` count from the start of its file."""

    name: str
    file: Path
    offset: int
    bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def row(self, number: int) -> "Stored":
        """Row `number` of a matrix. Raises ModelMissing where it has none."""
        if not 0 <= number < self.shape[0]:
            raise ModelMissing(f"{self.file}: {self.name} has no row {number}.", AGAIN)
        size = self.bytes // self.shape[0]
        return replace(self, offset=self.offset + number * size, bytes=size, shape=self.shape[1:])

    def share(self, name: str, number: int, count: int) -> "Stored":
        """Share `number` of the rows, of `count` equal ones, as the tensor `name`."""
        size = self.bytes // count
        shape = (*(rows // count for rows in self.shape[:1]), *self.shape[1:])
        return replace(self, name=name, offset=self.offset + number * size, bytes=size, shape=shape)


class Checkpoint:
    """The tensors of one component's folder under diffusers' names, also where its file is laid out
    as ComfyUI's are. Headers are read and checked; no tensor is.

    Raises ModelMissing that names the file: a shard that is not there, one cut short, a header that
    lies outside its file, an index that names a tensor which no shard has.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        stored: dict[str, Stored] = {}
        indexes = sorted(folder.glob("*.safetensors.index.json"))
        wanted = _read_index(indexes[0]) if indexes else {}
        files = {content(folder / name) for name in wanted.values()}
        files = files or set(weight_files(folder).values())
        if not files:
            raise ModelMissing(f"There are no weights in {folder}.", AGAIN)
        for file in sorted(files):
            stored |= {tensor.name: tensor for tensor in _read_header(file)}
        lost = sorted(set(wanted) - set(stored))
        if lost:
            raise ModelMissing(f"{folder}: the shards have no tensor {lost[0]}.", AGAIN)
        self.tensors = {
            name: stored[share.key].share(name, share.number, share.count)
            for name, share in model_keys(stored).items()
        }

    def __getitem__(self, name: str) -> Stored:
        try:
            return self.tensors[name]
        except KeyError:
            raise ModelMissing(f"{self.folder} has no tensor {name}.", AGAIN) from None

    def check(self, name: str, parameter: torch.Tensor) -> Stored:
        """The tensor that fills `parameter`. Raises ModelMissing where their shapes differ,
        ModelUnsupported where it is stored as what this version can't compute from."""
        stored = self[name]
        check_dtype(stored.file, name, NAMES[stored.dtype])
        if stored.shape != tuple(parameter.shape):
            raise ModelMissing(
                f"{stored.file}: {name} has the shape {list(stored.shape)}, and the model needs"
                f" {list(parameter.shape)}.",
                "These weights belong to another model.",
            )
        return stored


@dataclass(frozen=True)
class Place:
    """Where one parameter lies in a slab: `offset` in bytes."""

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Layout:
    """How a module's parameters are packed; the same for every block of a model."""

    places: tuple[Place, ...]
    bytes: int

    @classmethod
    def of(cls, module: nn.Module, dtype: torch.dtype) -> "Layout":
        """Pack every parameter of `module` (which may be on the meta device) as `dtype`."""
        places, offset = [], 0
        for name, parameter in module.named_parameters():
            places.append(Place(name, offset, tuple(parameter.shape), dtype))
            size = parameter.numel() * dtype.itemsize
            offset += -(-size // ALIGNMENT) * ALIGNMENT
        return cls(tuple(places), offset)

    def view(self, slab: torch.Tensor, place: Place) -> torch.Tensor:
        """The parameter at `place` of `slab`, a uint8 vector of `bytes`."""
        size = math.prod(place.shape) * place.dtype.itemsize
        return slab[place.offset : place.offset + size].view(place.dtype).view(place.shape)

    def stored(self, checkpoint: Checkpoint, prefix: str) -> list[Stored]:
        """Where the parameters of the module that `prefix` names are, in the order of `places`."""
        shapes = [torch.empty(place.shape, device="meta") for place in self.places]
        return [
            checkpoint.check(prefix + place.name, shape)
            for place, shape in zip(self.places, shapes, strict=True)
        ]

    def attach(self, module: nn.Module, slab: torch.Tensor) -> None:
        """Make the module's parameters views of `slab`, on the slab's device."""
        for place in self.places:
            set_parameter(module, place.name, self.view(slab, place))

    def reads(
        self, checkpoint: Checkpoint, prefix: str, slab: torch.Tensor
    ) -> list[tuple[Stored, torch.Tensor]]:
        """What has to be read to fill `slab` with the module that `prefix` names."""
        views = [self.view(slab, place) for place in self.places]
        return list(zip(self.stored(checkpoint, prefix), views, strict=True))


def read(
    pairs: Iterable[tuple[Stored, torch.Tensor]],
    done: Callable[[int], None] = lambda _: None,
    is_cancelled: Callable[[], bool] = lambda: False,
    disk: DiskMeter | None = None,
) -> None:
    """Fill each host tensor of `pairs` from its file, converted where the dtypes differ.

    `done(bytes)` is called after each piece, from the reading threads. `disk` is told what was not
    in the system's cache. Raises ModelMissing where a
    file ends too early or can't be read, Cancelled within a piece.
    """

    @torch.inference_mode()  # a thread's own state; what is filled may have been made in it
    def fill(files: _Files, stored: Stored, tensor: torch.Tensor, start: int) -> None:
        if is_cancelled():
            raise Cancelled("Stopped.", "Nothing was written.")
        if stored.dtype == tensor.dtype:
            size = min(PIECE, stored.bytes - start)
            files.read_into(stored, start, _bytes_of(tensor)[start : start + size])
        else:
            size = stored.bytes
            scratch = torch.empty(stored.shape, dtype=stored.dtype)
            files.read_into(stored, 0, _bytes_of(scratch))
            tensor.copy_(scratch)
        done(size)

    with _Files(disk) as files:
        pool = ThreadPoolExecutor(READERS, thread_name_prefix="weights")
        try:
            tasks = []
            for stored, tensor in pairs:
                whole = stored.dtype != tensor.dtype or stored.bytes == 0
                starts = [0] if whole else range(0, stored.bytes, PIECE)
                tasks += [pool.submit(fill, files, stored, tensor, start) for start in starts]
            finished, _ = wait(tasks, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, or Ctrl-C, nothing more is read
    for task in finished:
        task.result()


class Reader:
    """Reads the weights that a run needs, from any thread: counts their bytes, and ends with
    Cancelled when the run is. `disk`: see `read`."""

    def __init__(
        self, is_cancelled: Callable[[], bool] = lambda: False, disk: DiskMeter | None = None
    ) -> None:
        self.is_cancelled = is_cancelled
        self._disk = disk
        self.expected = 0
        self.done = 0
        self._lock = threading.Lock()

    def expect(self, count: int) -> None:
        """More bytes are to be read."""
        with self._lock:
            self.expected += count

    def __call__(
        self,
        pairs: Iterable[tuple[Stored, torch.Tensor]],
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        """See `read`. Ends with Cancelled also when nobody needs them any more: `is_over()`."""
        read(pairs, self._count, lambda: self.is_cancelled() or is_over(), self._disk)

    def check(self) -> None:
        """Raises Cancelled where the run is."""
        if self.is_cancelled():
            raise Cancelled("Stopped.", "Nothing was written.")

    def _count(self, size: int) -> None:
        with self._lock:
            self.done += size


class _Files:
    """Open files for positional reads; on Windows, which has none, a file for each thread."""

    def __init__(self, disk: DiskMeter | None = None) -> None:
        self._disk = disk
        self._lock = threading.Lock()
        self._open: dict[tuple[Path, int], Any] = {}

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._open.values():
            handle.close()

    def read_into(self, stored: Stored, start: int, target: memoryview) -> None:
        offset = stored.offset + start
        try:
            with self._metered(stored.file, offset, len(target)):
                count = self._read(stored.file, offset, target)
        except OSError as error:
            unless_memory(error)
            raise ModelMissing(f"{stored.file} can't be read: {error}.", AGAIN) from error
        if count < len(target):
            raise ModelMissing(f"{stored.file} ends too early, in {stored.name}.", AGAIN)

    def _metered(self, path: Path, offset: int, size: int) -> AbstractContextManager[None]:
        last = offset + size - 1
        if self._disk is None or is_cached(self._handle(path).fileno(), last):
            return nullcontext()
        return self._disk.reading(size)

    def _read(self, path: Path, offset: int, target: memoryview) -> int:
        total = 0
        while total < len(target):
            if hasattr(os, "preadv"):
                got = os.preadv(self._handle(path).fileno(), [target[total:]], offset + total)
            else:
                handle = self._handle(path)
                handle.seek(offset + total)
                got = handle.readinto(target[total:])
            if not got:
                break
            total += got
        return total

    def _handle(self, path: Path) -> Any:
        thread = 0 if hasattr(os, "preadv") else threading.get_ident()
        with self._lock:
            if (path, thread) not in self._open:
                self._open[path, thread] = path.open("rb", buffering=0)
            return self._open[path, thread]


@contextmanager
def no_weights() -> Iterator[None]:
    """Modules made inside have their parameters on the meta device; buffers and tables are real."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        yield


def set_parameter(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put `tensor` where the parameter `name` (dotted) stands."""
    *path, leaf = name.split(".")
    for part in path:
        module = getattr(module, part)
    module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat = tensor.view(-1).view(torch.uint8) if tensor.dim() else tensor.view(1).view(torch.uint8)
    array: Any = flat.numpy()
    return memoryview(array)


def _read_index(path: Path) -> dict[str, str]:
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(tensor): Path(file).name for tensor, file in names.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        unless_memory(error)
        raise ModelMissing(f"{path} can't be read: {error!r}.", AGAIN) from error


def _read_header(path: Path) -> list[Stored]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise ValueError("its header is larger than the file")
            header = json.loads(file.read(length))
        start = 8 + length
        return [
            _stored(name, path, entry, start, size)
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except FileNotFoundError:
        raise ModelMissing(f"The file {path} is missing.", AGAIN) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        unless_memory(error)
        raise ModelMissing(f"{path} is damaged: {error}.", AGAIN) from error


def _stored(name: str, path: Path, entry: Any, start: int, size: int) -> Stored:
    begin, end = entry["data_offsets"]
    shape = tuple(int(side) for side in entry["shape"])
    dtype = DTYPES[entry["dtype"]]
    if not 0 <= begin <= end or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has a wrong size")
    if start + end > size:
        raise ValueError(f"it ends too early, before {name}")
    return Stored(name, path, start + begin, end - begin, dtype, shape)
