"""Latents -> pixels."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from PIL import Image
from torch import nn
from torch.nn import functional

from qwen_image_tool.types import Size

# Latent cells, their mean and their deviation, to latent cells as the VAE reads them
Unscale = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def scale(vae: Any) -> int:
    """Pixels a side of one latent cell."""
    return int(2 ** len(vae.temperal_downsample))


def decode(vae: Any, cells: torch.Tensor, unscale: Unscale) -> Image.Image:
    """One picture's latent cells, [1, channels, 1, height, width], to its RGB or RGBA picture.

    Source: the end of QwenImagePipeline.__call__, VaeImageProcessor.postprocess.
    """
    cells = cells.to(vae.dtype)
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape).to(cells)
    std = torch.tensor(vae.config.latents_std).view(shape).to(cells)
    pixels = _pixels(vae, unscale(cells, mean, std))[0, :, 0]
    unit = (pixels * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0).cpu().float().numpy()
    return Image.fromarray((unit * 255).round().astype(np.uint8))


def make_single_frame(vae: Any) -> None:
    """Turn the VAE's decoder, in place, into one for a single frame: much faster, within rounding.

    For one frame a causal 3D convolution is the 2D convolution with its last temporal tap: the
    others only see the zeros before the first frame. AutoencoderKLQwenImage21 is one already.
    """
    if not isinstance(vae.post_quant_conv, QwenImageCausalConv3d):
        return
    vae.post_quant_conv = _SingleFrame(vae.post_quant_conv)
    for module in list(vae.decoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, QwenImageCausalConv3d):
                setattr(module, name, _SingleFrame(child))


def crop_centre(image: Image.Image, size: Size) -> Image.Image:
    """The centre of a picture that was worked at the next multiple up."""
    left, top = (image.width - size.width) // 2, (image.height - size.height) // 2
    return image.crop((left, top, left + size.width, top + size.height))


def _pixels(vae: Any, cells: torch.Tensor) -> torch.Tensor:
    """[1, 3 or 4, 1, height, width] in -1 to 1."""
    if isinstance(vae.post_quant_conv, _SingleFrame):
        decoded: torch.Tensor = vae.decoder(vae.post_quant_conv(cells))
        return decoded.clamp(-1, 1)
    pixels: torch.Tensor = vae.decode(cells, return_dict=False)[0]
    return pixels


class _SingleFrame(nn.Module):
    """Stands in for a QwenImageCausalConv3d on [batch, channels, 1, height, width]."""

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(conv.weight[:, :, -1].contiguous(), requires_grad=False)
        self.bias = conv.bias
        self._stride = conv.stride[1:]
        self._padding = conv._padding[2], conv._padding[0]

    def forward(self, frame: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(
            frame.squeeze(2), self.weight, self.bias, self._stride, self._padding
        ).unsqueeze(2)
