"""The planner on invented machines."""

from itertools import pairwise
from typing import Any

import pytest

from qwen_image_tool import device as device_module
from qwen_image_tool import planner
from qwen_image_tool.catalog import load_catalog
from qwen_image_tool.catalog.costs import card, load_costs
from qwen_image_tool.device import SYSTEMS, invented
from qwen_image_tool.errors import BadRequest, CannotRun
from qwen_image_tool.needs import Needs, Way
from qwen_image_tool.planner import GIB, USABLE_RAM, next_plans, plans_after
from qwen_image_tool.store import Installed, as_published, blocks_of, text_layers_of
from qwen_image_tool.types import Device, PhaseNeed, Placement, Plan, Rates, Request, Size

CATALOG = load_catalog()
FULL = as_published(CATALOG.find("qwen-image"))
NEW = as_published(CATALOG.find("qwen-image-2.1"))
TURBO = as_published(CATALOG.find("qwen-image-2.1-turbo"))
SMALL = FULL.model_copy(
    update={
        "bytes": {"transformer": 22 << 20, "vae": 5 << 20},
        "blocks": blocks_of({"num_layers": 6, "num_attention_heads": 3, "attention_head_dim": 64}),
        "text_layers": text_layers_of(
            {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4}
            | {"num_attention_heads": 3, "num_key_value_heads": 1}
        ),
        "decoder_parameters": 3 << 19,
    }
)
RATES = card("4060ti").rates
CPU_RATES = Rates(matmul=1e12, attention=5e11, memory=4e10, disk=2e9, reading=5e-10)


def device(kind: str, ram: float, vram: float = 0, **fields: Any) -> Device:
    """`ram` and `vram`: free, GiB."""
    given = {
        "kind": kind,
        "name": "A100" if kind != "cpu" else "Ryzen",
        "ram_bytes": int(ram * GIB * 1.2),
        "ram_free_bytes": int(ram * GIB),
        "vram_bytes": int(vram * GIB * 1.1),
        "vram_free_bytes": int(vram * GIB),
    }
    return Device.from_user(**given | fields)


def plans(on: Device, installed: Installed = FULL, **fields: Any) -> tuple[Plan, ...]:
    anyway = fields.pop("anyway", False)
    request = Request.from_user(**{"model": "qwen-image", "prompt": "x", "seed": 1, **fields})
    return planner.plans(installed.model.resolve(request, 1), installed, on, anyway)


def plan(on: Device, installed: Installed = FULL, **fields: Any) -> Plan:
    return plans(on, installed, **fields)[0]


# What people have: nobody's card holds the 20B model, most machines can't page-lock it
CARDS = [
    *(("cuda", vram, ram, "linux") for vram in (4, 8, 16, 24, 80) for ram in (8, 32, 128)),
    *(("cuda", vram, ram, "win32") for vram in (4, 6, 8, 12, 16, 24, 32) for ram in (16, 32, 64)),
    *(("cuda", vram, ram, "wsl") for vram in (8, 24) for ram in (16, 64)),
    *(("rocm", vram, ram, "linux") for vram in (8, 16, 24, 48) for ram in (16, 64)),
    *(("xpu", vram, 32, "win32") for vram in (8, 12, 16)),
    *(("mps", ram * 0.7, ram, "darwin") for ram in (8, 16, 24, 36, 64, 128)),
    *(("cuda", ram * 0.9, ram, "linux") for ram in (119,)),  # one memory for both
    *(("cuda", vram, 64, "linux") for vram in (2, 3, 96)),
    *(("cpu", 0, ram, system) for ram in (2, 8, 16, 64, 256) for system in ("linux", "win32")),
]
MACHINES = [
    device(kind, ram, vram, system=system, shared_memory=kind == "mps" or ram == 119, rates=rates)
    for kind, vram, ram, system in CARDS
    for rates in (CPU_RATES if kind == "cpu" else RATES, Rates())
]


def promising(on: Device, gib: float) -> Device:
    """A Windows that can promise so much more."""
    return on.model_copy(update={"system": "win32", "commit_free_bytes": int(gib * GIB)})


MACHINES += [
    promising(on, gib)
    for on in MACHINES
    if on.system == "win32" and on.rates.matmul and on.ram_free_bytes < 64 * GIB
    for gib in (6, 24)
]
WORK: list[tuple[Installed, dict[str, Any]]] = [
    (FULL, {"size": Size(256, 256)}),
    (FULL, {}),
    (FULL, {"size": Size(2048, 2048), "images": 4}),
    (FULL, {"mode": "exact"}),
    (NEW, {"size": Size(1024, 1024)}),
    (NEW, {"prompt": "a long story " * 400, "cfg": 4}),
    (NEW, {"size": Size(2048, 2048), "images": 3, "mode": "exact"}),
    (TURBO, {"mode": "exact"}),
    (SMALL, {"size": Size(256, 256)}),
]


