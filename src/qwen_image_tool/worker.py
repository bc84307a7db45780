"""The child process that owns the GPU: orders on stdin, reports on stdout, one JSON object a line.

Started by the supervisor as `python -m qwen_image_tool.worker PARENT`, with its own process id. It
may die of whatever torch or a driver does; it ends with its parent. Everything that libraries print
goes to stderr, whose last lines the supervisor keeps.
"""

import logging
import os
import queue
import sys
import threading
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError

from qwen_image_tool import logs
from qwen_image_tool.app import App
from qwen_image_tool.errors import Cancelled, OutOfMemory, ToolError, trouble_of
from qwen_image_tool.lifeline import ORPHANED, die_with_parent, private_stdout
from qwen_image_tool.messages import (
    Failed,
    Finished,
    Happened,
    Order,
    Report,
    Run,
    line,
    order_adapter,
)
from qwen_image_tool.settings import load_settings
from qwen_image_tool.types import Event, Failure

UNREADABLE = 65  # exit code of a worker that doesn't understand its supervisor
_log = logging.getLogger(__name__)


def main() -> None:
    reports = private_stdout()
    die_with_parent(int(sys.argv[1]))
    settings = load_settings()
    logs.set_up(settings.logs)
    worker = Worker(App(settings, previews=True), reports)
    threading.Thread(target=worker.listen, args=(sys.stdin.buffer,), daemon=True).start()
    worker.serve()


class Worker:
    """Runs one order after the other in the thread of `serve`; `listen` is another's."""

    def __init__(self, app: App, reports: BinaryIO) -> None:
        self._app = app
        self._reports = reports
        self._runs: queue.SimpleQueue[Run] = queue.SimpleQueue()
        self._stopped: set[str] = set()

    def listen(self, orders: BinaryIO) -> None:
        """Read orders until the supervisor is gone, or says what this version does not know: then
        end the process at once, for a job that nobody draws would be running for ever."""
        for text in orders:
            try:
                order = order_adapter.validate_json(text)
            except ValidationError as error:
                fault = error.errors()[0]  # the error itself has the prompt, which may say anything
                print(
                    f"An order can't be read: {fault['msg']} ({'.'.join(map(str, fault['loc']))})."
                    " Where the program was updated while its server ran, start the server again.",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(UNREADABLE)
            self._take(order)
        os._exit(ORPHANED)

    def serve(self) -> None:
        while True:
            self.run(self._runs.get())

    def run(self, run: Run) -> None:
        try:
            result = self._app.generate(
                run.request,
                lambda event: self._happened(run, event),
                lambda: run.job in self._stopped,
                output=Path(run.output),
                anyway=run.anyway,
                job=run.job,
                tried=run.tried,
                trouble=run.trouble,
            )
        except ToolError as error:
            logs.record_failure(error)
            # RAM may be had again once this process has ended, with all that it holds
            helpless = isinstance(error, OutOfMemory) and error.trouble == "memory"
            self._report(
                Failed(
                    job=run.job,
                    failure=Failure.of(error),
                    foreseen=not helpless,
                    stopped=isinstance(error, Cancelled),
                )
            )
        except Exception as error:  # noqa: BLE001  a library fails in any way; the worker goes on
            self._report(Failed(job=run.job, failure=unforeseen(error), foreseen=False))
        else:
            self._report(Finished(job=run.job, seconds=result.seconds))

    def _take(self, order: Order) -> None:
        if isinstance(order, Run):
            self._runs.put(order)
        else:
            self._stopped.add(order.job)

    def _happened(self, run: Run, event: Event) -> None:
        self._report(Happened(job=run.job, event=event))

    def _report(self, report: Report) -> None:
        self._reports.write(line(report))
        self._reports.flush()


def unforeseen(error: Exception) -> Failure:
    """What the table says of an error that no part of ours explains; the log has all of it."""
    _log.error("The run failed: %s", error, exc_info=error)
    kind, said = trouble_of(error)
    return Failure.from_table(kind or "other", f"({said})")


if __name__ == "__main__":
    main()
