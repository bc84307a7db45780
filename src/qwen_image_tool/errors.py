"""Every error a user can meet. Each one says what happened (`message`) and what to do (`hint`).

Faces turn them into text; `exit_code` is what the command line ends with.
"""

from typing import Literal


class ToolError(Exception):
    """Base of all errors that are meant for people. `str()` says what happened and what to do."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class BadRequest(ToolError):
    """The request can't be carried out as it stands: a value is unknown or out of range."""

    exit_code = 2


class PromptTooLong(BadRequest):
    """The prompt has more tokens than the model reads."""


class ModelMissing(BadRequest):
    """The model's folder, a component or a file of it is not there."""


class ModelUnsupported(BadRequest):
    """The model is known, but this version can't run it yet."""


class OutputNotWritable(BadRequest):
    """The output folder can't take the pictures: no permission, no space, not a folder."""


class NotOurPicture(BadRequest):
    """The file carries no request of ours."""


class CannotRun(BadRequest):
    """No plan fits this machine; the hint names the nearest request that can."""


class OutOfMemory(ToolError):
    """The machine ran out of GPU or main memory during the run."""


class BrokenPicture(ToolError):
    """What came out is no picture: the device or a library computed wrongly."""


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


class DownloadFailed(ToolError):
    """A download that can't go on by itself; `kind` is its category. What came stays on disk."""

    def __init__(self, kind: FailureKind, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.kind: FailureKind = kind


class Paused(ToolError):
    """The user paused a download; the next one goes on where it stopped."""

    exit_code = 130