def named(on: Device) -> str:
    vram, ram = on.vram_free_bytes / GIB, on.ram_free_bytes / GIB
    known = "known" if on.rates.matmul else "unknown"
    promised = f"-{on.commit_free_bytes / GIB:.0f}" if on.commit_free_bytes else ""
    return f"{on.kind}-{vram:.0f}-{ram:.0f}-{on.system}-{known}{promised}"


@pytest.mark.parametrize("on", MACHINES, ids=named)
def test_no_plan_is_above_the_memory_and_no_fallback_takes_more(on: Device) -> None:
    for installed, fields in WORK:
        try:
            found = plans(on, installed, **fields)
        except CannotRun:
            continue
        for each in found:
            for need in each.phases:
                both = need.ram_bytes + (need.vram_bytes if on.shared_memory else 0)
                assert both <= on.ram_free_bytes
                assert need.vram_bytes <= on.vram_free_bytes
                if on.commit_free_bytes is not None:
                    assert need.ram_bytes + need.vram_bytes <= on.commit_free_bytes
        for before, after in pairwise(found):
            assert after.vram_bytes <= before.vram_bytes
            assert after.bytes_per_step >= before.bytes_per_step or after.device == "cpu"
        assert len({each.model_copy(update={"reasons": ()}) for each in found}) == len(found)
        check_places(on, found)
        check_what_follows(found)


def check_what_follows(found: tuple[Plan, ...]) -> None:
    """Of each plan, by what it failed."""
    for place, failed in enumerate(found):
        left = found[place:]
        assert next_plans(left, "gpu memory") == next_plans(left, "crashed") == left[1:]
        smaller = next_plans(left, "memory")
        assert smaller == next_plans(left, "killed")
        assert all(each.ram_bytes < 0.9 * failed.ram_bytes for each in smaller)
        most = max((each.ram_bytes for each in left[1:] if each not in smaller), default=1 << 60)
        assert most >= 0.9 * failed.ram_bytes, "none is left out"
        plainly = next_plans(left, "broken picture")
        assert plainly == (left[1:] if failed.compiled or failed.attention else ())
        assert not [each for each in plainly if each.compiled or each.attention]


def check_places(on: Device, found: tuple[Plan, ...]) -> None:
    for each in found:
        for placement in (each.placement, each.text_placement):
            streamed = placement.blocks - placement.resident
            assert bool(streamed) == bool(placement.slots) == bool(placement.source)
            assert not streamed or streamed > placement.slots
            if each.device == "cpu" or on.shared_memory:
                assert placement.source in ("", "disk")
            assert placement.source != "pinned" or on.kind in ("cuda", "rocm")
            parts = [placement.streamed(place) for place in ("pinned", "pageable", "disk")]
            assert sum(parts) == streamed
            assert not streamed or placement.streamed(placement.source) > 0
            assert not placement.pageable or placement.source == "pinned"
            assert not placement.disk or placement.source in ("pinned", "pageable")
            assert min(placement.pageable, placement.disk, *parts) >= 0
        if each.mode == "exact":
            assert not each.compiled
            assert each.attention == ""
        assert each.forwards
    assert all(each.reasons[0] not in each.reasons[1:] for each in found)


def test_there_are_enough_machines_and_most_run() -> None:
    assert len({named(on) for on in MACHINES}) >= 2 * 60
    stuck = []
    for on in (on for on in MACHINES if on.commit_free_bytes is None):
        try:
            plan(on, size=Size(1024, 1024))
        except CannotRun:
            stuck.append(named(on))
    systems, rates = ("linux", "win32"), ("known", "unknown")
    assert stuck == [f"cpu-0-2-{system}-{known}" for system in systems for known in rates]


def drawing_of(found: Plan) -> PhaseNeed:
    [drawing] = [need for need in found.phases if need.phase == "denoise"]
    return drawing


def seconds_once_loaded(found: Plan) -> float:
    each = [need.seconds for need in found.phases if need.phase != "load"]
    return sum(seconds or 0 for seconds in each)


LADDERS = [
    *([(ram, vram) for vram in (3, 3.5, *range(4, 18), 24, 32, 44, 48, 80)] for ram in (8, 32, 96)),
    *([(ram, vram) for ram in (4, 6, *range(8, 60, 4), 128)] for vram in (4, 16, 80)),
]


