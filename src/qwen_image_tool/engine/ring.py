"""Which block is on the device when: some reside there, the others take turns in a few slots.

A slot is a block's module over one preallocated buffer. Fill number f puts streamed block f mod m
into slot f mod k, and is started as soon as fill f - k has been used: the copies run ahead of the
computation by k blocks, past the end of a walk into the one that follows.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import nn

from qwen_image_tool.engine.host import HostMemory


class Transfer(Protocol):
    """Moves blocks into slots, beside the computation."""

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

    def _begin(self) -> None:
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


class PinnedCopies:
    """A Transfer from page-locked host memory: one asynchronous copy a block on a stream of its
    own, ordered by events alone. `slab` gives a block's packed weights there."""

    def __init__(self, slab: Callable[[int], torch.Tensor], slots: Sequence[torch.Tensor]) -> None:
        self._slab, self._slots = slab, slots
        self._stream = copy_stream(slots[0].device)
        self._filled = [torch.cuda.Event() for _ in slots]
        self._free = [torch.cuda.Event() for _ in slots]

    def start(self, block: int, slot: int) -> None:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._free[slot])
            self._slots[slot].copy_(self._slab(block), non_blocking=True)
            self._filled[slot].record(self._stream)

    def wait(self, slot: int) -> None:
        torch.cuda.current_stream().wait_event(self._filled[slot])

    def release(self, slot: int) -> None:
        self._free[slot].record()

    def close(self) -> None:
        self._stream.synchronize()


class StagedCopies:
    """A Transfer from pageable memory or from disk: a thread fills one of two page-locked buffers
    and sends it on, while the other is on its way."""

    def __init__(self, fill: Fill, slots: Sequence[torch.Tensor]) -> None:
        self._fill, self._slots = fill, slots
        self._stream = copy_stream(slots[0].device)
        self._staging = [HostMemory(slots[0].nbytes) for _ in range(min(2, len(slots)))]
        for memory in self._staging:
            memory.lock()
        self._sent = [torch.cuda.Event() for _ in self._staging]
        self._filled = [torch.cuda.Event() for _ in slots]
        self._free = [torch.cuda.Event() for _ in slots]
        self._turn = itertools.cycle(range(len(self._staging)))
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ring")
        self._sending: dict[int, Future[object]] = {}

    def start(self, block: int, slot: int) -> None:
        self._sending[slot] = self._pool.submit(self._send, block, slot)

    @torch.inference_mode()  # a thread's own state
    def _send(self, block: int, slot: int) -> None:
        turn = next(self._turn)
        staging = self._staging[turn].tensor
        self._sent[turn].synchronize()  # the buffer may still be on its way
        self._fill(block, staging)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._free[slot])
            self._slots[slot].copy_(staging, non_blocking=True)
            self._sent[turn].record(self._stream)
            self._filled[slot].record(self._stream)

    def wait(self, slot: int) -> None:
        self._sending[slot].result()
        torch.cuda.current_stream().wait_event(self._filled[slot])

    def release(self, slot: int) -> None:
        self._free[slot].record()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._stream.synchronize()
        for memory in self._staging:
            memory.close()


def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream for copies into memory that the computation before it may still use."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream
