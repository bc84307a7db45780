"""What differs between the model families, and nothing else."""

import importlib
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch


class Family(Protocol):
    """What the engine asks of a family's module."""

    TOKENIZER: str  # the component whose folder has the tokenizer
    TEXT_MODEL: Any  # transformers' class of the text encoder's language model
    TEXT_NORMED: bool  # its last hidden states are read after its final norm
    TEXT_POSITIONS: int  # tokens of a prompt that the transformer can read
    SYSTEM: str | int  # leading text of the template, or its tokens, that the embeddings leave out
    VAE: Any  # diffusers' class
    PATCH: int  # latent cells a side of a token
    Transformer: Any  # (folder, placement, device, dtype, reader, cache)
    Forward: Any  # (transformer, timesteps, grid, reader): a denoise.Forward that has `condition`

    def wrap(self, prompt: str) -> str:
        """The prompt in its template."""

    def pack(self, cells: torch.Tensor) -> torch.Tensor:
        """Latent cells, [pictures, 1, channels, height, width], to [pictures, tokens, width]."""

    def unpack(self, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """[pictures, tokens, width] to latent cells, [pictures, channels, 1, height, width]."""

    def guide(self, positive: torch.Tensor, negative: torch.Tensor, cfg: float) -> torch.Tensor:
        """The guided velocity, [1, tokens, width]."""

    def unscale(self, cells: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
        """Latent cells as the VAE reads them."""

    def lengths(self, *args: Any, **kwargs: Any) -> Sequence[tuple[torch.Tensor, int]] | None:
        """See compiled.Lengths."""


MODULES = {"qwen-image": "qwen_image", "qwen-image-2.1": "qwen_image_21"}


def family(name: str) -> Family:
    """The module of a catalogue family; imported here, for each brings model classes of its own."""
    module: Any = importlib.import_module(f"{__name__}.{MODULES[name]}")
    return cast(Family, module)