KNOWN = {name: card(name).rates for name in ("h100", "4090", "4060ti")}
# Files that the system still has in its cache are read faster than RAM is copied by one thread
WARM = KNOWN["4090"].model_copy(update={"disk": 1.2e10, "pageable": 3e9, "compiler": False})


@pytest.mark.parametrize("system", ["linux", "win32"])
@pytest.mark.parametrize(("images", "mode"), [(1, "default"), (3, "default"), (3, "exact")])
@pytest.mark.parametrize("installed", [FULL, NEW, TURBO], ids=lambda m: str(m.model.id))
@pytest.mark.parametrize(
    "rates", [*KNOWN.values(), WARM, Rates()], ids=[*KNOWN, "warm disk", "unknown"]
)
def test_more_memory_is_never_slower(
    system: str, images: int, mode: str, installed: Installed, rates: Rates
) -> None:
    """In exact mode not with the same decoder: with more memory it may be diffusers' own, and the
    whole frame at a time, which are worth more than blocks."""
    for ladder in LADDERS:
        machines = [device("cuda", r, v, system=system, rates=rates) for r, v in ladder]
        asked: dict[str, Any] = {"size": Size(1024, 1024), "images": images, "mode": mode}
        found = [plan(on, installed, **asked) for on in machines]
        on_gpu = [each for each in found if each.device == "cuda"]
        assert on_gpu == found[-len(on_gpu) :], "the GPU is not left again"
        for before, after in pairwise(on_gpu):
            decoders = [(each.single_frame, each.strips) for each in (before, after)]
            assert mode == "default" or decoders[1] <= decoders[0]
            if mode == "exact" and decoders[1] < decoders[0]:
                continue
            assert after.bytes_per_step <= before.bytes_per_step
            assert bool(before.seconds) == bool(rates.matmul)
            assert seconds_once_loaded(after) <= seconds_once_loaded(before) * (1 + 1e-9)


SMALL_STEPS = [ram / 2 for ram in range(2 * 8, 2 * 64 + 1)]  # GiB
# A SATA disk, which no step hides
SATA = KNOWN["4060ti"].model_copy(update={"disk": 5e8})


@pytest.mark.parametrize(
    ("kind", "system"), [("cuda", "linux"), ("cuda", "win32"), ("xpu", "linux")]
)
@pytest.mark.parametrize("installed", [FULL, NEW], ids=lambda m: str(m.model.id))
@pytest.mark.parametrize("vram", [6, 12])
@pytest.mark.parametrize(
    "rates", [KNOWN["4090"], SATA, WARM, Rates()], ids=["4090", "sata", "warm disk", "unknown"]
)
def test_more_ram_reads_less_at_each_step(
    kind: str, system: str, installed: Installed, vram: int, rates: Rates
) -> None:
    """And all that is free is used: one block less on disk would not fit."""
    machines = [device(kind, ram, vram, system=system, rates=rates) for ram in SMALL_STEPS]
    found = [plan(on, installed, size=Size(1024, 1024)) for on in machines]
    for on, each in zip(machines, found, strict=True):
        assert each.device == kind
        assert each.ram_bytes <= on.ram_free_bytes
        if each.placement.streamed("disk"):
            spare = 2 * installed.blocks.bytes  # what the last blocks need no buffers for
            assert each.ram_bytes + spare + installed.blocks.bytes > USABLE_RAM * on.ram_free_bytes
    for before, after in pairwise(found):
        assert reads_a_step(after) <= reads_a_step(before)
        assert after.bytes_per_step == before.bytes_per_step
        assert after.placement.streamed("pinned") >= before.placement.streamed("pinned")
        assert seconds_once_loaded(after) <= seconds_once_loaded(before) * (1 + 1e-9)
    assert reads_a_step(found[-1]) == 0
    counts = {reads_a_step(each) for each in found}
    assert len(counts) > (found[0].placement.streamed("disk") + 1) / 2, "it goes block by block"


def reads_a_step(found: Plan) -> int:
    return drawing_of(found).read_bytes


def test_a_slow_disk_is_waited_for_less_with_more_ram() -> None:
    """Seconds of a step are those of the disk as long as it is the slowest."""
    found = [plan(device("cuda", ram, 12, rates=SATA), steps=10) for ram in (8, 12, 16)]
    for each in found:
        drawing = drawing_of(each)
        read = each.placement.streamed("disk") * FULL.blocks.bytes
        assert drawing.read_bytes == 10 * read
        assert drawing.seconds == pytest.approx(10 * read / 5e8, rel=0.2)
        assert "the computation waits for them" in each.reasons[2]
    kept = [each.blocks - each.resident - each.disk for each in (p.placement for p in found)]
    assert kept == sorted(set(kept))
    streamed, disk = kept[1] + found[1].placement.disk, found[1].placement.disk
    assert found[1].reasons[1] == (
        f"The 12.0 GiB of free RAM hold {kept[1]} of these {streamed}; the rest"
        f" ({disk * FULL.blocks.bytes / 1e9:.1f} GB) is read from disk at each step."
    )


