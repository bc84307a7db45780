"""How a request runs on a device: pure, no torch, nothing read from the machine.

On a GPU as many blocks stay as fit; the others cross to it once a step: from page-locked RAM as far
as it goes, then from RAM, then from disk. On the CPU, what the RAM does not hold is read from disk.
`needs.py` says what each way takes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

from qwen_image_tool.catalog import DEFAULT_MODEL
from qwen_image_tool.device import ENLARGE_PAGE_FILE
from qwen_image_tool.errors import TROUBLES, BadRequest, CannotRun, TroubleKind, trouble_in
from qwen_image_tool.needs import Needs, Way
from qwen_image_tool.store import Blocks, Installed
from qwen_image_tool.types import Device, Placement, Plan, Request, Size

GIB = 2**30
USABLE_RAM = 0.92  # of the free memory; the rest is for other programs
USABLE_VRAM = 0.95  # and for what the allocator can't use
CAREFUL_VRAM = 0.8  # after it ran out of memory
PINNED_ON_WINDOWS = 0.4  # of the RAM; it refuses at about half
LESS_RAM = 0.9  # of a plan's, is worth a try where it was not there
WINDOWS = ("win32", "wsl")
SLOTS = 2  # buffers that streamed blocks take turns in
PNG_BYTES_PER_PIXEL = 4  # RGBA that does not compress at all
METADATA_BYTES = 64 << 10
FLOAT32_LIMIT = 2 * GIB  # models up to this size compute in float32 on the CPU
LONG = 1800  # seconds of drawing that are worth a warning
SMALLER = (0.75, 0.5, 0.375, 0.25)  # of each side, tried for the hint


def plan(request: Request, installed: Installed, device: Device, anyway: bool = False) -> Plan:
    """The first of `plans`."""
    return plans(request, installed, device, anyway)[0]


def plans(
    request: Request, installed: Installed, device: Device, anyway: bool = False
) -> tuple[Plan, ...]:
    """Plans for a resolved request: the choice, then what to try where it fails (`next_plans`). On
    a GPU none takes more of its memory than the one before; the CPU is last. A fallback's first
    reason says what it changes.

    Raises CannotRun where the model does not fit this device, unless `anyway`: then the way that
    lacks least is taken.
    """
    needs = Needs(request, installed, device)
    chosen = _choose(needs)
    if chosen is None:
        if not anyway:
            raise _cannot(needs)
        return (_plan(needs, _smallest(needs), "It may not fit: this was asked for anyway."),)
    found = {chosen: ""}
    for way, instead in _fallbacks(needs, chosen):
        found.setdefault(way, instead)
    return tuple(_plan(needs, way, instead) for way, instead in found.items())


def next_plans(plans: Sequence[Plan], trouble: TroubleKind) -> tuple[Plan, ...]:
    """Of `plans`, the first of which failed, those that may do better: where RAM ran out (which is
    why systems kill a process), those that take less of it; where no picture came out, those that
    compute it plainly."""
    failed, *later = plans
    if trouble in ("memory", "killed"):
        return tuple(plan for plan in later if plan.ram_bytes < LESS_RAM * failed.ram_bytes)
    if trouble == "broken picture" and not (failed.compiled or failed.attention):
        return ()
    return tuple(later)


def plans_after(plans: Sequence[Plan], tried: int, trouble: TroubleKind) -> tuple[Plan, ...]:
    """For another process, after the plan number `tried` failed: its next ones; that one again
    where none may do better, because the memory of the first process is free now."""
    left = plans[min(tried, len(plans)) - 1 :]
    return next_plans(left, trouble) or tuple(left[:1])


def disk_bytes(request: Request) -> int:
    """What the pictures of a resolved request may take on disk."""
    if request.size is None:
        raise ValueError("the request is not resolved")
    return (request.size.pixels * PNG_BYTES_PER_PIXEL + METADATA_BYTES) * request.images


# The choice


def _choose(needs: Needs) -> Way | None:
    """The GPU where a way on it fits, else the CPU, else None."""
    on_gpu = _on_gpu(needs) if needs.device.kind != "cpu" else None
    return on_gpu or _on_cpu(needs)


def _on_gpu(needs: Needs, vram: float = USABLE_VRAM) -> Way | None:
    """As many residents as fit in this part of the free memory; what memory is left after all of
    them decodes the picture in fewer strips, then keeps the text encoder."""
    blocks, layers = needs.installed.blocks, needs.installed.text_layers
    best = None
    for way in _gpu_ways(needs):
        best = _with_sources(needs, way, vram)
        if best:
            break
    if best is None or best.blocks.resident < blocks.count:
        return best and _computed(needs, best)
    whole = replace(best, text=_resident(layers))
    return _computed(needs, whole if _fits(needs, whole, vram) else best)


def _gpu_ways(needs: Needs) -> Iterator[Way]:
    """From the most memory to the least, what is streamed without its source yet. Compiled where
    that can be: `_computed` decides it by the time alone."""
    blocks, layers = needs.installed.blocks, needs.installed.text_layers
    text = _streaming(layers, 0) or _resident(layers)
    way = Way(needs.device.torch_name, "bfloat16", _resident(blocks), text, not needs.exact)
    way = replace(way, compiled=needs.device.rates.compiler and not needs.exact)
    yield from _smaller(needs, way)


def _smaller(needs: Needs, way: Way) -> Iterator[Way]:
    """The way with more strips, then with fewer residents, then with as many strips as it takes. In
    exact mode diffusers' own decoder is worth more than residents, and so is the whole frame at a
    time."""
    strips, placements = _strips(needs, way), list(_placements(needs.installed.blocks))
    if needs.exact:
        decoders = [(False, 1), (True, 1), (True, strips)]
        found = [(placement, *decoder) for decoder in decoders for placement in placements]
    else:
        found = [(way.blocks, True, count) for count in range(1, strips)]
        found += [(placement, True, strips) for placement in placements]
    found += [(placements[-1], True, count) for count in range(strips + 1, needs.most_strips + 1)]
    for placement, single_frame, count in found:
        yield replace(way, blocks=placement, single_frame=single_frame, strips=count)


def _with_sources(needs: Needs, way: Way, vram: float) -> Way | None:
    """The way with what it streams in the fastest places that hold it; None where it does not
    fit."""
    if not _fits_vram(needs, way, vram):
        return None
    return _in_ram(needs, way, _lockable(needs.device))


def _in_ram(needs: Needs, way: Way, lockable: int) -> Way | None:
    """The way with as much of what it streams in RAM as that holds, page-locked up to `lockable`
    bytes; None where it does not fit even with all of it on disk."""
    least = _from(way, "disk", "disk")
    if not _fits(needs, least):
        return None
    return next(each for each in _tiers(needs, least, lockable) if _fits(needs, each))


def _tiers(needs: Needs, way: Way, lockable: int) -> Iterator[Way]:
    """From the most RAM to the least, which is the `way` itself: the text encoder, needed once a
    prompt, goes first, then blocks go one by one. Where CPU and GPU share memory a copy in RAM
    helps nobody."""
    if not needs.device.shared_memory:
        blocks, layers = needs.installed.blocks, needs.installed.text_layers
        streamed = way.blocks.blocks - way.blocks.resident
        lockable_blocks = lockable // blocks.bytes
        kept = replace(way, blocks=_kept(way.blocks, streamed, lockable_blocks))
        left = lockable - kept.blocks.streamed("pinned") * blocks.bytes
        if layers.count * layers.bytes <= left:
            yield replace(kept, text=_kept(way.text, layers.count, layers.count))
        yield replace(kept, text=_kept(way.text, layers.count, 0))
        for count in range(streamed, 0, -1):
            yield replace(way, blocks=_kept(way.blocks, count, lockable_blocks))
    yield way


def _computed(needs: Needs, way: Way) -> Way:
    """With the fastest attention, and compiled only where that saves more than it takes; exact mode
    keeps to what diffusers does."""
    if needs.exact:
        return way
    way = replace(way, attention=needs.device.rates.attention_backend)
    eager = replace(way, compiled=False)
    eager_seconds, seconds = needs.denoise_seconds(eager), needs.denoise_seconds(way)
    if eager_seconds is None or seconds is None:
        return eager
    return way if seconds < eager_seconds else eager


def _on_cpu(needs: Needs) -> Way | None:
    """In RAM as much as it holds, the text encoder last; the others are read from disk."""
    return next((way for way in _cpu_ways(needs) if _fits(needs, way)), None)


def _cpu_ways(needs: Needs) -> Iterator[Way]:
    """From the most memory to the least."""
    blocks, layers = needs.installed.blocks, needs.installed.text_layers
    small = needs.installed.weight_bytes * 2 <= FLOAT32_LIMIT
    dtype: Literal["bfloat16", "float32"] = "float32" if small else "bfloat16"
    way = Way("cpu", dtype, _resident(blocks), _resident(layers), not needs.exact)
    yield way
    once = replace(way, text=_streaming(layers, 0) or way.text)
    yield from (_from(smaller, "disk", "disk") for smaller in _smaller(needs, once))


def _strips(needs: Needs, way: Way) -> int:
    """As few as let the decoder take no more than drawing did and a block, so that the fewer cost
    one resident at most."""
    blocks = needs.installed.blocks
    streaming = replace(way, blocks=_streaming(blocks, 0) or way.blocks)
    limit, most = needs.drawing_bytes(streaming) + blocks.bytes, needs.most_strips
    ways = (replace(way, single_frame=True, strips=n) for n in range(1, most))
    return next((way.strips for way in ways if needs.decoding_bytes(way) <= limit), most)


def _resident(blocks: Blocks) -> Placement:
    return Placement(blocks=blocks.count, resident=blocks.count)


def _streaming(blocks: Blocks, resident: int) -> Placement | None:
    """None where there are too few blocks to take turns."""
    if blocks.count - resident <= SLOTS:
        return None
    return Placement(blocks=blocks.count, resident=resident, slots=SLOTS)


def _placements(blocks: Blocks) -> Iterator[Placement]:
    yield _resident(blocks)
    for resident in range(blocks.count - SLOTS - 1, -1, -1):
        placement = _streaming(blocks, resident)
        if placement:
            yield placement


def _from(way: Way, source: str, text_source: str) -> Way:
    """The way with all that it streams in these places."""
    blocks, text = (
        placement.model_copy(
            update={"source": place if placement.slots else "", "pageable": 0, "disk": 0}
        )
        for placement, place in ((way.blocks, source), (way.text, text_source))
    )
    return replace(way, blocks=blocks, text=text)


def _kept(placement: Placement, count: int, lockable: int) -> Placement:
    """With `count` of the streamed blocks in RAM, no more than `lockable` of them page-locked, and
    the others on disk."""
    if not placement.slots:
        return placement
    disk = placement.blocks - placement.resident - count
    update = {"source": "pageable", "disk": disk}
    if lockable:
        update = {"source": "pinned", "pageable": max(0, count - lockable), "disk": disk}
    return placement.model_copy(update=update)


def _lockable(device: Device) -> int:
    """Bytes of RAM that may be page-locked: torch does it for CUDA and ROCm alone."""
    windows = device.system in WINDOWS
    share = PINNED_ON_WINDOWS if windows else 1.0
    return int(device.ram_bytes * share) if device.kind in ("cuda", "rocm") else 0


# Does it fit


def _fits(needs: Needs, way: Way, vram: float = USABLE_VRAM) -> bool:
    return _lack(needs, way, vram) <= 1


def _fits_vram(needs: Needs, way: Way, vram: float) -> bool:
    """Which does not depend on where the streamed weights wait."""
    usable = needs.device.vram_free_bytes * vram
    return all(video <= usable for _, video in needs.memory(way).values())


def _lack(needs: Needs, way: Way, vram: float = USABLE_VRAM) -> float:
    """The need as a part of what may be used, of the memory that is shortest: the RAM, the GPU's,
    or what Windows can promise of both."""
    device = needs.device
    promised = device.commit_free_bytes
    ram_usable, vram_usable = device.ram_free_bytes * USABLE_RAM, device.vram_free_bytes * vram
    parts = [0.0]
    for ram, video in needs.memory(way).values():
        together = video if device.shared_memory else 0
        parts.append((ram + together) / max(ram_usable, 1))
        parts.append(video / max(vram_usable, 1))
        if promised is not None:
            parts.append((ram + video) / max(promised * USABLE_RAM, 1))
    return max(parts)


def _limited(needs: Needs) -> bool:
    """Whether it would run otherwise if Windows promised memory without a limit."""
    limit = needs.device.commit_free_bytes
    return limit is not None and _choose(needs) != _choose(_unlimited(needs))


def _unlimited(needs: Needs) -> Needs:
    device = needs.device.model_copy(update={"commit_free_bytes": None})
    return Needs(needs.request, needs.installed, device)


def _smallest(needs: Needs) -> Way:
    """The way that lacks least."""
    ways = [*_cpu_ways(needs)][-1:]
    if needs.device.kind != "cpu":
        least = replace([*_gpu_ways(needs)][-1], compiled=False)
        ways.append(_from(least, "disk", "disk"))
    ways += [replace(way, single_frame=True, strips=needs.most_strips) for way in ways]
    return min(ways, key=lambda way: _lack(needs, way))


# What to try next


def _fallbacks(needs: Needs, way: Way) -> Iterator[tuple[Way, str]]:
    """Each one goes on from the one before."""
    eager = replace(way, compiled=False, attention="")
    yield eager, "Without torch.compile, with torch's own attention."
    if way.device == "cpu":
        least = [*_cpu_ways(needs)][-1]
        yield least, "With as much as possible read from disk when it is needed."
        return
    careful = _on_gpu(needs, CAREFUL_VRAM)
    if careful and careful.blocks.resident < eager.blocks.resident:
        eager = replace(careful, compiled=False, attention="")
        yield eager, "With fewer blocks in the GPU's memory."
    if not eager.single_frame:
        eager = replace(eager, single_frame=True)
        yield eager, "With a decoder that takes less memory than diffusers'."
    eager = replace(eager, strips=min(needs.most_strips, 2 * eager.strips))
    yield eager, "With the picture decoded in more parts."
    unlocked = _in_ram(needs, eager, 0)
    if unlocked and "pageable" in (unlocked.blocks.source, unlocked.text.source):
        yield unlocked, "With weights from RAM, none page-locked."
    from_disk, streamed = _from(eager, "disk", "disk"), eager.blocks.blocks - eager.blocks.resident
    half = (streamed - eager.blocks.streamed("disk")) // 2
    fewer = replace(from_disk, blocks=_kept(from_disk.blocks, half, 0))
    if half and _fits(needs, fewer):
        yield fewer, "With half as many blocks in RAM, none page-locked."
    if _fits(needs, from_disk):
        yield from_disk, "With weights from disk, none page-locked."
    on_cpu = _on_cpu(needs)
    if on_cpu:
        yield on_cpu, "Without the GPU."


# What is said


def _plan(needs: Needs, way: Way, instead: str = "") -> Plan:
    request = needs.request
    return Plan(
        device=way.device,
        dtype=way.dtype,
        mode=request.mode,
        working_size=needs.working,
        forwards=needs.steps * needs.passes,
        compiled=way.compiled,
        attention=way.attention,
        single_frame=way.single_frame,
        strips=way.strips,
        placement=way.blocks,
        text_placement=way.text,
        vram_limit_bytes=_limit(needs, way),
        bytes_per_step=needs.bytes_per_step(way),
        phases=needs.phases(way),
        disk_bytes=disk_bytes(request),
        reasons=(*([instead] if instead else []), *_reasons(needs, way)),
    )


def _limit(needs: Needs, way: Way) -> int:
    """For torch's allocator, where more would not fail but spill into RAM, or past a person's
    limit."""
    device = needs.device
    spills = device.system in WINDOWS or device.shared_memory or device.vram_capped
    if way.device == "cpu" or not spills:
        return 0
    context = 0 if way.device == "mps" else needs.costs.context_bytes
    return max(0, device.vram_free_bytes - context)


def _reasons(needs: Needs, way: Way) -> Iterator[str]:
    """One plain sentence for each choice."""
    if way.device == "cpu":
        yield _why_cpu(needs, way) + _why_disk(needs, way) + _why_long(needs, way)
        yield from _why_not_gpu(needs)
    else:
        yield from _why_gpu(needs, way)
    yield from _why_text(needs, way)
    yield from _why_mode(needs, way)
    if way.strips > 1:
        yield (
            f"The picture is decoded in {way.strips} strips, to take little more memory than"
            " drawing."
        )
    if _limit(needs, way):
        yield f"torch may take {_gib(_limit(needs, way))}: it fails there instead of spilling over."
    if _limited(needs):
        yield (
            f"Windows can give programs {_gib(needs.device.commit_free_bytes or 0)} more, RAM and"
            " GPU memory together: that is what is short here."
        )
        yield ENLARGE_PAGE_FILE
    yield from needs.device.notes
    request, model = needs.request, needs.installed.model
    if needs.working != request.size:
        yield (
            f"Drawn at {needs.working} and cut to the centre {request.size}, because {model.name}"
            f" needs multiples of {model.sizes.multiple}."
        )


def _why_gpu(needs: Needs, way: Way) -> Iterator[str]:
    device, blocks = needs.device, way.blocks
    free = _gib(device.vram_free_bytes)
    if not blocks.slots:
        fits = "transformer" if way.text.slots else "model"
        yield f"Runs on {device.name}: the whole {fits} fits its {free} of free memory."
    else:
        crossing = f"{needs.bytes_per_step(way) / 1e9:.1f} GB"
        yield (
            f"Runs on {device.name}: {blocks.resident} of {blocks.blocks} blocks stay in its {free}"
            f" of free memory, the others ({crossing}) cross to it once a step,"
            f" from {_places(blocks)}."
        )
        yield from _why_source(needs, way)
        yield from _why_speed(needs, way)
    if not device.bf16:
        yield f"{device.name} has no units for bfloat16: it is slower than others of its speed."


def _places(blocks: Placement) -> str:
    if blocks.source == "disk":
        return "disk"
    ram = "RAM" if blocks.streamed("pageable") else "page-locked RAM"
    return f"{ram} and disk" if blocks.disk else ram


def _why_source(needs: Needs, way: Way) -> Iterator[str]:
    blocks, free = way.blocks, _gib(needs.device.ram_free_bytes)
    in_ram = _fits(_unlimited(needs), _from(way, "pageable", "disk"))
    if blocks.disk and not in_ram:
        streamed = blocks.blocks - blocks.resident
        yield (
            f"The {free} of free RAM hold {streamed - blocks.disk} of these {streamed}; the rest"
            f" ({needs.disk_bytes_per_step(way) / 1e9:.1f} GB) is read from disk at each step."
        )
    elif blocks.source == "disk" and not in_ram and not needs.device.shared_memory:
        yield f"The {free} of free RAM do not hold them."
    if blocks.streamed("pageable") and needs.device.system in WINDOWS:
        yield (
            f"Windows page-locks about half of the RAM at most, so no more than"
            f" {_gib(_lockable(needs.device))} are."
        )


def _why_speed(needs: Needs, way: Way) -> Iterator[str]:
    step, copying = needs.step_seconds(way), needs.copying_seconds(way)
    if step is not None and copying is not None:
        hidden = copying < step
        yield (
            f"A step takes {step:.2g} s; the copies take {copying:.2g} s of it,"
            f" {'beside the computation' if hidden else 'and the computation waits for them'}."
        )


def _why_cpu(needs: Needs, way: Way) -> str:
    why, device = "Runs on the CPU", needs.device
    if device.kind != "cpu" and not _on_gpu(_unlimited(needs)):
        why += (
            f", because the model does not fit {device.name}"
            f" ({_gib(device.vram_free_bytes)} of memory free)"
        )
    small = way.dtype == "float32"
    return why + (", in float32: the model is small." if small else ", in bfloat16 to save memory.")


def _why_not_gpu(needs: Needs) -> Iterator[str]:
    """The size that would run on a GPU that this one is too large for: minutes for hours."""
    if needs.device.kind != "cpu" and not _on_gpu(needs) and (size := _nearest(needs, _on_gpu)):
        yield f"At --size {size} it runs on {needs.device.name}."


def _why_disk(needs: Needs, way: Way) -> str:
    layers, blocks = needs.installed.text_layers, needs.installed.blocks
    once = (way.text.blocks - way.text.resident) * layers.bytes
    each = (way.blocks.blocks - way.blocks.resident) * blocks.bytes
    parts = [f"{once / 1e9:.1f} GB for a new prompt"] if once else []
    parts += [f"{each / 1e9:.1f} GB at every step"] if each else []
    if not parts:
        return ""
    in_ram = _fits(_unlimited(needs), next(_cpu_ways(needs)))
    why = "Not all of it stays in RAM" if in_ram else "The RAM does not hold it all"
    return f" {why}: {' and '.join(parts)} are read from disk."


def _why_long(needs: Needs, way: Way) -> str:
    """What a person has to know before 30 GB are fetched for it."""
    seconds = needs.denoise_seconds(way)
    if seconds is None or seconds < LONG:
        return ""
    return f" Drawing takes about {seconds / 3600:.1f} hours there."


def _why_text(needs: Needs, way: Way) -> Iterator[str]:
    if way.device == "cpu":
        return
    size = f"{needs.installed.text_layers.count * needs.installed.text_layers.bytes / 1e9:.1f} GB"
    if not way.text.slots:
        yield "The text encoder stays on the GPU."
    elif way.text.source == "disk":
        yield f"The text encoder ({size}) is read from disk for a new prompt."
    else:
        yield f"The text encoder ({size}) waits in RAM, and crosses to the GPU for a new prompt."


def _why_mode(needs: Needs, way: Way) -> Iterator[str]:
    if needs.exact:
        yield "Exact: nothing is compiled and attention is torch's own."
        if way.single_frame:
            levels = "one level" if way.strips == 1 else "two levels"
            yield (
                f"diffusers' decoder does not fit: pixels may differ from its own by {levels} of"
                " 255."
            )
    elif way.compiled:
        saved = (needs.denoise_seconds(replace(way, compiled=False)) or 0) - (
            needs.denoise_seconds(way) or 0
        )
        yield (
            f"Blocks are compiled: it takes {needs.compile_seconds(way):.0f} s and saves"
            f" {saved:.0f} s more than that."
        )
    elif way.device != "cpu" and needs.device.rates.compiler:
        yield "Blocks are not compiled: for so few steps it takes longer than it saves."


# What can't run


def _cannot(needs: Needs) -> CannotRun:
    model, device = needs.installed.model, needs.device
    nearest = _nearest(needs, _choose)
    hints = [f"choose --size {nearest}" if nearest else ""]
    hints += [f"use --model {DEFAULT_MODEL}" if model.id != DEFAULT_MODEL else ""]
    lacks = f"{model.name} at {needs.working} needs {_lacks(needs)}"
    hint = f"{', '.join(['Close other programs', *filter(None, hints)])}, or try it with --anyway."
    trouble = trouble_in(
        " ".join(device.notes)
    )  # a GPU that can't be used is what there is to mend
    hint = TROUBLES[trouble].press if trouble else hint
    hint = f"{ENLARGE_PAGE_FILE} {hint}" if _limited(needs) else hint
    return CannotRun(" ".join((lacks, *device.notes)), hint, trouble)


def _lacks(needs: Needs) -> str:
    """What is needed at least, and what is free."""
    device, least = needs.device, needs.memory(_smallest(needs)).values()
    if _limited(needs):
        both = max(ram + video for ram, video in least) / USABLE_RAM
        return (
            f"{_gib(int(both))} of RAM and GPU memory together; Windows can give programs"
            f" {_gib(device.commit_free_bytes or 0)} more."
        )
    ram = max(ram for ram, _ in least) / USABLE_RAM
    gpu = f" and {_gib(device.vram_free_bytes)} of GPU memory" if device.kind != "cpu" else ""
    return f"{_gib(int(ram))} of free RAM; {_gib(device.ram_free_bytes)} of RAM{gpu} are free."


def _nearest(needs: Needs, choose: Callable[[Needs], Way | None]) -> Size | None:
    """The largest size of about this shape that `choose` finds a way for."""
    sizes = needs.installed.model.sizes
    for part in SMALLER:
        width, height = int(needs.working.width * part), int(needs.working.height * part)
        size = Size(width, height).rounded_up(sizes.multiple)
        request = needs.request.model_copy(update={"size": size})
        try:
            sizes.check(size)
        except BadRequest:
            return None
        if choose(Needs(request, needs.installed, needs.device)):
            return size
    return None


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
