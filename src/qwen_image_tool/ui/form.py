"""What the form of Create says, as a Request, and back. Plain functions: they choose nothing."""

from dataclasses import astuple, dataclass
from typing import Any

from qwen_image_tool.catalog import Model
from qwen_image_tool.catalog.sizes import RATIOS, RESOLUTIONS, SIZES, menu_size, native_size
from qwen_image_tool.errors import BadRequest
from qwen_image_tool.types import MAX_SEED, Mode, Request, Size

NATIVE = "Native"  # the resolution that stands for the model's own size of a ratio


@dataclass(frozen=True)
class Form:
    """The values of the form, in its order. `resolution`: NATIVE, one of the menu, or pixels that
    the menu does not have, such as "720x720". `seed`: text; empty for a random one."""

    ratio: str
    resolution: str
    prompt: str
    negative: str
    model: str
    images: float | None
    seed: str | None
    steps: float | None
    cfg: float | None
    mode: Mode

    def values(self) -> tuple[Any, ...]:
        return astuple(self)


def request_of(form: Form, model: Model) -> Request:
    """Raises BadRequest that names the field."""
    return Request.from_user(
        model=model.id,
        prompt=form.prompt.strip(),
        negative_prompt=form.negative.strip() or None,
        size=size_of(form.ratio, form.resolution, model),
        steps=None if form.steps is None else int(form.steps),
        cfg=form.cfg,
        seed=seed_of(form.seed),
        images=1 if form.images is None else int(form.images),
        mode=form.mode,
    )


def form_of(request: Request, model: Model) -> Form:
    """The form that asks for this request."""
    ratio, resolution = entry_of(request.size, model)
    return Form(
        ratio=ratio,
        resolution=resolution,
        prompt=request.prompt,
        negative=(request.negative_prompt or "").strip(),
        model=model.id,
        images=request.images,
        seed="" if request.seed is None else str(request.seed),
        steps=model.sampling.steps if request.steps is None else request.steps,
        cfg=model.sampling.cfg if request.cfg is None else request.cfg,
        mode=request.mode,
    )


def size_of(ratio: str, resolution: str, model: Model) -> Size:
    """The pixels of a choice. Raises BadRequest."""
    if resolution == NATIVE:
        return native_size(model.sizes.native, ratio)
    if resolution in RESOLUTIONS:
        return menu_size(ratio, resolution)
    return Size.parse(resolution)


def entry_of(size: Size | None, model: Model) -> tuple[str, str]:
    """The ratio and resolution that stand for these pixels; None: the model's own."""
    if size is None:
        return "1:1", NATIVE
    native = {pixels: (ratio, NATIVE) for ratio, pixels in model.sizes.native.items()}
    menu = {pixels: entry for entry, pixels in SIZES.items()}
    return native.get(size) or menu.get(size) or (nearest_ratio(size), str(size))


def nearest_ratio(size: Size) -> str:
    def distance(ratio: str) -> float:
        width, height = map(int, ratio.split(":"))
        return max(size.width * height, size.height * width) / min(
            size.width * height, size.height * width
        )

    return min(RATIOS, key=distance)


def sizes_of(ratio: str, model: Model) -> dict[str, Size]:
    """The resolutions of a ratio, each with its pixels, the model's own first."""
    own = {NATIVE: model.sizes.native[ratio]} if ratio in model.sizes.native else {}
    return own | {resolution: SIZES[ratio, resolution] for resolution in RESOLUTIONS}


def seed_of(value: str | None) -> int | None:
    """None for a random one. Read from text: JavaScript's numbers lose digits of large seeds.
    Raises BadRequest."""
    text = (value or "").strip()
    if not text:
        return None
    if not text.isdecimal() or int(text) > MAX_SEED:
        raise BadRequest(f"The seed is {text}.", f"Use a whole number up to {MAX_SEED}, or none.")
    return int(text)
