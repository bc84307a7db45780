"""The Job Object of Windows, with a recording kernel32: not verified on Windows."""

import ctypes
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

from qwen_image_tool import lifeline


class Function:
    def __init__(self, name: str, calls: list[Any], result: int) -> None:
        self.name, self.calls, self.result = name, calls, result
        self.restype: Any = None

    def __call__(self, *arguments: Any) -> int:
        self.calls.append((self.name, arguments))
        return self.result


def test_the_child_is_put_in_a_job_that_ends_with_us() -> None:
    calls: list[Any] = []
    names = ("CreateJobObjectW", "SetInformationJobObject", "AssignProcessToJobObject")
    kernel32 = SimpleNamespace(**{name: Function(name, calls, 2**40 + 1) for name in names})
    process = SimpleNamespace(_handle=77)
    lifeline.put_in_job(process, kernel32)
    assert [name for name, _ in calls] == list(names)
    assert kernel32.CreateJobObjectW.restype is ctypes.c_void_p
    _, (job, kind, limits, size) = calls[1]
    assert (job.value, kind) == (2**40 + 1, 9)
    assert limits._obj.basic.flags == lifeline.KILL_ON_JOB_CLOSE
    assert size == ctypes.sizeof(lifeline._Extended)
    assert calls[2][1][1].value == 77
    assert process.qit_job is job


def test_elsewhere_it_does_nothing() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    lifeline.adopt(child)
    assert child.wait() == 0
