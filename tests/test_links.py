"""One content under two names: by a hard link, a symbolic link or a note."""

import os
import sys
from pathlib import Path

import pytest

from qwen_image_tool.store.links import (
    NOTE,
    content,
    delete,
    freed_by,
    link,
    names,
    weight_files,
)


def refuse(*_: object) -> None:
    raise OSError("this volume has none")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "ComfyUI" / "theirs.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"weights")
    return path


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "models" / "transformer" / "ours.safetensors"


def made(source: Path, target: Path, own: bool = False, by_note: bool = True) -> bool:
    return link(source, own, target, target.parent.parent / "partial", by_note)


def test_on_one_volume_it_is_one_file(source: Path, target: Path) -> None:
    assert made(source, target)
    assert target.samefile(source)
    assert not target.is_symlink()
    assert delete(target) == 0, "the content has another name"
    assert source.read_bytes() == b"weights"
    assert delete(source) == 7


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links need a right there")
def test_across_volumes_it_is_a_symbolic_link(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", refuse)
    assert made(source, target)
    assert target.is_symlink()
    assert target.read_bytes() == b"weights"
    assert delete(target) == 0
    assert source.exists()


def test_where_neither_is_allowed_a_note_says_where(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows, between two drives."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refuse)
        patch.setattr(os, "symlink", refuse)
        assert not made(source, target, by_note=False), "its reader knows no notes"
        assert not made(source, target, own=True), "ours may be deleted"
        assert made(source, target)
    assert [path.name for path in target.parent.iterdir()] == [target.name + NOTE]
    assert content(target) == source
    assert weight_files(target.parent) == {target.name: source}
    source.write_bytes(b"others")
    assert content(target).read_bytes() == b"others"
    assert made(source, target), "a link takes the note's place"
    assert not names(target)[1].exists()


def test_a_note_is_deleted_and_not_what_it_leads_to(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "symlink", refuse)
    made(source, target)
    assert delete(target) == 0
    assert not list(target.parent.iterdir())
    assert source.exists()
    assert content(target) == target
    assert weight_files(target.parent) == {}


def test_a_note_leads_to_plain_files_alone(target: Path, tmp_path: Path) -> None:
    """Reading a pipe would wait for ever."""
    target.parent.mkdir(parents=True)
    for what in (str(tmp_path), os.devnull):
        names(target)[1].write_text(what, encoding="utf-8")
        assert content(target) == target
    names(target)[1].write_bytes(b"\xff\xfe")
    assert content(target) == target


def test_what_a_removal_frees(source: Path, target: Path, tmp_path: Path) -> None:
    """A content counts once, and only where all of its names go."""
    assert made(source, target)
    (tmp_path / "own").write_bytes(b"12345")
    os.link(tmp_path / "own", tmp_path / "again")
    both = [tmp_path / "own", tmp_path / "again"]
    assert freed_by([target, *both, tmp_path / "gone"]) == 5
    assert freed_by(both[:1]) == 0
    assert freed_by([target, source]) == len(b"weights")
