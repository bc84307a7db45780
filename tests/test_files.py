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


class Clocks:
    """Time as tests say; `worked`: of this thread's core."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.worked = 0.0
        monkeypatch.setattr("qwen_image_tool.files.time.perf_counter", lambda: self.now)
        monkeypatch.setattr("qwen_image_tool.files.time.thread_time", lambda: self.worked)

    def read(self, disk: files.DiskMeter, seconds: float, size: int = files.ENOUGH) -> None:
        with disk.reading(size):
            self.now += seconds


def test_a_disk_is_measured_while_any_thread_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks, disk = Clocks(monkeypatch), files.DiskMeter()
    with disk.reading(files.ENOUGH // 2):
        clocks.now = 1.0
        with disk.reading(files.ENOUGH // 2):
            clocks.now = 3.0
        assert not disk.rates
        clocks.now = 4.0
    assert disk.rates["disk"] == files.ENOUGH / 4
    clocks.now = 100.0  # nobody reads
    for _ in range(2):
        clocks.read(disk, 0.5)
    assert disk.rates["disk"] == files.ENOUGH / 0.5


def test_what_waited_for_a_core_or_came_from_a_cache_says_nothing_of_a_disk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clocks, disk = Clocks(monkeypatch), files.DiskMeter()
    for seconds in (1.0, 9.0, 1.0, 0.1, 1.0):
        clocks.read(disk, seconds)
    assert disk.rates["disk"] == files.ENOUGH


def test_what_reading_costs_the_cpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks, disk = Clocks(monkeypatch), files.DiskMeter()
    clocks.worked = 50.0  # before
    with disk.reading(files.ENOUGH):
        clocks.now, clocks.worked = 2.0, 50.25
    assert disk.rates == {"disk": files.ENOUGH / 2, "reading": 0.25 / files.ENOUGH}


def test_little_says_nothing_of_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks, disk = Clocks(monkeypatch), files.DiskMeter()
    assert not disk.rates
    clocks.read(disk, 1.0, files.ENOUGH - 1)
    assert not disk.rates
