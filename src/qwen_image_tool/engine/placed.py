"""A model's parts where the plan wants them: repeated blocks in a ring, the rest on the device."""

import copy
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

import torch
from torch import nn

from qwen_image_tool.engine.host import HostMemory
from qwen_image_tool.engine.ring import (
    Background,
    Fill,
    PlainCopies,
    Ring,
    StreamCopies,
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
        self._device = device
        self._layout = Layout.of(modules[0], dtype)
        self._residents = interleaved(len(modules), placement.resident)
        kept = set(self._residents)
        streamed = [number for number in range(len(modules)) if number not in kept]
        in_host = _spread(streamed, len(streamed) - placement.streamed("disk"))
        self._to_lock = _spread(in_host, placement.streamed("pinned"))
        self._slots = [copy.deepcopy(modules[0]) for _ in range(placement.slots)]
        self._ring: Ring | None = None
        self._host: dict[int, HostMemory] = {}
        self._closed, self._resting = threading.Event(), threading.Event()
        # What is missing is said before anything is read
        stored = [self._layout.stored(checkpoint, f"{prefix}{n}.") for n in range(len(modules))]
        slabs = [self._device_memory() for _ in self._residents]
        for number, slab in zip(self._residents, slabs, strict=True):
            self._layout.attach(modules[number], slab)
        sizes = [sum(s.bytes for s in each) for each in stored]
        staying = sum(sizes[number] for number in (*self._residents, *in_host))
        reader.expect(staying)
        self._on_disk = sum(sizes) - staying
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
        return sum(not self._host[number].locked for number in self._to_lock)

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

        uploads = self._transfer(fill, slabs, {}) if slabs else None
        try:
            if uploads:
                uploads.expect(self._residents)
            for place, number in enumerate(self._residents):
                assert uploads
                uploads.start(number, place)
            for number in in_host:
                self._host[number] = memory = HostMemory(self._layout.bytes)
                fill(number, memory.tensor)
                if number in self._to_lock:
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
        """Fills the slots from where each of the streamed blocks waits."""
        self._resting.clear()
        locked = {number: each.tensor for number, each in self._host.items() if each.locked}
        return self._transfer(self._bring, slots, locked)

    def _bring(self, number: int, slab: torch.Tensor) -> None:
        """Fill `slab` from where a streamed block waits."""
        if number in self._host:
            slab.copy_(self._host[number].tensor)
        else:
            self._reader(self._reads(number, slab), self._resting.is_set)

    def _transfer(
        self, fill: Fill, slots: Sequence[torch.Tensor], locked: Mapping[int, torch.Tensor]
    ) -> Transfer:
        """Fills `slots` by `fill`, or where the device can, with what `locked` has from there."""
        if self._device.type == "cuda":
            return StreamCopies(fill, slots, locked)
        return (Background if self._device.type == "cpu" else PlainCopies)(fill, slots)

    def _device_memory(self) -> torch.Tensor:
        """For one block."""
        if self._device.type == "cpu":
            return HostMemory(self._layout.bytes).tensor
        return torch.empty(self._layout.bytes, dtype=torch.uint8, device=self._device)

    def _reads(self, number: int, slab: torch.Tensor) -> list[tuple[Stored, torch.Tensor]]:
        return self._layout.reads(self._checkpoint, f"{self._prefix}{number}.", slab)


def _spread(numbers: Sequence[int], count: int) -> list[int]:
    """So many of them, evenly."""
    return [numbers[place] for place in interleaved(len(numbers), count)]


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
