"""The picture side: a small `QwenImageTransformer2DModel`, its cached latents and its loss."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import diffusers.models.transformers.transformer_qwenimage as family
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from text import WIDTH as TEXT_WIDTH
from torch import Tensor, nn
from vae import Z_DIM, SingleFrameVae
from world import SIZES, SQUARE, Scene, arrange, render, sample_training_scene, write_caption

CONFIG: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 4 * Z_DIM,
    "out_channels": Z_DIM,
    "num_layers": 6,
    "attention_head_dim": 64,
    "num_attention_heads": 3,
    "joint_attention_dim": TEXT_WIDTH,
    "axes_dims_rope": (16, 24, 24),
}
SCHEDULER: dict[str, Any] = {
    "base_image_seq_len": 64,
    "max_image_seq_len": 256,
    "base_shift": 0.6,
    "max_shift": 1.2,
    "shift_terminal": 0.02,
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
}
# Mean and deviation of the logit of the noise level in training. High: only there must the sentence
# alone say what to draw; a little below, the noisy picture already shows it.
LEVEL_MEAN, LEVEL_DEVIATION = 1.2, 1.2
UNCONDITIONAL = 0.1  # share of captions replaced by " ", so that classifier-free guidance works


def build_transformer() -> QwenImageTransformer2DModel:
    """Blocks start as the identity and the output as zero."""
    model = QwenImageTransformer2DModel(**CONFIG)
    for block in model.transformer_blocks:
        for modulation in (block.img_mod, block.txt_mod):
            nn.init.zeros_(modulation[1].weight)
            nn.init.zeros_(modulation[1].bias)
    nn.init.zeros_(model.norm_out.linear.weight)
    nn.init.zeros_(model.norm_out.linear.bias)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    return model


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**SCHEDULER)


def use_small_attention() -> None:
    """On a CPU, at 80 tokens, plain matrix products train 3.7 times faster than fused attention."""

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any
    ) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -1e4)
        mixed: Tensor = scores.softmax(dim=-1) @ value
        return mixed.transpose(1, 2)

    family.dispatch_attention_fn = attend


@dataclass
class Shard:
    """Scenes of one size and their latents, normalised and packed as the pipeline packs them."""

    size: tuple[int, int]  # width, height in pixels
    scenes: list[Scene]
    latents: Tensor  # (N, H/32 * W/32, 64) bfloat16

    @property
    def grid(self) -> tuple[int, int, int]:
        """What the transformer calls an image shape: frames, rows and columns of tokens."""
        return (1, self.size[1] // 32, self.size[0] // 32)


@torch.no_grad()
def draw_shard(
    vae: SingleFrameVae, mean: Tensor, std: Tensor, seed: int, count: int, device: str
) -> Shard:
    """Every second shard is 256x256; the others take the six ratios in turn."""
    rng = random.Random(seed)
    size = SQUARE if seed % 2 == 0 else SIZES[1 + seed // 2 % 6]
    scenes = [sample_training_scene(rng) for _ in range(count)]
    parts = []
    batch = 8 if device == "cpu" else 128  # eight pictures stay within a CPU's cache
    for start in range(0, count, batch):
        pictures = render([arrange(scene, *size, rng) for scene in scenes[start : start + batch]])
        parts.append(encode(vae, pictures.to(device), mean, std).cpu())
    return Shard(size, scenes, torch.cat(parts))


def encode(vae: SingleFrameVae, pictures: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in 0..1 to packed latents (B, H/32 * W/32, 64) bfloat16."""
    pictures = (pictures * 2 - 1).contiguous(memory_format=torch.channels_last)
    with torch.autocast(pictures.device.type, torch.bfloat16):
        latents = vae.encode(pictures)
    latents = (latents.float() - mean[:, None, None]) / std[:, None, None]
    b, c, h, w = latents.shape
    packed = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return packed.reshape(b, h * w // 4, c * 4).bfloat16()


def caption_for(scene: Scene, rng: random.Random) -> str:
    if rng.random() < UNCONDITIONAL:
        return " "
    return write_caption(scene, rng) or " "


def flow_loss(
    model: nn.Module, latents: Tensor, words: Tensor, mask: Tensor, grid: tuple[int, int, int]
) -> Tensor:
    """Squared error of the velocity (noise - picture) at one random noise level a picture."""
    noise = torch.randn_like(latents)
    logit = torch.randn(len(latents), device=latents.device) * LEVEL_DEVIATION + LEVEL_MEAN
    level = torch.sigmoid(logit)
    noisy = torch.lerp(latents, noise, level[:, None, None])
    with torch.autocast(latents.device.type, torch.bfloat16):
        velocity: Tensor = model(noisy, words, mask, level, img_shapes=[grid], return_dict=False)[0]
    error = velocity.float() - (noise - latents)
    return error.square().mean()
