"""Header readers against real files and against 10,000 broken ones."""

import contextlib
import json
import random
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qwen_image_tool.errors import ModelBroken, ModelUnsupported
from qwen_image_tool.store.formats import FUSED, PREFIXES, SIGNS, UNREADABLE, describe
from qwen_image_tool.store.headers import MAX_HEADER, Header, Stored, read_header

MIB = 1 << 20


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    tensors = {f"block.{i}.weight": torch.zeros(4, 6, dtype=torch.bfloat16) for i in range(5)}
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf_bytes(tensors: int = 3) -> bytes:
    """A GGUF file as ggml's tools write them: texts, numbers, lists, quantised tensors."""
    pairs = [
        text("general.architecture") + struct.pack("<I", 8) + text("qwen_image"),
        text("general.quantization_version") + struct.pack("<II", 4, 2),
        text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b"),
        text("scores") + struct.pack("<IIQ", 9, 6, 2) + struct.pack("<ff", 1, 2),
    ]
    body, data = b"", b""
    for index in range(tensors):
        body += text(f"block.{index}.weight") + struct.pack("<IQQIQ", 2, 64, 4, 8, len(data))
        data += bytes(4 * 2 * 34).ljust(288, b"\0")
    head = b"GGUF" + struct.pack("<IQQ", 3, tensors, len(pairs)) + b"".join(pairs) + body
    return head.ljust(-(-len(head) // 32) * 32, b"\0") + data


def test_safetensors_as_the_library_writes_them(weights: Path) -> None:
    header = read_header(weights)
    assert header.container == "safetensors"
    assert header.metadata == {"format": "pt"}
    stored = header.tensors["block.3.weight"]
    assert (stored.dtype, stored.shape, stored.bytes) == ("BF16", (4, 6), 48)


def test_gguf(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(gguf_bytes())
    header = read_header(path)
    assert header.container == "gguf"
    assert header.metadata["general.architecture"] == "qwen_image"
    stored = header.tensors["block.2.weight"]
    assert (stored.dtype, stored.shape, stored.bytes) == ("Q8_0", (4, 64), 272)
    assert stored.offset + 288 == path.stat().st_size


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "truncated"),
        (b"\0" * 100, "zero-filled"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"\n <html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer"),
        (b"PK\x03\x04" + b"x" * 100, "header"),
        (b"\x80\x02}q\x00.", "header"),
        (b"\x05\0\0", "truncated"),
        (struct.pack("<Q", 100) + b"{}", "truncated"),
        (struct.pack("<Q", MAX_HEADER + 1) + b"{}", "header"),
        (struct.pack("<Q", 2**63) + b"{}", "header"),
        (struct.pack("<Q", 2) + b"[]", "header"),
        (struct.pack("<Q", 2) + b"{}" + b"more", "too long"),
        (b"GGUF\x03\0\0", "truncated"),
        (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "header"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "header"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "header"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62), "header"),
        (gguf_bytes()[:-200], "truncated"),
    ],
)
def test_what_is_no_weight_file_is_named(tmp_path: Path, data: bytes, kind: str) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(data)
    with pytest.raises(ModelBroken) as caught:
        read_header(path)
    assert caught.value.kind == kind
    assert str(path) in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    "entries",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
        {"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"a": "F32"},
        {"__metadata__": 3},
        {f"{i}": {} for i in range(40_000)},
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, entries: object) -> None:
    raw = json.dumps(entries).encode()
    path = tmp_path / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"data")
    with pytest.raises(ModelBroken):
        read_header(path)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Flip, overwrite, cut, insert or repeat; most of it in the header."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(len(changed), 700) or 1)
        match rng.randrange(6):
            case 0:
                changed[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                changed[at : at + 8] = struct.pack(
                    "<Q", rng.choice([0, 1, 2**31, 2**63, 2**64 - 1])
                )
            case 2:
                del changed[rng.randrange(len(changed) or 1) :]
            case 3:
                changed[at:at] = rng.randbytes(rng.randint(1, 40))
            case 4:
                changed[at : at + 4] = changed[at : at + 4] * rng.randint(2, 50)
            case 5:
                changed[at:at] = rng.choice([b"[", b"{", b'"', b"9", b"-", b"\xff"]) * 2000
    return bytes(changed)


@pytest.mark.parametrize("container", ["safetensors", "gguf"])
def test_5000_mutated_headers(weights: Path, container: str) -> None:
    """An error or a header each time; no crash, no hang, no memory."""
    good = weights.read_bytes() if container == "safetensors" else gguf_bytes()
    rng = random.Random(4)
    path = weights.with_name("mutated.safetensors")
    refused, slowest = 0, 0.0
    tracemalloc.start()
    for _ in range(5000):
        path.write_bytes(mutate(good, rng))
        started = time.thread_time()
        try:
            header = read_header(path)
        except ModelBroken:
            refused += 1
        else:  # the change hit a name, a value or the data: all that is described lies in the file
            size = path.stat().st_size
            assert all(0 <= t.offset <= t.offset + t.bytes <= size for t in header.tensors.values())
            with contextlib.suppress(ModelUnsupported):
                describe(path, header)
        slowest = max(slowest, time.thread_time() - started)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > 3500
    assert peak < 64 * MIB
    assert slowest < 2


def test_5000_headers_of_known_names_and_any_shapes() -> None:
    """Whatever stands behind the names that files are told by: an answer or a refusal."""
    rng = random.Random(5)
    names = [*SIGNS, "txt_norm.weight", "txt_in.text_norm.weight", "token_embd.weight", FUSED]
    names += ["controlnet_blocks.0", "control_img_in.weight", "x.embed_tokens.weight", "lora_a"]
    names += [part for part, _ in UNREADABLE]
    for _ in range(5000):
        tensors = {}
        for name in rng.sample(names, rng.randint(0, 4)):
            shape = tuple(rng.choice([0, 1, 16, 64, 3072, 4096]) for _ in range(rng.randint(0, 5)))
            tensors[rng.choice(["", *PREFIXES]) + name] = Stored("BF16", shape, 0, 0)
        with contextlib.suppress(ModelUnsupported):
            describe(Path("any"), Header("safetensors", tensors, {}, 0))


@pytest.mark.parametrize(
    "filler",
    [b"[],", b"{},", b'"ab",', b"1.5,", b"[" * 5000, b"123456,", b'"\xc3\xa9\xc3\xa9",'],
)
def test_the_worst_header_stays_within_64_mib(tmp_path: Path, filler: bytes) -> None:
    count = (MAX_HEADER - 100) // len(filler)
    raw = b'{"__metadata__":{"x":[' + filler * count + b"0]}}"
    path = tmp_path / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    tracemalloc.start()
    with contextlib.suppress(ModelBroken):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * MIB


@pytest.mark.parametrize("length", [0x3C, 0x13C, 0x80, 0x180])
def test_a_length_that_looks_like_another_format(tmp_path: Path, length: int) -> None:
    """The first byte of a sound file may be that of a web page or of a pickle."""
    path = tmp_path / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}".ljust(length))
    assert read_header(path).tensors == {}


def test_ten_thousand_tensors_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({f"t{i}": torch.from_numpy(np.zeros(2, "f4")) for i in range(10_000)}, path)
    assert len(read_header(path).tensors) == 10_000
