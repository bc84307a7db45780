"""The one loop: from noise to latents, with true classifier-free guidance."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch


class Forward(Protocol):
    """One pass of a transformer through its schedule; each family has its own."""

    def rehearse(self, latents: torch.Tensor, conditions: list[Any]) -> None:
        """Run one block, whatever its weights are by now, so that by the first step it is compiled
        and its kernels are on the GPU. Before the first walk."""

    def __call__(
        self, latents: torch.Tensor, step: int, conditions: list[Any]
    ) -> list[list[torch.Tensor]]:
        """`latents`: [pictures, tokens, channels]; `step`: from 0, in order. Returns the predicted
        velocity of each picture under each condition, [1, tokens, channels]."""


# A step is done: its number from 1, its seconds, and a function that gives the first picture's
# latents as they would be without their noise, [1, tokens, channels]: new ones, nobody else's
Latents = Callable[[], torch.Tensor]
Stepped = Callable[[int, float, Latents], None]
# The guided velocity, from the prompt's, the negative prompt's and the CFG scale
Guide = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


def noise(seeds: Sequence[int], shape: tuple[int, int, int], dtype: torch.dtype) -> torch.Tensor:
    """Latent cells to start from, [pictures, 1, *shape] (channels, height, width), on the CPU; each
    picture from its own generator, so that a seed gives the same noise on every device, in every
    dtype, beside any others."""
    drawn = [
        torch.randn((1, 1, *shape), generator=torch.Generator("cpu").manual_seed(seed), dtype=dtype)
        for seed in seeds
    ]
    return torch.cat(drawn)


def schedule(
    scheduler: Any, steps: int, sigmas: Sequence[float] | None, tokens: int, device: torch.device
) -> torch.Tensor:
    """Set the scheduler for a picture of `tokens` image tokens: for `sigmas` where a model has its
    own, else for `steps`. Returns its timesteps, [steps], float32, from 1000 down.

    Source: calculate_shift and retrieve_timesteps of diffusers' Qwen-Image pipelines.
    """
    config = scheduler.config
    slope = (config.max_shift - config.base_shift) / (
        config.max_image_seq_len - config.base_image_seq_len
    )
    intercept = config.base_shift - slope * config.base_image_seq_len
    scheduler.set_timesteps(
        sigmas=np.linspace(1.0, 1 / steps, steps) if sigmas is None else list(sigmas),
        mu=tokens * slope + intercept,
        device=device,
    )
    scheduler.set_begin_index(0)
    timesteps: torch.Tensor = scheduler.timesteps
    return timesteps


def denoise(
    forward: Forward,
    latents: torch.Tensor,
    scheduler: Any,
    timesteps: torch.Tensor,
    conditions: list[Any],
    guide: Guide,
    cfg: float,
    stepped: Stepped,
) -> torch.Tensor:
    """Run every timestep; returns the final latents, [pictures, tokens, channels].

    `conditions`: the prompt, then the negative prompt where `cfg` is above 1. `stepped` is called
    when the device has done a step; what it raises ends the loop.
    """
    pace = Pace(latents.device, stepped)
    for step, timestep in enumerate(timesteps):
        predictions = forward(latents, step, conditions)
        velocity = torch.cat([p[0] if len(p) == 1 else guide(p[0], p[1], cfg) for p in predictions])
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        pace.step(partial(_without_noise, scheduler, step, latents[:1], velocity[:1]))
    pace.finish()
    return latents


class Pace:
    """Tells of steps as the device finishes them, while the host is one step ahead: the device
    never waits for the next launch, and a cancelled run ends within a step."""

    def __init__(self, device: torch.device, stepped: Stepped) -> None:
        self._device, self._stepped = device, stepped
        self._told = 0
        self._marks: list[Any] = [self._mark()]
        self._latents: list[Latents] = []

    def step(self, latents: Latents) -> None:
        """A step has been launched."""
        self._marks.append(self._mark())
        self._latents.append(latents)
        ahead = 1 if self._device.type == "cuda" else 0
        if len(self._marks) > 1 + ahead:
            self._tell()

    def finish(self) -> None:
        """All steps have been launched."""
        while len(self._marks) > 1:
            self._tell()

    def _mark(self) -> Any:
        """A time on the device's own clock, or what the host's says when the device is done."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        if self._device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    def _tell(self) -> None:
        began, ended = self._marks.pop(0), self._marks[0]
        if self._device.type == "cuda":
            ended.synchronize()
            seconds = began.elapsed_time(ended) / 1000
        else:
            seconds = ended - began
        self._told += 1
        self._stepped(self._told, seconds, self._latents.pop(0))


def _without_noise(
    scheduler: Any, step: int, latents: torch.Tensor, velocity: torch.Tensor
) -> torch.Tensor:
    """Where the last velocity leads: latents after step `step` are data + sigma * velocity."""
    sigma: torch.Tensor = scheduler.sigmas[step + 1].to(latents)
    return latents - sigma * velocity
