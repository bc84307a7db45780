"""A transformer of diffusers, placed by us: its blocks in a ring, the rest on the device."""

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwen_image_tool.engine import placed
from qwen_image_tool.engine.weights import Checkpoint, Reader, no_weights
from qwen_image_tool.types import Placement

PREFIX = "transformer_blocks."


def without_weights(kind: Any, folder: Path) -> Any:
    """A model of diffusers' class `kind`, its parameters on the meta device."""
    with no_weights():
        return kind.from_config(kind.load_config(folder)).eval()


class Transformer:
    """`model` (made without weights) on `device` in `dtype`; its blocks are run through `walk`.

    What stays is loaded by `reader`, the blocks in the background. Raises ModelMissing.
    """

    def __init__(
        self,
        model: Any,
        checkpoint: Checkpoint,
        placement: Placement,
        device: torch.device,
        dtype: torch.dtype,
        reader: Reader,
    ) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        outer = [name for name, _ in model.named_parameters() if not name.startswith(PREFIX)]
        placed.load(model, zip(outer, outer, strict=True), checkpoint, device, dtype, reader)
        blocks = list(model.transformer_blocks)
        self._blocks = placed.Blocks(blocks, PREFIX, checkpoint, placement, device, dtype, reader)

    @property
    def loading(self) -> Future[None]:
        """Done when what stays of the blocks is read."""
        return self._blocks.loading

    @property
    def unlocked(self) -> int:
        """How many blocks the system did not page-lock that are to be; once all is read."""
        return self._blocks.unlocked

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules that walks give."""
        return self._blocks.modules

    def walk(self, last: bool = False) -> Iterator[tuple[int, nn.Module]]:
        """Every block in order, ready to run. After the `last` walk of a picture, `rest`."""
        return self._blocks.walk(last)

    def rest(self) -> None:
        """Give the memory of the slots back until the next walk."""
        self._blocks.rest()

    def any_block(self) -> AbstractContextManager[nn.Module]:
        """A block on the device, before the first walk; its weights may still be on their way."""
        return self._blocks.any()

    def close(self) -> None:
        """End what runs in the background, and give the memory back."""
        self._blocks.close()
