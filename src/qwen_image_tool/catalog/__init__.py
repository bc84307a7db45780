"""The model table: `models.json` and its reader. What is known of a model is data in that file."""

import difflib
from collections.abc import Sequence
from importlib.resources import files
from typing import Literal

from pydantic import ConfigDict, Field

from qwen_image_tool.errors import BadRequest, UnsupportedSize
from qwen_image_tool.types import Request, Size, Value

DEFAULT_MODEL = "practice"
Task = Literal["text-to-image", "edit", "layers"]
RUN: tuple[Task, ...] = ("text-to-image",)  # the tasks that this version runs
Family = Literal["qwen-image", "qwen-image-2.1"]


class Licence(Value):
    name: str
    url: str
    commercial: bool


class Component(Value):
    """One part of a model. `class` in JSON is its diffusers or transformers class."""

    model_config = ConfigDict(serialize_by_alias=True)
    class_name: str = Field(alias="class")
    parameters: int = 0
    bytes: int = Field(default=0, description="Of its weights as published")
    files: int = Field(default=0, description="Weight files (shards)")


class Sizes(Value):
    """Which sizes a model draws, in pixels. Any side is worked at the next multiple up."""

    multiple: int
    min_side: int
    max_side: int
    max_pixels: int
    native: dict[str, Size]

    def check(self, size: Size) -> None:
        """Raises BadRequest with the nearest size of the same shape that is within the limits."""
        within = (
            min(size.width, size.height) >= self.min_side
            and max(size.width, size.height) <= self.max_side
            and size.pixels <= self.max_pixels
        )
        if not within:
            raise UnsupportedSize(
                f"{size} is outside this model's limits ({self.min_side} to {self.max_side} pixels"
                f" a side, {self.max_pixels / 1e6:.2f} megapixels at most).",
                f"Nearest: --size {self._nearest(size)}.",
            )

    def _nearest(self, size: Size) -> Size:
        shrink = min(
            1.0,
            self.max_side / max(size.width, size.height),
            (self.max_pixels / size.pixels) ** 0.5,
        )

        def fit(side: int) -> int:
            side = (
                int(side * shrink + 1e-6) // self.multiple * self.multiple
            )  # a root that fits is exact
            return max(side, -(-self.min_side // self.multiple) * self.multiple)

        return Size(fit(size.width), fit(size.height))


class Sampling(Value):
    """The model card's own settings. `sigmas`: a fixed schedule, for distilled models."""

    steps: int
    cfg: float
    negative_prompt: str | None = None
    sigmas: tuple[float, ...] | None = None
    max_prompt_tokens: int | None = None


class Scheduler(Value):
    """Numbers of FlowMatchEulerDiscreteScheduler."""

    base_image_seq_len: int
    max_image_seq_len: int
    base_shift: float
    max_shift: float
    shift: float
    shift_terminal: float | None
    time_shift_type: Literal["exponential", "linear"]
    use_dynamic_shifting: bool
    num_train_timesteps: int


class PinnedFile(Value):
    """What a file has to be, whatever a hub says of it."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Variant(Value):
    """The transformer of a model in other storage: one file of another repository."""

    id: str = Field(description="bf16, fp8, or a GGUF quantisation such as Q4_K_M")
    repo: str
    file: str
    bytes: int = Field(description="As published, to the digits that are known")
    unsupported: str = Field(default="", description="Why this version can't run it, if so")
    revision: str = Field(default="", description="Commit of `repo`; empty: the current one")
    pinned: PinnedFile | None = None


class Model(Value):
    """One row of the catalogue."""

    id: str
    name: str
    repo: str = Field(default="", description="On Hugging Face and, under the same id, ModelScope")
    released: str
    licence: str
    family: Family
    pipeline: str = Field(description="diffusers pipeline class in model_index.json")
    tasks: tuple[Task, ...]
    unsupported: str = Field(default="", description="Why this version can't run it, if so")
    components: dict[str, Component]
    sizes: Sizes
    sampling: Sampling
    scheduler: Scheduler
    decode_bytes_per_pixel: int = Field(description="What diffusers' VAE holds, bfloat16")
    note: str = ""
    revision: str = Field(
        default="", description="Commit of `repo`; empty: the current one, pinned when downloaded"
    )
    pinned: dict[str, PinnedFile] = Field(
        default_factory=dict,
        description="Files of `repo` at `revision`, by path; of others the hub's hashes count",
    )
    transformer_config: dict[str, bool] = Field(
        default_factory=dict, description="Where its configuration differs from the family's"
    )
    shares: dict[str, str] = Field(
        default_factory=dict, description="Component -> the model that publishes the same files"
    )
    variants: tuple[Variant, ...] = ()

    @property
    def does(self) -> tuple[Task, ...]:
        """What can be done with it here: of a model that runs, what this version runs; of another,
        what it is made for."""
        return self.tasks if self.unsupported else RUN

    def variant(self, name: str) -> Variant | None:
        """The variant called `name`; None for "bf16", the model's own. Raises BadRequest."""
        if name.lower() in ("", "bf16"):
            return None
        found = next((v for v in self.variants if v.id.lower() == name.lower()), None)
        if found is None:
            raise BadRequest(
                f"{self.name} has no variant {name!r}.",
                did_you_mean(name, ["bf16", *(variant.id for variant in self.variants)]),
            )
        return found

    @property
    def weight_bytes(self) -> int:
        return sum(component.bytes for component in self.components.values())

    def resolve(self, request: Request, seed: int) -> Request:
        """The request with every open choice filled in: the model's own values, and `seed`.

        Raises BadRequest where the request asks for what this model can't do.
        """
        if not request.prompt.strip():
            raise BadRequest("The prompt is empty.", "Say in a sentence what the picture shows.")
        size = request.size or self.sizes.native["1:1"]
        self.sizes.check(size)
        if self.scheduler.shift_terminal and request.steps == 1:
            raise BadRequest(f"{self.name} can't draw in one step.", "Use --steps 2 or more.")
        fixed = self.sampling.sigmas
        if fixed and request.steps not in (None, len(fixed)):
            raise BadRequest(
                f"{self.name} always takes {len(fixed)} steps, not {request.steps}.",
                "Leave --steps out.",
            )
        cfg = self.sampling.cfg if request.cfg is None else request.cfg
        negative = request.negative_prompt
        if negative is None and cfg > 1:
            negative = self.sampling.negative_prompt or " "
        if negative is not None and negative.strip() and cfg <= 1:
            raise BadRequest(
                "A negative prompt does nothing at CFG 1.", "Use --cfg above 1, such as --cfg 4."
            )
        return request.model_copy(
            update={
                "size": size,
                "steps": self.sampling.steps if request.steps is None else request.steps,
                "cfg": cfg,
                "negative_prompt": negative if cfg > 1 else None,
                "seed": seed if request.seed is None else request.seed,
            }
        )


class Catalog(Value):
    licences: dict[str, Licence]
    models: tuple[Model, ...]

    def get(self, name: str) -> Model | None:
        """The model whose id or repository is exactly `name`; None where there is none."""
        return next((m for m in self.models if name and name in (m.id, m.repo)), None)

    def find(self, name: str) -> Model:
        """Like `get`, but raises BadRequest that names the nearest id."""
        model = self.get(name)
        if model is None:
            raise BadRequest(
                f"There is no model {name!r}.",
                did_you_mean(name, [m.id for m in self.models]),
            )
        return model

    def licence_of(self, model: Model) -> Licence:
        return self.licences[model.licence]


def load_catalog() -> Catalog:
    text = files(__package__).joinpath("models.json").read_bytes()
    return Catalog.from_json(text)


def did_you_mean(word: str, choices: Sequence[str]) -> str:
    """A hint that names the nearest of `choices`, or all of them."""
    near = difflib.get_close_matches(word.lower(), [c.lower() for c in choices], 1, cutoff=0.5)
    if near:
        return f"Did you mean {next(c for c in choices if c.lower() == near[0])!r}?"
    return "Choose one of " + ", ".join(choices) + "."
