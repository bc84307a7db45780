"""What the hardware is, read once: torch's part (TorchFacts, read in engine/) and the host's.

No torch here: `probe_in_child` asks it in a process of its own, which a broken driver may kill.
"""

import contextlib
import ctypes
import importlib
import importlib.metadata
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Literal

import psutil
from pydantic import ValidationError

from qwen_image_tool.catalog.costs import Card, load_costs
from qwen_image_tool.errors import ToolError
from qwen_image_tool.types import Device, Rates, Value

PAGE_FILES = r"SYSTEM\CurrentControlSet\Control\Session Manager\Memory Management"
SYSTEMS = {
    "linux": "Linux",
    "win32": "Windows",
    "wsl": "WSL",
    "darwin": "macOS",
}  # system() -> name
METAL_PART = 2 / 3  # of a Mac's memory, which Metal gives the GPU; of large ones three quarters
SAME_START = 60  # seconds that two readings of it may differ by: clocks are set
PROBE_SECONDS = 120  # the first import of torch from a hard disk takes a minute
REINSTALL = "Run `./qit setup` (Windows: `qit setup`) to install it again."

ENLARGE_PAGE_FILE = (
    "In Windows' Settings > System > About > Advanced system settings > Performance > Advanced >"
    " Virtual memory, let Windows manage the page file, or make it larger."
)


class TorchFacts(Value):
    """What torch says of itself and of the first GPU it can use. Sizes in bytes.

    `error`: why torch can't be used at all. `gpu_error`: why its GPU can't, in torch's words.
    """

    version: str = ""
    built_for: str = ""  # "CUDA 13.0", "ROCm 7.2", "XPU", "MPS"; "" is a build for the CPU alone
    kind: Literal["cpu", "cuda", "rocm", "xpu", "mps"] = "cpu"
    gpu: str = ""
    gpus: int = 0
    vram_bytes: int = 0
    vram_free_bytes: int = 0
    bf16: bool = False
    capability: str = ""
    shared_memory: bool = False
    driver: str = ""
    error: str = ""
    gpu_error: str = ""


class Look(Value):
    """What a child process found when it looked, with this torch and since this start of the
    machine (seconds since 1970)."""

    torch: str
    started: int
    facts: TorchFacts


class NvidiaCard(Value):
    """The first NVIDIA GPU, as its driver names it: torch need not be there."""

    name: str
    driver: str


class Commit(Value):
    """What Windows can promise to programs at most, and can still promise, in bytes: the RAM and
    the page file, as large as it may grow. It promises all memory that is a program's own, used or
    not, and the GPU's too."""

    limit_bytes: int
    free_bytes: int


def probe(facts: TorchFacts) -> Device:
    """The device that a run uses. Raises ToolError where torch can't be used at all."""
    if facts.error:
        raise ToolError(f"torch can't be used: {facts.error}", REINSTALL)
    ram_bytes, ram_free_bytes = memory()
    promised = commit()
    notes = []
    if facts.gpu_error:
        notes.append(f"The GPU is not used: {facts.gpu_error}")
    if facts.gpus > 1:
        notes.append(f"There are {facts.gpus} GPUs; the first is used.")
    return Device(
        kind=facts.kind,
        name=facts.gpu or cpu_name(),
        ram_bytes=ram_bytes,
        ram_free_bytes=ram_free_bytes,
        vram_bytes=facts.vram_bytes,
        vram_free_bytes=_with_context(facts),
        commit_free_bytes=promised.free_bytes if promised else None,
        cores=cores(),
        bf16=facts.bf16,
        shared_memory=facts.shared_memory,
        system=system(),
        driver=facts.driver,
        torch=facts.version,
        notes=tuple(notes),
    )


def _with_context(facts: TorchFacts) -> int:
    """torch counts the free memory when its context is made; a run's own makes that again."""
    context = 0 if facts.kind in ("cpu", "mps") else load_costs().context_bytes
    return min(facts.vram_bytes, facts.vram_free_bytes + context)


def system() -> str:
    """sys.platform, or wsl: a Linux whose memory Windows lends."""
    wsl = sys.platform == "linux" and "microsoft" in platform.release().lower()
    return "wsl" if wsl else sys.platform


