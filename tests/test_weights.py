import errno
import json
import os
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qwen_image_tool.engine import weights
from qwen_image_tool.engine.weights import Checkpoint, Layout, read
from qwen_image_tool.errors import ModelMissing, ModelUnsupported

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
    "a.bias": torch.tensor([0.5, -1.5, 2.5]),
    "b.scalar": torch.tensor(7.0),
    "b.empty": torch.empty(0, 3),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    first = {k: v for k, v in TENSORS.items() if k.startswith("a")}
    second = {k: v for k, v in TENSORS.items() if k.startswith("b")}
    save_file(first, tmp_path / "m-1.safetensors")
    save_file(second, tmp_path / "m-2.safetensors")
    names = dict.fromkeys(first, "m-1.safetensors") | dict.fromkeys(second, "m-2.safetensors")
    index = {"metadata": {}, "weight_map": names}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("positional", [True, False])
def test_a_tensor_is_read_into_its_place(
    folder: Path, name: str, positional: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not positional:  # as on Windows
        monkeypatch.delattr(os, "preadv")
    checkpoint = Checkpoint(folder)
    target = torch.full_like(TENSORS[name], -1)
    counted: list[int] = []
    read([(checkpoint[name], target)], counted.append)
    assert torch.equal(target, TENSORS[name])
    assert sum(counted) == TENSORS[name].nbytes


def test_other_dtypes_are_converted(folder: Path) -> None:
    target = torch.empty(3, 4)
    read([(Checkpoint(folder)["a.weight"], target)])
    assert torch.equal(target, TENSORS["a.weight"].float())


@pytest.mark.parametrize("name", ["I8", "U8", "I64", "BOOL", "F8_E4M3", "F8_E5M2"])
def test_numbers_of_another_kind_are_named(tmp_path: Path, name: str) -> None:
    """They are somebody's quantisation: as weights they would draw noise."""
    save_file({"x": torch.ones(3, 4).to(weights.DTYPES[name])}, tmp_path / "x.safetensors")
    with pytest.raises(ModelUnsupported, match=rf"x\.safetensors: x is in {name}, and this"):
        Checkpoint(tmp_path).check("x", torch.empty(3, 4))


def test_a_dtype_that_nobody_knows_is_named(folder: Path) -> None:
    shard = folder / "m-1.safetensors"
    shard.write_bytes(shard.read_bytes().replace(b'"BF16"', b'"F4_X"'))
    with pytest.raises(ModelMissing, match=r"m-1\.safetensors is damaged: .*F4_X"):
        Checkpoint(folder)


def test_a_file_is_not_to_blame_where_memory_runs_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> int:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    checkpoint = Checkpoint(folder)
    monkeypatch.setattr(os, "preadv", no_memory)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        read([(checkpoint["a.bias"], torch.empty(3))])


def test_a_large_tensor_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "PIECE", 1000)
    tensor = torch.randn(1234, 3)
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    target = torch.empty_like(tensor)
    counted: list[int] = []
    read([(Checkpoint(tmp_path)["x"], target)], counted.append)
    assert torch.equal(target, tensor)
    assert len(counted) == 15


def test_ctrl_c_does_not_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"x": torch.zeros(100_000)}, tmp_path / "x.safetensors")
    monkeypatch.setattr(weights, "PIECE", 400)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def slow(_: int) -> None:
        time.sleep(0.01)
        counted.append(1)

    counted: list[int] = []
    monkeypatch.setattr(weights, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read([(Checkpoint(tmp_path)["x"], torch.empty(100_000))], slow)
    assert len(counted) < 1000


def test_a_slab_holds_a_whole_module(tmp_path: Path) -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).bfloat16()
    save_file(
        {f"blocks.4.{k}": v for k, v in block.state_dict().items()}, tmp_path / "x.safetensors"
    )
    with weights.no_weights():
        empty = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    layout = Layout.of(empty, torch.bfloat16)
    assert all(place.offset % weights.ALIGNMENT == 0 for place in layout.places)
    slab = torch.empty(layout.bytes, dtype=torch.uint8)
    read(layout.reads(Checkpoint(tmp_path), "blocks.4.", slab))
    layout.attach(empty, slab)
    x = torch.randn(2, 5).bfloat16()
    assert torch.equal(empty(x), block(x))
    assert {p.untyped_storage().data_ptr() for p in empty.parameters()} == {slab.data_ptr()}


def test_what_is_not_there_is_named(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    with pytest.raises(ModelMissing, match=r"has no tensor c\.weight"):
        _ = checkpoint["c.weight"]
    with pytest.raises(ModelMissing, match=r"shape \[3, 4\], and the model needs \[4, 3\]"):
        checkpoint.check("a.weight", torch.empty(4, 3))
    (folder / "m-2.safetensors").unlink()
    with pytest.raises(ModelMissing, match=r"m-2\.safetensors is missing"):
        Checkpoint(folder)


def test_a_shard_without_its_tensor_is_named(folder: Path) -> None:
    save_file({"b.empty": TENSORS["b.empty"]}, folder / "m-2.safetensors")
    with pytest.raises(ModelMissing, match=r"no tensor b\.scalar"):
        Checkpoint(folder)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelMissing, match="no weights"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1])
def test_a_short_shard_is_named(folder: Path, keep: int) -> None:
    shard = folder / "m-1.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:keep])
    with pytest.raises(ModelMissing, match=r"m-1\.safetensors"):
        Checkpoint(folder)


def test_damaged_headers_never_crash(folder: Path) -> None:
    shard = folder / "m-1.safetensors"
    data = shard.read_bytes()
    rng = random.Random(0)
    for _ in range(500):
        broken = bytearray(data)
        for _ in range(rng.randint(1, 8)):
            broken[rng.randrange(min(len(broken), 300))] = rng.randrange(256)
        shard.write_bytes(broken)
        try:
            checkpoint = Checkpoint(folder)
        except ModelMissing:
            continue
        size = shard.stat().st_size
        for stored in checkpoint.tensors.values():
            assert stored.file != shard or 0 < stored.offset <= stored.offset + stored.bytes <= size


def test_a_reader_counts_what_it_reads(folder: Path) -> None:
    reader, target = weights.Reader(), torch.empty_like(TENSORS["a.weight"])
    for _ in range(3):
        reader([(Checkpoint(folder)["a.weight"], target)])
    assert reader.done == 3 * target.nbytes
