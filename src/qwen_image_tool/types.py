"""The vocabulary: what is asked (Request), on what (Device), how it runs (Plan), what is said on
the way (Event) and what came out (Result).

Frozen values with an exact JSON round trip; fields at their default are left out when written.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, core_schema

from qwen_image_tool.errors import TROUBLES, BadRequest, ToolError, TroubleKind

MAX_PROMPT = 100_000  # characters; no model reads a tenth of them
MAX_SEED = 2**63 - 1  # torch.Generator takes more, SQLite and JavaScript tools do not


@dataclass(frozen=True, slots=True)
class Size:
    """Width and height in pixels, both at least 1. Written as "1328x1328"."""

    width: int
    height: int

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1:
            raise ValueError(f"{self.width}x{self.height} has no pixels")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "WIDTHxHEIGHT". Raises ValueError for anything else."""
        match = re.fullmatch(r"\s*(\d{1,6})\s*[x×X]\s*(\d{1,6})\s*", text)
        if not match:
            raise ValueError(f"{text!r} is not a size like 1024x768")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def pixels(self) -> int:
        return self.width * self.height

    def rounded_up(self, multiple: int) -> "Size":
        """The smallest size that holds this one with both sides a multiple of `multiple` pixels."""
        return Size(-(-self.width // multiple) * multiple, -(-self.height // multiple) * multiple)

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: Any, _handler: Any) -> CoreSchema:
        from_text = core_schema.no_info_after_validator_function(
            cls.parse, core_schema.str_schema(pattern=r"^\s*\d{1,6}\s*[x×X]\s*\d{1,6}\s*$")
        )
        return core_schema.json_or_python_schema(
            json_schema=from_text,
            python_schema=core_schema.union_schema(
                [core_schema.is_instance_schema(cls), from_text],
                custom_error_type="size",
                custom_error_message="Write it as WIDTHxHEIGHT",
            ),
            serialization=core_schema.to_string_ser_schema(),
        )


class Value(BaseModel):
    """Base of the frozen values: unknown fields are refused, defaults are left out when written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def from_user(cls, **fields: Any) -> Self:
        """Build from a person's input. Raises BadRequest that names the field and its range."""
        try:
            return cls(**fields)
        except ValidationError as error:
            raise _bad_request(error) from error

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields without those at their default."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def to_json(self) -> str:
        return self.model_dump_json(exclude_defaults=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Raises pydantic's ValidationError where the text is not such a value."""
        return cls.model_validate_json(text)


Mode = Literal["default", "exact"]


class Request(Value):
    """Everything the user asked for. None means: the model's own value."""

    model: str = Field(min_length=1, description="A catalogue id, or a local model folder")
    prompt: str = Field(default="", max_length=MAX_PROMPT, description="What the picture shows")
    negative_prompt: str | None = Field(
        default=None, max_length=MAX_PROMPT, description="What it should not show"
    )
    size: Size | None = Field(default=None, description="Pixels of the file, WIDTHxHEIGHT")
    steps: int | None = Field(default=None, ge=1, le=1000, description="Denoising steps")
    cfg: float | None = Field(
        default=None, ge=1, le=50, description="True classifier-free guidance; 1 is off"
    )
    seed: int | None = Field(
        default=None, ge=0, le=MAX_SEED, description="Seed of the first picture; None is random"
    )
    images: int = Field(
        default=1, ge=1, le=100, description="Pictures, with seeds seed, seed+1 ..."
    )
    mode: Mode = Field(
        default="default",
        description="exact: the bits of diffusers on this device; default: within rounding of them",
    )
    truncate: bool = Field(default=False, description="Cut a prompt that is too long")

    @property
    def seeds(self) -> tuple[int, ...]:
        """One seed a picture. Needs a resolved request."""
        if self.seed is None:
            raise ValueError("the request has no seed yet: resolve it first")
        return tuple((self.seed + i) % (MAX_SEED + 1) for i in range(self.images))

    def for_image(self, index: int) -> "Request":
        """The request that makes picture `index` of this one alone."""
        return self.model_copy(update={"seed": self.seeds[index], "images": 1})


class Rates(Value):
    """What a device was measured to do, in the dtype it computes in; 0: not measured.

    Products and attention in FLOP/s; copies and reads in bytes/s, where nothing else is said."""

    matmul: float = 0
    attention: float = 0
    memory: float = Field(default=0, description="Copies within the device, read plus written")
    bus: float = Field(default=0, description="From page-locked memory to the GPU")
    pageable: float = Field(default=0, description="From pageable memory to the GPU")
    disk: float = Field(default=0, description="Reads of model files by several threads")
    reading: float = Field(default=0, description="Seconds of one core for a byte of these reads")
    attention_backend: str = Field(
        default="", description="diffusers' name of the fastest one; empty: torch's own choice"
    )
    compiler: bool = Field(default=False, description="torch.compile works here")
    compile_seconds: float = Field(
        default=0, description="That the first compiled step took longer, with what is cached"
    )


class Device(Value):
    """What the hardware is: read once, passed as a value. Sizes in bytes."""

    kind: Literal["cpu", "cuda", "rocm", "xpu", "mps"]
    name: str
    ram_bytes: int
    ram_free_bytes: int
    vram_bytes: int = 0
    vram_free_bytes: int = Field(
        default=0, description="What a process may take, its own context included"
    )
    commit_free_bytes: int | None = Field(
        default=None,
        description="What Windows can still promise to programs, RAM and GPU memory together;"
        " null: the system has no such limit",
    )
    vram_capped: bool = Field(default=False, description="A person set that, not the hardware")
    cores: int = 1
    bf16: bool = Field(default=True, description="Multiplies bfloat16 matrices in hardware")
    shared_memory: bool = Field(default=False, description="GPU and CPU use the same memory")
    system: str = Field(default="", description="sys.platform, or wsl")
    driver: str = ""
    torch: str = ""
    rates: Rates = Rates()
    notes: tuple[str, ...] = ()

    def within(self, ram_bytes: int | None, vram_bytes: int | None) -> "Device":
        """This device with no more free memory than these."""
        limits = {"ram_free_bytes": ram_bytes, "vram_free_bytes": vram_bytes}
        update = {
            name: min(getattr(self, name), limit)
            for name, limit in limits.items()
            if limit is not None
        }
        capped = self.vram_capped or vram_bytes is not None
        return self.model_copy(update=update | {"vram_capped": capped})

    def with_rates(self, rates: Rates) -> "Device":
        return self.model_copy(update={"rates": rates})

    @property
    def torch_name(self) -> str:
        """The name torch gives it: ROCm answers to "cuda"."""
        return "cuda" if self.kind == "rocm" else self.kind


PhaseName = Literal["load", "encode", "denoise", "decode", "save"]


class PhaseNeed(Value):
    """What a phase is expected to take: memory at its peak and reads from disk, in bytes; seconds,
    where they can be told."""

    phase: PhaseName
    ram_bytes: int
    vram_bytes: int = 0
    read_bytes: int = 0
    seconds: float | None = None


class Placement(Value):
    """Where a model's repeated blocks are: `resident` of them on the device, the others taking
    turns in `slots` buffers there, from `source`: page-locked RAM, RAM, or disk. Those of them that
    do not fit there come from elsewhere: `pageable` of them from RAM, `disk` of them from disk."""

    blocks: int
    resident: int
    slots: int = 0
    source: Literal["", "pinned", "pageable", "disk"] = ""
    pageable: int = 0
    disk: int = 0

    def streamed(self, place: str) -> int:
        """How many come from `place`, a source."""
        others = {"pageable": self.pageable, "disk": self.disk}
        rest = self.blocks - self.resident - sum(others.values())
        return others.get(place, 0) + rest * (place == self.source)


class Plan(Value):
    """How a resolved request runs on a device, with one plain sentence for each choice."""

    device: str = Field(description="torch's name of the device")
    dtype: Literal["bfloat16", "float32"]
    mode: Mode = "default"
    working_size: Size = Field(description="What the engine draws; the file is its centre")
    forwards: int = Field(description="Passes through the transformer")
    compiled: bool = Field(default=False, description="Blocks go through torch.compile")
    attention: str = Field(
        default="", description="diffusers' name of the attention backend; empty: torch's choice"
    )
    single_frame: bool = Field(
        default=True, description="Our own decoder makes the pixels; else diffusers', for its bits"
    )
    strips: int = Field(default=1, description="Parts that our decoder works a picture in")
    placement: Placement = Field(description="Of the transformer's blocks")
    text_placement: Placement = Field(description="Of the text encoder's layers")
    vram_limit_bytes: int = Field(
        default=0,
        description="What torch may take of the GPU, so that it fails, not spills; 0: all",
    )
    bytes_per_step: int = Field(default=0, description="Weights that a step copies to the device")
    phases: tuple[PhaseNeed, ...]
    disk_bytes: int = Field(description="Space the pictures may take")
    reasons: tuple[str, ...] = ()

    def loads_like(self, other: "Plan") -> bool:
        """Whether a model loaded by `other` can run by this plan."""
        ours, theirs = (
            (
                *(plan.device, plan.dtype, plan.mode, plan.placement, plan.text_placement),
                *(plan.compiled, plan.attention, plan.vram_limit_bytes, plan.single_frame),
            )
            for plan in (self, other)
        )
        return ours == theirs

    @property
    def ram_bytes(self) -> int:
        return max(need.ram_bytes for need in self.phases)

    @property
    def vram_bytes(self) -> int:
        return max(need.vram_bytes for need in self.phases)

    @property
    def seconds(self) -> float | None:
        """Of all phases; None where one can't be told."""
        each = [need.seconds for need in self.phases]
        return None if None in each else sum(s for s in each if s is not None)


class _Event(Value):
    kind: str

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **super().to_dict()}


class PhaseStarted(_Event):
    kind: Literal["phase"] = "phase"
    phase: PhaseName
    detail: str = ""


class Stepped(_Event):
    """Denoising step `step` of `steps` is done; `seconds` is what this step took."""

    kind: Literal["step"] = "step"
    step: int
    steps: int
    seconds: float


class Loading(_Event):
    """Weights read so far, of those that the run needs now; in bytes."""

    kind: Literal["loading"] = "loading"
    done_bytes: int
    total_bytes: int


class Saved(_Event):
    kind: Literal["saved"] = "saved"
    path: str
    seed: int


class Preview(_Event):
    """What the first picture looks like after step `step`: a small JPEG, in base64."""

    kind: Literal["preview"] = "preview"
    step: int
    jpeg: str


class Planned(_Event):
    """How the request runs, before any weight is read."""

    kind: Literal["planned"] = "planned"
    plan: Plan
    number: int = Field(default=1, description="Of the plans for this request, counted from 1")


class Notice(_Event):
    """A sentence for the user that changes nothing in the run."""

    kind: Literal["notice"] = "notice"
    text: str


class DownloadProgress(_Event):
    """A download's state: bytes that are on disk and bytes in all, bytes a second over the last
    seconds (0: none yet), seconds left (None: not known)."""

    kind: Literal["download"] = "download"
    model: str
    done_bytes: int
    total_bytes: int
    bytes_per_second: float = 0
    seconds_left: float | None = None
    file: str = ""


class VerifyProgress(_Event):
    """Hashing: bytes read of bytes in all."""

    kind: Literal["verify"] = "verify"
    model: str
    done_bytes: int
    total_bytes: int
    file: str = ""


Event = Annotated[
    PhaseStarted
    | Planned
    | Loading
    | Stepped
    | Preview
    | Saved
    | Notice
    | DownloadProgress
    | VerifyProgress,
    Field(discriminator="kind"),
]
event_adapter: TypeAdapter[Event] = TypeAdapter(Event)


class Failure(Value):
    """Why something ended without a result: what happened, what to do next, and what was kept.

    `kind`: a key of errors.TROUBLES.
    """

    kind: TroubleKind
    message: str
    hint: str = ""
    kept: str = ""

    @classmethod
    def of(cls, error: ToolError) -> Self:
        """What a person is told of an error."""
        trouble = TROUBLES[error.trouble]
        hint = error.hint or trouble.press
        return cls(kind=error.trouble, message=error.message, hint=hint, kept=trouble.kept)

    @classmethod
    def from_table(cls, kind: TroubleKind, detail: str = "") -> Self:
        """The table's sentences, with what this case adds."""
        trouble = TROUBLES[kind]
        message = f"{trouble.happened} {detail}".strip()
        return cls(kind=kind, message=message, hint=trouble.press, kept=trouble.kept)


class ImageFile(Value):
    """A picture on disk."""

    path: str
    seed: int
    size: Size


class Result(Value):
    """What a run made, from what, and how long each phase took (seconds)."""

    request: Request
    plan: Plan
    images: tuple[ImageFile, ...]
    seconds: dict[PhaseName, float]
    versions: dict[str, str]


NAMES = {
    "prompt": "The prompt",
    "negative_prompt": "The negative prompt",
    "steps": "The number of steps",
    "cfg": "The CFG scale",
    "images": "The number of pictures",
    "seed": "The seed",
}
SHOWN = 80  # characters of a wrong value, at most
# pydantic's kinds of error, or their first words -> what is allowed
KINDS = {
    "int": "It has to be a whole number.",
    "float": "It has to be a number.",
    "finite": "It has to be a number.",
    "bool": "It has to be true or false.",
    "string_unicode": "It has to be text of valid unicode characters.",
    "string": "It has to be text.",
    "path": "It has to be a folder.",
    "list": "It has to be a list.",
    "dict": "It has to be an object.",
    "size": "Write it as WIDTHxHEIGHT: 1024x768.",
}
LIMITS = {
    "ge": "Use {} or more.",
    "gt": "Use more than {}.",
    "le": "Use {} or less.",
    "lt": "Use less than {}.",
    "min_length": "Use {} or more characters.",
}


def wrong_field(found: Mapping[str, Any], name: str) -> BadRequest:
    """What is wrong with a field and what is allowed, by pydantic's details of one error. `name`:
    what the field is called where it was given."""
    kind, given, limits = found["type"], found["input"], found.get("ctx", {})
    if kind == "missing":
        return BadRequest(f"{name} is missing.", "Give it.")
    if kind == "extra_forbidden":
        return BadRequest(f"{name} is not a field here.", "Leave it out.")
    if "max_length" in limits:
        most = f"Use {limits['max_length']} or less."
        if isinstance(given, str):
            return BadRequest(f"{name} has {len(given)} characters.", most)
        return BadRequest(f"{name} has {len(given)} entries.", most)
    if given in ("", None):
        return BadRequest(f"{name} is empty.", _allowed(found))
    shown = str(given) if limits.keys() & LIMITS.keys() else repr(given)
    if len(shown) > SHOWN:
        shown = f"{shown[: SHOWN // 2]} ... {shown[-SHOWN // 2 :]}"
    return BadRequest(f"{name} is {shown}.", _allowed(found))


def _allowed(found: Mapping[str, Any]) -> str:
    kind, limits = found["type"], found.get("ctx", {})
    if kind == "literal_error":
        choices = limits["expected"].removeprefix("'', ").replace("'", "")
        return f"Choose {choices}."
    for name, words in LIMITS.items():
        if name in limits:
            limit = limits[name]
            # Seeds keep all their digits
            return words.format(limit if isinstance(limit, int) else f"{limit:g}")
    known = KINDS.get(kind) or KINDS.get(kind.partition("_")[0])
    return known or f"{found['msg'].removeprefix('Value error, ')}."


def _bad_request(error: ValidationError) -> BadRequest:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"]) or "request"
    return wrong_field(first, NAMES.get(field, field))
