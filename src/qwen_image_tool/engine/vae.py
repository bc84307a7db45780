"""Latents -> pixels."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from qwen_image_tool.types import Size


def scale(vae: Any) -> int:
    """Pixels a side of one latent cell."""
    return int(2 ** len(vae.temperal_downsample))


def decode(vae: Any, latents: torch.Tensor) -> Image.Image:
    """One picture's latents, [1, channels, 1, height, width], to its RGB picture.

    Source: the end of QwenImagePipeline.__call__, VaeImageProcessor.postprocess.
    """
    latents = latents.to(vae.dtype)
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents)
    inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(latents)
    pixels = vae.decode(latents / inverse_std + mean, return_dict=False)[0][0, :, 0]
    unit = (pixels * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0).cpu().float().numpy()
    return Image.fromarray((unit * 255).round().astype(np.uint8))


def crop_centre(image: Image.Image, size: Size) -> Image.Image:
    """The centre of a picture that was worked at the next multiple up."""
    left, top = (image.width - size.width) // 2, (image.height - size.height) // 2
    return image.crop((left, top, left + size.width, top + size.height))
