"""Exits: codes, last words and kernel counters become one sentence with the next step."""

import os
import signal
import sys
from pathlib import Path

import pytest

from qwen_image_tool.errors import (
    TROUBLES,
    OutOfMemory,
    memory_told,
    trouble_in,
    trouble_of,
)
from qwen_image_tool.exits import explain, oom_kills
from qwen_image_tool.supervisor import Exit, WorkerProcess


@pytest.mark.parametrize(
    ("code", "output", "oom", "phase", "kind", "spelled"),
    [
        (-9, "", 0, "denoise", "killed", "SIGKILL during denoise"),
        (-9, "", 1, "load", "memory", "SIGKILL during load"),
        (-11, "", 0, None, "crashed", "SIGSEGV"),
        (-6, "terminate called ... std::bad_alloc", 0, None, "memory", "SIGABRT"),
        (-15, "", 0, None, "killed", "SIGTERM"),
        (0xC0000005, "", 0, "load", "memory", "0xC0000005 access violation during load"),
        (0xC0000005, "", 0, "denoise", "crashed", "0xC0000005"),
        (0xC0000409, "", 0, None, "crashed", "0xC0000409"),
        (0xC000012D, "", 0, None, "memory", "page file is full"),
        (0xC0000017, "", 0, None, "memory", "0xC0000017"),
        (1, "The paging file is too small. (os error 1455)", 0, None, "memory", "exit code 1"),
        (1, "torch.OutOfMemoryError: CUDA out of memory.", 0, None, "gpu memory", "exit code 1"),
        (1, "CUDA error: an illegal memory access", 0, None, "GPU failed", "exit code 1"),
        (1, "DefaultCPUAllocator: can't allocate memory", 0, None, "memory", "exit code 1"),
        (1, "SystemError: error return without exception set", 0, None, "memory", "exit code 1"),
        (1, "OpenBLAS error: Memory allocation still failed", 0, None, "memory", "exit code 1"),
        (-6, "Fatal glibc error: failed ...: out of memory", 0, None, "memory", "SIGABRT"),
        (-11, "libgomp: Thread creation failed: Resource", 0, None, "memory", "SIGSEGV"),
        (1, "OSError: [Errno 28] No space left on device", 0, None, "disk full", "exit code 1"),
        (1, "PermissionError: [Errno 13]", 0, None, "not writable", "exit code 1"),
        (1, "The NVIDIA driver on your system is too old", 0, None, "old driver", "exit code"),
        (1, "Torch not compiled with CUDA enabled", 0, None, "torch without GPU", "exit code"),
        (3, "Segfault-free nonsense", 0, None, "crashed", "exit code 3"),
    ],
)
def test_explain(code: int, output: str, oom: int, phase: str, kind: str, spelled: str) -> None:
    failure = explain(code, output, oom, phase)  # type: ignore[arg-type]
    assert failure.kind == kind
    assert spelled in failure.message
    assert failure.hint
    assert failure.kept


# As CPython, the loader of shared libraries, numpy and diffusers raise where memory runs out
SYSTEM_ERROR = "<function _find_and_load at 0x7f> returned NULL without setting an exception"
NO_ROOM = "libgomp.so.1: failed to map segment from shared object"


@pytest.mark.parametrize(
    ("came_from", "error", "known"),
    [
        (None, SystemError(SYSTEM_ERROR), ("memory", SYSTEM_ERROR)),
        (None, MemoryError(), ("memory", "MemoryError")),
        (ImportError(NO_ROOM), ImportError("\n\nIMPORTANT: READ THIS"), ("memory", NO_ROOM)),
        (None, ImportError(f"\nIMPORTANT: READ THIS\n\n {NO_ROOM}"), ("memory", NO_ROOM)),
        (MemoryError(), OSError("Unable to load weights"), ("memory", "MemoryError")),
        (ValueError("a"), OSError("\n \nUnable to load\nit"), (None, "Unable to load")),
    ],
)
def test_an_error_says_what_it_came_from(
    came_from: Exception | None, error: Exception, known: tuple[str | None, str]
) -> None:
    error.__context__ = came_from
    assert trouble_of(error) == known
    error.__context__, error.__cause__ = None, came_from
    assert trouble_of(error) == known


def test_errors_that_came_from_each_other_are_read_once() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__context__, second.__context__ = second, first
    assert trouble_of(first) == (None, "a")


