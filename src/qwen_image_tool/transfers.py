"""Downloads, imports, checks and repairs of models in the background, one at a time.

What came of a download stays on disk whatever happens, so that starting it again goes on.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import Field

from qwen_image_tool.catalog import Model
from qwen_image_tool.errors import (
    Busy,
    Cancelled,
    LicenceNotAccepted,
    Paused,
    ToolError,
    Unknown,
)
from qwen_image_tool.store.download import Control
from qwen_image_tool.store.library import Library
from qwen_image_tool.store.verify import Fault
from qwen_image_tool.types import (
    DownloadProgress,
    Event,
    Failure,
    Notice,
    Value,
    VerifyProgress,
)

# `update`: go on to the newest revision; `again`: fetch all anew; `check`: without reading every
# byte, which `verify` does
Action = Literal["download", "update", "again", "import", "check", "verify", "repair"]
FETCHING: tuple[Action, ...] = ("download", "update", "again")
NOTES = 5  # that are kept of a transfer
AGREE = "Read it, and ask again with `accept_licence` if you agree."


class Transfer(Value):
    """Work on one model's files, under way or over. `faults`: what a check found. `source`: the
    file that is imported."""

    model: str
    variant: str = ""
    source: str = ""
    action: Action
    state: Literal["running", "paused", "cancelled", "done", "failed"] = "running"
    progress: DownloadProgress | VerifyProgress | None = None
    faults: tuple[Fault, ...] = ()
    notes: tuple[str, ...] = Field(default=(), description="What it said last")
    failure: Failure | None = Field(default=None, description="Where it failed or was paused")


class Transfers:
    """`tell` is called with every change, in their order, from the thread that works; it must not
    block, nor ask here. `ended` counts the works that came to an end."""

    def __init__(self, library: Library, tell: Callable[[Transfer], None]) -> None:
        self._library, self._tell = library, tell
        self._lock = threading.Lock()
        self.ended = 0
        self._all: dict[str, Transfer] = {}
        self._control: Control | None = None
        self._thread: threading.Thread | None = None

    def all(self) -> tuple[Transfer, ...]:
        """The last one of each model."""
        with self._lock:
            return tuple(self._all.values())

    def start(
        self,
        model: Model,
        action: Action,
        variant: str = "",
        accept_licence: bool = False,
        source: Path | None = None,
    ) -> Transfer:
        """Begin in the background; `source` is the file to import. Raises Busy while another one
        runs, and at once what asking needs no network to know: LicenceNotAccepted, BadRequest."""
        if action in FETCHING:
            model.variant(variant)
            self._check_licence(model, accept_licence)
        with self._lock:
            if self._thread:
                raise Busy("Another model is being worked on.", "Wait for it, or pause it.")
            transfer = Transfer(
                model=model.id, variant=variant, action=action, source=str(source or "")
            )
            self._all[model.id] = transfer
            self._control = control = Control()
            thread = threading.Thread(
                target=self._run,
                args=(transfer, model, control, accept_licence),
                name="transfer",
                daemon=True,
            )
            thread.start()
            self._thread = thread
        return transfer

    def stop(self, model: str, keep: bool) -> Transfer:
        """Pause it, or cancel it and throw away what came. Raises Unknown where none runs."""
        with self._lock:
            transfer = self._all.get(model)
            if transfer is None or transfer.state != "running" or self._control is None:
                raise Unknown(f"Nothing is under way for {model!r}.", "It may be over.")
            if keep:
                self._control.pause()
            else:
                self._control.cancel()
        return transfer

    def forget(self, model: str) -> None:
        """What was done for a model that is deleted. Something that runs stays."""
        with self._lock:
            if model in self._all and self._all[model].state != "running":
                del self._all[model]

    def close(self) -> None:
        """Pause what runs, and wait for it."""
        with self._lock:
            control, thread = self._control, self._thread
        if control and thread:
            control.pause()
            thread.join(10)

    def _check_licence(self, model: Model, accept: bool) -> None:
        licence = self._library.catalog.licence_of(model)
        if not (licence.commercial or accept or self._library.accepted(model)):
            raise LicenceNotAccepted(
                f"{model.name} is under the {licence.name}, which allows no commercial use:"
                f" {licence.url}.",
                AGREE,
            )

    def _run(self, transfer: Transfer, model: Model, control: Control, accept: bool) -> None:
        def emit(event: Event) -> None:
            if isinstance(event, DownloadProgress | VerifyProgress):
                self._set(transfer.model, {"progress": event})
            elif isinstance(event, Notice):
                notes = self._all[transfer.model].notes
                self._set(transfer.model, {"notes": (*notes, event.text)[-NOTES:]})

        change: dict[str, object] = {"state": "done"}
        try:
            change["faults"] = self._work(transfer, model, control, accept, emit)
        except Paused as error:
            change = {"state": "paused", "failure": Failure.of(error)}
        except Cancelled:
            change = {"state": "cancelled"}
        except LicenceNotAccepted as error:  # its words are others than those agreed to
            failure = Failure.of(error).model_copy(update={"hint": AGREE})
            change = {"state": "failed", "failure": failure}
        except ToolError as error:
            change = {"state": "failed", "failure": Failure.of(error)}
        except Exception as error:  # noqa: BLE001  the thread's last word must not be silence
            change = {"state": "failed", "failure": Failure.from_table("other", f"({error})")}
        self._set(transfer.model, change, last=True)

    def _work(
        self,
        transfer: Transfer,
        model: Model,
        control: Control,
        accept: bool,
        emit: Callable[[Event], None],
    ) -> tuple[Fault, ...]:
        stopped, action = control.stopped.is_set, transfer.action
        match action:
            case "import":
                self._library.import_file(Path(transfer.source), model, emit, stopped)
            case "repair":
                return self._library.repair(model, emit, control)
            case "check" | "verify":
                return self._library.verify(model, action == "verify", emit, stopped)
            case _:
                self._library.download(
                    *(model, transfer.variant, emit, control, accept),
                    again=action == "again",
                    update=action == "update",
                )
        return ()

    def _set(self, model: str, change: dict[str, object], last: bool = False) -> None:
        with self._lock:
            self._all[model] = changed = self._all[model].model_copy(update=change)
            if last:  # with the state: who sees that it has ended may begin the next
                self._thread = None
                self.ended += 1
            self._tell(changed)
