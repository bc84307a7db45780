"""Exits: codes, last words and kernel counters become one sentence with the next step."""

from pathlib import Path

import pytest

from qwen_image_tool.errors import TROUBLES, trouble_in
from qwen_image_tool.exits import explain, oom_kills


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


def test_the_table_is_whole() -> None:
    for kind, trouble in TROUBLES.items():
        assert trouble.happened.endswith("."), kind
        assert trouble.kept.endswith("."), kind
        assert kind == "database" or trouble.press.endswith("."), kind
    assert trouble_in("nothing known") is None


def test_oom_counters_of_kernel_and_cgroups(tmp_path: Path) -> None:
    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    assert oom_kills(tmp_path) == 0
    write("proc/vmstat", "nr_free_pages 5\noom_kill 2\n")
    write("proc/self/cgroup", "0::/user/app\n4:memory:/box\n3:cpu,cpuacct:/x\n")
    write("sys/fs/cgroup/user/app/memory.events", "low 0\noom 1\noom_kill 3\n")
    write("sys/fs/cgroup/memory/box/memory.oom_control", "under_oom 0\noom_kill 4\n")
    assert oom_kills(tmp_path) == 9
    write("proc/vmstat", "garbage")
    assert oom_kills(tmp_path) == 7
