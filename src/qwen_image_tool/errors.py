"""Every error a user can meet. Each one says what happened (`message`) and what to do (`hint`).

Faces turn them into text; `exit_code` is what the command line ends with. TROUBLES is the one table
of what can go wrong under a job: the sentences for what has no message of its own (a process that
died), and what was kept.
"""

import errno
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

TroubleKind = Literal[
    "request",
    "gpu memory",
    "memory",
    "disk full",
    "not writable",
    "network",
    "missing file",
    "broken file",
    "wrong component",
    "old driver",
    "torch without GPU",
    "GPU failed",
    "broken picture",
    "unsupported size",
    "crashed",
    "killed",
    "twice interrupted",
    "crash loop",
    "database",
    "other",
]


class Trouble(NamedTuple):
    """What happened, what was kept, and what to press."""

    happened: str
    kept: str
    press: str


_QUEUE = "The job's settings and everything saved before are kept."
TROUBLES: dict[TroubleKind, Trouble] = {
    "request": Trouble("The request can't be carried out.", _QUEUE, "Change it and try again."),
    "gpu memory": Trouble(
        "The GPU's memory ran out.",
        _QUEUE,
        "Close programs that use the GPU, or choose a smaller size; then press Retry.",
    ),
    "memory": Trouble(
        "The computer's memory ran out, and the system ended the process that draws.",
        _QUEUE,
        "Close other programs (on Windows: make the page file larger), or choose a smaller model;"
        " then press Retry.",
    ),
    "disk full": Trouble(
        "The disk is full.", _QUEUE, "Free some space or choose another folder; then press Retry."
    ),
    "not writable": Trouble(
        "A folder can't be written.",
        _QUEUE,
        "Allow writing to it or choose another folder; then press Retry.",
    ),
    "network": Trouble(
        "The network failed.",
        "What was downloaded stays and is not fetched again.",
        "Check the connection, then press Resume.",
    ),
    "missing file": Trouble(
        "A file of the model is not there.", _QUEUE, "Download the model, then press Retry."
    ),
    "broken file": Trouble(
        "A file of the model is damaged.", _QUEUE, "Press Repair for this model, then Retry."
    ),
    "wrong component": Trouble(
        "A component belongs to another model.",
        _QUEUE,
        "Press Repair for this model, then Retry.",
    ),
    "old driver": Trouble(
        "The graphics driver is too old for this torch.",
        _QUEUE,
        "Update the driver, restart the computer, then press Retry.",
    ),
    "torch without GPU": Trouble(
        "This torch was built without support for the GPU.",
        _QUEUE,
        "Run `./qit setup` (Windows: `qit setup`), then press Retry.",
    ),
    "GPU failed": Trouble(
        "The GPU or its driver reported an error.",
        _QUEUE,
        "Press Retry; if it comes back, restart the computer and update the driver.",
    ),
    "broken picture": Trouble(
        "The model computed no valid picture: it has values that are not numbers.",
        _QUEUE + " Nothing black was saved.",
        "Press Retry; if it comes back, choose the exact mode or verify the model.",
    ),
    "unsupported size": Trouble(
        "The model can't draw this size.", _QUEUE, "Choose a size of the menu."
    ),
    "crashed": Trouble(
        "The process that draws crashed.", _QUEUE, "Press Retry; the log has its last lines."
    ),
    "killed": Trouble("The process that draws was ended from outside.", _QUEUE, "Press Retry."),
    "twice interrupted": Trouble(
        "The program was ended twice while this job ran, so it is not started a third time.",
        _QUEUE,
        "Press Retry.",
    ),
    "crash loop": Trouble(
        "The process that draws crashed three times in ten minutes.",
        "All jobs are kept, and the queue waits.",
        "Read the last error, then press Resume.",
    ),
    "database": Trouble("A database file is damaged.", "Pictures are files of their own.", ""),
    "other": Trouble("Something went wrong.", _QUEUE, "Press Retry; the log says more."),
}

