"""Weights that are read before they are loaded."""

import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file

import qwen_image_tool.engine.weights as weights
import qwen_image_tool.files as files
import qwen_image_tool.store.ahead as ahead
from qwen_image_tool import device
from qwen_image_tool.app import App
from qwen_image_tool.engine.probe import torch_facts
from qwen_image_tool.files import DiskMeter
from qwen_image_tool.settings import Settings
from qwen_image_tool.store.ahead import PIECE, Wanted, pieces, read_ahead
from qwen_image_tool.types import Request, Size
from running import own_threads, wait


@pytest.fixture
def model(tmp_path: Path) -> list[Wanted]:
    """In the transformer 2 pieces and a bit more, in the text encoder's layers 10 and 20 bytes,
    with a table of words between them."""
    folders = [tmp_path / "transformer", tmp_path / "text_encoder"]
    for folder in folders:
        folder.mkdir()
        (folder / "config.json").write_text("{}", encoding="utf-8")
    save(folders[0] / "a-1.safetensors", {"a": 2 * PIECE})
    save(folders[0] / "a-2.safetensors", {"b": 7, "c": 5})
    save(folders[1] / "b.safetensors", {"a.layers.0": 10, "embed": 1000, "x.layers.1": 20})
    return [Wanted(folders[0]), Wanted(folders[1], ".layers.")]


def save(path: Path, sizes: dict[str, int]) -> None:
    save_file({n: torch.ones(size, dtype=torch.uint8) for n, size in sizes.items()}, path)


def test_what_is_wanted_comes_in_its_order(model: list[Wanted]) -> None:
    found = list(pieces(model, 1 << 40))
    assert [(path.name, size) for path, _, size in found] == [
        ("a-1.safetensors", PIECE),
        ("a-1.safetensors", PIECE),
        ("a-2.safetensors", 12),
        ("b.safetensors", 10),
        ("b.safetensors", 20),
    ]
    (_, first, _), (_, second, _) = found[:2]
    assert second == first + PIECE
    for path, start, size in found:
        assert path.read_bytes()[start : start + size] == b"\x01" * size


def test_what_may_not_be_needed_comes_last(model: list[Wanted]) -> None:
    folder = model[0].folder
    order = [Wanted(folder, without="b"), Wanted(folder, "b")]
    assert [size for _, _, size in pieces(order, 1 << 40)] == [PIECE, PIECE, 5, 7]


def test_it_keeps_to_its_part_of_the_memory(model: list[Wanted]) -> None:
    assert len(list(pieces(model, 2 * PIECE + 22))) == 4
    assert not list(pieces(model, 5))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what its cache holds")
def test_what_is_in_the_cache_is_not_read_again(model: list[Wanted]) -> None:
    piece = next(pieces(model, 1 << 40))
    buffer = memoryview(bytearray(PIECE))
    piece[0].read_bytes()
    ahead._read(piece, buffer, DiskMeter())
    assert not any(buffer[:100])


@pytest.mark.parametrize("cached", [False, True])
def test_the_disk_is_measured_by_what_came_from_it(
    model: list[Wanted], monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    monkeypatch.setattr(ahead, "is_cached", lambda _file, _start: cached)
    monkeypatch.setattr(files, "ENOUGH", 1)
    disk, buffer = DiskMeter(), memoryview(bytearray(PIECE))
    for piece in pieces(model, 1 << 40):
        ahead._read(piece, buffer, disk)
    assert bool(disk.rates) != cached


def test_a_piece_of_which_the_system_has_read_the_start_is_read(
    model: list[Wanted], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads on by itself, past the header and past the piece before."""
    path, start, size = next(pieces(model, 1 << 40))
    monkeypatch.setattr(ahead, "is_cached", lambda _, at: at < start + 4096)
    buffer = memoryview(bytearray(PIECE))
    ahead._read((path, start, size), buffer, DiskMeter())
    assert bytes(buffer[:size]) == path.read_bytes()[start : start + size]


def test_everything_is_read_and_nothing_goes_on(
    model: list[Wanted], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, read, done = ahead._read, [], threading.Event()

    def record(piece: ahead.Piece, *rest: Any) -> None:
        plain(piece, *rest)
        read.append(piece)
        if len(read) == 5:
            done.set()

    monkeypatch.setattr(ahead, "_read", record)
    before = own_threads()
    with read_ahead(model, DiskMeter()):
        assert done.wait(60)
    assert sorted(read) == sorted(pieces(model, 1 << 40))
    wait(lambda: own_threads() <= before)


def test_it_ends_with_the_block(model: list[Wanted], monkeypatch: pytest.MonkeyPatch) -> None:
    began, may_go_on, read = threading.Event(), threading.Event(), []

    def slow(piece: ahead.Piece, *_: Any) -> None:
        read.append(piece)
        began.set()
        assert may_go_on.wait(60)

    monkeypatch.setattr(ahead, "_read", slow)
    with read_ahead(model, DiskMeter()):
        assert began.wait(60)
        threading.Timer(0.2, may_go_on.set).start()
    assert len(read) <= ahead.READERS < 5


def test_what_is_not_there_or_cannot_be_read_is_no_error(
    model: list[Wanted], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model[0].folder
    (folder / "a-2.safetensors").unlink()
    (folder / "a-3.safetensors").write_bytes(b"no weights")
    ahead._read((folder / "a-2.safetensors", 0, 1), memoryview(bytearray(10)), DiskMeter())
    with read_ahead([*model, Wanted(folder / "nowhere")], DiskMeter()):
        pass
    assert len(list(pieces(model, 1 << 40))) == 4
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), {"available": 0}))
    with read_ahead(model, DiskMeter()):
        pass


def test_later_plans_know_what_the_disk_gave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "is_cached", lambda _file, _start: False)
    monkeypatch.setattr(weights, "is_cached", lambda _file, _start: False)
    monkeypatch.setattr(files, "ENOUGH", 1)
    monkeypatch.setattr(time, "thread_time", time.perf_counter)  # Windows' moves in ticks
    app = App(Settings(output=tmp_path / "out", cache=tmp_path / "cache"))
    request = Request(model="practice", prompt="x", size=Size(64, 64), steps=2, seed=1)
    app.generate(request, lambda _: None)
    rates = app.rates.get(device.probe(torch_facts()))
    assert rates
    assert rates.disk > 0
    assert rates.reading > 0
