"""What a weight file says of itself: the headers of safetensors and GGUF, read within bounds.

No tensor is read. A file may lie in any way: every count, size and offset is checked before it is
used, and reading a header never takes more than 64 MiB.
Sources: https://github.com/huggingface/safetensors#format and
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn

from qwen_image_tool.errors import FaultKind, ModelBroken

MAX_HEADER = 4 << 20  # bytes of safetensors JSON; the largest of the family has 0.3 MB
MAX_GGUF_HEADER = 64 << 20  # bytes walked over, of which little is kept
MAX_TENSORS = 1 << 15
MAX_PAIRS = 1 << 14
MAX_ARRAY = 1 << 20  # strings of a GGUF array: a tokenizer's vocabulary has 152,064
MAX_NAME = 512  # bytes
MAX_TEXT = 4096  # bytes of a metadata text that is kept
MAX_DIMENSIONS = 8
SUFFIXES = (".safetensors", ".gguf")

BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip

# ggml's type number: name, values a block, bytes a block (gguf.constants.GGML_QUANT_SIZES)
GGML = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2),
    26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "B",
    10: "Q",
    11: "q",
    12: "d",
}
_TEXT, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file: `offset` counts bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True)
class Header:
    """What a weight file holds. `metadata` keeps texts and numbers, no lists; `size`: its bytes."""

    container: Literal["safetensors", "gguf"]
    tensors: dict[str, Stored]
    metadata: dict[str, Any]
    size: int


def read_header(path: Path) -> Header:
    """The header of a safetensors or GGUF file, told apart by the file's first bytes.

    Raises ModelBroken: missing, truncated, zero-filled, a web page, or a header that can't be.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            start = file.read(64)
            file.seek(0)
            if start.startswith(b"GGUF"):
                return _gguf(_Bounded(file, path, size))
            if start[8:9] != b"{":
                _known_impostors(start, path)
            return _safetensors(file, path, size)
    except FileNotFoundError:
        raise ModelBroken("missing", f"The file {path} is missing.", AGAIN) from None
    except OSError as error:
        raise ModelBroken(
            "unreadable", f"The file {path} can't be read ({error}).", AGAIN
        ) from error


AGAIN = "`qit models repair` fetches what is broken."


def _broken(kind: FaultKind, path: Path, what: str) -> NoReturn:
    raise ModelBroken(kind, f"The file {path} {what}.", AGAIN)


def _known_impostors(start: bytes, path: Path) -> None:
    if not start:
        _broken("truncated", path, "is empty")
    if not start.strip(b"\0"):
        _broken("zero-filled", path, "is filled with zeros")
    if start.lstrip()[:1] == b"<":
        _broken("web page", path, "is a web page and not weights")
    if start.startswith(b"version https://git-lfs"):
        _broken("pointer", path, "is a Git LFS pointer and not the weights it points to")
    if start.startswith(b"PK\x03\x04") or start[:1] == b"\x80":
        _broken("header", path, "is a pickle, which could run any program; it is not opened")