@pytest.mark.parametrize("installed", [FULL, NEW], ids=lambda m: str(m.model.id))
@pytest.mark.parametrize("ram_vram", [(16, 24), (64, 16)], ids=str)
def test_a_larger_page_file_is_never_slower(
    ram_vram: tuple[int, int], installed: Installed
) -> None:
    on = device("cuda", *ram_vram, rates=KNOWN["4090"])
    size = Size(1024, 1024)
    found = [plan(promising(on, gib), installed, size=size) for gib in range(6, 66, 2)]
    on_gpu = [each for each in found if each.device == "cuda"]
    assert on_gpu == found[-len(on_gpu) :], "the GPU is not left again"
    for before, after in pairwise(on_gpu):
        assert after.bytes_per_step <= before.bytes_per_step
        assert seconds_once_loaded(after) <= seconds_once_loaded(before) * (1 + 1e-9)
    unlimited = plan(on.model_copy(update={"system": "win32"}), installed, size=size)
    assert found[-1] == unlimited != found[0]


def test_more_ram_never_reads_more() -> None:
    for installed in (FULL, NEW):
        machines = [device("cpu", ram, rates=CPU_RATES) for ram in range(6, 64, 2)]
        found = [plan(on, installed, size=Size(256, 256)) for on in machines]
        for before, after in pairwise(found):
            assert after.bytes_per_step <= before.bytes_per_step
            assert before.seconds
            assert seconds_once_loaded(after) <= seconds_once_loaded(before)
        assert found[0].bytes_per_step > found[-1].bytes_per_step == 0


def test_reading_takes_from_the_cores_that_compute() -> None:
    costs = ({"disk": 2e10, "reading": cost} for cost in (0, 5e-10))
    quick, slow = (CPU_RATES.model_copy(update=cost) for cost in costs)

    def step(cores: int, rates: Rates) -> float:
        found = plan(device("cpu", 8, rates=rates, cores=cores), size=Size(256, 256), steps=2)
        seconds = drawing_of(found).seconds
        assert seconds
        return seconds / 2

    read = plan(device("cpu", 8, rates=slow), size=Size(256, 256)).bytes_per_step
    for cores in (2, 4):
        longer = step(cores, slow) - step(cores, quick)
        assert longer == pytest.approx(5e-10 * read / cores)


def test_a_step_on_the_cpu_takes_what_was_measured() -> None:
    """docs/benchmarks.md, "The 20B model on a CPU with less RAM than weights"."""
    rates = Rates(matmul=9.4e11, attention=1.8e11, memory=9e10, disk=2e9, reading=5e-10)
    found = plan(device("cpu", 8, rates=rates, cores=2), size=Size(256, 256), steps=2)
    assert found.placement
    assert (found.placement.resident, found.placement.source) == (12, "disk")
    assert drawing_of(found).seconds == pytest.approx(34, rel=0.1)


def test_the_20b_model_runs_on_a_4_gib_card() -> None:
    found = plan(device("cuda", 64, 4), size=Size(1328, 1328))
    assert (found.device, found.placement.slots, found.placement.source) == ("cuda", 2, "pinned")
    assert found.vram_bytes < 4 * GIB
    least = planner.plans(
        FULL.model.resolve(Request(model="m", prompt="x"), 1), FULL, device("cuda", 64, 3.5)
    )[0]
    assert least.placement.resident == 0
    assert least.vram_bytes - load_costs().context_bytes < 2.6 * GIB


@pytest.mark.parametrize("side", [1024, 2048])
def test_qwen_image_21_runs_on_a_6_gib_card(side: int) -> None:
    assert plan(device("cuda", 64, 6), NEW, size=Size(side, side)).device == "cuda"


def test_a_card_that_holds_the_model_holds_all_of_it() -> None:
    found = plan(device("cuda", 8, 60))
    assert (found.device, found.dtype) == ("cuda", "bfloat16")
    assert not found.placement.slots
    assert not found.text_placement.slots
    assert found.strips == 1
    assert found.bytes_per_step == 0
    assert 38 * GIB < found.vram_bytes < 42 * GIB, "no modulation, no head, no words, no vision"
    assert found.reasons[0] == "Runs on A100: the whole model fits its 60.0 GiB of free memory."


