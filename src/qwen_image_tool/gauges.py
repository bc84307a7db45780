"""Memory and disks as they are now, for somebody who watches them. Read without torch."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import psutil

from qwen_image_tool.device import memory
from qwen_image_tool.doctor import LOW_DISK, LOW_RAM, LOW_VRAM
from qwen_image_tool.types import Value

SMI = ("nvidia-smi", "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits")
SMI_SECONDS = 5  # a driver that hangs must not take the page with it


class Gauge(Value):
    """Something that can run out. `where`: a folder of a disk; `holds`: what we keep there. `low`:
    less is free than a run should find."""

    kind: Literal["ram", "vram", "disk"]
    total_bytes: int
    free_bytes: int
    low: bool
    where: str = ""
    holds: tuple[str, ...] = ()


def read_gauges(folders: Mapping[str, Path]) -> tuple[Gauge, ...]:
    """RAM, the first NVIDIA GPU's memory, and each disk that one of `folders` lies on; `folders` by
    what they hold."""
    return ram_gauge(), *vram_gauges(), *disk_gauges(folders)


def ram_gauge() -> Gauge:
    total, free = memory()
    return Gauge(kind="ram", total_bytes=total, free_bytes=free, low=free < LOW_RAM)


def vram_gauges(command: tuple[str, ...] = SMI) -> tuple[Gauge, ...]:
    """Empty where nvidia-smi does not tell: other makers' GPUs are not read while they work."""
    flags = getattr(subprocess, "CREATE_NO_WINDOW", 0)
    try:
        out = subprocess.run(
            command, capture_output=True, timeout=SMI_SECONDS, check=True, creationflags=flags
        ).stdout.decode(errors="replace")
        total, free = (int(number) << 20 for number in out.splitlines()[0].split(","))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return ()
    return (Gauge(kind="vram", total_bytes=total, free_bytes=free, low=free < LOW_VRAM),)


def disk_gauges(folders: Mapping[str, Path]) -> tuple[Gauge, ...]:
    """One for each volume, in the order of `folders`. A folder need not be there yet."""
    volumes: dict[int, list[tuple[str, Path]]] = {}
    for name, path in folders.items():
        there = next((each for each in (path, *path.parents) if each.exists()), None)
        if there is not None:
            volumes.setdefault(there.stat().st_dev, []).append((name, there))
    return tuple(_disk(held) for held in volumes.values())


def _disk(held: list[tuple[str, Path]]) -> Gauge:
    usage = shutil.disk_usage(held[0][1])
    return Gauge(
        kind="disk",
        total_bytes=usage.total,
        free_bytes=usage.free,
        low=usage.free < LOW_DISK,
        where=_mount(held[0][1]),
        holds=tuple(name for name, _ in held),
    )


def _mount(path: Path) -> str:
    """The folder that the volume hangs on; on Windows its drive."""
    path = path.absolute()
    return str(next((each for each in (path, *path.parents) if os.path.ismount(each)), path))


def process_bytes(pid: int | None) -> int:
    """RAM of a process; 0 where it has ended."""
    with contextlib.suppress(psutil.Error):
        return int(psutil.Process(pid).memory_info().rss) if pid else 0
    return 0
