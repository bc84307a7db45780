"""The 20B family (Qwen-Image, -2512): its prompt template, its latents, its schedule, its forward.

Same arithmetic as diffusers' QwenImagePipeline, taken apart so that the loop and the placement of
weights are ours. Source: diffusers 0.42, pipelines/qwenimage/pipeline_qwenimage.py and
models/transformers/transformer_qwenimage.py.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qwen_image_tool.engine.transformer import Transformer
from qwen_image_tool.types import Size

PROMPT_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity,"
    " text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
TEMPLATE_TOKENS = 34  # leading tokens of the template that are cut from the embeddings


def token_grid(size: Size, vae_scale: int) -> tuple[int, int]:
    """Rows and columns of image tokens: 2x2 latent cells of `vae_scale` pixels a side."""
    return size.height // (2 * vae_scale), size.width // (2 * vae_scale)


def noise(
    seeds: tuple[int, ...],
    grid: tuple[int, int],
    channels: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Starting latents, [pictures, tokens, 4 * channels]; each picture from its own CPU generator,
    so that a seed gives the same noise on every device, in every dtype, beside any others."""
    rows, columns = grid
    shape = (1, 1, channels, 2 * rows, 2 * columns)
    drawn = [
        torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=dtype)
        for seed in seeds
    ]
    latents = torch.cat(drawn).view(len(seeds), channels, rows, 2, columns, 2)
    latents = latents.permute(0, 2, 4, 1, 3, 5).reshape(len(seeds), rows * columns, channels * 4)
    return latents.to(device)


def unpack(latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """[pictures, tokens, 4 * channels] -> latent cells, [pictures, channels, 1, height, width]."""
    rows, columns = grid
    pictures, _, packed = latents.shape
    latents = latents.view(pictures, rows, columns, packed // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return latents.reshape(pictures, packed // 4, 1, rows * 2, columns * 2)


def schedule(scheduler: Any, steps: int, tokens: int, device: torch.device) -> torch.Tensor:
    """Set the scheduler for `steps` and a picture of `tokens` image tokens; returns its timesteps,
    [steps], float32, from 1000 down."""
    config = scheduler.config
    slope = (config.max_shift - config.base_shift) / (
        config.max_image_seq_len - config.base_image_seq_len
    )
    intercept = config.base_shift - slope * config.base_image_seq_len
    scheduler.set_timesteps(
        sigmas=np.linspace(1.0, 1 / steps, steps), mu=tokens * slope + intercept, device=device
    )
    scheduler.set_begin_index(0)
    timesteps: torch.Tensor = scheduler.timesteps
    return timesteps


@dataclass(frozen=True)
class Condition:
    """One prompt as the blocks see it: its hidden state, [1, text tokens, inner], and the rotary
    frequencies of (image, text) that go with its length."""

    text: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor]


class Forward:
    """The transformer on one schedule, in lockstep: block i runs on every picture and both CFG
    halves before block i + 1, so that a weight is needed once a step. No stream is padded or
    batched with another: each has the bits it would have alone.

    `timesteps`: [steps], 0 to 1000. `grid`: rows and columns of image tokens.
    """

    def __init__(
        self, transformer: Transformer, timesteps: torch.Tensor, grid: tuple[int, int]
    ) -> None:
        self._transformer = transformer
        self._shapes = [[(1, *grid)]]
        self._tembs = [transformer.time_embedding(timestep) for timestep in timesteps]
        self._table = transformer.modulation(timesteps, self._tembs)

    def condition(self, embeddings: torch.Tensor) -> Condition:
        """`embeddings`: [1, text tokens, text encoder's width]."""
        model = self._transformer.model
        text = model.txt_in(model.txt_norm(embeddings))
        rotary = model.pos_embed(
            self._shapes, max_txt_seq_len=embeddings.shape[1], device=embeddings.device
        )
        return Condition(text, rotary)

    def __call__(
        self, latents: torch.Tensor, step: int, conditions: list[Condition]
    ) -> list[list[torch.Tensor]]:
        """One pass at step `step` of the schedule, from 0.

        `latents`: [pictures, tokens, channels]. Returns the predicted velocity of each picture
        under each condition: a list over pictures of lists over conditions, [1, tokens, channels].
        """
        model, temb = self._transformer.model, self._tembs[step]
        pictures = [model.img_in(latents[i : i + 1]) for i in range(latents.shape[0])]
        streams = [(image, c.text, c.rotary) for image in pictures for c in conditions]
        for number, block in self._transformer.walk():
            self._table.set(block, number, step)
            streams = [
                (*reversed(block(image, text, None, temb, rotary)), rotary)
                for image, text, rotary in streams
            ]
        out = [model.proj_out(model.norm_out(image, temb)) for image, _, _ in streams]
        width = len(conditions)
        return [out[i : i + width] for i in range(0, len(out), width)]