def test_rocm_is_called_cuda_by_torch() -> None:
    assert plan(device("rocm", 64, 78)).device == "cuda"


def test_what_the_memory_of_a_card_does_not_hold_waits_in_ram() -> None:
    found = plan(device("cuda", 64, 16, rates=RATES))
    streamed = found.placement.blocks - found.placement.resident
    assert found.placement.source == found.text_placement.source == "pinned"
    assert found.bytes_per_step == streamed * FULL.blocks.bytes
    assert "of 60 blocks stay in its 16.0 GiB of free memory" in found.reasons[0]
    assert "beside the computation" in found.reasons[1]
    text = FULL.text_layers.count * FULL.text_layers.bytes
    assert found.ram_bytes > found.bytes_per_step + text


def test_little_ram_is_answered_by_reading_from_disk() -> None:
    sources = [
        (each.placement.source, each.text_placement.source)
        for each in (plan(device("cuda", ram, 8)) for ram in (4, 6, 32, 64))
    ]
    assert sources == [("disk", "disk"), *[("pinned", "disk")] * 2, ("pinned", "pinned")]


@pytest.mark.parametrize("system", ["win32", "wsl"])
def test_windows_page_locks_less(system: str) -> None:
    on = device("cuda", 36, 8, system=system)
    found = plan(on)
    assert found.placement.source == "pinned"
    assert found.placement.pageable > 0
    assert not found.placement.disk
    assert found.placement.streamed("pinned") * FULL.blocks.bytes <= 0.4 * on.ram_bytes
    assert found.reasons[0].endswith("once a step, from RAM.")
    assert any("Windows page-locks" in reason for reason in found.reasons)
    assert plan(device("cuda", 90, 24, system=system)).placement.source == "pinned"


def test_a_small_page_file_is_said_where_it_decides() -> None:
    """And nothing else is given as the reason."""
    on = device("cuda", 64, 16, rates=RATES)
    for gib, on_gpu, from_disk in ((50, True, False), (30, True, True), (6, False, True)):
        found = plan(promising(on, gib))
        said = " ".join(found.reasons)
        assert (found.device == "cuda") == on_gpu
        assert bool(found.placement.streamed("disk")) == from_disk
        assert ("let Windows manage the page file" in said) == from_disk
        assert "free RAM" not in said
        assert "RAM does not hold" not in said
        assert "does not fit" not in said
    assert f"Windows can give programs {gib}.0 GiB more, RAM and GPU memory together" in said
    short = plan(promising(device("cuda", 6, 16, rates=RATES), 24))
    assert any("The 6.0 GiB of free RAM hold" in reason for reason in short.reasons)
    assert not any("page file" in reason for reason in short.reasons)


def test_torch_is_capped_where_memory_would_spill() -> None:
    context = load_costs().context_bytes
    windows = device("cuda", 64, 8, system="win32")
    assert plan(windows).vram_limit_bytes == 8 * GIB - context
    linux = device("cuda", 64, 8, system="linux")
    assert plan(linux).vram_limit_bytes == 0
    asked = device("cuda", 64, 80).within(None, 6 * GIB)
    assert plan(asked).vram_limit_bytes == 6 * GIB - context
    assert plan(device("mps", 64, 48, shared_memory=True)).vram_limit_bytes == 48 * GIB


def test_shared_memory_is_counted_once() -> None:
    """A Mac's GPU and CPU use the same 128 GiB."""
    mac = device("mps", 128, 128, shared_memory=True)
    assert plan(mac).device == "mps"
    assert not plan(mac).placement.slots
    small = plan(device("mps", 24, 24, shared_memory=True))
    assert (small.device, small.placement.source) == ("mps", "disk")
    assert small.ram_bytes + small.vram_bytes < 2 * 24 * GIB


def test_compiling_has_to_pay() -> None:
    slow = device("cuda", 64, 16, rates=RATES)
    assert plan(slow).compiled
    assert not plan(slow, size=Size(256, 256), steps=4).compiled
    assert any("longer than it saves" in r for r in plan(slow, steps=2).reasons)
    cannot = RATES.model_copy(update={"compiler": False})
    assert not plan(device("cuda", 64, 16, rates=cannot)).compiled
    fast = card("h100").rates
    assert not plan(device("cuda", 64, 80, rates=fast)).compiled
    cached = fast.model_copy(update={"compile_seconds": 2})
    assert plan(device("cuda", 64, 80, rates=cached)).compiled