@pytest.mark.parametrize("kind", [ImportError, KeyError, SystemError, ValueError])
def test_memory_that_ran_out_is_told_whatever_wrapped_it(kind: type[Exception]) -> None:
    said = r"^The memory ran out. MemoryError. Do this.$"
    with pytest.raises(OutOfMemory, match=said), memory_told("Do this."):
        raise kind("no") from MemoryError()
    with pytest.raises(kind), memory_told("Do this."):
        raise kind("no")


def test_a_folder_that_nothing_may_run_from_is_no_want_of_memory() -> None:
    assert trouble_in(f"{NO_ROOM}: Operation not permitted") is None


def test_an_error_says_nothing_of_one_that_was_put_aside() -> None:
    error = OSError("The name is wrong")
    error.__context__, error.__suppress_context__ = MemoryError(), True
    assert trouble_of(error) == (None, "The name is wrong")


def test_the_table_is_whole() -> None:
    for kind, trouble in TROUBLES.items():
        assert trouble.happened.endswith("."), kind
        assert trouble.kept.endswith("."), kind
        assert kind == "database" or trouble.press.endswith("."), kind
    assert trouble_in("nothing known") is None


# Files as the kernel writes them: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst
EVENTS = "low 0\nhigh 0\nmax {max}\noom {oom}\noom_kill {kills}\noom_group_kill 0\n"
CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n"
VERSION_1 = "12:memory:{group}\n11:cpu,cpuacct:/other\n1:name=systemd:/other\n0::/other\n"


class Kernel:
    """A root folder with the kernel's files. `own`: the group of this process."""

    def __init__(self, root: Path, own: str, version: int, mounted: str | None = None) -> None:
        self.root, self.version = root, version
        self.group = (own if mounted is None else mounted).strip("/")
        text = f"0::{own}\n" if version == 2 else VERSION_1.format(group=own)
        self.write("proc/self/cgroup", text)
        self.write("proc/vmstat", "nr_free_pages 71\noom_kill 0\ndrop_pagecache 3\n")
        self.count(0)

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def count(self, kills: int) -> None:
        """So many processes were killed in the group; every try to get memory counts as `oom`."""
        if self.version == 2:
            text = EVENTS.format(max=kills * 40, oom=kills * 2, kills=kills)
            self.write(f"sys/fs/cgroup/{self.group}/memory.events", text)
        else:
            path = f"sys/fs/cgroup/memory/{self.group}/memory.oom_control"
            self.write(path, CONTROL.format(kills=kills))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("own", "mounted"),
    [
        ("/", None),
        ("/user.slice/user-1000.slice/app.scope", None),
        ("/docker/0123abc", ""),  # inside a container only the mount's root is there
        ("/user.slice/app.scope", "/user.slice"),  # the limit is a group's above
    ],
)
def test_kills_that_a_cgroup_counts(
    tmp_path: Path, own: str, mounted: str | None, version: int
) -> None:
    kernel = Kernel(tmp_path, own, version, mounted)
    assert oom_kills(tmp_path) == 0
    kernel.count(3)
    assert oom_kills(tmp_path) == 3


def test_kills_that_the_kernel_counts(tmp_path: Path) -> None:
    assert oom_kills(tmp_path) == 0
    kernel = Kernel(tmp_path, "/app", version=2)
    kernel.write("proc/vmstat", "nr_free_pages 5\noom_kill 2\n")
    kernel.count(4)
    assert oom_kills(tmp_path) == 6
    kernel.write("proc/vmstat", "garbage")
    kernel.write("sys/fs/cgroup/app/memory.events", "oom_kill\noom_kill x\n")
    assert oom_kills(tmp_path) == 0


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize(("version", "counted"), [(1, True), (2, True), (2, False)])
def test_a_worker_that_the_kernel_kills_for_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, counted: bool
) -> None:
    """From its start to the sentence; without a count it was somebody else's SIGKILL."""
    kernel = Kernel(tmp_path, "/app", version)
    kernel.count(5)  # in other programs of the group, before
    monkeypatch.setattr("qwen_image_tool.exits.ROOT", tmp_path)
    worker = WorkerProcess([sys.executable, "-c", "import time; time.sleep(1000)"])
    if counted:
        kernel.count(6)
    os.kill(worker.pid, signal.SIGKILL)
    end = worker.next_report(30)
    worker.end()
    assert isinstance(end, Exit)
    assert explain(end.code, end.output, end.oom_kills).kind == ("memory" if counted else "killed")
