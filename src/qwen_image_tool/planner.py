"""How a request runs on a device: pure arithmetic, no torch, nothing read from the machine.

For now the whole model is resident on one device; where it does not fit, the answer is CannotRun.
"""

from dataclasses import dataclass
from typing import Literal

from qwen_image_tool.catalog import DEFAULT_MODEL
from qwen_image_tool.errors import CannotRun
from qwen_image_tool.store import Installed
from qwen_image_tool.types import Device, PhaseNeed, Plan, Request, Size

GIB = 2**30
PROCESS_BYTES = int(0.9 * GIB)  # Python with torch and the model classes loaded, before any weight
USABLE = 0.92  # of the free memory; the rest is for other programs and the allocator's rounding
PNG_BYTES_PER_PIXEL = 3  # RGB that does not compress at all
METADATA_BYTES = 64 << 10
FLOAT32_LIMIT = 2 * GIB  # models up to this size compute in float32 on the CPU


@dataclass(frozen=True)
class _Placement:
    device: str
    dtype: Literal["bfloat16", "float32"]
    phases: tuple[PhaseNeed, ...]
    reason: str


def plan(request: Request, installed: Installed, device: Device) -> Plan:
    """Plan a resolved request. Raises CannotRun where the model does not fit this device."""
    if request.size is None or request.steps is None:
        raise ValueError("the request is not resolved")
    model = installed.model
    working = request.size.rounded_up(model.sizes.multiple)
    passes = request.images * (1 if request.negative_prompt is None else 2)
    placement = _place(working, installed, device)
    reasons = [placement.reason]
    if working != request.size:
        reasons.append(
            f"Drawn at {working} and cut to the centre {request.size}, because {model.name} needs"
            f" multiples of {model.sizes.multiple}."
        )
    return Plan(
        device=placement.device,
        dtype=placement.dtype,
        working_size=working,
        forwards=request.steps * passes,
        phases=placement.phases,
        disk_bytes=disk_bytes(request),
        reasons=tuple(reasons),
    )


def disk_bytes(request: Request) -> int:
    """What the pictures of a resolved request may take on disk."""
    if request.size is None:
        raise ValueError("the request is not resolved")
    return (request.size.pixels * PNG_BYTES_PER_PIXEL + METADATA_BYTES) * request.images


def _place(size: Size, installed: Installed, device: Device) -> _Placement:
    weights = installed.weight_bytes
    decode = size.pixels * installed.model.decode_bytes_per_pixel
    if device.kind != "cpu":
        need = weights + decode
        if need <= device.vram_free_bytes * USABLE:
            return _Placement(
                device=device.torch_name,
                dtype="bfloat16",
                phases=_on_gpu(weights, decode, max(installed.bytes.values())),
                reason=f"Runs on {device.name}: the whole model fits ({_gib(need)} of"
                f" {_gib(device.vram_free_bytes)} free).",
            )
    small = weights * 2 <= FLOAT32_LIMIT
    factor = 2 if small else 1
    need = PROCESS_BYTES + (weights + decode) * factor
    if need > device.ram_free_bytes * USABLE:
        raise _cannot(installed, need, device)
    where = "Runs on the CPU" + (
        f", because {device.name} has too little free memory ({_gib(device.vram_free_bytes)})"
        if device.kind != "cpu"
        else ""
    )
    return _Placement(
        device="cpu",
        dtype="float32" if small else "bfloat16",
        phases=_on_cpu(weights * factor, decode * factor),
        reason=f"{where}, in "
        + ("float32: the model is small." if small else "bfloat16: float32 would double it."),
    )


def _on_gpu(weights: int, decode: int, largest: int) -> tuple[PhaseNeed, ...]:
    loading = PROCESS_BYTES + largest  # one component at a time passes through the RAM
    return (
        PhaseNeed(phase="load", ram_bytes=loading, vram_bytes=weights),
        PhaseNeed(phase="encode", ram_bytes=PROCESS_BYTES, vram_bytes=weights),
        PhaseNeed(phase="denoise", ram_bytes=PROCESS_BYTES, vram_bytes=weights),
        PhaseNeed(phase="decode", ram_bytes=PROCESS_BYTES, vram_bytes=weights + decode),
    )


def _on_cpu(weights: int, decode: int) -> tuple[PhaseNeed, ...]:
    resident = PROCESS_BYTES + weights
    return (
        PhaseNeed(phase="load", ram_bytes=resident),
        PhaseNeed(phase="encode", ram_bytes=resident),
        PhaseNeed(phase="denoise", ram_bytes=resident),
        PhaseNeed(phase="decode", ram_bytes=resident + decode),
    )


def _cannot(installed: Installed, need: int, device: Device) -> CannotRun:
    gpu = f" and {_gib(device.vram_free_bytes)} of VRAM" if device.kind != "cpu" else ""
    hint = (
        f"Close other programs, choose a smaller --size, or use --model {DEFAULT_MODEL}."
        if installed.model.id != DEFAULT_MODEL
        else "Close other programs, or choose a smaller --size."
    )
    return CannotRun(
        f"{installed.model.name} needs {_gib(need)} of RAM here, and this computer has"
        f" {_gib(device.ram_free_bytes)} free{gpu}.",
        hint,
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
