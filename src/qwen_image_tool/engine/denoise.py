"""The one loop: from noise to latents, true classifier-free guidance with the norm rescale."""

import time
from collections.abc import Callable
from typing import Any

import torch

from qwen_image_tool.engine.families.qwen_image import Condition, Forward


def denoise(
    forward: Forward,
    latents: torch.Tensor,
    scheduler: Any,
    timesteps: torch.Tensor,
    conditions: list[Condition],
    cfg: float,
    stepped: Callable[[int, float], None],
) -> torch.Tensor:
    """Run every timestep; returns the final latents, [pictures, tokens, channels].

    `conditions`: the prompt, then the negative prompt where `cfg` is above 1. `stepped(step,
    seconds)` is called after each step, from 1; what it raises ends the loop.
    """
    for step, timestep in enumerate(timesteps):
        started = time.perf_counter()
        predictions = forward(latents, step, conditions)
        velocity = torch.cat([guide(prediction, cfg) for prediction in predictions])
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        stepped(step + 1, time.perf_counter() - started)
    return latents


def guide(prediction: list[torch.Tensor], cfg: float) -> torch.Tensor:
    """True CFG: away from the negative prediction by `cfg`, at the conditional one's norm a token.

    Source: QwenImagePipeline.__call__.
    """
    if len(prediction) == 1:
        return prediction[0]
    positive, negative = prediction
    combined = negative + cfg * (positive - negative)
    norm = torch.norm(positive, dim=-1, keepdim=True)
    rescaled: torch.Tensor = combined * (norm / torch.norm(combined, dim=-1, keepdim=True))
    return rescaled
