from pathlib import Path

import pytest

from qwen_image_tool import planner
from qwen_image_tool.catalog import load_catalog
from qwen_image_tool.errors import CannotRun
from qwen_image_tool.planner import GIB
from qwen_image_tool.store import Installed, blocks_of, text_layers_of
from qwen_image_tool.types import Device, Plan, Request, Size

MODEL = load_catalog().find("qwen-image")
FULL = Installed(
    model=MODEL,
    folder=Path(),
    bytes={name: part.bytes for name, part in MODEL.components.items()},
    blocks=blocks_of({}),
    text_layers=text_layers_of({}),
)
SMALL = Installed(
    model=MODEL,
    folder=Path(),
    bytes={"transformer": 22 << 20, "vae": 5 << 20},
    blocks=blocks_of({"num_layers": 6, "num_attention_heads": 3, "attention_head_dim": 64}),
    text_layers=text_layers_of(
        {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4}
        | {"num_attention_heads": 3, "num_key_value_heads": 1}
    ),
)


def device(kind: str, ram: float, vram: float = 0) -> Device:
    """`ram` and `vram`: free, GiB."""
    return Device.from_user(
        kind=kind,
        name="A100" if kind != "cpu" else "Ryzen",
        ram_bytes=int(ram * GIB * 1.2),
        ram_free_bytes=int(ram * GIB),
        vram_bytes=int(vram * GIB * 1.1),
        vram_free_bytes=int(vram * GIB),
    )


def plan(on: Device, installed: Installed = FULL, **fields: object) -> Plan:
    request = Request.from_user(**{"model": "qwen-image", "prompt": "x", "seed": 1, **fields})
    return planner.plan(MODEL.resolve(request, 1), installed, on)


def test_a_card_that_holds_the_model_is_used() -> None:
    found = plan(device("cuda", 8, 60))
    assert (found.device, found.dtype) == ("cuda", "bfloat16")
    assert 46 * GIB < found.vram_bytes < 48 * GIB, "no modulation, no head, no words, no vision"
    assert "A100" in found.reasons[0]


def test_rocm_is_called_cuda_by_torch() -> None:
    assert plan(device("rocm", 64, 78)).device == "cuda"


def test_a_card_that_is_too_small_is_left_out_with_its_reason() -> None:
    found = plan(device("cuda", 96, 16))
    assert (found.device, found.dtype) == ("cpu", "bfloat16")
    assert "does not fit A100 (16.0 GiB of memory free)" in found.reasons[0]
    assert found.vram_bytes == 0


def test_small_models_compute_in_float32_on_the_cpu() -> None:
    assert plan(device("cpu", 4), SMALL, size=Size(256, 256)).dtype == "float32"
    assert plan(device("cpu", 96)).dtype == "bfloat16"


@pytest.mark.parametrize("kind", ["cpu", "cuda", "rocm", "xpu", "mps"])
@pytest.mark.parametrize("ram", [2, 8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("vram", [0, 4, 8, 16, 24, 48, 80, 96])
def test_no_plan_is_above_the_memory(kind: str, ram: float, vram: float) -> None:
    on = device(kind, ram, 0 if kind == "cpu" else vram)
    for installed in (FULL, SMALL):
        try:
            found = plan(on, installed)
        except CannotRun:
            continue
        assert found.ram_bytes <= on.ram_free_bytes
        assert found.vram_bytes <= on.vram_free_bytes


def test_what_cannot_run_is_said_with_its_figures_and_what_can() -> None:
    with pytest.raises(CannotRun) as caught:
        plan(device("cuda", 8, 4))
    assert str(caught.value) == (
        "Qwen-Image needs 11.8 GiB of free RAM, and this computer has 8.0 GiB and 4.0 GiB of GPU"
        " memory free. Close other programs, choose a smaller --size, or use --model practice."
    )


def test_shared_memory_is_counted_once() -> None:
    """A Mac's GPU and CPU use the same 128 GiB."""
    mac = device("mps", 128, 128).model_copy(update={"shared_memory": True})
    assert plan(mac, size=Size(512, 512)).device == "mps"
    tight = {"ram_free_bytes": 40 * GIB, "vram_free_bytes": 40 * GIB}
    assert plan(mac.model_copy(update=tight), size=Size(512, 512)).device == "cpu"


def test_where_the_ram_is_short_blocks_are_read_from_disk() -> None:
    found = plan(device("cpu", 12), size=Size(256, 256))
    assert found.placement.source == found.text_placement.source == "disk"
    assert 0 < found.placement.resident < 58
    assert found.placement.slots == 2
    assert found.reasons[0].endswith(
        "13.1 GB for a new prompt and 19.0 GB at every step are read from disk."
    )
    assert plan(device("cpu", 64), size=Size(256, 256)).placement.resident == 60


def test_the_full_model_runs_in_6_gib_of_ram() -> None:
    found = plan(device("cpu", 6), size=Size(256, 256))
    assert found.ram_bytes < 6 * GIB


def test_more_ram_never_reads_more() -> None:
    plans = [plan(device("cpu", ram), size=Size(256, 256)) for ram in range(6, 64, 2)]
    kept = [found.placement.resident + found.text_placement.resident for found in plans]
    assert kept == sorted(kept)
    assert kept[0] < kept[-1] == 88


def test_passes_count_pictures_steps_and_halves() -> None:
    big = device("cuda", 64, 78)
    assert plan(big, steps=10).forwards == 20
    assert plan(big, steps=10, cfg=1).forwards == 10
    assert plan(big, steps=10, images=3).forwards == 60


def test_a_size_between_multiples_is_worked_at_the_next_one() -> None:
    found = plan(device("cuda", 64, 78), size=Size(1472, 1140))
    assert found.working_size == Size(1472, 1152)
    assert any("centre 1472x1140" in reason for reason in found.reasons)


def test_more_pixels_never_need_less() -> None:
    big = device("cuda", 64, 90)
    needs = [plan(big, size=Size(side, side)).vram_bytes for side in (256, 512, 1024, 1328, 2048)]
    assert needs == sorted(needs)


def test_an_unresolved_request_is_a_mistake_of_ours() -> None:
    with pytest.raises(ValueError, match="not resolved"):
        planner.plan(Request(model="m", prompt="x"), FULL, device("cpu", 96))
