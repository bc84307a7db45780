"""A child process that ends with its parent, and the pipe between them.

On Windows the parent holds a Job Object, which closes with its last handle. On Linux the child asks
the kernel. Everywhere the end of the child's stdin means that the parent is gone.
"""

import ctypes
import os
import signal
import subprocess
import sys
from typing import Any, BinaryIO

ORPHANED = 75  # exit code of a child whose parent is gone
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

KILL_ON_JOB_CLOSE = 0x2000
EXTENDED_LIMITS = 9  # JobObjectExtendedLimitInformation


class _Basic(ctypes.Structure):
    _fields_ = (
        ("per_process_time", ctypes.c_int64),
        ("per_job_time", ctypes.c_int64),
        ("flags", ctypes.c_uint32),
        ("minimum_working_set", ctypes.c_size_t),
        ("maximum_working_set", ctypes.c_size_t),
        ("active_processes", ctypes.c_uint32),
        ("affinity", ctypes.c_size_t),
        ("priority", ctypes.c_uint32),
        ("scheduling", ctypes.c_uint32),
    )


class _Extended(ctypes.Structure):
    _fields_ = (
        ("basic", _Basic),
        ("io_counters", ctypes.c_uint64 * 6),
        ("process_memory", ctypes.c_size_t),
        ("job_memory", ctypes.c_size_t),
        ("peak_process_memory", ctypes.c_size_t),
        ("peak_job_memory", ctypes.c_size_t),
    )


def adopt(process: "subprocess.Popen[bytes]") -> None:
    """End `process` when this one ends. Not verified on Windows."""
    if sys.platform == "win32":
        put_in_job(process, ctypes.WinDLL("kernel32"))


def put_in_job(process: Any, kernel32: Any) -> None:
    """The handle of the job stays with the process object: both live as long as we watch it."""
    kernel32.CreateJobObjectW.restype = ctypes.c_void_p  # else a handle is cut to 32 bits
    job = ctypes.c_void_p(kernel32.CreateJobObjectW(None, None))
    limits = _Extended()
    limits.basic.flags = KILL_ON_JOB_CLOSE
    kernel32.SetInformationJobObject(
        job, EXTENDED_LIMITS, ctypes.byref(limits), ctypes.sizeof(limits)
    )
    kernel32.AssignProcessToJobObject(job, ctypes.c_void_p(int(process._handle)))
    process.qit_job = job


def private_stdout() -> BinaryIO:
    """The pipe to the parent; from now on print() and C libraries write to stderr instead."""
    reports = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return reports


def die_with_parent(parent: int) -> None:
    """On Linux the kernel ends this process with its parent; elsewhere the Job Object of the
    parent and the end of stdin do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's, which tells us
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it went between our start and the call
            os._exit(ORPHANED)