def _safetensors(file: BinaryIO, path: Path, size: int) -> Header:
    raw_length = file.read(8)
    length = int.from_bytes(raw_length, "little")
    if len(raw_length) < 8:
        _broken("truncated", path, f"ends after {size} bytes")
    if length > MAX_HEADER:
        _broken("header", path, f"is no safetensors file: its header would have {length} bytes")
    raw = file.read(length)
    if len(raw) < length:
        _broken("truncated", path, f"ends after {size} bytes, within its header")
    entries = _parse(raw, path)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        _broken("header", path, "has a header with broken metadata")
    start = 8 + length
    tensors = {name: _entry(entry, start, path) for name, entry in entries.items()}
    _check_layout(tensors, start, size, path)
    return Header("safetensors", tensors, metadata, size)


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    # Each brace and bracket costs far more memory parsed than written
    if raw.count(b"{") > MAX_TENSORS + 2 or raw.count(b"[") > 2 * MAX_TENSORS:
        _broken("header", path, f"names more than {MAX_TENSORS} tensors")
    try:
        entries = json.loads(raw, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError):
        _broken("header", path, "has a header that is not JSON")
    if not isinstance(entries, dict):
        _broken("header", path, "has a header that is no JSON object")
    return entries


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def _entry(entry: Any, start: int, path: Path) -> Stored:
    fields = entry if isinstance(entry, dict) else {}
    dtype = fields.get("dtype")
    shape, offsets = _naturals(fields.get("shape")), _naturals(fields.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS or shape is None or offsets is None:
        _broken("header", path, "describes a tensor in a way that safetensors does not")
    if len(offsets) != 2 or len(shape) > MAX_DIMENSIONS:
        _broken("header", path, "describes a tensor in a way that safetensors does not")
    begin, end = offsets
    if (end - begin) * 8 != _product(shape, path) * BITS[dtype]:
        _broken("header", path, "gives a tensor a place that does not fit its shape")
    return Stored(dtype, tuple(shape), start + begin, end - begin)


def _naturals(values: Any) -> list[int] | None:
    good = isinstance(values, list) and all(type(v) is int and 0 <= v < 2**62 for v in values)
    return values if good else None


def _product(shape: list[int], path: Path) -> int:
    product = math.prod(shape)
    if product >= 2**62:
        _broken("header", path, "describes a tensor larger than any disk")
    return product


def _check_layout(tensors: dict[str, Stored], start: int, size: int, path: Path) -> None:
    """Every byte after the header belongs to one tensor, as safetensors demands."""
    position = start
    for stored in sorted(tensors.values(), key=lambda stored: (stored.offset, stored.bytes)):
        if stored.offset != position:
            _broken("header", path, "has tensors that overlap or leave a hole")
        position += stored.bytes
    if position > size:
        _broken("truncated", path, f"has {size} of {position} bytes")
    if position < size:
        _broken("too long", path, f"has {size} bytes, and its header describes {position}")


class _Bounded:
    """Reads forward in a file; what lies beyond its end or beyond a header's bounds is an error."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self._file, self.path, self.size = file, path, size
        self.position = 0

    def take(self, count: int) -> bytes:
        data = self._file.read(self._within(count))
        self.position += count
        if len(data) < count:
            _broken("truncated", self.path, f"ends after {self.size} bytes, within its header")
        return data

    def skip(self, count: int) -> None:
        self._within(count)
        self.position += count
        self._file.seek(self.position)

    def _within(self, count: int) -> int:
        if self.position + count > self.size:
            _broken("truncated", self.path, f"ends after {self.size} bytes, within its header")
        if self.position + count > MAX_GGUF_HEADER:
            _broken("header", self.path, "has a header that is too long")
        return count

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, limit: int, what: str) -> int:
        value: int = self.number("Q")
        if value > limit:
            _broken("header", self.path, f"would have {value} {what}")
        return value

    def text(self, limit: int) -> str:
        """A text of at most `limit` bytes."""
        data = self.take(self.count(limit, "letters in a name"))
        try:
            return data.decode()
        except UnicodeDecodeError:
            _broken("header", self.path, "has a name that is no text")

    def skip_text(self) -> None:
        self.skip(self.number("Q"))


def _gguf(reader: _Bounded) -> Header:
    reader.skip(4)
    version = reader.number("I")
    if version not in (2, 3):
        _broken("header", reader.path, f"is GGUF of the unknown version {version}")
    count = reader.count(MAX_TENSORS, "tensors")
    pairs = reader.count(MAX_PAIRS, "metadata entries")
    metadata = dict(_gguf_pair(reader) for _ in range(pairs))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment not in (1 << bit for bit in range(17)):
        _broken("header", reader.path, f"aligns its tensors to {alignment!r} bytes")
    described = [_gguf_tensor(reader) for _ in range(count)]
    start = -(-reader.position // alignment) * alignment
    tensors = {
        name: Stored(kept.dtype, kept.shape, start + kept.offset, kept.bytes)
        for name, kept in described
    }
    if len(tensors) < count:
        _broken("header", reader.path, "names a tensor twice")
    _check_gguf_layout(tensors, alignment, reader)
    return Header("gguf", tensors, metadata, reader.size)


def _gguf_pair(reader: _Bounded) -> tuple[str, Any]:
    return reader.text(MAX_NAME), _gguf_value(reader, reader.number("I"))


def _gguf_value(reader: _Bounded, kind: int) -> Any:
    """The value, or None for what is of no use here: long texts and lists."""
    if kind in _SCALARS:
        return reader.number(_SCALARS[kind])
    if kind == _TEXT:
        length = reader.number("Q")
        if length > MAX_TEXT:
            return reader.skip(length)
        return reader.take(length).decode(errors="replace")
    if kind != _ARRAY:
        _broken("header", reader.path, f"has metadata of the unknown type {kind}")
    inner, count = reader.number("I"), reader.number("Q")
    if inner in _SCALARS:
        return reader.skip(count * struct.calcsize("<" + _SCALARS[inner]))
    if inner != _TEXT or count > MAX_ARRAY:
        _broken("header", reader.path, "has a metadata list that can't be")
    for _ in range(count):
        reader.skip_text()
    return None


def _gguf_tensor(reader: _Bounded) -> tuple[str, Stored]:
    name = reader.text(MAX_NAME)
    dimensions = reader.number("I")
    if dimensions > MAX_DIMENSIONS:
        _broken("header", reader.path, f"has a tensor of {dimensions} dimensions")
    shape = [reader.number("Q") for _ in range(dimensions)]
    dtype, values, size = GGML.get(reader.number("I"), ("", 1, 0))
    offset: int = reader.number("Q")
    if not dtype or (shape and shape[0] % values):
        _broken("header", reader.path, f"has the tensor {name!r} in a type that can't be")
    total = _product(shape, reader.path) // values * size
    return name, Stored(dtype, tuple(reversed(shape)), offset, total)


def _check_gguf_layout(tensors: dict[str, Stored], alignment: int, reader: _Bounded) -> None:
    position = 0
    for stored in sorted(tensors.values(), key=lambda stored: (stored.offset, stored.bytes)):
        if stored.offset < position or stored.offset % alignment:
            _broken("header", reader.path, "has tensors that overlap or lie askew")
        position = stored.offset + stored.bytes
    if position > reader.size:
        _broken("truncated", reader.path, f"has {reader.size} of {position} bytes")
