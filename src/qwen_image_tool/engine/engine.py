"""One loaded model: run a resolved request, step by step."""

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers.utils.logging as diffusers_logging
import torch
import transformers.utils.logging as transformers_logging
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from qwen_image_tool import logs
from qwen_image_tool.engine import text, vae, weights
from qwen_image_tool.engine.denoise import denoise
from qwen_image_tool.engine.families import qwen_image
from qwen_image_tool.engine.transformer import Transformer
from qwen_image_tool.errors import Cancelled, ModelMissing, OutOfMemory
from qwen_image_tool.store import Installed
from qwen_image_tool.types import (
    Event,
    PhaseName,
    PhaseStarted,
    Placement,
    Plan,
    Request,
    Stepped,
)

Emit = Callable[[Event], None]
IsCancelled = Callable[[], bool]


class Engine:
    """A model on one device in one dtype; loaded at the first run and kept for the next."""

    def __init__(self, installed: Installed) -> None:
        self.installed = installed
        self._parts: _Parts | None = None

    def run(
        self, request: Request, plan: Plan, emit: Emit, is_cancelled: IsCancelled
    ) -> tuple[list[Image.Image], dict[PhaseName, float]]:
        """Make the pictures of a resolved request, in the order of its seeds; and seconds a phase.

        Raises PromptTooLong, ModelMissing, OutOfMemory; or Cancelled within a step of
        `is_cancelled()` turning true. Source of the arithmetic: QwenImagePipeline.__call__.
        """
        if request.size is None or request.steps is None or request.cfg is None:
            raise ValueError("the request is not resolved")
        watch = _Watch(emit, is_cancelled, request.steps)
        with torch.inference_mode(), _memory_errors():
            # 1. The weights, where they are not in memory yet
            with watch.phase("load"):
                parts = self._load(plan)
                grid = qwen_image.token_grid(plan.working_size, parts.scale)

            # 2. The prompts, as the transformer reads them
            with watch.phase("encode"):
                timesteps = qwen_image.schedule(
                    parts.scheduler, request.steps, math.prod(grid), parts.device
                )
                forward = qwen_image.Forward(parts.transformer, timesteps, grid)
                conditions = [
                    forward.condition(self._encode(parts, prompt, request.truncate))
                    for prompt in (request.prompt, request.negative_prompt)
                    if prompt is not None
                ]

            # 3. From noise to latents
            with watch.phase("denoise"):
                latents = qwen_image.noise(
                    request.seeds, grid, parts.channels, parts.dtype, parts.device
                )
                latents = denoise(
                    forward,
                    latents,
                    parts.scheduler,
                    timesteps,
                    conditions,
                    request.cfg,
                    watch.stepped,
                )

            # 4. From latents to pixels, one picture at a time
            with watch.phase("decode"):
                cells = qwen_image.unpack(latents, grid)
                images = [
                    vae.crop_centre(vae.decode(parts.vae, cell[None]), request.size)
                    for cell in cells
                ]
        return images, watch.seconds

    def release(self) -> None:
        """Give the memory back."""
        if self._parts is not None:
            self._parts.close()
        self._parts = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _load(self, plan: Plan) -> "_Parts":
        wanted = torch.device(plan.device), getattr(torch, plan.dtype), plan.placement
        parts = self._parts
        if parts is None or (parts.device, parts.dtype, parts.placement) != wanted:
            self.release()
            parts = self._parts = _Parts(self.installed.folder, *wanted)
        return parts

    def _encode(self, parts: "_Parts", prompt: str, truncate: bool) -> torch.Tensor:
        limit = self.installed.model.sampling.max_prompt_tokens
        if limit is None:
            raise ValueError(f"{self.installed.model.id} has no prompt limit in the catalogue")
        ids = text.tokenize(parts.tokenizer, prompt, limit, truncate)
        return text.embed(parts.text_encoder, ids, parts.device)


class _Parts:
    """The components of a model, loaded."""

    def __init__(
        self, folder: Path, device: torch.device, dtype: torch.dtype, placement: Placement
    ) -> None:
        self.device, self.dtype, self.placement = device, dtype, placement

        def load(cls: Any, name: str) -> Any:
            return cls.from_pretrained(folder / name, dtype=dtype).to(device).eval()

        logs.adopt_libraries()
        # Their progress bars would stand beside ours
        transformers_logging.disable_progress_bar()
        diffusers_logging.disable_progress_bar()
        try:
            self.tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
            self.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
            self.text_encoder = load(Qwen2_5_VLForConditionalGeneration, "text_encoder")
            self.transformer = Transformer(
                folder / "transformer", placement, device, dtype, weights.read
            )
            self.vae = load(AutoencoderKLQwenImage, "vae")
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelMissing(
                f"The model in {folder} can't be loaded: {error}.", "Download it again."
            ) from error
        self.channels: int = self.transformer.model.config.in_channels // 4
        self.scale = vae.scale(self.vae)

    def close(self) -> None:
        self.transformer.close()


class _Watch:
    """Tells the caller where a run is, times its phases, and ends it when it is cancelled."""

    def __init__(self, emit: Emit, is_cancelled: IsCancelled, steps: int) -> None:
        self._emit, self._is_cancelled, self._steps = emit, is_cancelled, steps
        self.seconds: dict[PhaseName, float] = {}

    @contextmanager
    def phase(self, name: PhaseName) -> Iterator[None]:
        self._check()
        self._emit(PhaseStarted(phase=name))
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def stepped(self, step: int, seconds: float) -> None:
        self._emit(Stepped(step=step, steps=self._steps, seconds=seconds))
        self._check()

    def _check(self) -> None:
        if self._is_cancelled():
            raise Cancelled("Stopped.", "Nothing was written.")


@contextmanager
def _memory_errors() -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        first_line = str(error).partition("\n")[0]
        raise OutOfMemory(
            f"The memory ran out. {first_line}".strip(),
            "Close other programs, or choose a smaller --size.",
        ) from error
