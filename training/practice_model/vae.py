"""The VAE: the real class with its causal 3D convolutions in their single-frame form.

For one frame, a causal 3D convolution is the 2D convolution with its last temporal tap: the others
only see the zero padding before the first frame. Training that form costs a third, and the numbers
are the same.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
    QwenImageAttentionBlock,
    QwenImageCausalConv3d,
)
from torch import Tensor, nn
from world import COLOUR_NAMES, KINDS, paint

Z_DIM = 16
POSTERIOR_STD = (
    0.1  # fixed: the noise the decoder learns to live with, in units of the latents' own std
)
CONFIG: dict[str, Any] = {
    "base_dim": 16,
    "z_dim": Z_DIM,
    "dim_mult": [1, 2, 2, 4, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [False] * 4,  # four halvings: 16 pixels a latent, 32 a token
    "latents_mean": [0.0] * Z_DIM,
    "latents_std": [1.0] * Z_DIM,
}


class SingleFrameConv(nn.Conv2d):
    """Stands in for `QwenImageCausalConv3d` on (B, C, 1, H, W)."""

    def forward(self, x: Tensor, _cache: Tensor | None = None) -> Tensor:
        return super().forward(x.squeeze(2)).unsqueeze(2)


class SingleFrameVae(nn.Module):
    """Encoder and decoder of `AutoencoderKLQwenImage` for pictures (B, 3, H, W) in -1..1."""

    def __init__(self) -> None:
        super().__init__()
        real = AutoencoderKLQwenImage(**CONFIG)
        for module in list(real.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, QwenImageCausalConv3d):
                    setattr(module, name, _flat(child))
                elif isinstance(child, QwenImageAttentionBlock):
                    # Attention over the whole frame would depend on its size: it stays a no-op.
                    nn.init.zeros_(child.proj.weight)
                    nn.init.zeros_(cast(Tensor, child.proj.bias))
                    child.requires_grad_(False)
        self.encoder, self.quant_conv = real.encoder, real.quant_conv
        self.decoder, self.post_quant_conv = real.decoder, real.post_quant_conv
        with torch.no_grad():
            self.quant_conv.weight[Z_DIM:] = 0
            self.quant_conv.bias[Z_DIM:] = 2 * math.log(POSTERIOR_STD)
        for parameter in self.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    def encode(self, pictures: Tensor) -> Tensor:
        """The posterior's mean, (B, 16, H/16, W/16)."""
        mean: Tensor = self.quant_conv(self.encoder(pictures.unsqueeze(2)))[:, :Z_DIM, 0]
        return mean

    def decode(self, latents: Tensor) -> Tensor:
        pictures: Tensor = self.decoder(self.post_quant_conv(latents.unsqueeze(2)))[:, :, 0]
        return pictures

    def forward(self, pictures: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.encode(pictures)
        return self.decode(latents + POSTERIOR_STD * noise), latents


def _flat(conv: QwenImageCausalConv3d) -> SingleFrameConv:
    return SingleFrameConv(
        conv.in_channels,
        conv.out_channels,
        cast(tuple[int, int], conv.kernel_size[1:]),
        padding=(conv._padding[2], conv._padding[0]),
    )


def to_real(flat: SingleFrameVae, mean: Tensor, std: Tensor) -> AutoencoderKLQwenImage:
    """The shipped class with the trained numbers in the last temporal tap, zeros in the others."""
    config = CONFIG | {"latents_mean": mean.tolist(), "latents_std": std.tolist()}
    real = AutoencoderKLQwenImage(**config)
    state = flat.state_dict()
    for name, target in real.state_dict().items():
        source = state[name].float()
        if target.ndim == 5 and source.ndim == 4:
            target.zero_()
            target[:, :, -1] = source
        else:
            target.copy_(source.view_as(target))
    return real


def window_batch(rng: random.Random, count: int, side: int) -> Tensor:
    """Pictures (count, 3, side, side) in -1..1: windows on things of every sort."""
    seed = torch.Generator().manual_seed(rng.getrandbits(62))
    what = torch.stack(
        (
            torch.randint(len(KINDS), (count, 3), generator=seed),
            torch.randint(len(COLOUR_NAMES), (count, 3), generator=seed),
        ),
        dim=-1,
    )
    absent = torch.rand(count, 3, generator=seed) < torch.tensor([0.0, 0.4, 0.7])
    what[..., 0].masked_fill_(absent, -1)
    radius = 16 * (110 / 16) ** torch.rand(count, 3, generator=seed)
    # The window's middle lies near each thing's edge more often than in its flat inside.
    angle = torch.rand(count, 3, generator=seed) * 2 * math.pi
    reach = radius * (0.2 + torch.rand(count, 3, generator=seed)) + side * 0.2
    where = torch.stack(
        (side / 2 + reach * angle.cos(), side / 2 + reach * angle.sin(), radius), dim=-1
    )
    background = torch.randint(len(COLOUR_NAMES), (count,), generator=seed)
    return paint(what, where, background, side, side) * 2 - 1


def picture_loss(made: Tensor, wanted: Tensor) -> Tensor:
    """L1 on pixels and on their differences to the right and down, which keeps edges crisp."""
    error = made.float() - wanted
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 0.5 * edges + 0.5 * error.square().mean()


def from_real(folder: Path) -> tuple[SingleFrameVae, Tensor, Tensor]:
    """The inverse of `to_real`, from a saved VAE, with the mean and deviation of its latents."""
    real = AutoencoderKLQwenImage.from_pretrained(folder, torch_dtype=torch.float32)
    flat = SingleFrameVae()
    state = real.state_dict()
    for name, target in flat.state_dict().items():
        source = state[name]
        target.copy_(
            (source[:, :, -1] if source.ndim == 5 and target.ndim == 4 else source).view_as(target)
        )
    return flat, torch.tensor(real.config.latents_mean), torch.tensor(real.config.latents_std)
