"""How a request runs on a device: pure arithmetic, no torch, nothing read from the machine.

A GPU is used where it holds the whole model. On the CPU, what the RAM does not hold is read from
disk when it is needed: the text encoder's layers once a prompt, the blocks once a step.
"""

from dataclasses import dataclass
from typing import Literal

from qwen_image_tool.catalog import DEFAULT_MODEL
from qwen_image_tool.errors import CannotRun
from qwen_image_tool.store import Blocks, Installed
from qwen_image_tool.types import Device, PhaseNeed, Placement, Plan, Request, Size

GIB = 2**30
PROCESS_BYTES = int(0.9 * GIB)  # Python with torch and the model classes loaded, before any weight
USABLE = 0.92  # of the free memory; the rest is for other programs and the allocator's rounding
SLOTS = 2  # buffers that streamed blocks take turns in
PNG_BYTES_PER_PIXEL = 4  # RGBA that does not compress at all
METADATA_BYTES = 64 << 10
FLOAT32_LIMIT = 2 * GIB  # models up to this size compute in float32 on the CPU


@dataclass(frozen=True)
class _Choice:
    device: str
    dtype: Literal["bfloat16", "float32"]
    blocks: Placement
    text: Placement
    phases: tuple[PhaseNeed, ...]
    reason: str

    def fits(self, device: Device) -> bool:
        ram, vram = device.ram_free_bytes * USABLE, device.vram_free_bytes * USABLE
        both = ram if device.shared_memory else ram + vram
        return all(
            need.ram_bytes <= ram
            and need.vram_bytes <= vram
            and need.ram_bytes + need.vram_bytes <= both
            for need in self.phases
        )


def plan(request: Request, installed: Installed, device: Device) -> Plan:
    """Plan a resolved request. Raises CannotRun where the model does not fit this device."""
    if request.size is None or request.steps is None:
        raise ValueError("the request is not resolved")
    model = installed.model
    working = request.size.rounded_up(model.sizes.multiple)
    passes = request.images * (1 if request.negative_prompt is None else 2)
    choice = _choose(working, installed, device)
    reasons = [choice.reason]
    if working != request.size:
        reasons.append(
            f"Drawn at {working} and cut to the centre {request.size}, because {model.name} needs"
            f" multiples of {model.sizes.multiple}."
        )
    return Plan(
        device=choice.device,
        dtype=choice.dtype,
        mode=request.mode,
        working_size=working,
        forwards=request.steps * passes,
        placement=choice.blocks,
        text_placement=choice.text,
        phases=choice.phases,
        disk_bytes=disk_bytes(request),
        reasons=tuple(reasons),
    )


def disk_bytes(request: Request) -> int:
    """What the pictures of a resolved request may take on disk."""
    if request.size is None:
        raise ValueError("the request is not resolved")
    return (request.size.pixels * PNG_BYTES_PER_PIXEL + METADATA_BYTES) * request.images


def _choose(size: Size, installed: Installed, device: Device) -> _Choice:
    """The GPU where the whole model fits it; else the CPU, with as much in RAM as it holds."""
    if device.kind != "cpu":
        gpu = _on_gpu(size, installed, device)
        if gpu.fits(device):
            return gpu
    layers, count = installed.text_layers.count, installed.blocks.count
    fewer = range(count - SLOTS - 1, -1, -1)
    for text, blocks in ((layers, count), (0, count), *((0, resident) for resident in fewer)):
        cpu = _on_cpu(size, installed, device, text, blocks)
        if cpu.fits(device):
            return cpu
    raise _cannot(installed, cpu, device)


