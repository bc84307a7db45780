"""The 20B family's modulation, computed once a schedule instead of kept.

A third of that family's weights (`img_mod`, `txt_mod`) only turn a timestep into rows of shifts,
scales and gates. The rows of all timesteps are small; the weights that make them pass through one
scratch buffer, block by block, and are forgotten. Each row comes from a product of the same shape
as in diffusers' block (one timestep at a time), so it has the same bits.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from qwen_image_tool.engine import weights
from qwen_image_tool.engine.weights import Checkpoint, Layout

PARTS = ("img_mod", "txt_mod")


class Row(nn.Module):
    """Stands where a block's `img_mod` or `txt_mod` stood and hands out the current row."""

    row: torch.Tensor

    def forward(self, _temb: torch.Tensor) -> torch.Tensor:
        return self.row


class Table:
    """The rows of every timestep and block. `rows`: [steps, blocks, 2, 1, 6 * width]."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def set(self, block: nn.Module, number: int, step: int) -> None:
        """Give `block` (whose parts are Rows) what block `number` needs at `step`."""
        for place, part in enumerate(PARTS):
            getattr(block, part).row = self.rows[step, number, place]


def strip(block: nn.Module) -> nn.ModuleDict:
    """Put Rows into the block; returns the modules that they replace."""
    taken = nn.ModuleDict({part: getattr(block, part) for part in PARTS})
    for part in PARTS:
        setattr(block, part, Row())
    return taken


def build(
    tembs: Sequence[torch.Tensor], blocks: int, load: Callable[[int], nn.ModuleDict]
) -> Table:
    """The table for the time embeddings `tembs`, each [1, width]. `load(number)` gives the
    modulation modules of one block, filled until its next call."""
    rows = []
    for number in range(blocks):
        modules = load(number)
        rows.append(
            torch.stack([torch.stack([modules[part](temb) for part in PARTS]) for temb in tembs])
        )
    return Table(torch.stack(rows, dim=1))


class Modulation:
    """The modulation of `blocks`, `prefix` + "0.", "1." ... in the checkpoint; taken out of them
    here. The table of the last schedule is kept."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        prefix: str,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._prefix, self._checkpoint, self._device = prefix, checkpoint, device
        taken = [strip(block) for block in blocks]
        self._scratch = taken[0]  # filled with each block's weights in turn
        self._layout = Layout.of(self._scratch, dtype)
        self._count = len(blocks)
        self._table: tuple[tuple[float, ...], Table] | None = None

    def table(self, timesteps: torch.Tensor, tembs: Sequence[torch.Tensor]) -> Table:
        """The rows of a schedule, whose time embeddings are `tembs`."""
        schedule = tuple(timesteps.tolist())
        if self._table is None or self._table[0] != schedule:
            self._table = schedule, build(tembs, self._count, self._load)
        return self._table[1]

    def _load(self, number: int) -> nn.ModuleDict:
        slab = torch.empty(self._layout.bytes, dtype=torch.uint8)
        weights.read(self._layout.reads(self._checkpoint, f"{self._prefix}{number}.", slab))
        self._layout.attach(self._scratch, slab.to(self._device))
        return self._scratch
