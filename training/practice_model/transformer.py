"""The picture side: a small `QwenImageTransformer2DModel`, its cached latents and its loss."""

from __future__ import annotations

import time
from typing import Any

import diffusers.models.transformers.transformer_qwenimage as family
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from scenes import Scenes
from text import WIDTH as TEXT_WIDTH
from torch import Tensor, nn
from vae import Z_DIM, SingleFrameVae
from world import SIZES, paint

CONFIG: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 4 * Z_DIM,
    "out_channels": Z_DIM,
    "num_layers": 8,
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
EVEN_LEVELS = 0.25  # share of the noise levels that are uniform instead, which keeps edges crisp
UNCONDITIONAL = 0.1  # share of captions replaced by " ", so that classifier-free guidance works
TOKENS = 112  # of text and picture together, whatever the size: attention likes multiples of 16


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


def deepened(model: QwenImageTransformer2DModel) -> QwenImageTransformer2DModel:
    """One of `build_transformer`'s depth that starts with the same numbers as `model`.

    The blocks it lacks are spread evenly between its own, as the identity.
    """
    deep, wanted = build_transformer(), CONFIG["num_layers"]
    have = model.config.num_layers
    if have > wanted:
        raise ValueError(f"{have} blocks there, more than the {wanted} trained here")
    state = deep.state_dict()
    for name, value in model.state_dict().items():
        target, (head, _, rest) = name, name.partition(".")
        if head == "transformer_blocks":
            index, _, tail = rest.partition(".")
            target = f"{head}.{int(index) * wanted // have}.{tail}"
        state[target].copy_(value)
    return deep


def rehearse(model: QwenImageTransformer2DModel, count: int, device: str) -> None:
    """One step without effect of each shape, so that everything is compiled before the first."""
    for width, height in SIZES:
        tokens = width * height // 32**2
        latents = torch.zeros(count, tokens, 4 * Z_DIM, device=device)
        words = torch.zeros(count, TOKENS - tokens, TEXT_WIDTH, device=device)
        mask = torch.ones(count, TOKENS - tokens, dtype=torch.bool, device=device)
        torch.autograd.backward(flow_loss(model, latents, words, mask, (width, height)))
    model.zero_grad(set_to_none=True)


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**SCHEDULER)


def prepare_for_training(model: QwenImageTransformer2DModel, device: str) -> None:
    """The same numbers, faster: a rotation without complex numbers, which compiles into one kernel.

    The image stream stays in float32, so that noise levels are not rounded to bfloat16.
    """
    family.apply_rotary_emb_qwen = _rotate
    model.pos_embed.register_forward_hook(
        lambda _module, _inputs, made: tuple(torch.view_as_real(rotation) for rotation in made)
    )
    model.img_in.register_forward_hook(lambda _module, _inputs, made: made.float())
    if device == "cpu":
        family.dispatch_attention_fn = _attend


def _rotate(x: Tensor, rotation: Tensor, **_: Any) -> Tensor:
    """x (B, S, heads, D) by rotation (S, D / 2, 2), pairs of neighbours as complex numbers."""
    real, imaginary = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    cos, sin = rotation[:, None].unbind(-1)
    turned = (real * cos - imaginary * sin, real * sin + imaginary * cos)
    return torch.stack(turned, dim=-1).flatten(-2).type_as(x)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any
) -> Tensor:
    """On a CPU, at about 100 tokens, plain products train 3.7 times faster than fused attention."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -1e4)
    mixed: Tensor = scores.softmax(dim=-1) @ value
    return mixed.transpose(1, 2)


@torch.no_grad()
def draw_latents(
    vae: SingleFrameVae, mean: Tensor, std: Tensor, every: list[Scenes], until: float
) -> list[Tensor]:
    """Latents of the first scenes of each size, as many as are ready at the time `until`.

    Each is (n, H/32 * W/32, 64) bfloat16 on the scenes' device, as the pipeline packs them.
    """
    parts: list[list[Tensor]] = [[] for _ in every]
    pieces = max(len(scenes) for scenes in every) // PIECE + 1
    for piece in range(pieces):
        for scenes, done in zip(every, parts, strict=True):
            rows = slice(len(scenes) * piece // pieces, len(scenes) * (piece + 1) // pieces)
            drawn = (scenes.what[rows], scenes.where[rows], scenes.background[rows])
            done.append(encode(vae, paint(*drawn, *scenes.size), mean, std))
        done[-1].sum().item()  # waits for the device, so that the time is true
        if time.time() > until:
            break
    return [torch.cat(done) for done in parts]


PIECE = 384  # pictures of the most frequent size encoded at once


def encode(vae: SingleFrameVae, pictures: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in 0..1 to packed latents (B, H/32 * W/32, 64) bfloat16."""
    pictures = (pictures * 2 - 1).contiguous(memory_format=torch.channels_last)
    with torch.autocast(pictures.device.type, torch.bfloat16):
        latents = vae.encode(pictures)
    latents = (latents.float() - mean[:, None, None]) / std[:, None, None]
    b, c, h, w = latents.shape
    packed = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return packed.reshape(b, h * w // 4, c * 4).bfloat16()


def flow_loss(
    model: nn.Module, latents: Tensor, words: Tensor, mask: Tensor, size: tuple[int, int]
) -> Tensor:
    """Squared error of the velocity (noise - picture) at one random noise level a picture."""
    noise = torch.randn_like(latents)
    count, device = len(latents), latents.device
    level = torch.sigmoid(torch.randn(count, device=device) * LEVEL_DEVIATION + LEVEL_MEAN)
    even = torch.rand(count, device=device) < EVEN_LEVELS
    level = torch.where(even, torch.rand(count, device=device), level)
    noisy = torch.lerp(latents, noise, level[:, None, None])
    grid = (1, size[1] // 32, size[0] // 32)  # frames, rows and columns of tokens
    with torch.autocast(device.type, torch.bfloat16):
        velocity: Tensor = model(noisy, words, mask, level, img_shapes=[grid], return_dict=False)[0]
    return (velocity.float() - (noise - latents)).square().mean()
