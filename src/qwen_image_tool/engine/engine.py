"""One loaded model: run a resolved request, step by step."""

import base64
import functools
import gc
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import diffusers.utils.logging as diffusers_logging
import torch
import transformers
import transformers.utils.logging as transformers_logging
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image

from qwen_image_tool import logs
from qwen_image_tool.decoding import DECODINGS
from qwen_image_tool.engine import attention, compiled, families, text, vae, weights
from qwen_image_tool.engine.cache import TensorCache, checkpoint_identity
from qwen_image_tool.engine.checks import SAFER, check_finite, check_image
from qwen_image_tool.engine.denoise import Latents, denoise, noise, schedule
from qwen_image_tool.engine.fresh import FreshThread
from qwen_image_tool.engine.sketch import Show, Sideshow, Sketch
from qwen_image_tool.errors import (
    AttentionFailed,
    BrokenPicture,
    Cancelled,
    ModelMissing,
    OutOfMemory,
    ToolError,
    first_line,
    memory_told,
    unless_memory,
)
from qwen_image_tool.files import DiskMeter
from qwen_image_tool.planner import next_plans
from qwen_image_tool.store import Installed
from qwen_image_tool.types import (
    Event,
    Loading,
    Notice,
    PhaseName,
    PhaseStarted,
    Plan,
    Planned,
    Preview,
    Request,
    Size,
    Stepped,
)

PREVIEW_SECONDS = 0.4  # at least, between two previews
READING_SECONDS = 0.2  # at most, between asking how far reading is, and whether it is cancelled
Emit = Callable[[Event], None]
IsCancelled = Callable[[], bool]
# Bytes on disk. A prompt of the 20B family takes about 0.3 MB, a schedule 4.4 MB a step
EMBEDDINGS_LIMIT, MODULATION_LIMIT = 256 << 20, 2 << 30


