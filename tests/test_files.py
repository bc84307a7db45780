"""Small files: replaced whole, or as they were; the rate of a disk."""

import os
import stat
from pathlib import Path

import pytest

from qwen_image_tool import files
from qwen_image_tool.files import replace_file


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a"
    for data in (b"one", b"two\r\n"):
        replace_file(path, data, private=True)
        assert path.read_bytes() == data
    assert [found.name for found in path.parent.iterdir()] == ["a"]
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a"
    path.mkdir(parents=True)
    with pytest.raises(OSError):  # noqa: PT011 - the system's own, of many kinds
        replace_file(path, b"data")
    assert list(path.parent.iterdir()) == [path]


def test_a_disk_is_measured_while_any_thread_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("qwen_image_tool.files.time.perf_counter", lambda: now)
    disk = files.DiskMeter()
    with disk.reading(files.ENOUGH):
        now = 1.0
        with disk.reading(files.ENOUGH):
            now = 3.0
        assert disk.rate == files.ENOUGH / 3
    now = 100.0  # nobody reads
    with disk.reading(files.ENOUGH):
        now = 101.0
    assert disk.rate == 3 * files.ENOUGH / 4


def test_little_says_nothing_of_a_disk() -> None:
    disk = files.DiskMeter()
    assert disk.rate == 0
    with disk.reading(files.ENOUGH - 1):
        pass
    assert disk.rate == 0
