"""The files of Python's libraries, read before they are imported."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import MagicMock

import pytest

import qwen_image_tool.libraries as libraries
from qwen_image_tool.libraries import LibraryFiles

VERSIONS = {"torch": "2.11"}


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What was read; nothing is in the system's cache."""
    found: list[Path] = []
    monkeypatch.setattr(libraries, "_fetch", lambda path, *_: found.append(path))
    monkeypatch.setattr(libraries, "_seems_cached", lambda _: False)
    monkeypatch.setattr(os, "RWF_NOWAIT", 8, raising=False)
    return found


def start(files: LibraryFiles) -> None:
    with files.imported():
        pass


def kept(path: Path) -> list[Path]:
    return [Path(name) for name in json.loads(path.read_text(encoding="utf-8"))["files"]]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what its cache holds")
def test_what_an_import_has_read_is_brought_before_the_next(
    tmp_path: Path, fetched: list[Path]
) -> None:
    path = tmp_path / "cache" / "libraries.json"
    package = tmp_path / "packages" / "package"
    (package / "models").mkdir(parents=True)
    (package / "models" / "no module.txt").write_text("x", encoding="utf-8")
    (package / "__init__.py").write_text(
        """
import os
from pathlib import Path
for file in os.scandir(Path(__file__).parent / "models"):
    Path(file).read_text(encoding="utf-8")
""",
        encoding="utf-8",
    )
    code = """
import sys
from pathlib import Path
from qwen_image_tool.libraries import LibraryFiles
sys.path.append(sys.argv[2])
with LibraryFiles(Path(sys.argv[1]), {"torch": "2.11"}).imported():
    import numpy
    import package
    beside = Path(package.__file__).parents[1] / "no library"
    beside.write_text("x", encoding="utf-8")
    beside.read_text(encoding="utf-8")
"""
    subprocess.run([sys.executable, "-c", code, str(path), str(package.parent)], check=True)
    start(LibraryFiles(path, VERSIONS))
    assert {package / "models", package / "models" / "no module.txt"} <= {*fetched}
    assert any(file.name.startswith("_multiarray_umath") for file in fetched)
    assert all(file.exists() for file in fetched)
    assert not any(file.name == "no library" for file in fetched)
    files = kept(path)
    assert sorted(files) == sorted(fetched)
    assert len(files) == len(set(files))
    names = [file.name.partition(".")[0] for file in files]
    assert names.index("numpy") < names.index("no module")  # as they were imported


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_a_start_that_fails_has_read_is_not_kept(
    tmp_path: Path, fetched: list[Path], error: type[BaseException]
) -> None:
    path = tmp_path / "libraries.json"
    with pytest.raises(error), LibraryFiles(path, VERSIONS).imported():
        raise error
    assert not path.exists()
    assert not libraries._listeners


def test_a_start_that_is_interrupted_does_not_wait_for_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[Path] = []

    def fetch(path: Path, _: libraries.Pieces, ended: threading.Event) -> None:
        if path == Path("0"):
            raise KeyboardInterrupt
        assert ended.wait(20)
        found.append(path)

    monkeypatch.setattr(libraries, "_fetch", fetch)
    monkeypatch.setattr(libraries, "_seems_cached", lambda _: False)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        libraries._bring([(Path(str(n)), None) for n in range(libraries.READERS * 2)])
    assert time.monotonic() - began < 15


def test_a_large_file_is_not_read_to_its_end_when_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, ended = tmp_path / "large", threading.Event()
    path.write_bytes(b"x" * 100)
    monkeypatch.setattr(libraries, "PIECE", 10)
    asked: list[int] = []

    def cached(_: int, at: int) -> bool:
        asked.append(at)
        if len(asked) == 3:
            ended.set()
        return True

    monkeypatch.setattr(libraries, "is_cached", cached)
    libraries._fetch(path, None, ended)
    libraries._fetch(path, None, ended)
    assert asked == [9, 19, 29]