class Engine:
    """A model on one device in one dtype; loaded at the first run and kept for the next.

    `cache`: folder for what can be made again (embeddings of known prompts, modulation of known
    schedules); None keeps none. `previews`: say what a picture looks like while it is drawn.
    """

    def __init__(
        self, installed: Installed, cache: Path | None = None, previews: bool = False
    ) -> None:
        self.installed = installed
        self._files = _files(installed)
        self._cache = cache
        self._previews = cache / "previews" if cache and previews else None
        self._parts: _Parts | None = None
        self._emit: Emit = lambda _: None

    def is_of(self, installed: Installed) -> bool:
        """Whether it runs this model, from the files that are there now."""
        return installed == self.installed and _files(installed) == self._files

    def run(
        self,
        request: Request,
        plans: Sequence[Plan],
        emit: Emit,
        is_cancelled: IsCancelled,
        disk: DiskMeter | None = None,
    ) -> "Run":
        """Make the pictures of a resolved request by the first of `plans`; where the memory runs
        out or what comes out is no picture, by the next one that may do better, which is said.
        `disk`: see weights.read.

        Raises PromptTooLong, ModelMissing, OutOfMemory, BrokenPicture; or Cancelled within a step
        of `is_cancelled()` turning true.
        """
        self._emit, left, shown = emit, plans, dict[str, Any]()
        while left:
            plan = left[0]
            emit(Planned(plan=plan, number=plans.index(plan) + 1))
            try:
                run = self._run(request, plan, emit, weights.Reader(is_cancelled, disk))
                return replace(run, rates=run.rates | shown)
            except (OutOfMemory, BrokenPicture) as error:
                left = next_plans(left, error.trouble)
                if not left:
                    raise
                why = error.message
                if isinstance(error, AttentionFailed):
                    shown["attention_backend"] = ""
            # Here the failed run's tensors are gone, with the error that held them
            self.release()
            emit(Notice(text=f"{why} Trying again: {left[0].reasons[0]}"))
        raise ValueError("there is no plan")

    def release(self) -> None:
        """Give the memory back."""
        if self._parts is not None:
            self._parts.close()
            _forget_tables()
        self._parts = None
        gc.collect()
        if torch.accelerator.is_available():
            torch.get_device_module().empty_cache()

    def _run(self, request: Request, plan: Plan, emit: Emit, reader: weights.Reader) -> "Run":
        """Source of the arithmetic: QwenImagePipeline.__call__, QwenImage21Pipeline.__call__."""
        if request.size is None or request.steps is None or request.cfg is None:
            raise ValueError("the request is not resolved")
        watch = _Watch(emit, reader.is_cancelled, request.steps)
        with torch.inference_mode(), _errors(plan), self._whole():
            # 1. The weights, where they are not in memory yet; the reading goes on behind
            with watch.phase("load"):
                parts = self._load(plan, reader)
                family, grid = parts.family, parts.token_grid(plan.working_size)
                prompts = [p for p in (request.prompt, request.negative_prompt) if p is not None]
                ids = parts.tokenize(prompts, request.truncate)
                known = parts.known(ids, reader)
                timesteps = schedule(
                    parts.scheduler, request.steps, parts.sigmas, math.prod(grid), parts.device
                )

            # 2. The prompts, as the transformer reads them
            with watch.phase("encode"), watch.reading(reader):
                embeddings = parts.encode(ids, known, reader, watch)

            # 3. The rest of the weights
            with watch.phase("load"), watch.reading(reader):
                forward = family.Forward(parts.transformer, timesteps, grid, reader)
                conditions = [forward.condition(embedding) for embedding in embeddings]
                cells = noise(request.seeds, parts.cell_shape(grid), parts.dtype)
                latents = family.pack(cells).to(parts.device)
                if parts.device.type != "cpu" and not parts.transformer.loading.done():
                    forward.rehearse(latents, conditions)
                watch.wait(parts.transformer.loading)
                if refused := parts.transformer.unlocked:
                    said = f"The system does not page-lock {refused} of the blocks, so they cross"
                    emit(Notice(text=f"{said} to the GPU more slowly, by way of a buffer."))

            # 4. From noise to latents
            with watch.phase("denoise"):
                sketch = parts.sketch(self._previews)
                shown = _shown(sketch, lambda found: family.unpack(found, grid)[0], emit)
                with shown as watch.show, parts.drawing():
                    latents = denoise(
                        forward,
                        latents,
                        parts.scheduler,
                        timesteps,
                        conditions,
                        family.guide,
                        request.cfg,
                        watch.stepped,
                    )
                check_finite(latents)

            # 5. From latents to pixels, one picture at a time
            with watch.phase("decode"):
                cells = family.unpack(latents, grid)
                drawn = parts.thread.run(
                    lambda: [
                        vae.decode(parts.vae, cell[None], family.unscale, plan.strips, reader.check)
                        for cell in cells
                    ]
                )
                images = [vae.crop_centre(image, request.size) for image in drawn]
                for image in images if plan.mode != "exact" else ():
                    check_image(image)
                if sketch:
                    sketch.learn(cells[0], drawn[0])
        if not parts.compiled:
            return Run(images, plan, watch.seconds)
        plan = plan.model_copy(update={"compiled": parts.compiled.works})
        return Run(images, plan, watch.seconds, parts.compiled.rates)

    def _load(self, plan: Plan, reader: weights.Reader) -> "_Parts":
        if self._parts is None or not plan.loads_like(self._parts.plan):
            self.release()
            self._parts = _Parts(self.installed, plan, self._cache, reader)
            self._parts.speed_up(lambda text: self._emit(Notice(text=text)))
        return self._parts

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What an ended run has left half loaded is given back."""
        try:
            yield
        except BaseException:
            if self._parts and not self._parts.is_loaded:
                self.release()
            raise


@dataclass(frozen=True)
class Run:
    """The pictures of a request in the order of its seeds, what made them, and the seconds of each
    phase. `rates`: what it has shown of the device's, by their names in Rates."""

    images: list[Image.Image]
    plan: Plan
    seconds: dict[PhaseName, float]
    rates: dict[str, Any] = field(default_factory=dict)