def invented(
    ram_bytes: int, vram_bytes: int | None, card: Card | None = None, on: str = ""
) -> Device:
    """A machine that isn't this one: all of its memory is free, its page file is as large as it has
    to be. Its card is NVIDIA's; a Mac's GPU has a part of the RAM, the usual one where `vram_bytes`
    is None. `on`: a key of SYSTEMS; "" is this computer's system."""
    on = on or system()
    kind: Literal["cpu", "cuda", "mps"] = "mps" if on == "darwin" else "cuda"
    if kind == "mps":
        usual = int(ram_bytes * METAL_PART)
        vram_bytes = usual if vram_bytes is None else min(vram_bytes, ram_bytes)
    if not vram_bytes:
        kind = "cpu"
    name = {"cpu": "the CPU", "cuda": "the card", "mps": "Apple's GPU"}[kind]
    gpu = {"cpu": "no GPU", "cuda": "an NVIDIA card", "mps": "Apple's GPU"}[kind]
    return Device(
        kind=kind,
        name=card.name if card else name,
        rates=card.rates if card else Rates(),
        ram_bytes=ram_bytes,
        ram_free_bytes=ram_bytes,
        vram_bytes=vram_bytes or 0,
        vram_free_bytes=vram_bytes or 0,
        shared_memory=kind == "mps",
        system=on,
        notes=(f"Planned as on {SYSTEMS.get(on, on)} with {gpu}.",),
    )


def probe_in_child(
    seconds: float = PROBE_SECONDS, module: str = "qwen_image_tool.engine.probe"
) -> TorchFacts:
    """TorchFacts from a child process. Never raises: what went wrong is in `error`, with the last
    lines the child wrote."""
    child = subprocess.Popen(
        [sys.executable, "-P", "-X", "utf8", "-m", module],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
    )
    try:
        out, err = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the driver: leave it
            child.communicate(timeout=5)
        return TorchFacts(error=f"it did not answer within {seconds:g} seconds.")
    with contextlib.suppress(ValidationError, IndexError):
        return TorchFacts.from_json(out.splitlines()[-1])
    last = " ".join(err.strip().splitlines()[-3:])
    return TorchFacts(error=f"its process ended with code {child.returncode}. {last}".strip())


def look(kept: Path) -> TorchFacts:
    """Like `probe_in_child`; what it finds is written to `kept`, unless something is wrong."""
    facts = probe_in_child()
    if not facts.error and not facts.gpu_error:
        found = Look(torch=_torch(), started=_started(), facts=facts)
        with contextlib.suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(found.to_json(), encoding="utf-8")
    return facts


def last_look(kept: Path) -> TorchFacts | None:
    """What `look` found last, where neither torch nor the start of the machine is another."""
    try:
        found = Look.from_json(kept.read_bytes())
    except (OSError, ValidationError):
        return None
    same = found.torch == _torch() and abs(found.started - _started()) < SAME_START
    return found.facts if same else None


def _torch() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _started() -> int:
    return int(psutil.boot_time())


def nvidia_card() -> NvidiaCard | None:
    """Asks nvidia-smi, then /proc; None where neither knows an NVIDIA GPU."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    flags = getattr(subprocess, "CREATE_NO_WINDOW", 0)
    try:
        out = subprocess.run(
            command, capture_output=True, timeout=20, check=True, creationflags=flags
        ).stdout.decode(errors="replace")
        name, _, driver = out.splitlines()[0].rpartition(",")
        return NvidiaCard(name=name.strip(), driver=driver.strip())
    except (OSError, subprocess.SubprocessError, IndexError):
        return _nvidia_from_proc(Path("/proc/driver/nvidia"))


def memory(root: Path = Path("/")) -> tuple[int, int]:
    """Bytes of RAM this process may have: in all, and now. A container's limit counts."""
    ram = psutil.virtual_memory()
    total, free = ram.total, ram.available
    for limit, used in _cgroup_memory(root):
        total, free = min(total, limit), min(free, max(limit - used, 0))
    return total, free


def commit() -> Commit | None:
    """None on other systems, which have no such limit, and where Windows does not tell."""
    windows = getattr(ctypes, "windll", None)
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    if windows is None or not windows.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    growth = _page_file_growth(status.ram, max(0, status.commit_limit - status.ram))
    return Commit(limit_bytes=status.commit_limit + growth, free_bytes=status.commit_free + growth)


