"""The files of Python's libraries, read before they are imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import qwen_image_tool.libraries as libraries
from qwen_image_tool.libraries import LibraryFiles

VERSIONS = {"torch": "2.11"}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What was read; nothing is in the cache."""
    found: list[Path] = []
    monkeypatch.setattr(libraries, "_read_through", found.append)
    monkeypatch.setattr(libraries, "is_cached", lambda _file, _start: False)
    monkeypatch.setattr(os, "RWF_NOWAIT", 8, raising=False)
    return found


def test_what_a_process_has_loaded_is_read_in_the_next(tmp_path: Path, read: list[Path]) -> None:
    path = tmp_path / "cache" / "libraries.json"
    LibraryFiles(path, VERSIONS).read()
    assert not read
    code = """
import sys
from pathlib import Path
import numpy
from qwen_image_tool.libraries import LibraryFiles
LibraryFiles(Path(sys.argv[1]), {"torch": "2.11"}).remember()
"""
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    LibraryFiles(path, VERSIONS).read()
    assert any(file.name.startswith("_multiarray_umath") for file in read)
    assert any("psutil" in file.parts for file in read)
    assert all(file.is_file() for file in read)
    sizes = [file.stat().st_size for file in json_files(path)]
    assert sizes == sorted(sizes, reverse=True)


def json_files(path: Path) -> list[Path]:
    return [Path(name) for name in json.loads(path.read_text(encoding="utf-8"))["files"]]


def test_other_versions_have_another_list(tmp_path: Path, read: list[Path]) -> None:
    path = tmp_path / "libraries.json"
    files = LibraryFiles(path, VERSIONS)
    files.remember()
    kept = path.read_bytes()
    files.remember()
    assert path.read_bytes() == kept
    other = LibraryFiles(path, {"torch": "2.12"})
    other.read()
    assert not read
    other.remember()
    other.read()
    assert len(read) == len(json_files(path)) > 100


def test_nothing_is_read_where_the_largest_is_in_the_cache(
    tmp_path: Path, read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = LibraryFiles(tmp_path / "libraries.json", VERSIONS)
    files.remember()
    monkeypatch.setattr(libraries, "is_cached", lambda _file, _start: True)
    files.read()
    assert not read


def test_no_list_is_kept_where_the_system_does_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)
    path = tmp_path / "libraries.json"
    LibraryFiles(path, VERSIONS).remember()
    assert not path.exists()


def test_a_list_that_is_broken_or_cannot_be_written_is_no_error(
    tmp_path: Path, read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "libraries.json"
    path.write_text('{"versions": 3', encoding="utf-8")
    files = LibraryFiles(path, VERSIONS)
    files.read()
    gone = {"versions": VERSIONS, "files": [str(tmp_path / "gone"), str(tmp_path)]}
    path.write_text(json.dumps(gone), encoding="utf-8")
    files.read()
    assert len(read) == 2
    monkeypatch.setattr(psutil, "Process", object)  # as on macOS
    LibraryFiles(path / "not a folder", VERSIONS).remember()


def test_a_file_that_is_gone_is_passed_over(tmp_path: Path) -> None:
    assert not libraries._is_there(tmp_path / "gone")
    libraries._read_through(tmp_path / "gone")
    (tmp_path / "here").write_bytes(b"x" * 10)
    libraries._read_through(tmp_path / "here")
