"""A transformer whose weights are placed by us: the few outer parts always on the device, the
blocks in a ring, the modulation in a table."""

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from torch import nn

from qwen_image_tool.engine import modulation
from qwen_image_tool.engine.ring import (
    Background,
    PinnedCopies,
    Ring,
    StagedCopies,
    Transfer,
    interleaved,
)
from qwen_image_tool.engine.weights import Checkpoint, Layout, no_weights, set_parameter
from qwen_image_tool.types import Placement

BLOCKS = "transformer_blocks"
Read = Callable[[list[Any]], None]


class Transformer:
    """`model` is diffusers' own class on `device` in `dtype`; its blocks are run through `walk`.

    `read` fills host tensors from the checkpoint: see weights.read. Raises ModelMissing.
    """

    def __init__(
        self,
        folder: Path,
        placement: Placement,
        device: torch.device,
        dtype: torch.dtype,
        read: Read,
    ) -> None:
        self.device, self.dtype = device, dtype
        self._read = read
        self._checkpoint = Checkpoint(folder)
        with no_weights():
            config = QwenImageTransformer2DModel.load_config(folder)
            self.model: Any = QwenImageTransformer2DModel.from_config(config).eval()
        self._blocks: list[nn.Module] = list(self.model.transformer_blocks)
        taken = [modulation.strip(block) for block in self._blocks]
        self._modulation = taken[0]  # filled with each block's weights in turn
        self._layout = Layout.of(self._blocks[0], dtype)
        self._modulation_layout = Layout.of(self._modulation, dtype)
        self._table: tuple[tuple[float, ...], modulation.Table] | None = None
        self._load_outer_parts()
        self._ring = self._make_ring(placement)

    def modulation(
        self, timesteps: torch.Tensor, tembs: Sequence[torch.Tensor]
    ) -> modulation.Table:
        """The modulation of every step of a schedule; that of the last schedule is kept."""
        schedule = tuple(timesteps.tolist())
        if self._table is None or self._table[0] != schedule:
            table = modulation.build(tembs, len(self._blocks), self._modulation_of)
            self._table = schedule, table
        return self._table[1]

    def time_embedding(self, timestep: torch.Tensor) -> torch.Tensor:
        """[1, width], for a scalar timestep from 0 to 1000."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        time = timestep.expand(1).to(self.dtype) / 1000
        embedding: torch.Tensor = self.model.time_text_embed(time, like, None)
        return embedding

    def walk(self) -> Iterator[tuple[int, nn.Module]]:
        """Every block in order, ready to run on the device."""
        return self._ring.walk()

    def close(self) -> None:
        """End the copies that run ahead."""
        self._ring.close()

    def _load_outer_parts(self) -> None:
        names = [n for n, p in self.model.named_parameters() if not n.startswith(BLOCKS)]
        made = {}
        for name in names:
            stored = self._checkpoint.check(name, self.model.get_parameter(name))
            made[name] = (stored, torch.empty(stored.shape, dtype=self.dtype))
        self._read(list(made.values()))
        for name, (_, tensor) in made.items():
            set_parameter(self.model, name, tensor.to(self.device))

    def _make_ring(self, placement: Placement) -> Ring:
        count = len(self._blocks)
        residents = interleaved(count, placement.resident)
        for number in residents:
            self._layout.attach(self._blocks[number], self._on_device(number))
        streamed = [number for number in range(count) if number not in residents]
        if not streamed:
            return Ring(count, dict(enumerate(self._blocks)), [], None)
        slots = [self._slab(self.device) for _ in range(placement.slots)]
        modules = [copy.deepcopy(self._blocks[streamed[0]]) for _ in slots]
        for module, slot in zip(modules, slots, strict=True):
            self._layout.attach(module, slot)
        return Ring(
            count,
            {number: self._blocks[number] for number in residents},
            modules,
            self._transfer(placement.source, streamed, slots),
        )

    def _transfer(
        self, source: str, streamed: Sequence[int], slots: Sequence[torch.Tensor]
    ) -> Transfer:
        if source == "disk":
            make = Background if self.device.type == "cpu" else StagedCopies
            return make(self._fill, slots)
        # One slab for all, of exactly their size: torch would round each to a power of two
        memory = torch.empty(self._layout.bytes * len(streamed), dtype=torch.uint8)
        slabs = dict(zip(streamed, memory.split(self._layout.bytes), strict=True))
        for number, slab in slabs.items():
            self._fill(number, slab)
        if source == "pinned":
            return PinnedCopies(memory, slabs, slots)
        return StagedCopies(lambda number, slab: slab.copy_(slabs[number]), slots)

    def _fill(self, number: int, slab: torch.Tensor) -> None:
        """Read a block's weights into `slab`, in host memory."""
        self._read(self._layout.reads(self._checkpoint, f"{BLOCKS}.{number}.", slab))

    def _on_device(self, number: int) -> torch.Tensor:
        slab = self._slab(torch.device("cpu"))
        self._fill(number, slab)
        return slab.to(self.device)

    def _modulation_of(self, number: int) -> nn.ModuleDict:
        slab = torch.empty(self._modulation_layout.bytes, dtype=torch.uint8)
        self._read(self._modulation_layout.reads(self._checkpoint, f"{BLOCKS}.{number}.", slab))
        self._modulation_layout.attach(self._modulation, slab.to(self.device))
        return self._modulation

    def _slab(self, device: torch.device) -> torch.Tensor:
        return torch.empty(self._layout.bytes, dtype=torch.uint8, device=device)