def cores(root: Path = Path("/")) -> int:
    """CPU cores this process may use: its affinity, and a container's quota."""
    allowed = os.cpu_count() or 1
    if sys.platform == "linux":
        allowed = len(os.sched_getaffinity(0))
    return max(1, min([allowed, *_cgroup_cores(root)]))


def cpu_name() -> str:
    """The processor's name, "CPU" where the system does not tell."""
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        return done.stdout.strip() or "CPU"
    named = _first_after([Path("/proc/cpuinfo")], "model name")
    return (named or platform.processor()).lstrip("\t: ") or "CPU"


# NVIDIA without nvidia-smi


def _nvidia_from_proc(folder: Path) -> NvidiaCard | None:
    name = _first_after(folder.glob("gpus/*/information"), "Model:")
    if name is None:
        return None
    version = _read(folder / "version").split("Kernel Module")[-1].split()
    return NvidiaCard(name=name, driver=next((w for w in version if w[0].isdigit()), ""))


def _first_after(paths: Iterable[Path], label: str) -> str | None:
    for path in paths:
        for line in _read(path).splitlines():
            if line.startswith(label):
                return line.removeprefix(label).strip()
    return None


# Windows' commit limit (MEMORYSTATUSEX of sysinfoapi.h; its "page file" is the limit)


class _MemoryStatus(ctypes.Structure):
    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("ram", ctypes.c_uint64),
        ("ram_free", ctypes.c_uint64),
        ("commit_limit", ctypes.c_uint64),
        ("commit_free", ctypes.c_uint64),
        ("virtual", ctypes.c_uint64),
        ("virtual_free", ctypes.c_uint64),
        ("extended_free", ctypes.c_uint64),
    )


def _page_file_growth(ram: int, now: int) -> int:
    """Bytes that page files of `now` bytes may still grow by, as far as their disks allow. One that
    Windows manages grows to three times the RAM, or an eighth of its disk (Microsoft,
    "Introduction to page files")."""
    most = free = 0
    for drive, largest in _page_files():
        with contextlib.suppress(OSError):
            disk = shutil.disk_usage(drive)
            most += largest or min(max(3 * ram, 4 << 30), disk.total // 8)
            free += disk.free
    return max(0, min(most - now, free))


def _page_files() -> Iterator[tuple[str, int]]:
    """The drive of each, and the bytes it may have: 0 is what Windows manages. "?" is a drive that
    Windows chooses: nearly always its own."""
    winreg = importlib.import_module("winreg")
    try:
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, PAGE_FILES) as key:
            written = winreg.QueryValueEx(key, "PagingFiles")[0]
    except OSError:
        return
    for line in written:
        if match := re.fullmatch(r"(.:)\\.*?(?: \d+ (\d+))?", line.strip()):
            drive = os.environ.get("SYSTEMDRIVE", "C:") if match[1] == "?:" else match[1]
            yield f"{drive}\\", int(match[2] or 0) << 20


# Limits of a container (kernel docs: cgroup-v1/memory, scheduler/sched-bwc, cgroup-v2)


def _cgroup_memory(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) of every group this process is in that has a limit. Page cache that the kernel
    would drop is not used."""
    for folder in cgroups(root, "memory"):
        stat = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
        for limit, usage, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            most, now = _read(folder / limit).strip(), _read(folder / usage).strip()
            if most.isdigit() and now.isdigit():
                yield int(most), int(now) - int(stat.get(cache, 0))


def _cgroup_cores(root: Path) -> Iterator[int]:
    for folder in cgroups(root, "cpu"):
        quota = _read(folder / "cpu.max").split() or [
            _read(folder / "cpu.cfs_quota_us").strip(),
            _read(folder / "cpu.cfs_period_us").strip(),
        ]
        if all(text.isdigit() for text in quota) and int(quota[0]) > 0:
            yield math.ceil(int(quota[0]) / int(quota[1]))


def cgroups(root: Path, controller: str) -> Iterator[Path]:
    """This process' group and all above it, for version 2 and for version 1 of cgroups."""
    mount = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, names, own = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        base = mount / controller if names else mount
        # inside a container the path is the host's, and only the mount's root is there
        inner = PurePosixPath(own.lstrip("/"))
        for group in dict.fromkeys([inner, *inner.parents]):
            yield base / group


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