def _on_gpu(size: Size, installed: Installed, device: Device) -> _Choice:
    blocks, layers = installed.blocks, installed.text_layers
    weights = _outer_bytes(installed) + blocks.count * blocks.bytes + layers.count * layers.bytes
    # A block at a time, and the whole VAE, pass through the RAM
    loading = PROCESS_BYTES + max(blocks.bytes, layers.bytes, installed.bytes["vae"])
    decoding = weights + _decode_bytes(size, installed)
    return _Choice(
        device=device.torch_name,
        dtype="bfloat16",
        blocks=_placement(blocks, blocks.count),
        text=_placement(layers, layers.count),
        phases=(
            PhaseNeed(phase="load", ram_bytes=loading, vram_bytes=weights),
            PhaseNeed(phase="encode", ram_bytes=PROCESS_BYTES, vram_bytes=weights),
            PhaseNeed(phase="denoise", ram_bytes=PROCESS_BYTES, vram_bytes=weights),
            PhaseNeed(phase="decode", ram_bytes=PROCESS_BYTES, vram_bytes=decoding),
        ),
        reason=f"Runs on {device.name}: the whole model fits its"
        f" {_gib(device.vram_free_bytes)} of free memory.",
    )


def _on_cpu(
    size: Size, installed: Installed, device: Device, text_resident: int, resident: int
) -> _Choice:
    small = installed.weight_bytes * 2 <= FLOAT32_LIMIT
    widened = 2 if small else 1
    blocks = _placement(installed.blocks, resident)
    text = _placement(installed.text_layers, text_resident)
    held = (
        _outer_bytes(installed)
        + (blocks.resident + blocks.slots) * installed.blocks.bytes
        + (text.resident + text.slots) * installed.text_layers.bytes
    )
    in_memory = PROCESS_BYTES + held * widened
    decoding = in_memory + _decode_bytes(size, installed) * widened
    return _Choice(
        device="cpu",
        dtype="float32" if small else "bfloat16",
        blocks=blocks,
        text=text,
        phases=(
            PhaseNeed(phase="load", ram_bytes=in_memory),
            PhaseNeed(phase="encode", ram_bytes=in_memory),
            PhaseNeed(phase="denoise", ram_bytes=in_memory),
            PhaseNeed(phase="decode", ram_bytes=decoding),
        ),
        reason=_why_cpu(device, small) + _why_disk(installed, blocks, text),
    )


def _placement(blocks: Blocks, resident: int) -> Placement:
    if resident == blocks.count:
        return Placement(blocks=blocks.count, resident=resident)
    return Placement(blocks=blocks.count, resident=resident, slots=SLOTS, source="disk")


def _outer_bytes(installed: Installed) -> int:
    """The VAE, and of the transformer what is not in its blocks."""
    blocks = installed.blocks
    in_blocks = blocks.count * (blocks.bytes + blocks.modulation_bytes)
    return installed.bytes["vae"] + max(0, installed.bytes["transformer"] - in_blocks)


def _why_cpu(device: Device, small: bool) -> str:
    why = "Runs on the CPU"
    if device.kind != "cpu":
        why += (
            f", because the model does not fit {device.name}"
            f" ({_gib(device.vram_free_bytes)} of memory free)"
        )
    return why + (", in float32: the model is small." if small else ", in bfloat16 to save memory.")


def _why_disk(installed: Installed, blocks: Placement, text: Placement) -> str:
    once = (text.blocks - text.resident) * installed.text_layers.bytes
    each = (blocks.blocks - blocks.resident) * installed.blocks.bytes
    parts = []
    if once:
        parts.append(f"{once / 1e9:.1f} GB for a new prompt")
    if each:
        parts.append(f"{each / 1e9:.1f} GB at every step")
    if not parts:
        return ""
    return f" The RAM does not hold it all: {' and '.join(parts)} are read from disk."


def _decode_bytes(size: Size, installed: Installed) -> int:
    return size.pixels * installed.model.decode_bytes_per_pixel


def _cannot(installed: Installed, cpu: _Choice, device: Device) -> CannotRun:
    gpu = f" and {_gib(device.vram_free_bytes)} of GPU memory" if device.kind != "cpu" else ""
    smaller = "Close other programs, choose a smaller --size"
    practice = installed.model.id == DEFAULT_MODEL
    return CannotRun(
        f"{installed.model.name} needs {_gib(max(n.ram_bytes for n in cpu.phases))} of free RAM,"
        f" and this computer has {_gib(device.ram_free_bytes)}{gpu} free.",
        f"{smaller}." if practice else f"{smaller}, or use --model {DEFAULT_MODEL}.",
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
