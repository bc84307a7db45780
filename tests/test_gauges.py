"""What can run out, as it is now."""

import os
import sys
from pathlib import Path

import pytest

from qwen_image_tool import gauges
from qwen_image_tool.doctor import LOW_RAM
from qwen_image_tool.gauges import disk_gauges, process_bytes, ram_gauge, read_gauges, vram_gauges


def test_folders_of_one_disk_are_one_gauge(tmp_path: Path) -> None:
    [disk] = disk_gauges({"models": tmp_path / "not" / "there", "logs": tmp_path})
    assert disk.holds == ("models", "logs")
    assert 0 <= disk.free_bytes <= disk.total_bytes
    assert os.path.ismount(disk.where)


@pytest.mark.skipif(sys.platform == "win32", reason="it has one /dev")
def test_each_disk_has_its_gauge(tmp_path: Path) -> None:
    if Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("one disk alone")
    first, second = disk_gauges({"models": tmp_path, "data": Path("/dev/shm")})
    assert (first.holds, second.holds) == (("models",), ("data",))


@pytest.mark.parametrize(("free", "low"), [(LOW_RAM, False), (LOW_RAM - 1, True)])
def test_little_ram_is_low(free: int, low: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauges, "memory", lambda: (2**35, free))
    assert ram_gauge().low is low


def test_what_the_driver_tells_of_its_memory(tmp_path: Path) -> None:
    [found] = vram_gauges((sys.executable, "-c", "print('24564, 1024')"))
    assert (found.total_bytes, found.free_bytes) == (24564 << 20, 1024 << 20)
    assert found.low
    assert vram_gauges((str(tmp_path / "none"),)) == ()
    assert vram_gauges((sys.executable, "-c", "print('[N/A], [N/A]')")) == ()
    assert vram_gauges((sys.executable, "-c", "raise SystemExit(9)")) == ()


def test_all_of_it(tmp_path: Path) -> None:
    kinds = [gauge.kind for gauge in read_gauges({"models": tmp_path})]
    assert kinds[0] == "ram"
    assert kinds[-1] == "disk"


def test_a_process_and_none() -> None:
    assert process_bytes(os.getpid()) > 1_000_000
    assert process_bytes(None) == 0
    assert process_bytes(2**22 + 1) == 0
