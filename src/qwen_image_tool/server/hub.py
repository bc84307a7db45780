"""News in the event loop: one subscription to the feed, any number of listening clients."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

from qwen_image_tool.errors import ToolError
from qwen_image_tool.feed import EventNews, JobNews, News, PictureNews
from qwen_image_tool.jobs import Job
from qwen_image_tool.service import Service
from qwen_image_tool.types import Preview

QUEUE = 256  # news that a client may lag behind


class Ending(ToolError):
    """The server ends before the job: that one goes on at the next start."""

    code = "server_ending"

    def __init__(self) -> None:
        super().__init__(
            "QwenImageTool is being ended.", "The job is kept, and goes on at the next start."
        )


class Hub:
    """Made in the running event loop. A client that lags loses previews first, then its place: its
    queue ends, and it looks again."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._all: set[asyncio.Queue[News | None]] = set()
        self._of_job: dict[str, set[asyncio.Queue[News | None]]] = {}
        self.closed = False
        self._end = service.feed.subscribe(self._heard)

    def close(self) -> None:
        """End every client's stream; no news comes any more."""
        self._end()
        self.closed = True
        for queue in [*self._all, *(q for queues in self._of_job.values() for q in queues)]:
            _end(queue)

    async def everything(self) -> AsyncIterator[News]:
        """All news from now on, until the server ends or the client lags too far."""
        with self._listening(None) as queue:
            while (news := await queue.get()) is not None:
                yield news

    async def job(self, job: str) -> AsyncIterator[News]:
        """News of one job up to its end, which is the last."""
        with self._listening(job) as queue:
            while not self.closed:
                found = await asyncio.to_thread(self._service.jobs.get, job)
                if found.has_ended:
                    yield JobNews(job=found)
                    return
                while (news := await queue.get()) is not None:
                    yield news
                    if isinstance(news, JobNews) and news.job.has_ended:
                        return

    async def end_of(self, job: str) -> Job:
        """The job once it has ended. Raises Ending where the server ends first."""
        async for news in self.job(job):
            if isinstance(news, JobNews) and news.job.has_ended:
                return news.job
        raise Ending

    @contextlib.contextmanager
    def _listening(self, job: str | None) -> Iterator[asyncio.Queue[News | None]]:
        queue: asyncio.Queue[News | None] = asyncio.Queue(QUEUE)
        queues = self._all if job is None else self._of_job.setdefault(job, set())
        queues.add(queue)
        try:
            yield queue
        finally:
            queues.discard(queue)
            if job is not None and not queues:
                self._of_job.pop(job, None)

    def _heard(self, news: News) -> None:
        """In the thread that brings it."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._pass_on, news)

    def _pass_on(self, news: News) -> None:
        for queue in [*self._all, *self._of_job.get(_job_of(news), ())]:
            preview = isinstance(news, EventNews) and isinstance(news.event, Preview)
            if queue.qsize() < QUEUE // 2 or (not preview and not queue.full()):
                queue.put_nowait(news)
            elif not preview:
                _end(queue)


def _end(queue: asyncio.Queue[News | None]) -> None:
    while not queue.empty():
        queue.get_nowait()
    queue.put_nowait(None)


def _job_of(news: News) -> str:
    if isinstance(news, JobNews):
        return news.job.id
    return news.job if isinstance(news, EventNews | PictureNews) else ""