# What a process wrote before it died -> what happened. The first that matches counts.
_SAID: tuple[tuple[str, TroubleKind], ...] = (
    (r"os error 1455|WinError 1455|paging file is too small", "memory"),
    (r"CUDA out of memory|HIP out of memory|torch\.OutOfMemoryError", "gpu memory"),
    (r"CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED", "gpu memory"),
    (r"cudaErrorMemoryAllocation|(CUDA|HIP) error: out of memory", "gpu memory"),
    (r"MPS backend out of memory|ERROR_OUT_OF_DEVICE_MEMORY", "gpu memory"),  # Apple's; Intel's
    (r"could not create a primitive$|can't start new thread", "memory"),  # oneDNN's; Python's
    (r"MemoryError|DefaultCPUAllocator|[Cc]annot allocate memory|std::bad_alloc", "memory"),
    (r"\[Errno 12\]|glibc error: .*out of memory", "memory"),
    (r"failed to map segment from shared object(?!: Operation not permitted)", "memory"),
    (r"OpenBLAS error: Memory allocation|libgomp: Thread creation failed", "memory"),
    (r"SystemError: .*without (setting an exception|exception set)", "memory"),  # Python's own
    (r"NVIDIA driver on your system is too old|driver version is insufficient", "old driver"),
    (r"Torch not compiled with CUDA enabled|no kernel image is available", "torch without GPU"),
    (r"torch was built without support for", "torch without GPU"),
    (r"CUDA error|HIP error|CUBLAS_STATUS|CUDNN_STATUS|device-side assert", "GPU failed"),
    (r"No space left on device|WinError 112|Disk quota exceeded", "disk full"),
    (r"PermissionError|Read-only file system", "not writable"),
)


LINE = 300  # characters of an error of a library that are said
MEMORY: frozenset[TroubleKind | None] = frozenset(("gpu memory", "memory"))  # that ran out
_SENTENCE_ENDS = re.compile(r"(?<=[.!?]) (?=[A-Z`(])")


def sentences(said: str) -> list[str]:
    """Those of what the program says."""
    return _SENTENCE_ENDS.split(said)


def trouble_in(output: str) -> TroubleKind | None:
    """What the last output of a process says went wrong; None where it says nothing known."""
    found = (kind for pattern, kind in _SAID if re.search(pattern, output, re.MULTILINE))
    return next(found, None)


def trouble_of(error: BaseException) -> tuple[TroubleKind | None, str]:
    """What an error says went wrong, or the first that it came from which says something known; and
    the line that says it. Libraries wrap their errors: where memory ran out, numpy gives general
    advice, and diffusers tells of a file that can't be loaded."""
    for each in _origins(error):
        if kind := trouble_in("".join(traceback.format_exception_only(each))):
            rows = (row[:LINE] for row in _rows(each) if trouble_in(row))
            return kind, next(rows, first_line(each))
    return None, first_line(error)


def unless_memory(error: BaseException) -> None:
    """Raise it again where memory ran out, whatever was being done with it."""
    if trouble_of(error)[0] in MEMORY:
        raise error


def first_line(error: BaseException) -> str:
    """Of those that an error has; the name of its type where it has none."""
    return next(_rows(error), type(error).__name__)[:LINE]


def _origins(error: BaseException) -> Iterator[BaseException]:
    """The error, what it came from, and so on."""
    each: BaseException | None = error
    seen = set[int]()
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)


def _rows(error: BaseException) -> Iterator[str]:
    return filter(None, (row.strip() for row in str(error).splitlines()))


@contextmanager
def memory_told(hint: str) -> Iterator[None]:
    """Turn what Python, libraries and the system raise where memory runs out into OutOfMemory."""
    try:
        yield
    except ToolError:
        raise
    except Exception as error:  # libraries wrap it in any class
        kind, said = trouble_of(error)
        if kind not in MEMORY:
            raise
        raise OutOfMemory(f"The memory ran out. {said.rstrip('.')}.", hint, kind) from error


