"""How a request runs on a device: pure arithmetic, no torch, nothing read from the machine.

For now the text encoder and the VAE are resident on the device. The transformer's blocks are too;
on the CPU they are read from disk at every step where the RAM does not hold them all.
"""

from dataclasses import dataclass
from typing import Literal

from qwen_image_tool.catalog import DEFAULT_MODEL
from qwen_image_tool.errors import CannotRun
from qwen_image_tool.store import Installed
from qwen_image_tool.types import Device, PhaseNeed, Placement, Plan, Request, Size

GIB = 2**30
PROCESS_BYTES = int(0.9 * GIB)  # Python with torch and the model classes loaded, before any weight
USABLE = 0.92  # of the free memory; the rest is for other programs and the allocator's rounding
SLOTS = 2  # buffers that streamed blocks take turns in
PNG_BYTES_PER_PIXEL = 3  # RGB that does not compress at all
METADATA_BYTES = 64 << 10
FLOAT32_LIMIT = 2 * GIB  # models up to this size compute in float32 on the CPU


@dataclass(frozen=True)
class _Choice:
    device: str
    dtype: Literal["bfloat16", "float32"]
    blocks: Placement
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
        working_size=working,
        forwards=request.steps * passes,
        placement=choice.blocks,
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
    """The GPU where the whole model fits it, else the CPU."""
    if device.kind != "cpu":
        gpu = _on_gpu(size, installed, device)
        if gpu.fits(device):
            return gpu
    count = installed.blocks.count
    for resident in (count, *range(count - SLOTS - 1, -1, -1)):
        cpu = _on_cpu(size, installed, device, resident)
        if cpu.fits(device):
            return cpu
    raise _cannot(installed, cpu, device)


def _on_gpu(size: Size, installed: Installed, device: Device) -> _Choice:
    blocks = installed.blocks
    weights = installed.weight_bytes - blocks.count * blocks.modulation_bytes
    decode = _decode_bytes(size, installed)
    # One component passes through the RAM, and of the transformer one block
    loading = PROCESS_BYTES + max(
        blocks.bytes, *(b for name, b in installed.bytes.items() if name != "transformer")
    )
    return _Choice(
        device=device.torch_name,
        dtype="bfloat16",
        blocks=Placement(blocks=blocks.count, resident=blocks.count),
        phases=(
            PhaseNeed(phase="load", ram_bytes=loading, vram_bytes=weights),
            PhaseNeed(phase="encode", ram_bytes=PROCESS_BYTES, vram_bytes=weights),
            PhaseNeed(phase="denoise", ram_bytes=PROCESS_BYTES, vram_bytes=weights),
            PhaseNeed(phase="decode", ram_bytes=PROCESS_BYTES, vram_bytes=weights + decode),
        ),
        reason=f"Runs on {device.name}: the whole model fits its"
        f" {_gib(device.vram_free_bytes)} of free memory.",
    )


def _on_cpu(size: Size, installed: Installed, device: Device, resident: int) -> _Choice:
    blocks = installed.blocks
    small = installed.weight_bytes * 2 <= FLOAT32_LIMIT
    widened = 2 if small else 1
    streamed = blocks.count - resident
    held = blocks.count - streamed + (SLOTS if streamed else 0)
    weights = installed.weight_bytes - blocks.count * (blocks.bytes + blocks.modulation_bytes)
    in_memory = PROCESS_BYTES + (weights + held * blocks.bytes) * widened
    reason = "Runs on the CPU"
    if device.kind != "cpu":
        reason += (
            f", because the model does not fit {device.name}"
            f" ({_gib(device.vram_free_bytes)} of memory free)"
        )
    reason += ", in float32: the model is small." if small else ", in bfloat16 to save memory."
    if streamed:
        reason += (
            f" {streamed} of {blocks.count} blocks are read from disk at every step"
            f" ({streamed * blocks.bytes / 1e9:.1f} GB), because the RAM does not hold them."
        )
    return _Choice(
        device="cpu",
        dtype="float32" if small else "bfloat16",
        blocks=Placement(
            blocks=blocks.count,
            resident=resident,
            slots=SLOTS if streamed else 0,
            source="disk" if streamed else "",
        ),
        phases=(
            PhaseNeed(phase="load", ram_bytes=in_memory),
            PhaseNeed(phase="encode", ram_bytes=in_memory),
            PhaseNeed(phase="denoise", ram_bytes=in_memory),
            PhaseNeed(
                phase="decode", ram_bytes=in_memory + _decode_bytes(size, installed) * widened
            ),
        ),
        reason=reason,
    )


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
