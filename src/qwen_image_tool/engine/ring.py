"""Which block is on the device when: some reside there, the others take turns in a few slots.

A slot is a block's module over one preallocated buffer. Fill number f puts streamed block f mod m
into slot f mod k, and is started as soon as fill f - k has been used: the copies run ahead of the
computation by k blocks, past the end of a walk into the one that follows. A transfer is told a walk
before what it will fill, so that it reads from a slow disk further ahead, into memory of its own.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol

import torch
from torch import nn

from qwen_image_tool.engine.host import HostMemory


class Transfer(Protocol):
    """Moves blocks into slots, beside the computation."""

    def expect(self, blocks: Sequence[int]) -> None:
        """These are started next, in this order, after those that are expected already."""

    def start(self, block: int, slot: int) -> None:
        """Begin to fill `slot` with `block`, once what was released there is computed."""

    def wait(self, slot: int) -> None:
        """Let the computation that follows wait until `slot` is filled."""

    def release(self, slot: int) -> None:
        """The computation so far was the last that needs what `slot` holds."""

    def close(self) -> None:
        """End what runs in the background."""


class Ring:
    """`count` blocks in their order. `residents` maps block numbers to modules; `slots` are the
    modules that the other blocks take turns in, filled by `transfer`."""

    def __init__(
        self,
        count: int,
        residents: Mapping[int, nn.Module],
        slots: Sequence[nn.Module],
        transfer: Transfer | None,
    ) -> None:
        self._count = count
        self._residents = residents
        self._slots = slots
        self._transfer = transfer
        self._streamed = [block for block in range(count) if block not in residents]
        # Number of the fill that the next walk begins with; None where the slots hold nothing
        self._next: int | None = None
        if self._streamed and (transfer is None or not 1 <= len(slots) <= len(self._streamed)):
            raise ValueError(f"{len(self._streamed)} streamed blocks do not fit {len(slots)} slots")

    def walk(self, last: bool = False) -> Iterator[tuple[int, nn.Module]]:
        """Every block once, in order, ready to run; the first fills begin at this call. The end of
        a walk fills the slots for the next one, unless it is the `last`. After one that was left
        early the next walk fills them anew."""
        if self._next is None:
            self._begin()
        return self._take_turns(last)

    def _take_turns(self, last: bool) -> Iterator[tuple[int, nn.Module]]:
        fill, self._next = self._next or 0, None
        fills = fill + len(self._streamed)
        if not last:
            self._expect()  # the next walk
        for block in range(self._count):
            if block in self._residents:
                yield block, self._residents[block]
                continue
            assert self._transfer
            slot = fill % len(self._slots)
            self._transfer.wait(slot)
            try:
                yield block, self._slots[slot]
            finally:
                self._transfer.release(slot)
            if not last or fill + len(self._slots) < fills:
                self._start(fill + len(self._slots))
            fill += 1
        self._next = None if last else fill

    def close(self) -> None:
        if self._transfer:
            self._transfer.close()

    def _start(self, fill: int) -> None:
        assert self._transfer
        self._transfer.start(self._streamed[fill % len(self._streamed)], fill % len(self._slots))

    def _expect(self) -> None:
        if self._transfer:
            self._transfer.expect(self._streamed)

    def _begin(self) -> None:
        self._expect()
        for fill in range(len(self._slots)):
            self._start(fill)
        self._next = 0


def interleaved(count: int, residents: int) -> list[int]:
    """Which `residents` of `count` blocks stay: spread evenly, so that every streamed block has
    about the same computation to hide behind."""
    streamed = count - residents
    gone = {int((i + 0.5) * count / streamed) for i in range(streamed)}
    return [block for block in range(count) if block not in gone]


class Fill(Protocol):
    """Puts a block's packed weights into host memory."""

    def __call__(self, block: int, slab: torch.Tensor, /) -> object: ...


class Background:
    """A Transfer whose slots are in host memory: a thread fills them (from disk)."""

    def __init__(self, fill: Fill, slots: Sequence[torch.Tensor]) -> None:
        self._fill = fill
        self._slots = slots
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ring")
        self._filled: dict[int, Future[object]] = {}

    def expect(self, blocks: Sequence[int]) -> None:
        """It reads no further ahead than its slots reach."""

    def start(self, block: int, slot: int) -> None:
        self._filled[slot] = self._pool.submit(self._send, block, slot)

    @torch.inference_mode()  # a thread's own state
    def _send(self, block: int, slot: int) -> None:
        self._fill(block, self._slots[slot])

    def wait(self, slot: int) -> None:
        self._filled[slot].result()

    def release(self, slot: int) -> None:
        """Computation on the CPU has ended when it returns."""

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class PlainCopies(Background):
    """A Transfer to a device without streams of ours (Apple, Intel; not verified on either): a
    thread fills a buffer in host memory and copies it to the slot."""

    def __init__(self, fill: Fill, slots: Sequence[torch.Tensor]) -> None:
        super().__init__(fill, slots)
        self._buffer = torch.empty_like(slots[0], device="cpu")

    @torch.inference_mode()
    def _send(self, block: int, slot: int) -> None:
        self._fill(block, self._buffer)
        self._slots[slot].copy_(self._buffer)

    def release(self, slot: int) -> None:  # noqa: ARG002
        """The next fill of a slot may start: what is computed there has to be done."""
        torch.accelerator.synchronize()