class _Parts:
    """The components of a model; the text encoder comes at the first prompt that isn't known.

    Weights that stay are read in the background. Raises ModelMissing.
    """

    def __init__(
        self, installed: Installed, plan: Plan, cache: Path | None, reader: weights.Reader
    ) -> None:
        folder, self.plan = installed.folder, plan
        self.family = family = families.family(installed.model.family)
        sampling = installed.model.sampling
        self.sigmas = sampling.sigmas
        self.device, self.dtype = torch.device(plan.device), getattr(torch, plan.dtype)
        self._cache, self._family_name = cache, installed.model.family
        self._text_folder, self._vae_folder = folder / "text_encoder", folder / "vae"
        self._text_encoder: text.TextEncoder | None = None
        self.compiled: compiled.Compiled | None = None
        self._sketch: Sketch | None = None
        self.thread = FreshThread(self.device)
        logs.adopt_libraries()
        # Their progress bars would stand beside ours
        transformers_logging.disable_progress_bar()
        diffusers_logging.disable_progress_bar()
        limit_memory(self.device, plan.vram_limit_bytes)
        try:
            self.tokenizer = text.Tokenizer(folder / family.TOKENIZER, family.wrap, family.SYSTEM)
            self.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
            positions = text.positions(self._text_folder)
            self._known = self._tensor_cache("embeddings", self._text_folder, EMBEDDINGS_LIMIT)
            self.vae = family.VAE.from_pretrained(folder / "vae", dtype=self.dtype).eval()
            vae.keep_decoder(self.vae)
            self.vae.to(self.device)
            if plan.single_frame:
                on_gpu = plan.device not in ("cpu", "mps")
                decoding = DECODINGS[installed.model.family]
                vae.make_single_frame(self.vae, decoding, on_gpu and plan.dtype == "bfloat16")
            self.transformer = family.Transformer(
                installed.transformer,
                plan.placement,
                self.device,
                self.dtype,
                reader,
                self._tensor_cache("modulation", installed.transformer, MODULATION_LIMIT),
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            unless_memory(error)
            raise ModelMissing(
                f"The model in {folder} can't be loaded: {error}.", "Download it again."
            ) from error
        self._prompt_limit = min(
            sampling.max_prompt_tokens or family.TEXT_POSITIONS,
            family.TEXT_POSITIONS,
            positions - self.tokenizer.dropped,
        )

    def speed_up(self, on_failure: Callable[[str], None]) -> None:
        """Attention and compiled blocks as planned; `on_failure` is told where they don't work."""
        blocks = self.transformer.blocks
        attention.use(blocks, self.plan.attention)
        if self.plan.compiled:
            cache = self._cache and self._cache / "compiled"
            self.compiled = compiled.compile_blocks(blocks, self.family.lengths, cache, on_failure)

    @property
    def is_loaded(self) -> bool:
        """Nothing is on its way, and nothing failed to come."""
        loading = [part.loading for part in (self.transformer, self._text_encoder) if part]
        return all(each.done() and each.exception() is None for each in loading)

    def token_grid(self, size: Size) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        side = self.family.PATCH * vae.scale(self.vae)
        return size.height // side, size.width // side

    def cell_shape(self, grid: tuple[int, int]) -> tuple[int, int, int]:
        """Channels, height and width of a picture's latent cells."""
        patch = self.family.PATCH
        channels = self.transformer.model.config.in_channels // patch**2
        return channels, grid[0] * patch, grid[1] * patch

    def tokenize(self, prompts: Sequence[str], truncate: bool) -> list[list[int]]:
        """Each prompt's token ids. Raises PromptTooLong."""
        return [self.tokenizer(prompt, self._prompt_limit, truncate) for prompt in prompts]

    def known(self, prompts: list[list[int]], reader: weights.Reader) -> list[torch.Tensor | None]:
        """The last hidden states of each prompt, of its token ids, from an earlier run. Where one
        is new, the text encoder is loaded from here on."""
        found = [self._known.get(ids) if self._known else None for ids in prompts]
        if self._text_encoder is None and any(states is None for states in found):
            self._text_encoder = text.TextEncoder(
                self.family.TEXT_MODEL,
                self.family.TEXT_NORMED,
                self._text_folder,
                self.plan.text_placement,
                self.device,
                self.dtype,
                reader,
            )
        return found

    def encode(
        self,
        prompts: list[list[int]],
        known: list[torch.Tensor | None],
        reader: weights.Reader,
        watch: "_Watch",
    ) -> list[torch.Tensor]:
        """Each prompt's embeddings, [1, tokens, width], of its token ids."""
        new = [ids for ids, states in zip(prompts, known, strict=True) if states is None]
        made = iter(self._read_prompts(new, reader, watch) if new else ())
        hidden = [next(made) if states is None else states.to(self.device) for states in known]
        return [states[:, self.tokenizer.dropped :] for states in hidden]

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """While the transformer walks: after it, the picture is decoded in the memory of its slots,
        and the next prompt is read there."""
        try:
            yield
        finally:
            self.transformer.rest()

    def sketch(self, folder: Path | None) -> Sketch | None:
        """Draws previews of this VAE's latents."""
        if folder and self._sketch is None:
            self._sketch = Sketch(folder, checkpoint_identity(self._vae_folder))
        return self._sketch

    def close(self) -> None:
        if self._text_encoder:
            self._text_encoder.close()
        self.transformer.close()
        self.thread.close()

    def _read_prompts(
        self, prompts: list[list[int]], reader: weights.Reader, watch: "_Watch"
    ) -> list[torch.Tensor]:
        assert self._text_encoder
        watch.wait(self._text_encoder.loading)
        hidden = self._text_encoder.encode(prompts, reader)
        for ids, states in zip(prompts, hidden, strict=True):
            if self._known:
                self._known.put(ids, states)
        return hidden

    def _tensor_cache(self, name: str, component: Path, limit: int) -> TensorCache | None:
        if self._cache is None:
            return None
        libraries = [torch.__version__, transformers.__version__, diffusers.__version__]
        identity = [self._family_name, device_name(self.device), str(self.dtype), *libraries]
        return TensorCache(self._cache / name, identity + checkpoint_identity(component), limit)


class _Watch:
    """Tells the caller where a run is, times its phases, and ends it when it is cancelled."""

    def __init__(self, emit: Emit, is_cancelled: IsCancelled, steps: int) -> None:
        self._emit, self._is_cancelled, self._steps = emit, is_cancelled, steps
        self.seconds: dict[PhaseName, float] = {}
        self.show: Show | None = None
        self._shown = 0.0
        self._read = Loading(done_bytes=0, total_bytes=0)

    @contextmanager
    def phase(self, name: PhaseName) -> Iterator[None]:
        self._check()
        self._emit(PhaseStarted(phase=name))
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    @contextmanager
    def reading(self, reader: weights.Reader) -> Iterator[None]:
        """Meanwhile it is said how far `reader` is; in a thread, for a block that is read may keep
        this one waiting."""
        ended = threading.Event()

        def tell() -> None:
            while not ended.wait(READING_SECONDS):
                self._tell(reader)

        with ThreadPoolExecutor(1, thread_name_prefix="progress") as pool:
            telling = pool.submit(tell)
            try:
                yield
            finally:
                ended.set()
        telling.result()
        self._tell(reader)

    def wait(self, loading: Future[None]) -> None:
        """Until what is read in the background is there."""
        while not loading.done():
            wait([loading], timeout=READING_SECONDS)
            self._check()
        loading.result()

    def stepped(self, step: int, seconds: float, latents: Latents) -> None:
        self._emit(Stepped(step=step, steps=self._steps, seconds=seconds))
        self._check()
        now = time.perf_counter()
        if self.show and now - self._shown > PREVIEW_SECONDS and step < self._steps:
            self._shown = now
            self.show(step, latents())

    def _tell(self, reader: weights.Reader) -> None:
        """What is read, where that is news. First what is done: more may be expected meanwhile."""
        done = reader.done
        read = Loading(done_bytes=done, total_bytes=reader.expected)
        if read != self._read:
            self._read = read
            self._emit(read)

    def _check(self) -> None:
        if self._is_cancelled():
            raise Cancelled("Stopped.", "Nothing was written.")


@contextmanager
def _shown(
    sketch: Sketch | None, cells: Callable[[torch.Tensor], torch.Tensor], emit: Emit
) -> Iterator[Show | None]:
    """What shows latents while they are made, of which `cells` makes latent cells; all is shown
    that will be when this ends."""
    if sketch is None:
        yield None
        return

    def told(step: int, jpeg: bytes) -> None:
        emit(Preview(step=step, jpeg=base64.b64encode(jpeg).decode()))

    with Sideshow(
        lambda latents: sketch.draw(cells(latents)),
        told,
        lambda error: emit(Notice(text=f"There are no more previews of this run: {error}")),
    ) as sideshow:
        yield sideshow.show


def _files(installed: Installed) -> list[list[str]]:
    """The state of the files that the model is loaded from."""
    others = [
        installed.folder / name for name in installed.model.components if name != "transformer"
    ]
    folders = (installed.transformer, *others)
    return [checkpoint_identity(folder) for folder in folders if folder.is_dir()]


def device_name(device: torch.device) -> str:
    """Bits depend on the card, not on its number."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _forget_tables() -> None:
    """diffusers keeps the rotary tables of every model for good, on its device."""
    for each in gc.get_objects():
        # Not isinstance: it asks objects that answer with a warning
        if type(each) is functools._lru_cache_wrapper and each.__module__.startswith("diffusers."):
            each.cache_clear()


def limit_memory(device: torch.device, limit: int) -> None:
    """Make torch fail above `limit` bytes of the GPU; 0 lifts the limit. Not verified on GPUs of
    Apple and Intel."""
    if device.type == "cpu":
        return
    gpu: Any = torch.get_device_module(device)
    if device.type == "mps":
        total = gpu.recommended_max_memory()
    else:
        total = gpu.get_device_properties(device).total_memory
    gpu.set_per_process_memory_fraction(min(1.0, (limit or total) / total))


@contextmanager
def _errors(plan: Plan) -> Iterator[None]:
    """What torch and the system raise, in words for people."""
    with memory_told("Close other programs, or choose a smaller --size."):
        try:
            yield
        except ToolError:
            raise
        except Exception as error:  # libraries fail in any way
            if not plan.attention:
                raise
            unless_memory(error)
            raise AttentionFailed(
                f"Attention by {plan.attention} does not work here. {first_line(error)}", SAFER
            ) from error
