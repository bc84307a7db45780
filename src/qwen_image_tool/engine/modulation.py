"""The 20B family's modulation, computed once a schedule instead of kept.

A third of that family's weights (`img_mod`, `txt_mod`) only turn a timestep into rows of shifts,
scales and gates. The rows of all timesteps are small; the weights that make them pass through one
scratch buffer, block by block, and are forgotten. Each row comes from a product of the same shape
as in diffusers' block (one timestep at a time), so it has the same bits.
"""

from collections.abc import Sequence

import torch
from torch import nn

from qwen_image_tool.engine import placed
from qwen_image_tool.engine.cache import TensorCache
from qwen_image_tool.engine.weights import Checkpoint, Reader
from qwen_image_tool.types import Placement

IMAGE, TEXT = PARTS = ("img_mod", "txt_mod")


class Row(nn.Module):
    """Stands where a block's `img_mod` or `txt_mod` stood and hands out the current row."""

    row: torch.Tensor

    def forward(self, _temb: torch.Tensor) -> torch.Tensor:
        return self.row


class Table:
    """The rows of every timestep and block. `rows`: [steps, blocks, n + 1, 6 * width], the image's
    n and the text's. n is 1, or 2 where reference pictures have a row of timestep 0 (Edit-2511's
    `zero_cond_t`)."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def set(self, block: nn.Module, number: int, step: int) -> None:
        """Give `block` (whose parts are Rows) what block `number` needs at `step`."""
        image, text = self.rows[step, number].tensor_split([-1])
        block.get_submodule(IMAGE).row = image
        block.get_submodule(TEXT).row = text


def strip(block: nn.Module) -> nn.ModuleDict:
    """Put Rows into the block; returns the modules that they replace."""
    taken = nn.ModuleDict({part: getattr(block, part) for part in PARTS})
    for part in PARTS:
        setattr(block, part, Row())
    return taken


class Modulation:
    """The modulation of `blocks`, `prefix` + "0.", "1." ... in the checkpoint; taken out of them
    here. The table of the last schedule stays in memory; those before are in `cache`."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        prefix: str,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        cache: TensorCache | None = None,
    ) -> None:
        self._taken = [strip(block) for block in blocks]
        self._from = prefix, checkpoint
        self._device, self._dtype, self._cache = device, dtype, cache
        self._table: tuple[list[float], Table] | None = None

    def table(
        self, timesteps: torch.Tensor, tembs: Sequence[torch.Tensor], reader: Reader
    ) -> Table:
        """The rows of a schedule, whose time embeddings are `tembs`, each [n, width]: of the
        timestep, and where n is 2 of timestep 0. `reader` reads the weights, where the rows are not
        known."""
        schedule: list[float] = timesteps.tolist()
        if self._table is None or self._table[0] != schedule:
            rows = self._cache.get(schedule) if self._cache else None
            if rows is None:
                rows = self._compute(tembs, reader)
                if self._cache:
                    self._cache.put(schedule, rows)
            self._table = schedule, Table(rows.to(self._device))
        return self._table[1]

    def _compute(self, tembs: Sequence[torch.Tensor], reader: Reader) -> torch.Tensor:
        """Walk through the weights once; two blocks of them are in memory."""
        placement = Placement(
            blocks=len(self._taken), resident=0, slots=min(2, len(self._taken)), source="disk"
        )
        blocks = placed.Blocks(
            self._taken, *self._from, placement, self._device, self._dtype, reader
        )
        rows = []
        try:
            for _, modules in blocks.walk(last=True, reader=reader):
                reader.check()
                image, text = (modules.get_submodule(part) for part in PARTS)
                rows.append(torch.stack([torch.cat([image(t), text(t[:1])]) for t in tembs]))
        finally:
            blocks.close()
        return torch.stack(rows, dim=1)
