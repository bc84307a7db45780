"""A GPU in words: streams whose work is done in any order that their events allow."""

import contextlib
import itertools
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch


class AsyncGpu:
    """Takes the place of torch.cuda's streams and events. Nothing is done when it is launched: what
    may run next is drawn by chance, so that an order that no event asks for is broken sooner or
    later."""

    def __init__(self, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self._chance = random.Random(seed)
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        self._done: set[int] = set()
        self._streams: list[Stream] = []
        self._current = threading.local()
        self.computing = Stream(self)
        for name, stands in {
            "Event": lambda: Event(self),
            "Stream": lambda _: Stream(self),
            "stream": self._on,
            "current_stream": lambda *_: getattr(self._current, "stream", self.computing),
        }.items():
            monkeypatch.setattr(torch.cuda, name, stands)

    def add(self, stream: "Stream") -> None:
        # One stream may be far slower than another
        stream.weight = self._chance.choice((1, 1, 30))
        self._streams.append(stream)

    def current(self) -> "Stream":
        return getattr(self._current, "stream", self.computing)

    def launch(self, stream: "Stream", work: Callable[[], object], after: int = 0) -> int:
        """`work` on `stream`, once what has the number `after` is done; returns its own number."""
        with self._lock:
            number = next(self._numbers)
            stream.queue.append((number, after, work))
            return number

    def finish(self, until: int | None = None) -> None:
        """Work on until this number, or all, is done."""
        with self._lock:
            while until not in self._done:
                ready = [s for s in self._streams if s.queue and self._may(s.queue[0])]
                if not ready:
                    assert until is None, "what is waited for was never launched"
                    assert not any(stream.queue for stream in self._streams), (
                        "streams wait for ever"
                    )
                    return
                [stream] = self._chance.choices(ready, [s.weight for s in ready])
                number, _, work = stream.queue.popleft()
                work()
                self._done.add(number)

    def _may(self, launched: tuple[int, int, Any]) -> bool:
        return not launched[1] or launched[1] in self._done

    @contextlib.contextmanager
    def _on(self, stream: "Stream") -> Iterator[None]:
        before = self.current()
        self._current.stream = stream
        try:
            yield
        finally:
            self._current.stream = before


class Stream:
    def __init__(self, gpu: AsyncGpu) -> None:
        self._gpu = gpu
        self.queue: deque[tuple[int, int, Callable[[], object]]] = deque()
        self.last = 0
        self.weight = 1
        gpu.add(self)

    def launch(self, work: Callable[[], object], after: int = 0) -> int:
        self.last = self._gpu.launch(self, work, after)
        return self.last

    def wait_event(self, event: "Event") -> None:
        self.launch(lambda: None, event.number)

    def wait_stream(self, other: "Stream") -> None:
        self.launch(lambda: None, other.last)

    def synchronize(self) -> None:
        if self.last:
            self._gpu.finish(self.last)


class Event:
    """One that was never recorded is waited for by nobody, as CUDA's."""

    def __init__(self, gpu: AsyncGpu) -> None:
        self._gpu, self.number = gpu, 0

    def record(self, stream: Stream | None = None) -> None:
        self.number = (stream or self._gpu.current()).launch(lambda: None)

    def synchronize(self) -> None:
        if self.number:
            self._gpu.finish(self.number)


class Slot:
    """Device memory for one block. A copy into it is done later, of what the source holds then."""

    device = torch.device("cuda")

    def __init__(self, gpu: AsyncGpu, size: int) -> None:
        self._gpu, self.nbytes, self.holds = gpu, size, torch.zeros(size, dtype=torch.uint8)

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> None:
        assert non_blocking
        self._gpu.current().launch(lambda: self.holds.copy_(source))


class Cudart:
    """CUDA's runtime, as far as it locks pages; `refuses` from so many on."""

    def __init__(self, refuses: int = 1 << 60) -> None:
        self.locked: dict[int, int] = {}
        self._refuses = refuses

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        assert flags == 0
        if len(self.locked) >= self._refuses:
            return 2  # cudaErrorMemoryAllocation
        self.locked[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.locked[address]
        return 0