def test_exact_mode_keeps_what_diffusers_does() -> None:
    rates = RATES.model_copy(update={"attention_backend": "_native_cudnn"})
    on = device("cuda", 64, 24, rates=rates)
    default, exact = plan(on), plan(on, mode="exact")
    assert (default.attention, default.compiled) == ("_native_cudnn", True)
    assert (exact.attention, exact.compiled, exact.single_frame) == ("", False, False)
    tight = plan(device("cuda", 64, 4, rates=rates), mode="exact")
    assert (tight.single_frame, tight.strips) == (True, 1)
    assert any("one level of 255" in reason for reason in tight.reasons)
    tighter = plan(device("cuda", 64, 3.3, rates=rates), mode="exact")
    assert tighter.strips > 1
    assert any("two levels of 255" in reason for reason in tighter.reasons)


def test_exact_mode_falls_back_to_the_smaller_decoder() -> None:
    first, *others = plans(device("cuda", 64, 24), mode="exact")
    assert not first.single_frame
    assert [each.strips for each in others if each.single_frame][:2] == [1, 2]
    assert "With a decoder that takes less memory than diffusers'." in [
        o.reasons[0] for o in others
    ]


def test_fallbacks_come_in_order() -> None:
    found = plans(device("cuda", 90, 16, rates=RATES))
    assert [each.reasons[0] for each in found[1:]] == [
        "Without torch.compile, with torch's own attention.",
        "With fewer blocks in the GPU's memory.",
        "With the picture decoded in more parts.",
        "With weights from RAM, none page-locked.",
        "With half as many blocks in RAM, none page-locked.",
        "With weights from disk, none page-locked.",
        "Without the GPU.",
    ]
    first, eager, fewer, strips, pageable, half, disk, cpu = found
    assert first.compiled
    assert not eager.compiled
    assert fewer.placement.resident < first.placement.resident
    assert strips.strips == 2 * first.strips
    assert (pageable.placement.source, disk.placement.source) == ("pageable", "disk")
    in_ram = [
        each.placement.blocks - each.placement.resident - each.placement.streamed("disk")
        for each in (pageable, half, disk)
    ]
    assert in_ram == [in_ram[0], in_ram[0] // 2, 0]
    assert cpu.device == "cpu"


@pytest.mark.parametrize(("ram", "vram", "system"), [(28, 8, "win32"), (32, 8, "linux")])
def test_where_ram_runs_out_more_weights_come_from_disk(ram: int, vram: int, system: str) -> None:
    """Not the same need again without a compiler, nor more of it with fewer blocks on the card."""
    found = plans(device("cuda", ram, vram, rates=RATES, system=system))
    assert found[0].ram_bytes > 0.8 * 0.92 * ram * GIB
    [half, disk, *_] = next_plans(found, "memory")
    assert half.placement.streamed("disk") > found[0].placement.streamed("disk")
    assert half.ram_bytes < 0.7 * found[0].ram_bytes
    assert disk.placement.source == "disk"
    assert disk.ram_bytes < 6 * GIB


def test_another_process_goes_on_after_what_failed() -> None:
    found = plans(device("cuda", 90, 16, rates=RATES))
    assert plans_after(found, 1, "crashed") == found[1:]
    assert plans_after(found, 3, "gpu memory") == found[3:]
    assert plans_after(found, 99, "crashed") == found[-1:], "by then there may be fewer"
    assert "With half as many" in plans_after(found, 1, "memory")[0].reasons[0]
    disk = next(n for n, each in enumerate(found, 1) if each.placement.source == "disk")
    assert plans_after(found, disk, "memory") == found[disk - 1 : disk], "memory may be free now"


def test_seconds_are_those_of_the_slower_of_bus_and_computation() -> None:
    rates = Rates(matmul=4e13, attention=4e13, memory=2.5e11, bus=2.5e10, pageable=1e10, disk=3e9)
    hidden = plan(device("cuda", 64, 4, rates=rates), steps=10)
    seconds = {need.phase: need.seconds for need in hidden.phases}
    whole = plan(device("cuda", 64, 80, rates=rates), steps=10)
    assert seconds["denoise"] == {need.phase: need.seconds for need in whole.phases}["denoise"]
    slow_bus = rates.model_copy(update={"bus": 1e9})
    bound = plan(device("cuda", 64, 4, rates=slow_bus), steps=10)
    assert drawing_of(bound).seconds == pytest.approx(10 * bound.bytes_per_step / 1e9)
    assert "waits for them" in bound.reasons[1]
    assert plan(device("cuda", 64, 4)).seconds is None, "no rate is known"


# An H100, by benchmarks/any_card.py: seconds of a step, both CFG halves; of 2.1 a cached step
MEASURED = [
    (FULL, 1328, False, 0.627),
    (FULL, 1328, True, 0.482),
    (NEW, 1024, False, 0.148),
    (NEW, 1024, True, 0.111),
    (NEW, 2048, False, 0.742),
]


@pytest.mark.parametrize(("installed", "side", "compiled", "seconds"), MEASURED)
def test_seconds_are_near_those_of_an_h100(
    installed: Installed, side: int, compiled: bool, seconds: float
) -> None:
    rates = card("h100").rates.model_copy(update={"compiler": compiled, "compile_seconds": 1e-9})
    on = device("cuda", 128, 78, rates=rates)
    found = plan(on, installed, size=Size(side, side), steps=20)
    assert found.compiled == compiled
    assert drawing_of(found).seconds == pytest.approx(20 * seconds, rel=0.15)


# docs/benchmarks.md: seconds of a decode in strips over that of the whole frame
IN_STRIPS = [
    (FULL, 1328, 5, 1.09),
    (FULL, 1328, 20, 1.46),
    (FULL, 2048, 5, 1.05),
    (FULL, 2048, 20, 1.25),
    (NEW, 1024, 5, 1.11),
    (NEW, 1024, 20, 1.44),
    (NEW, 2048, 5, 1.02),
    (NEW, 2048, 20, 1.17),
]


@pytest.mark.parametrize(("installed", "side", "strips", "ratio"), IN_STRIPS)
def test_strips_take_little_more_time_as_measured(
    installed: Installed, side: int, strips: int, ratio: float
) -> None:
    request = Request(model="qwen-image", prompt="x", seed=1, size=Size(side, side))
    on = device("cuda", 128, 78, rates=card("h100").rates)
    needs = Needs(installed.model.resolve(request, 1), installed, on)
    everything = Placement(blocks=installed.blocks.count, resident=installed.blocks.count)
    text = Placement(blocks=installed.text_layers.count, resident=installed.text_layers.count)
    whole, parts = (
        needs.phases(Way("cuda", "bfloat16", everything, text, strips=count))[-1].seconds
        for count in (1, strips)
    )
    assert whole
    assert parts
    assert parts / whole == pytest.approx(ratio, rel=0.06)


def test_hours_on_the_cpu_are_said() -> None:
    slow = CPU_RATES.model_copy(update={"matmul": 3e11})
    found = plan(device("cpu", 96, rates=slow))
    drawing = drawing_of(found).seconds
    assert drawing
    assert f"Drawing takes about {drawing / 3600:.1f} hours there." in found.reasons[0]
    quick = plan(device("cpu", 96, rates=slow), SMALL, size=Size(256, 256))
    assert "hours" not in quick.reasons[0]
    assert "hours" not in plan(device("cpu", 96)).reasons[0], "it is not known"


def test_a_smaller_vae_decodes_in_less_time() -> None:
    on = device("cpu", 96, rates=CPU_RATES)
    [large, small] = [
        next(need.seconds for need in plan(on, model, size=Size(256, 256)).phases[::-1])
        for model in (FULL, SMALL)
    ]
    assert large
    assert small
    assert large / 50 < small < large / 10


def test_a_card_that_is_too_small_for_this_size_is_said_with_one_that_it_draws() -> None:
    on = device("cuda", 32, 4)
    found = plan(on, NEW, size=Size(2048, 2048))
    assert found.device == "cpu"
    [said] = [reason for reason in found.reasons if "it runs on A100" in reason]
    size = Size.parse(said.split()[2])
    assert plan(on, NEW, size=size).device == "cuda"
    assert "it runs on" not in " ".join(plan(device("cuda", 32, 1), NEW).reasons)
    assert "it runs on" not in " ".join(plans(device("cuda", 32, 8), NEW)[-1].reasons)


def test_small_models_compute_in_float32_on_the_cpu() -> None:
    assert plan(device("cpu", 4), SMALL, size=Size(256, 256)).dtype == "float32"
    assert plan(device("cpu", 96)).dtype == "bfloat16"


def test_where_the_ram_is_short_blocks_are_read_from_disk() -> None:
    found = plan(device("cpu", 12), size=Size(256, 256))
    assert found.placement.source == found.text_placement.source == "disk"
    assert 0 < found.placement.resident < 58
    assert found.placement.slots == 2
    assert found.reasons[0].endswith(
        f"13.1 GB for a new prompt and {found.bytes_per_step / 1e9:.1f} GB at every step are read"
        " from disk."
    )
    assert plan(device("cpu", 64), size=Size(256, 256)).placement.resident == 60


def test_the_full_model_runs_in_6_gib_of_ram() -> None:
    found = plan(device("cpu", 6), size=Size(256, 256))
    assert found.ram_bytes < 6 * GIB


def test_what_cannot_run_is_said_with_its_figures_and_what_can() -> None:
    with pytest.raises(CannotRun) as caught:
        plan(device("cpu", 3.8), size=Size(2048, 2048))
    assert "Qwen-Image at 2048x2048 needs" in caught.value.message
    assert "; 3.8 GiB of RAM are free." in caught.value.message
    nearest = caught.value.hint.partition("--size ")[2].partition(",")[0]
    assert plan(device("cpu", 3.8), size=Size.parse(nearest)).device == "cpu"
    with pytest.raises(CannotRun, match="of GPU memory are free"):
        plan(device("cuda", 1, 1))
    with pytest.raises(CannotRun, match=r"; Windows can give programs 2.0 GiB more.") as caught:
        plan(promising(device("cuda", 64, 16), 2))
    assert "of RAM and GPU memory together;" in caught.value.message
    assert "let Windows manage the page file" in caught.value.hint


def test_it_can_be_asked_for_anyway() -> None:
    [found] = plans(device("cuda", 1, 3), anyway=True)
    assert found.reasons[0] == "It may not fit: this was asked for anyway."
    assert found.placement.resident == 0
    assert found.ram_bytes > GIB
    fits = device("cuda", 64, 16)
    assert plans(fits, anyway=True) == plans(fits)


def test_passes_count_pictures_steps_and_halves() -> None:
    big = device("cuda", 64, 78)
    assert plan(big, steps=10).forwards == 20
    assert plan(big, steps=10, cfg=1).forwards == 10
    assert plan(big, steps=10, images=3).forwards == 60


def test_pictures_share_each_pass_over_the_weights() -> None:
    on = device("cuda", 64, 8, rates=RATES)
    one, four = plan(on, images=1), plan(on, images=4)
    assert four.bytes_per_step - one.bytes_per_step < 4 * FULL.blocks.bytes
    assert four.seconds
    assert one.seconds
    assert four.seconds > 3 * one.seconds


def test_a_size_between_multiples_is_worked_at_the_next_one() -> None:
    found = plan(device("cuda", 64, 78), size=Size(1472, 1140))
    assert found.working_size == Size(1472, 1152)
    assert any("centre 1472x1140" in reason for reason in found.reasons)


def test_more_pixels_never_need_less() -> None:
    big = device("cuda", 64, 90)
    needs = [plan(big, size=Size(side, side)).vram_bytes for side in (256, 512, 1024, 1328, 2048)]
    assert needs == sorted(needs)


def test_a_longer_prompt_keeps_more_keys_and_values() -> None:
    on = device("cuda", 64, 90)
    short, long = plan(on, NEW), plan(on, NEW, prompt="words " * 1500)
    cache = 0.5 * 2**20 * 2900  # half a MiB a token
    assert long.phases[3].vram_bytes - short.phases[3].vram_bytes == pytest.approx(cache, rel=0.05)


def test_an_unresolved_request_is_a_mistake_of_ours() -> None:
    with pytest.raises(ValueError, match="not resolved"):
        planner.plan(Request(model="m", prompt="x"), FULL, device("cpu", 96))


def test_cards_that_are_not_here() -> None:
    known = card("RTX 4060 Ti")
    assert known.vram_bytes == 16 * GIB
    assert "assumed" in invented(32 * GIB, known.vram_bytes, known).name


def test_machines_that_are_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have this computer's system, unless another one is named."""
    for system, locks_all in (("linux", True), ("win32", False), ("wsl", False)):
        monkeypatch.setattr(device_module, "system", lambda system=system: system)
        for found in (
            plan(invented(32 * GIB, 8 * GIB)),
            plan(invented(32 * GIB, 8 * GIB, on=system)),
        ):
            assert (found.placement.streamed("pageable") == 0) == locks_all
            assert f"Planned as on {SYSTEMS[system]} with an NVIDIA card." in found.reasons
    mac = plan(invented(64 * GIB, None, on="darwin"))
    assert (mac.device, mac.placement.resident) == ("mps", 60)
    assert "Planned as on macOS with Apple's GPU." in mac.reasons
    assert invented(64 * GIB, 80 * GIB, on="darwin").vram_bytes == 64 * GIB
    assert plan(invented(64 * GIB, 0, on="darwin")).device == "cpu"


def test_cards_that_are_not_known() -> None:
    with pytest.raises(BadRequest, match=r"'4060' .* 4060ti, .*--vram 8GiB"):
        card("4060")