class ToolError(Exception):
    """Base of all errors that are meant for people. `str()` says what happened and what to do."""

    exit_code = 1
    trouble: TroubleKind = "other"

    def __init__(self, message: str, hint: str = "", trouble: TroubleKind | None = None) -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint
        self.trouble = trouble or self.trouble

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class BadRequest(ToolError):
    """The request can't be carried out as it stands: a value is unknown or out of range."""

    trouble: TroubleKind = "request"
    exit_code = 2


class PromptTooLong(BadRequest):
    """The prompt has more tokens than the model reads."""


class ModelMissing(BadRequest):
    """The model's folder, a component or a file of it is not there."""

    trouble: TroubleKind = "missing file"


class ModelUnsupported(BadRequest):
    """The model is known, but this version can't run it yet."""


class OutputNotWritable(BadRequest):
    """The output folder can't take the pictures: no permission, no space, not a folder."""

    trouble: TroubleKind = "not writable"


class NotOurPicture(BadRequest):
    """The file carries no request of ours."""


class CannotRun(BadRequest):
    """No plan fits this machine; the hint names the nearest request that can."""

    trouble: TroubleKind = "memory"


class OutOfMemory(ToolError):
    """The machine ran out of GPU or main memory during the run."""

    trouble: TroubleKind = "memory"


class BrokenPicture(ToolError):
    """What came out is no picture: the device or a library computed wrongly."""

    trouble: TroubleKind = "broken picture"


class AttentionFailed(BrokenPicture):
    """The attention backend that was measured to be the fastest does not work here any more."""


class Cancelled(ToolError):
    """The user stopped the run; nothing was written."""

    exit_code = 130


FaultKind = Literal[
    "missing",
    "interrupted",
    "truncated",
    "too long",
    "zero-filled",
    "web page",
    "pointer",
    "header",
    "index",
    "swapped",
    "changed",
    "unreadable",
]


class ModelBroken(ModelMissing):
    """A file of the model is not what was published; `kind` names how."""

    def __init__(self, kind: FaultKind, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.kind: FaultKind = kind
        self.trouble = "wrong component" if kind in ("swapped", "index") else "broken file"


class LicenceNotAccepted(BadRequest):
    """The model's licence limits its use, and the user has not accepted it yet."""


FailureKind = Literal[
    "network",
    "stalled",
    "server",
    "busy",
    "tls",
    "redirect",
    "not found",
    "no access",
    "changed",
    "hash",
    "web page",
    "disk full",
    "not writable",
    "locked",
    "bad name",
]


_DOWNLOAD_TROUBLES: dict[FailureKind, TroubleKind] = {
    "disk full": "disk full",
    "not writable": "not writable",
    "hash": "broken file",
}


class DownloadFailed(ToolError):
    """A download that can't go on by itself; `kind` is its category. What came stays on disk."""

    def __init__(self, kind: FailureKind, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.kind: FailureKind = kind
        self.trouble = _DOWNLOAD_TROUBLES.get(kind, "network")


class Paused(ToolError):
    """The user paused a download; the next one goes on where it stopped."""

    exit_code = 130


class Unknown(BadRequest):
    """There is no job, picture or model with this id."""


class Busy(BadRequest):
    """What was asked for has to wait: another one is under way."""


class NotWritten(ToolError):
    """A file other than a picture could not be written."""

    trouble: TroubleKind = "not writable"

    @classmethod
    def of(cls, path: Path, error: OSError) -> "NotWritten":
        """With what the system says, and what to do about it."""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return cls(
            f"{path} can't be written: {error.strerror or error}.",
            "Free some space on that disk." if full else "Allow writing to it.",
            "disk full" if full else None,
        )


class DiskFull(NotWritten):
    """A database can't be written for want of space."""

    trouble: TroubleKind = "disk full"


class DatabaseBroken(ToolError):
    """A database file is damaged; what can be read of it is kept at the next start."""

    trouble: TroubleKind = "database"


class UnsupportedSize(BadRequest):
    """The model can't draw this size; the hint names the nearest one that it can."""

    trouble: TroubleKind = "unsupported size"