def test_a_python_elsewhere_has_another_list(
    tmp_path: Path, fetched: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after the project's folder was moved: the files of the old list are gone."""
    path = tmp_path / "libraries.json"
    start(LibraryFiles(path, VERSIONS))
    assert LibraryFiles(path, VERSIONS)._known()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert not LibraryFiles(path, VERSIONS)._known()


def test_other_versions_have_another_list(tmp_path: Path, fetched: list[Path]) -> None:
    path = tmp_path / "libraries.json"
    start(LibraryFiles(path, VERSIONS))
    before = path.read_bytes()
    assert not fetched
    start(LibraryFiles(path, VERSIONS))
    assert path.read_bytes() == before
    assert len(fetched) == len(kept(path)) > 100
    fetched.clear()
    other = LibraryFiles(path, {"torch": "2.12"})
    start(other)
    assert not fetched
    assert path.read_bytes() != before
    start(other)
    assert len(fetched) == len(kept(path)) > 100


def test_no_list_is_kept_where_the_system_does_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)
    path = tmp_path / "libraries.json"
    start(LibraryFiles(path, VERSIONS))
    assert not path.exists()


def test_a_list_that_is_broken_or_cannot_be_written_is_no_error(
    tmp_path: Path, fetched: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "libraries.json"
    path.write_text('{"versions": 3', encoding="utf-8")
    files = LibraryFiles(path, VERSIONS)
    assert not files._known()
    path.write_text(
        json.dumps({"versions": files._versions, "files": [str(tmp_path)]}), encoding="utf-8"
    )
    assert not files._known()
    gone = {str(tmp_path / "gone"): [0], str(tmp_path): None}
    path.write_text(json.dumps({"versions": files._versions, "files": gone}), encoding="utf-8")
    start(files)
    assert sorted(fetched) == [tmp_path, tmp_path / "gone"]
    start(LibraryFiles(path / "not a folder", VERSIONS))


@pytest.mark.parametrize("cached", [True, False])
def test_only_what_is_not_in_the_cache_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    ended, path = threading.Event(), tmp_path / "here"
    path.write_bytes(b"x" * 25)
    monkeypatch.setattr(libraries, "PIECE", 10)
    monkeypatch.setattr(libraries, "is_cached", lambda _file, start: cached or start == 9)
    file = MagicMock()
    file.__enter__.return_value = file
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", lambda *_, **__: file)
        libraries._fetch(path, None, ended)
        libraries._fetch(path, [2, 7], ended)
    sizes = [each.args[0] for each in file.read.call_args_list]
    assert sizes == ([] if cached else [10, 5, 5])
    libraries._fetch(tmp_path / "gone", None, ended)
    libraries._fetch(tmp_path, None, ended)  # a folder


def test_libraries_that_are_in_the_cache_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nearly every start: a few of the thousands are asked."""
    (tmp_path / "empty").touch()
    (tmp_path / "full").write_bytes(b"x")
    paths = [tmp_path / "empty", tmp_path, tmp_path / "gone", tmp_path / "full"]
    known: libraries.Known = [(path, None) for path in paths]
    fetched: list[Path] = []
    monkeypatch.setattr(libraries, "SAMPLE", 1)
    monkeypatch.setattr(libraries, "_fetch", lambda path, *_: fetched.append(path))
    monkeypatch.setattr(libraries, "is_cached", lambda _file, _start: True)
    libraries._bring(known)
    assert not fetched
    monkeypatch.setattr(libraries, "is_cached", lambda _file, _start: False)
    libraries._bring(known)
    assert sorted(fetched) == sorted(paths)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell what was touched")
def test_of_a_shared_library_only_what_was_touched_is_read() -> None:
    import torch  # noqa: F401

    found = libraries._shared_libraries()
    [name] = [name for name in found if Path(name).name == "libtorch_cpu.so"]
    whole, pieces = -(-Path(name).stat().st_size // libraries.PIECE), found[name]
    assert pieces
    assert pieces == sorted({*pieces})
    assert 0 == pieces[0] < pieces[-1] < whole
    assert 10 < len(pieces) < whole / 2
