"""Why a process ended: its exit code, its last words and the kernel's counters, in one sentence."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

from qwen_image_tool.device import cgroups
from qwen_image_tool.errors import TroubleKind, trouble_in
from qwen_image_tool.types import Failure, PhaseName

ROOT = Path("/")  # where the kernel's files are
# Windows' NTSTATUS codes, as Popen.returncode gives them
ACCESS_VIOLATION = 0xC0000005
STACK_BUFFER_OVERRUN = 0xC0000409
NO_MEMORY = 0xC0000017
COMMITMENT_LIMIT = 0xC000012D
DLL_NOT_FOUND = 0xC0000135
_WINDOWS: dict[int, tuple[TroubleKind, str]] = {
    NO_MEMORY: ("memory", "STATUS_NO_MEMORY"),
    COMMITMENT_LIMIT: ("memory", "STATUS_COMMITMENT_LIMIT: the page file is full"),
    ACCESS_VIOLATION: ("crashed", "access violation"),
    STACK_BUFFER_OVERRUN: ("crashed", "a library ended it"),
    DLL_NOT_FOUND: ("crashed", "a library is missing"),
}


def explain(code: int, output: str, oom_kills: int = 0, phase: PhaseName | None = None) -> Failure:
    """What happened to a process that ended by itself with `code` (negative: a signal; above
    0xC0000000: an NTSTATUS of Windows), having last written `output`, while the kernel counted
    `oom_kills` more processes killed for memory; `phase`: what it was doing."""
    kind = trouble_in(output) or _by_code(code, oom_kills, phase)
    return Failure.from_table(kind, f"({_spelled(code, phase)})")


def oom_kills(root: Path | None = None) -> int:
    """Processes that the kernel has killed for want of memory: its own counter, and those of the
    memory cgroups that this process is in or below. 0 where nobody counts."""
    return sum(
        int(value)
        for path in _counters(root or ROOT)
        for key, value in _pairs(path)
        if key == "oom_kill" and value.isdigit()
    )


def _by_code(code: int, oom: int, phase: PhaseName | None) -> TroubleKind:
    if code == -getattr(signal, "SIGKILL", 9):
        return "memory" if oom > 0 else "killed"
    if code == ACCESS_VIOLATION and phase == "load":
        return "memory"  # how Windows fails to give memory that was promised; invoke-ai#7563
    if code in _WINDOWS:
        return _WINDOWS[code][0]
    return "killed" if code == -signal.SIGTERM else "crashed"


def _spelled(code: int, phase: PhaseName | None) -> str:
    during = f" during {phase}" if phase else ""
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"{signal.Signals(-code).name}{during}"
        return f"signal {-code}{during}"
    if code >= 0xC0000000:
        known = f" {_WINDOWS[code][1]}" if code in _WINDOWS else ""
        return f"code 0x{code:08X}{known}{during}"
    return f"exit code {code}{during}"


def _counters(root: Path) -> Iterator[Path]:
    yield root / "proc/vmstat"
    for group in cgroups(root, "memory"):
        yield group / "memory.events"  # of version 2
        yield group / "memory.oom_control"  # of version 1


def _pairs(path: Path) -> list[tuple[str, str]]:
    with contextlib.suppress(OSError, ValueError):
        lines = path.read_text(encoding="utf-8").splitlines()
        return [(key, value) for key, _, value in (entry.partition(" ") for entry in lines)]
    return []
