"""A model's parts where the plan wants them: repeated blocks in a ring, the rest on the device."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn

from qwen_image_tool.engine import weights
from qwen_image_tool.engine.ring import (
    Background,
    PinnedCopies,
    Ring,
    StagedCopies,
    Transfer,
    interleaved,
)
from qwen_image_tool.engine.weights import Checkpoint, Layout, Stored, set_parameter
from qwen_image_tool.types import Placement

Read = Callable[[list[tuple[Stored, torch.Tensor]]], None]  # weights.read, with its callbacks


class Blocks:
    """Repeated blocks of one shape, `prefix` + "0.", "1." ... in the checkpoint, placed by a plan.

    `modules` are on the meta device and have the parameters that are to be loaded; `read` reads
    what stays. Raises ModelMissing where the checkpoint does not have them.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        prefix: str,
        checkpoint: Checkpoint,
        placement: Placement,
        device: torch.device,
        dtype: torch.dtype,
        read: Read,
    ) -> None:
        self._modules, self._prefix, self._checkpoint = modules, prefix, checkpoint
        self._device, self._read = device, read
        self._layout = Layout.of(modules[0], dtype)
        self._ring = self._make_ring(placement)

    def walk(self) -> Iterator[tuple[int, nn.Module]]:
        """Every block in order, ready to run on the device."""
        return self._ring.walk()

    def close(self) -> None:
        """End the copies that run ahead."""
        self._ring.close()

    def _make_ring(self, placement: Placement) -> Ring:
        count = len(self._modules)
        residents = interleaved(count, placement.resident)
        for number in residents:
            self._layout.attach(self._modules[number], self._slab(number).to(self._device))
        kept = {number: self._modules[number] for number in residents}
        streamed = [number for number in range(count) if number not in kept]
        if not streamed:
            return Ring(count, kept, [], None)
        slots = [
            torch.empty(self._layout.bytes, dtype=torch.uint8, device=self._device)
            for _ in range(placement.slots)
        ]
        modules = [copy.deepcopy(self._modules[streamed[0]]) for _ in slots]
        for module, slot in zip(modules, slots, strict=True):
            self._layout.attach(module, slot)
        return Ring(count, kept, modules, self._transfer(placement.source, streamed, slots))

    def _transfer(
        self, source: str, streamed: Sequence[int], slots: Sequence[torch.Tensor]
    ) -> Transfer:
        if source == "disk":
            return (Background if self._device.type == "cpu" else StagedCopies)(self._fill, slots)
        # One slab for all, exactly as large as they are: torch would round each to a power of two
        memory = torch.empty(self._layout.bytes * len(streamed), dtype=torch.uint8)
        slabs = dict(zip(streamed, memory.split(self._layout.bytes), strict=True))
        for number, slab in slabs.items():
            self._read(self._reads(number, slab))
        if source == "pinned":
            return PinnedCopies(memory, slabs, slots)
        return StagedCopies(lambda number, slab: slab.copy_(slabs[number]), slots)

    def _slab(self, number: int) -> torch.Tensor:
        slab = torch.empty(self._layout.bytes, dtype=torch.uint8)
        self._read(self._reads(number, slab))
        return slab

    def _fill(self, number: int, slab: torch.Tensor) -> None:
        # Not by self._read: a fill that runs ahead of a cancelled run serves the next one
        weights.read(self._reads(number, slab))

    def _reads(self, number: int, slab: torch.Tensor) -> list[tuple[Stored, torch.Tensor]]:
        return self._layout.reads(self._checkpoint, f"{self._prefix}{number}.", slab)


def load(
    module: nn.Module,
    names: Iterable[tuple[str, str]],
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    read: Read,
) -> None:
    """Load single parameters: `names` pairs the module's name of each with the checkpoint's."""
    pairs = {}
    for name, stored_name in names:
        stored = checkpoint.check(stored_name, module.get_parameter(name))
        pairs[name] = stored, torch.empty(stored.shape, dtype=dtype)
    read(list(pairs.values()))
    for name, (_, tensor) in pairs.items():
        set_parameter(module, name, tensor.to(device))
