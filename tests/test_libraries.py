"""The files of Python's libraries, read before they are imported."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import MagicMock

import psutil
import pytest

import qwen_image_tool.libraries as libraries
from qwen_image_tool.libraries import LibraryFiles

VERSIONS = {"torch": "2.11"}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What was read."""
    found: list[Path] = []
    monkeypatch.setattr(libraries, "_read_through", lambda path, _: found.append(path))
    monkeypatch.setattr(os, "RWF_NOWAIT", 8, raising=False)
    return found


def read_all(files: LibraryFiles, found: list[Path]) -> None:
    """Until as many are found as are kept."""
    with files.read():
        deadline = time.monotonic() + 20
        while len(found) < len(files._known()) and time.monotonic() < deadline:
            time.sleep(0.01)


def test_what_a_process_has_loaded_is_read_in_the_next(tmp_path: Path, read: list[Path]) -> None:
    path = tmp_path / "cache" / "libraries.json"
    read_all(LibraryFiles(path, VERSIONS), read)
    assert not read
    code = """
import sys
from pathlib import Path
import numpy
from qwen_image_tool.libraries import LibraryFiles
LibraryFiles(Path(sys.argv[1]), {"torch": "2.11"}).remember()
"""
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    read_all(LibraryFiles(path, VERSIONS), read)
    assert any(file.name.startswith("_multiarray_umath") for file in read)
    assert any("psutil" in file.parts for file in read)
    assert all(file.is_file() for file in read)
    files = json_files(path)
    assert len(files) == len(set(files))
    names = [file.name.partition(".")[0] for file in files]
    assert names.index("pathlib") < names.index("libraries")  # as they were imported


def test_the_rest_is_not_read_when_the_block_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = LibraryFiles(tmp_path / "libraries.json", VERSIONS)
    monkeypatch.setattr(os, "RWF_NOWAIT", 8, raising=False)
    files.remember()
    count = len(json_files(tmp_path / "libraries.json"))
    begun, ended = threading.Semaphore(0), threading.Event()
    found: list[Path] = []

    def slow(path: Path, _: threading.Event) -> None:
        found.append(path)
        begun.release()
        ended.wait(20)

    monkeypatch.setattr(libraries, "_read_through", slow)
    with files.read():
        for _ in range(libraries.READERS):
            assert begun.acquire(timeout=20)
        threading.Timer(0.2, ended.set).start()
    assert len(found) < count


def test_a_large_file_is_not_read_to_its_end_when_the_block_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an interrupted start waits for it."""
    files = LibraryFiles(tmp_path / "libraries.json", VERSIONS)
    monkeypatch.setattr(os, "RWF_NOWAIT", 8, raising=False)
    files.remember()
    begun, left = threading.Event(), iter(range(10_000))

    def read(_: int) -> bytes:
        begun.set()
        time.sleep(0.01)
        return b"x" * (next(left, None) is not None)

    file = MagicMock()
    file.__enter__.return_value = file
    file.read.side_effect = read
    monkeypatch.setattr(libraries, "is_cached", lambda _file, _start: False)
    monkeypatch.setattr(files, "_known", lambda: [tmp_path / "large"])
    monkeypatch.setattr(Path, "open", lambda *_, **__: file)
    with files.read():
        assert begun.wait(20)
    assert next(left, None) is not None


def test_a_python_elsewhere_has_another_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after the project's folder was moved: the files of the old list are gone."""
    monkeypatch.setattr(os, "RWF_NOWAIT", 8, raising=False)
    path = tmp_path / "libraries.json"
    LibraryFiles(path, VERSIONS).remember()
    assert LibraryFiles(path, VERSIONS)._known()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert not LibraryFiles(path, VERSIONS)._known()


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
    read_all(other, read)
    assert not read
    other.remember()
    read_all(other, read)
    assert len(read) == len(json_files(path)) > 100


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
    read_all(files, read)
    gone = {"versions": files._versions, "files": [str(tmp_path / "gone"), str(tmp_path)]}
    path.write_text(json.dumps(gone), encoding="utf-8")
    read_all(files, read)
    assert len(read) == 2
    monkeypatch.setattr(psutil, "Process", object)  # as on macOS
    LibraryFiles(path / "not a folder", VERSIONS).remember()


def test_what_is_in_the_cache_or_gone_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()
    libraries._read_through(tmp_path / "gone", ended)
    file = MagicMock()
    file.__enter__.return_value = file
    file.read.side_effect = [b"x" * 10, b""]
    monkeypatch.setattr(Path, "open", lambda *_, **__: file)
    monkeypatch.setattr(libraries, "is_cached", lambda _file, _start: True)
    libraries._read_through(tmp_path / "here", ended)
    assert not file.read.called
    monkeypatch.setattr(libraries, "is_cached", lambda _file, _start: False)
    libraries._read_through(tmp_path / "here", ended)
    assert file.read.call_count == 2  # its bytes, and its end
    ended.set()
    libraries._read_through(tmp_path / "here", ended)
    assert file.read.call_count == 2
