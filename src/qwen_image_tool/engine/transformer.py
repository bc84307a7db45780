"""The 20B family's transformer, placed by us: its blocks without their modulation weights."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from torch import nn

from qwen_image_tool.engine import modulation, placed, weights
from qwen_image_tool.engine.placed import Read
from qwen_image_tool.engine.weights import Checkpoint, Layout, no_weights
from qwen_image_tool.types import Placement

PREFIX = "transformer_blocks."


class Transformer:
    """`model` is diffusers' own class on `device` in `dtype`; its blocks are run through `walk`.

    `read` (weights.read) loads what stays. Raises ModelMissing.
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
        self._checkpoint = Checkpoint(folder)
        with no_weights():
            config = QwenImageTransformer2DModel.load_config(folder)
            self.model: Any = QwenImageTransformer2DModel.from_config(config).eval()
        modules = list(self.model.transformer_blocks)
        taken = [modulation.strip(module) for module in modules]
        self._modulation = taken[0]  # filled with each block's weights in turn
        self._modulation_layout = Layout.of(self._modulation, dtype)
        self._table: tuple[tuple[float, ...], modulation.Table] | None = None
        outer = [n for n, _ in self.model.named_parameters() if not n.startswith(PREFIX)]
        names = zip(outer, outer, strict=True)
        placed.load(self.model, names, self._checkpoint, device, dtype, read)
        self._count = len(modules)
        self._blocks = placed.Blocks(
            modules, PREFIX, self._checkpoint, placement, device, dtype, read
        )

    def walk(self) -> Iterator[tuple[int, nn.Module]]:
        """Every block in order, ready to run once its modulation is set."""
        return self._blocks.walk()

    def modulation(
        self, timesteps: torch.Tensor, tembs: Sequence[torch.Tensor]
    ) -> modulation.Table:
        """The modulation of every step of a schedule; that of the last schedule is kept."""
        schedule = tuple(timesteps.tolist())
        if self._table is None or self._table[0] != schedule:
            table = modulation.build(tembs, self._count, self._modulation_of)
            self._table = schedule, table
        return self._table[1]

    def time_embedding(self, timestep: torch.Tensor) -> torch.Tensor:
        """[1, width], for a scalar timestep from 0 to 1000."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        time = timestep.expand(1).to(self.dtype) / 1000
        embedding: torch.Tensor = self.model.time_text_embed(time, like, None)
        return embedding

    def close(self) -> None:
        """End the copies that run ahead."""
        self._blocks.close()

    def _modulation_of(self, number: int) -> nn.ModuleDict:
        slab = torch.empty(self._modulation_layout.bytes, dtype=torch.uint8)
        layout = self._modulation_layout
        weights.read(layout.reads(self._checkpoint, f"{PREFIX}{number}.", slab))
        layout.attach(self._modulation, slab.to(self.device))
        return self._modulation
