"""A model's parts where the plan wants them: repeated blocks in a ring, the rest on the device."""

import copy
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

import torch
from torch import nn

from qwen_image_tool.engine.host import HostMemory
from qwen_image_tool.engine.ring import (
    Background,
    Fill,
    PinnedCopies,
    PlainCopies,
    Ring,
    StagedCopies,
    Transfer,
    interleaved,
)
from qwen_image_tool.engine.weights import Checkpoint, Layout, Reader, Stored, set_parameter
from qwen_image_tool.types import Placement


class Blocks:
    """Repeated blocks of one shape, `prefix` + "0.", "1." ... in the checkpoint, placed by a plan.

    `modules` are on the meta device and have the parameters that are to be loaded. What stays, on
    the device or in host memory, is read in the background from here on, by `reader`. Raises
    ModelMissing where the checkpoint does not have them.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        prefix: str,
        checkpoint: Checkpoint,
        placement: Placement,
        device: torch.device,
        dtype: torch.dtype,
        reader: Reader,
    ) -> None:
        self._modules, self._prefix, self._checkpoint = modules, prefix, checkpoint
        self._placement, self._device = placement, device
        self._layout = Layout.of(modules[0], dtype)
        self._residents = interleaved(len(modules), placement.resident)
        kept = set(self._residents)
        self._streamed = [number for number in range(len(modules)) if number not in kept]
        self._slots = [copy.deepcopy(modules[0]) for _ in range(placement.slots)]
        self._ring: Ring | None = None
        self._host: dict[int, HostMemory] = {}
        self._closed, self._resting = threading.Event(), threading.Event()
        # What is missing is said before anything is read
        stored = [self._layout.stored(checkpoint, f"{prefix}{n}.") for n in range(len(modules))]
        slabs = [self._device_memory() for _ in self._residents]
        for number, slab in zip(self._residents, slabs, strict=True):
            self._layout.attach(modules[number], slab)
        in_host = self._streamed if placement.source in ("pinned", "pageable") else []
        sizes = [sum(s.bytes for s in each) for each in stored]
        reader.expect(sum(sizes[number] for number in (*self._residents, *in_host)))
        self._on_disk = 0 if in_host else sum(sizes[number] for number in self._streamed)
        self._reader = Reader()  # of what streams from disk
        loader = ThreadPoolExecutor(1, thread_name_prefix="load")
        self.loading: Future[None] = loader.submit(self._load, slabs, in_host, reader)
        loader.shutdown(wait=False)

    @property
    def modules(self) -> list[nn.Module]:
        """Those that walks give: the residents, and the slots."""
        return [*(self._modules[number] for number in self._residents), *self._slots]

    @property
    def unlocked(self) -> int:
        """How many blocks the system did not page-lock that are to be; once all is read."""
        wanted = self._host.values() if self._placement.source == "pinned" else ()
        return sum(not memory.locked for memory in wanted)

    def walk(
        self, last: bool = False, reader: Reader | None = None
    ) -> Iterator[tuple[int, nn.Module]]:
        """Every block in order, ready to run on the device; waits until what stays is read. No
        other walk follows the `last` one soon: it fills no slot for the next. Of a walk that is
        alone, `reader` reads, and counts, what streams from disk."""
        self.loading.result()
        if self._ring is None:
            self._ring = self._make_ring()
        self._reader = reader or Reader()
        self._reader.expect(self._on_disk)
        return self._ring.walk(last)

    @contextmanager
    def any(self) -> Iterator[nn.Module]:
        """A block on the device, before the first walk; its weights may still be on their way."""
        if self._residents:
            yield self._modules[self._residents[0]]
            return
        self._layout.attach(self._slots[0], self._device_memory())
        try:
            yield self._slots[0]
        finally:
            self._slots[0].to("meta")

    def rest(self) -> None:
        """Give the memory of the slots back until the next walk."""
        if self._ring:
            self._resting.set()
            self._ring.close()
            self._ring = None
        for module in self._slots:
            module.to("meta")

    def close(self) -> None:
        """End what runs in the background, and give the memory back."""
        self._closed.set()
        wait([self.loading])
        self.rest()
        for memory in self._host.values():
            memory.close()
        self._host.clear()

    @torch.inference_mode()  # a thread's own state
    def _load(self, slabs: Sequence[torch.Tensor], in_host: Sequence[int], reader: Reader) -> None:
        """Read the residents into their `slabs` and the blocks `in_host` into host memory."""

        def fill(number: int, slab: torch.Tensor) -> None:
            reader(self._reads(number, slab), self._closed.is_set)

        uploads = self._transfer(fill, slabs) if slabs else None
        try:
            for place, number in enumerate(self._residents):
                assert uploads
                uploads.start(number, place)
            for number in in_host:
                self._host[number] = memory = HostMemory(self._layout.bytes)
                fill(number, memory.tensor)
                if self._placement.source == "pinned":
                    memory.lock()
            for place in range(len(slabs)):
                assert uploads
                uploads.wait(place)
        finally:
            if uploads:
                uploads.close()

    def _make_ring(self) -> Ring:
        residents = {number: self._modules[number] for number in self._residents}
        slots = [self._device_memory() for _ in self._slots]
        for module, slot in zip(self._slots, slots, strict=True):
            self._layout.attach(module, slot)
        transfer = self._stream(slots) if slots else None
        return Ring(len(self._modules), residents, self._slots, transfer)

    def _stream(self, slots: Sequence[torch.Tensor]) -> Transfer:
        """What fills the slots, from where the streamed blocks are."""
        if not self._host:
            self._resting.clear()
            return self._transfer(self._fill_from_disk, slots)
        if all(memory.locked for memory in self._host.values()):
            return PinnedCopies(lambda number: self._host[number].tensor, slots)
        return self._transfer(lambda n, slab: slab.copy_(self._host[n].tensor), slots)

    def _fill_from_disk(self, number: int, slab: torch.Tensor) -> None:
        self._reader(self._reads(number, slab), self._resting.is_set)

    def _transfer(self, fill: Fill, slots: Sequence[torch.Tensor]) -> Transfer:
        if self._device.type == "cpu":
            return Background(fill, slots)
        return (StagedCopies if self._device.type == "cuda" else PlainCopies)(fill, slots)

    def _device_memory(self) -> torch.Tensor:
        """For one block."""
        if self._device.type == "cpu":
            return HostMemory(self._layout.bytes).tensor
        return torch.empty(self._layout.bytes, dtype=torch.uint8, device=self._device)

    def _reads(self, number: int, slab: torch.Tensor) -> list[tuple[Stored, torch.Tensor]]:
        return self._layout.reads(self._checkpoint, f"{self._prefix}{number}.", slab)


def load(
    module: nn.Module,
    names: Iterable[tuple[str, str]],
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    reader: Reader,
) -> None:
    """Load single parameters: `names` pairs the module's name of each with the checkpoint's."""
    pairs = {}
    for name, stored_name in names:
        stored = checkpoint.check(stored_name, module.get_parameter(name))
        pairs[name] = stored, torch.empty(stored.shape, dtype=dtype)
    reader.expect(sum(stored.bytes for stored, _ in pairs.values()))
    reader(list(pairs.values()))
    for name, (_, tensor) in pairs.items():
        set_parameter(module, name, tensor.to(device))
