"""What running costs: constants that `benchmarks/calibrate.py` measures and writes to `costs.json`,
and the rates that are assumed of cards nobody here has."""

from importlib.resources import files

from pydantic import Field

from qwen_image_tool.catalog import Family
from qwen_image_tool.errors import BadRequest
from qwen_image_tool.types import Rates, Value

GIB = 2**30


class FamilyCosts(Value):
    """Of one family. A hidden state is every token of a picture and its prompt at the
    transformer's width, in the dtype that it computes in."""

    held: float = Field(description="Hidden states that each picture and CFG half keeps")
    working: float = Field(description="Hidden states that the block being computed takes")
    traffic: float = Field(description="Hidden states that a block reads and writes, eager")
    compiled_traffic: float = Field(description="The same, compiled")
    decode_slack: float = Field(
        description="Memory of our own decoder, as a multiple of its tensors: kernels work in it"
    )
    decode_flop: float = Field(description="To decode one pixel, by the published VAE")
    decode_traffic: float = Field(description="Bytes that decoding one pixel reads and writes")


class Costs(Value):
    """Bytes and seconds. `machine`, `versions`: where they were measured."""

    machine: str
    versions: dict[str, str]
    context_bytes: int = Field(description="Of the GPU, beside what torch's allocator holds")
    workspace_bytes: int = Field(description="Of the GPU, for cuBLAS and the allocator's rounding")
    process_bytes: dict[str, int] = Field(
        description="RAM with torch and the model classes loaded and no weight: `cpu`, `gpu`"
    )
    compile_seconds: float = Field(description="Of torch.compile, nothing cached")
    families: dict[Family, FamilyCosts]


class Card(Value):
    """A card nobody here has: its memory and what it is assumed to do."""

    name: str
    vram_bytes: int
    rates: Rates


def load_costs() -> Costs:
    return Costs.from_json(files(__package__).joinpath("costs.json").read_bytes())


def card(name: str) -> Card:
    """Raises BadRequest that names the known ones. About 0.85 of the data sheets' peaks, with the
    bus of a usual machine and an NVMe disk; only those of an H100 were measured."""
    key = "".join(name.lower().split()).removeprefix("rtx")
    if key not in _CARDS:
        raise BadRequest(
            f"What a card {name!r} does is not known here.",
            f"Choose one of {', '.join(_CARDS)}, or give its memory, such as --vram 8GiB.",
        )
    gib, matmul, attention, memory, bus = _CARDS[key]
    rates = Rates(
        matmul=matmul * 1e12,
        attention=attention * 1e12,
        memory=memory * 1e9,
        bus=bus * 1e9,
        pageable=min(bus, 10) * 1e9,
        disk=3e9,
        compiler=True,
    )
    return Card(name=f"{key.upper()} (assumed rates)", vram_bytes=gib * GIB, rates=rates)


# GiB; TFLOP/s of products and of attention in bfloat16; GB/s of its memory and of its bus
_CARDS = {
    "3060": (12, 22, 22, 300, 25),
    "4060ti": (16, 40, 40, 245, 12.5),
    "3090": (24, 64, 60, 800, 25),
    "4090": (24, 150, 150, 860, 25),
    "5090": (32, 200, 190, 1520, 50),
    "h100": (80, 698, 511, 2912, 55),
}
