"""One loaded model: run a resolved request, step by step."""

import functools
import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers.utils.logging as diffusers_logging
import torch
import transformers
import transformers.utils.logging as transformers_logging
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image

from qwen_image_tool import logs
from qwen_image_tool.engine import families, text, vae, weights
from qwen_image_tool.engine.denoise import denoise, noise, schedule
from qwen_image_tool.engine.embeddings import EmbeddingCache, checkpoint_identity
from qwen_image_tool.errors import Cancelled, ModelMissing, OutOfMemory
from qwen_image_tool.store import Installed
from qwen_image_tool.types import (
    Event,
    PhaseName,
    PhaseStarted,
    Plan,
    Request,
    Size,
    Stepped,
)

Emit = Callable[[Event], None]
IsCancelled = Callable[[], bool]


class Engine:
    """A model on one device in one dtype; loaded at the first run and kept for the next.

    `cache`: folder for the embeddings of known prompts; None keeps none.
    """

    def __init__(self, installed: Installed, cache: Path | None = None) -> None:
        self.installed = installed
        self._cache = cache
        self._parts: _Parts | None = None

    def run(
        self, request: Request, plan: Plan, emit: Emit, is_cancelled: IsCancelled
    ) -> tuple[list[Image.Image], dict[PhaseName, float]]:
        """Make the pictures of a resolved request, in the order of its seeds; and seconds a phase.

        Raises PromptTooLong, ModelMissing, OutOfMemory; or Cancelled within a step of
        `is_cancelled()` turning true. Source of the arithmetic: QwenImagePipeline.__call__ and
        QwenImage21Pipeline.__call__.
        """
        if request.size is None or request.steps is None or request.cfg is None:
            raise ValueError("the request is not resolved")
        watch = _Watch(emit, is_cancelled, request.steps)
        with torch.inference_mode(), _memory_errors():
            # 1. The weights, where they are not in memory yet
            with watch.phase("load"):
                parts = self._load(plan, is_cancelled)
                family, grid = parts.family, parts.token_grid(plan.working_size)

            # 2. The prompts, as the transformer reads them
            with watch.phase("encode"):
                timesteps = schedule(
                    parts.scheduler, request.steps, parts.sigmas, math.prod(grid), parts.device
                )
                forward = family.Forward(parts.transformer, timesteps, grid)
                prompts = [request.prompt, request.negative_prompt]
                embeddings = parts.encode(
                    [p for p in prompts if p is not None], request.truncate, is_cancelled
                )
                conditions = [forward.condition(embedding) for embedding in embeddings]

            # 3. From noise to latents
            with watch.phase("denoise"):
                cells = noise(request.seeds, parts.cell_shape(grid), parts.dtype)
                latents = denoise(
                    forward,
                    family.pack(cells).to(parts.device),
                    parts.scheduler,
                    timesteps,
                    conditions,
                    family.guide,
                    request.cfg,
                    watch.stepped,
                )

            # 4. From latents to pixels, one picture at a time
            with watch.phase("decode"):
                cells = family.unpack(latents, grid)
                images = [
                    vae.crop_centre(vae.decode(parts.vae, cell[None], family.unscale), request.size)
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

    def _load(self, plan: Plan, is_cancelled: IsCancelled) -> "_Parts":
        if self._parts is None or not plan.loads_like(self._parts.plan):
            self.release()
            self._parts = _Parts(self.installed, plan, self._cache, is_cancelled)
        return self._parts


class _Parts:
    """The components of a model, loaded; the text encoder at the first prompt that isn't known."""

    def __init__(
        self, installed: Installed, plan: Plan, cache: Path | None, is_cancelled: IsCancelled
    ) -> None:
        folder, self.plan = installed.folder, plan
        self.family = family = families.family(installed.model.family)
        sampling = installed.model.sampling
        self.sigmas = sampling.sigmas
        self.device, self.dtype = torch.device(plan.device), getattr(torch, plan.dtype)
        read = functools.partial(weights.read, is_cancelled=is_cancelled)
        place = self.device, self.dtype, read
        logs.adopt_libraries()
        # Their progress bars would stand beside ours
        transformers_logging.disable_progress_bar()
        diffusers_logging.disable_progress_bar()
        try:
            self.tokenizer = text.Tokenizer(folder / family.TOKENIZER, family.wrap, family.SYSTEM)
            self.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
            positions = text.positions(folder / "text_encoder")
            self.transformer = family.Transformer(folder / "transformer", plan.placement, *place)
            self.vae = (
                family.VAE.from_pretrained(folder / "vae", dtype=self.dtype).to(self.device).eval()
            )
            if plan.mode != "exact":
                vae.make_single_frame(self.vae)
        except torch.OutOfMemoryError:
            raise
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelMissing(
                f"The model in {folder} can't be loaded: {error}.", "Download it again."
            ) from error
        self._prompt_limit = min(
            sampling.max_prompt_tokens or family.TEXT_POSITIONS,
            family.TEXT_POSITIONS,
            positions - self.tokenizer.dropped,
        )
        self._text_folder = folder / "text_encoder"
        self._text_encoder: text.TextEncoder | None = None
        self._known = cache and self._embedding_cache(cache, installed.model.family)

    def token_grid(self, size: Size) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        side = self.family.PATCH * vae.scale(self.vae)
        return size.height // side, size.width // side

    def cell_shape(self, grid: tuple[int, int]) -> tuple[int, int, int]:
        """Channels, height and width of a picture's latent cells."""
        patch = self.family.PATCH
        channels = self.transformer.model.config.in_channels // patch**2
        return channels, grid[0] * patch, grid[1] * patch

    def encode(
        self, prompts: list[str], truncate: bool, is_cancelled: IsCancelled
    ) -> list[torch.Tensor]:
        """Each prompt's embeddings, [1, tokens, width]."""
        ids = [self.tokenizer(prompt, self._prompt_limit, truncate) for prompt in prompts]
        known = [self._known.get(each) if self._known else None for each in ids]
        new = [each for each, states in zip(ids, known, strict=True) if states is None]
        made = iter(self._read_prompts(new, is_cancelled) if new else ())
        hidden = [next(made) if states is None else states.to(self.device) for states in known]
        return [states[:, self.tokenizer.dropped :] for states in hidden]

    def close(self) -> None:
        if self._text_encoder:
            self._text_encoder.close()
        self.transformer.close()

    def _read_prompts(
        self, prompts: list[list[int]], is_cancelled: IsCancelled
    ) -> list[torch.Tensor]:
        if self._text_encoder is None:
            self._text_encoder = text.TextEncoder(
                self.family.TEXT_MODEL,
                self.family.TEXT_NORMED,
                self._text_folder,
                self.plan.text_placement,
                self.device,
                self.dtype,
                functools.partial(weights.read, is_cancelled=is_cancelled),
            )
        hidden = self._text_encoder.encode(prompts)
        for ids, states in zip(prompts, hidden, strict=True):
            if self._known:
                self._known.put(ids, states)
        return hidden

    def _embedding_cache(self, folder: Path, family: str) -> EmbeddingCache:
        libraries = [torch.__version__, transformers.__version__]
        identity = [family, str(self.device), str(self.dtype), *libraries]
        return EmbeddingCache(folder, identity + checkpoint_identity(self._text_folder))


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
