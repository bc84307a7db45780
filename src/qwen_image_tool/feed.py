"""News of a running service, for whoever listens."""

import contextlib
import threading
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field

from qwen_image_tool.gallery.index import Picture
from qwen_image_tool.jobs import Job, State
from qwen_image_tool.progress import Progress
from qwen_image_tool.transfers import Transfer
from qwen_image_tool.types import Event, Failure, Value


class QueueState(Value):
    """The queue as a whole. `halted`: why it waits for a person."""

    counts: dict[State, int]
    paused: bool = False
    halted: Failure | None = None
    running: str | None = Field(default=None, description="Id of the job under way")
    loaded: bool = Field(default=False, description="A worker is up, and may hold a model")


class JobNews(Value):
    """A job is new or has changed its state."""

    kind: Literal["job"] = "job"
    job: Job


class EventNews(Value):
    """Something happened in the job under way."""

    kind: Literal["event"] = "event"
    job: str
    event: Event
    progress: Progress


class PictureNews(Value):
    """A picture was saved."""

    kind: Literal["picture"] = "picture"
    job: str
    picture: Picture


class QueueNews(Value):
    kind: Literal["queue"] = "queue"
    queue: QueueState


class TransferNews(Value):
    """A download, a check or a repair goes on."""

    kind: Literal["transfer"] = "transfer"
    transfer: Transfer


News = Annotated[
    JobNews | EventNews | PictureNews | QueueNews | TransferNews, Field(discriminator="kind")
]
Listener = Callable[[News], None]


class Feed:
    """Passes news on, in the thread that brings them: a listener must not block."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: list[Listener] = []

    def publish(self, news: News) -> None:
        with self._lock:
            listeners = tuple(self._listeners)
        for listener in listeners:
            listener(news)

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Returns what ends the subscription."""
        with self._lock:
            self._listeners.append(listener)

        def end() -> None:
            with self._lock, contextlib.suppress(ValueError):
                self._listeners.remove(listener)

        return end