@dataclass(frozen=True)
class Buffer:
    """Page-locked memory for one block; `sent`: when what it held has left it."""

    memory: HostMemory
    sent: torch.cuda.Event


class Staging:
    """`count` buffers of `size` bytes. A thread fills them with what is expected, in that order, as
    soon as one is free, so that a disk works on while other blocks are sent and computed."""

    def __init__(self, fill: Fill, size: int, count: int) -> None:
        self._fill = fill
        self._buffers = [Buffer(HostMemory(size), torch.cuda.Event()) for _ in range(count)]
        self._free: SimpleQueue[Buffer | None] = SimpleQueue()
        for buffer in self._buffers:
            buffer.memory.lock()
            self._free.put(buffer)
        self._coming: deque[tuple[int, Future[Buffer]]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="staging")

    def expect(self, blocks: Sequence[int]) -> None:
        """These are taken next, after those that are expected already."""
        self._coming.extend((block, self._pool.submit(self._read, block)) for block in blocks)

    def take(self, block: int) -> Buffer:
        """The buffer with `block`, once it is filled; then `give_back` it. What was expected before
        `block` is let go of: its walk was left early. Raises what the fill raised."""
        number, coming = self._coming.popleft()
        while number != block:
            self.give_back(coming.result())
            number, coming = self._coming.popleft()
        return coming.result()

    def give_back(self, buffer: Buffer) -> None:
        """It is filled anew, once what it holds is sent."""
        self._free.put(buffer)

    def close(self) -> None:
        """What is sent has left the buffers."""
        self._free.put(None)
        self._pool.shutdown(cancel_futures=True)
        for buffer in self._buffers:
            buffer.memory.close()

    @torch.inference_mode()  # a thread's own state
    def _read(self, block: int) -> Buffer:
        buffer = self._free.get()
        if buffer is None:  # closed
            raise CancelledError
        try:
            buffer.sent.synchronize()
            self._fill(block, buffer.memory.tensor)
        except BaseException:
            self._free.put(buffer)
            raise
        return buffer


class StreamCopies:
    """A Transfer by a copy stream, ordered by events alone. What `locked` has, page-locked, is
    copied from there; `fill` puts all else, from pageable memory or from disk, into a Staging."""

    def __init__(
        self, fill: Fill, slots: Sequence[torch.Tensor], locked: Mapping[int, torch.Tensor]
    ) -> None:
        self._fill, self._slots, self._locked = fill, slots, locked
        self._staging: Staging | None = None
        self._stream = copy_stream(slots[0].device)
        self._filled = [torch.cuda.Event() for _ in slots]
        self._free = [torch.cuda.Event() for _ in slots]
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ring")
        self._sending: dict[int, Future[None]] = {}

    def expect(self, blocks: Sequence[int]) -> None:
        staged = [block for block in blocks if block not in self._locked]
        if staged and self._staging is None:
            count = min(2, len(self._slots))
            self._staging = Staging(self._fill, self._slots[0].nbytes, count)
        if self._staging:
            self._staging.expect(staged)

    def start(self, block: int, slot: int) -> None:
        self._settle(slot)  # of a walk that was left early
        if block in self._locked:
            self._send(self._locked[block], slot)
        else:
            self._sending[slot] = self._pool.submit(self._send_on, block, slot)

    def wait(self, slot: int) -> None:
        self._settle(slot)
        torch.cuda.current_stream().wait_event(self._filled[slot])

    def release(self, slot: int) -> None:
        self._free[slot].record()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._stream.synchronize()
        if self._staging:
            self._staging.close()

    def _settle(self, slot: int) -> None:
        """The copy into `slot` is on the stream."""
        if sending := self._sending.pop(slot, None):
            sending.result()

    @torch.inference_mode()  # a thread's own state
    def _send_on(self, block: int, slot: int) -> None:
        assert self._staging
        buffer = self._staging.take(block)
        self._send(buffer.memory.tensor, slot)
        buffer.sent.record(self._stream)
        self._staging.give_back(buffer)

    def _send(self, slab: torch.Tensor, slot: int) -> None:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._free[slot])
            self._slots[slot].copy_(slab, non_blocking=True)
            self._filled[slot].record(self._stream)


def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream for copies into memory that the computation before it may still use."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream
