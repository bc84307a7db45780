"""Waiting for a server while being ready to stop: what the system waits for can't be interrupted,
so another thread waits."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

LOOK_EVERY = 0.1  # seconds

Answer = TypeVar("Answer")
Check = Callable[[], None]  # raises where the work is to stop


def patiently(
    ask: Callable[[], Answer], check: Check, left: Callable[[Future[Answer]], None]
) -> Answer:
    """What `ask` returns or raises. Where `check` raises meanwhile, that is raised at once, and
    `left` gets the answer when it comes after all."""
    answer: Future[Answer] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:  # noqa: BLE001  it is raised in the thread that asked
            answer.set_exception(error)

    threading.Thread(target=run, name="ask", daemon=True).start()
    try:
        while not wait((answer,), LOOK_EVERY).done:
            check()
    except BaseException:
        answer.add_done_callback(left)
        raise
    return answer.result()


def sleep(seconds: float, check: Check) -> None:
    """As long as `seconds`, unless `check` raises."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        time.sleep(min(left, LOOK_EVERY))
        check()
