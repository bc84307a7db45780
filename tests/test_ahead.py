"""Weights that are read before they are loaded."""

import threading
from pathlib import Path

import psutil
import pytest

import qwen_image_tool.store.ahead as ahead
from qwen_image_tool.store.ahead import PIECE, pieces, read_ahead


@pytest.fixture
def model(tmp_path: Path) -> list[Path]:
    folders = [tmp_path / "text_encoder", tmp_path / "transformer"]
    for folder in folders:
        folder.mkdir()
        (folder / "config.json").write_text("{}", encoding="utf-8")
    (folders[0] / "a-00001.safetensors").write_bytes(b"x" * (PIECE + 1))
    (folders[0] / "a-00002.safetensors").write_bytes(b"x" * 10)
    (folders[1] / "b.safetensors").write_bytes(b"x" * 2 * PIECE)
    return folders


def test_files_come_in_the_order_they_are_needed_in(model: list[Path]) -> None:
    assert [(path.name, start) for path, start in pieces(model, 1 << 40)] == [
        ("a-00001.safetensors", 0),
        ("a-00001.safetensors", PIECE),
        ("a-00002.safetensors", 0),
        ("b.safetensors", 0),
        ("b.safetensors", PIECE),
    ]


def test_it_keeps_to_its_part_of_the_memory(model: list[Path]) -> None:
    assert len(list(pieces(model, PIECE + 12))) == 3
    assert not list(pieces(model, 5))


def test_everything_is_read_and_nothing_goes_on(
    model: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, read, done = ahead._read, [], threading.Event()

    def record(piece: ahead.Piece, buffer: memoryview) -> None:
        plain(piece, buffer)
        read.append(piece)
        if len(read) == 5:
            done.set()

    monkeypatch.setattr(ahead, "_read", record)
    before = threading.active_count()
    with read_ahead(model):
        assert done.wait(60)
    assert sorted(read) == sorted(pieces(model, 1 << 40))
    assert threading.active_count() == before


def test_it_ends_with_the_block(model: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    began, may_go_on, read = threading.Event(), threading.Event(), []

    def slow(piece: ahead.Piece, _: memoryview) -> None:
        read.append(piece)
        began.set()
        assert may_go_on.wait(60)

    monkeypatch.setattr(ahead, "_read", slow)
    with read_ahead(model):
        assert began.wait(60)
        threading.Timer(0.2, may_go_on.set).start()
    assert len(read) <= ahead.READERS < 5


def test_what_is_not_there_or_cannot_be_read_is_no_error(
    model: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (model[0] / "a-00002.safetensors").unlink()
    ahead._read((model[0] / "a-00002.safetensors", 0), memoryview(bytearray(10)))
    with read_ahead([*model, model[0] / "nowhere"]):
        pass
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), {"available": 0}))
    with read_ahead(model):
        pass
