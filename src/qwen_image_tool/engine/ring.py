"""Which block is on the device when: some reside there, the others take turns in a few slots.

A slot is a block's module over one preallocated buffer. Fill number f puts streamed block f mod m
into slot f mod k, and is started as soon as fill f - k has been used: the copies run ahead of the
computation by k blocks, and past the end of a step into the next.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import nn


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
        self._next = 0  # number of the fill that the next streamed block finds
        if self._streamed and (transfer is None or not 1 < len(slots) < len(self._streamed)):
            raise ValueError(f"{len(self._streamed)} streamed blocks do not fit {len(slots)} slots")
        if self._streamed:
            self._fill_all()

    def walk(self) -> Iterator[tuple[int, nn.Module]]:
        """Every block once, in order, ready to run. After a walk that was left early the next one
        fills the slots anew."""
        if self._streamed and self._next % len(self._streamed):
            self._fill_all()
        for block in range(self._count):
            if block in self._residents:
                yield block, self._residents[block]
                continue
            assert self._transfer
            slot = self._next % len(self._slots)
            self._transfer.wait(slot)
            try:
                yield block, self._slots[slot]
            finally:
                self._transfer.release(slot)
                self._start(self._next + len(self._slots))
                self._next += 1

    def close(self) -> None:
        if self._transfer:
            self._transfer.close()

    def _start(self, fill: int) -> None:
        assert self._transfer
        self._transfer.start(self._streamed[fill % len(self._streamed)], fill % len(self._slots))

    def _fill_all(self) -> None:
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
        self._filled[slot] = self._pool.submit(self._fill, block, self._slots[slot])

    def wait(self, slot: int) -> None:
        self._filled[slot].result()

    def release(self, slot: int) -> None:
        """Computation on the CPU has ended when it returns."""

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class PinnedCopies:
    """A Transfer from slabs in page-locked host memory: one asynchronous copy a block on a stream
    of its own, ordered by events alone. `memory` holds all slabs and is page-locked here, exactly
    as large as it is. Raises RuntimeError where the system refuses."""

    def __init__(
        self,
        memory: torch.Tensor,
        slabs: Mapping[int, torch.Tensor],
        slots: Sequence[torch.Tensor],
    ) -> None:
        self._memory, self._slabs, self._slots = memory, slabs, slots
        torch.cuda.check_error(
            torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
        )
        self._stream = torch.cuda.Stream(slots[0].device)
        self._filled = [torch.cuda.Event() for _ in slots]
        self._free = [torch.cuda.Event() for _ in slots]

    def start(self, block: int, slot: int) -> None:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._free[slot])
            self._slots[slot].copy_(self._slabs[block], non_blocking=True)
            self._filled[slot].record(self._stream)

    def wait(self, slot: int) -> None:
        torch.cuda.current_stream().wait_event(self._filled[slot])

    def release(self, slot: int) -> None:
        self._free[slot].record()

    def close(self) -> None:
        self._stream.synchronize()
        torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr()))


class StagedCopies:
    """A Transfer from pageable memory or from disk: a thread fills a page-locked staging buffer and
    sends it on, beside the computation."""

    def __init__(self, fill: Fill, slots: Sequence[torch.Tensor]) -> None:
        self._fill, self._slots = fill, slots
        self._stream = torch.cuda.Stream(slots[0].device)
        self._staging = [torch.empty_like(slot, device="cpu").pin_memory() for slot in slots]
        self._sent = [torch.cuda.Event() for _ in slots]
        self._free = [torch.cuda.Event() for _ in slots]
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ring")
        self._filled: dict[int, Future[object]] = {}

    def start(self, block: int, slot: int) -> None:
        self._filled[slot] = self._pool.submit(self._send, block, slot)

    @torch.inference_mode()  # a thread's own state
    def _send(self, block: int, slot: int) -> None:
        self._sent[slot].synchronize()  # the buffer is still on its way from its last fill
        self._fill(block, self._staging[slot])
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._free[slot])
            self._slots[slot].copy_(self._staging[slot], non_blocking=True)
            self._sent[slot].record(self._stream)

    def wait(self, slot: int) -> None:
        self._filled[slot].result()
        torch.cuda.current_stream().wait_event(self._sent[slot])

    def release(self, slot: int) -> None:
        self._free[slot].record()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._stream.synchronize()
