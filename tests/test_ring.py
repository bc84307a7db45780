"""The ring's order with a transfer that records, and the real moves on tiny models."""

import itertools
import re
import shutil
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from torch import nn

import tiny
from async_gpu import AsyncGpu, Cudart
from qwen_image_tool.engine import families, placed, text, weights
from qwen_image_tool.engine.cache import TensorCache
from qwen_image_tool.engine.families.qwen_image import Forward, Transformer
from qwen_image_tool.engine.host import HostMemory
from qwen_image_tool.engine.modulation import Modulation
from qwen_image_tool.engine.ring import Background, Ring, StreamCopies, interleaved
from qwen_image_tool.engine.weights import Checkpoint, Reader
from qwen_image_tool.errors import Cancelled, ModelMissing
from qwen_image_tool.types import Placement


class Recorder:
    """A device in words: what each slot holds, and whether the computation still needs it."""

    def __init__(self) -> None:
        self.holds: dict[int, int] = {}
        self.in_use: set[int] = set()
        self.expected: deque[int] = deque()
        self.skipped: list[int] = []
        self.started: list[tuple[int, int]] = []
        self.closed = False

    def expect(self, blocks: Sequence[int]) -> None:
        self.expected.extend(blocks)

    def start(self, block: int, slot: int) -> None:
        while (number := self.expected.popleft()) != block:
            self.skipped.append(number)
        assert slot not in self.in_use, f"slot {slot} is overwritten while block runs in it"
        self.holds[slot] = block
        self.started.append((block, slot))

    def wait(self, slot: int) -> None:
        self.in_use.add(slot)

    def release(self, slot: int) -> None:
        self.in_use.remove(slot)

    def close(self) -> None:
        self.closed = True


def ring(count: int, resident: int, slots: int) -> tuple[Ring, Recorder, list[nn.Module]]:
    recorder = Recorder()
    residents = {number: nn.Identity() for number in interleaved(count, resident)}
    modules: list[nn.Module] = [nn.Identity() for _ in range(slots)]
    return Ring(count, residents, modules, recorder), recorder, modules


@pytest.mark.parametrize(
    ("count", "resident", "slots"), [(60, 0, 2), (60, 9, 2), (60, 46, 3), (7, 2, 2), (5, 1, 3)]
)
def test_every_block_is_there_when_it_runs(count: int, resident: int, slots: int) -> None:
    made, recorder, modules = ring(count, resident, slots)
    for _ in range(3):
        seen = []
        for number, module in made.walk():
            seen.append(number)
            if module in modules:
                assert recorder.holds[modules.index(module)] == number
        assert seen == list(range(count))
    streamed = [number for number in range(count) if number not in interleaved(count, resident)]
    fills = [block for block, _ in recorder.started]
    assert len(fills) == 3 * len(streamed) + slots, "each block crosses once a step"
    assert fills == [streamed[i % len(streamed)] for i in range(len(fills))]
    assert not recorder.skipped
    assert [*recorder.expected] == (streamed * 4)[len(fills) :], "the rest of the next step"
    made.close()
    assert recorder.closed


def test_the_prefetch_runs_ahead_and_wraps_into_the_next_step() -> None:
    made, recorder, _ = ring(4, 0, 2)
    assert not recorder.started
    walk = made.walk()
    assert [block for block, _ in recorder.started] == [0, 1]
    next(walk)
    next(walk)
    assert [block for block, _ in recorder.started] == [0, 1, 2]
    list(walk)
    assert [block for block, _ in recorder.started] == [0, 1, 2, 3, 0, 1]


def test_a_walk_that_was_left_early_starts_over() -> None:
    made, recorder, modules = ring(6, 0, 2)
    for number, _ in made.walk():
        if number == 3:
            break
    assert not recorder.in_use
    for number, module in made.walk():
        assert recorder.holds[modules.index(module)] == number


def test_too_few_streamed_blocks_for_the_slots_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        ring(4, 3, 2)


@pytest.mark.parametrize("before", [0, 1, 3])
def test_the_last_walk_prefetches_nothing(before: int) -> None:
    made, recorder, modules = ring(5, 0, 2)
    for _ in range(2):
        recorder.started.clear()
        for last in [False] * before + [True]:
            for number, module in made.walk(last):
                assert recorder.holds[modules.index(module)] == number
        fills = [block for block, _ in recorder.started]
        assert fills == [0, 1, 2, 3, 4] * (before + 1)
        assert not recorder.expected


@pytest.mark.parametrize("count", [1, 7, 60])
def test_residents_are_spread_evenly(count: int) -> None:
    for residents in range(count + 1):
        kept = interleaved(count, residents)
        assert len(set(kept)) == len(kept) == residents
        gone = [block for block in range(count) if block not in kept]
        gaps = [b - a for a, b in itertools.pairwise(gone)]
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_what_a_background_fill_raises_reaches_the_walk() -> None:
    def fill(block: int, slab: torch.Tensor) -> None:
        raise ModelMissing(f"block {block} is broken")

    slots = [torch.empty(4) for _ in range(2)]
    made = Ring(4, {}, [nn.Identity(), nn.Identity()], Background(fill, slots))
    with pytest.raises(ModelMissing, match="block 0"):
        next(made.walk())
    made.close()


# The real moves, on a tiny transformer of six blocks

SHAPES = [[(1, 4, 6)]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("models") / "six"
    pipe = tiny.pipeline(seed=3, layers=6).to(torch.bfloat16)
    pipe.transformer.save_pretrained(where, max_shard_size="60KB")
    return where


@pytest.fixture
def _no_grad() -> Iterator[None]:
    with torch.inference_mode():
        yield


PLACEMENTS = [
    Placement(blocks=6, resident=6),
    Placement(blocks=6, resident=0, slots=2, source="disk"),
    Placement(blocks=6, resident=1, slots=3, source="disk"),
    Placement(blocks=6, resident=3, slots=2, source="disk"),
    Placement(blocks=6, resident=2, slots=2, source="pageable"),
    Placement(blocks=6, resident=1, slots=2, source="pageable", disk=2),
    Placement(blocks=6, resident=0, slots=2, source="pageable", disk=5),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "placement", PLACEMENTS, ids=lambda p: f"{p.source or 'all'}-{p.resident}-{p.slots}-{p.disk}"
)
@pytest.mark.usefixtures("_no_grad")
def test_every_placement_has_the_bits_of_the_plain_forward(
    folder: Path, placement: Placement, dtype: torch.dtype
) -> None:
    plain = QwenImageTransformer2DModel.from_pretrained(folder, dtype=dtype).eval()
    placed = Transformer(folder, placement, torch.device("cpu"), dtype, Reader())
    torch.manual_seed(0)
    latents = torch.randn(2, 24, 64).to(dtype)
    prompts = [torch.randn(1, length, 32).to(dtype) for length in (5, 11)]
    timesteps = torch.tensor([900.0, 512.5, 20.0])
    forward = Forward(placed, timesteps, (4, 6), Reader())
    conditions = [forward.condition(prompt) for prompt in prompts]
    for step, timestep in enumerate(timesteps):
        ours = forward(latents, step, conditions)
        for picture in range(2):
            for half, prompt in enumerate(prompts):
                theirs = plain(
                    hidden_states=latents[picture : picture + 1],
                    timestep=timestep.expand(1).to(dtype) / 1000,
                    encoder_hidden_states=prompt,
                    img_shapes=SHAPES,
                    return_dict=False,
                )[0]
                assert torch.equal(ours[picture][half], theirs)
    placed.close()


TIERS = [
    Placement(blocks=6, resident=6),
    Placement(blocks=6, resident=2, slots=2, source="pinned"),
    Placement(blocks=6, resident=2, slots=2, source="pinned", pageable=2),
    Placement(blocks=6, resident=2, slots=2, source="pinned", disk=2),
    Placement(blocks=6, resident=0, slots=3, source="pinned", pageable=1, disk=4),
    Placement(blocks=6, resident=1, slots=2, source="pageable", disk=3),
    Placement(blocks=6, resident=0, slots=1, source="disk"),
]


@pytest.mark.parametrize("placement", TIERS, ids=lambda p: p.to_json())
@pytest.mark.usefixtures("_no_grad")
def test_what_waits_in_ram_is_read_once_and_the_others_at_each_step(
    folder: Path, placement: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the copies of a GPU, on memory of the CPU; with the bits of the plain forward."""
    gpu, cudart = AsyncGpu(0, monkeypatch), Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(
        placed.Blocks,
        "_transfer",
        lambda _, fill, slots, locked: StreamCopies(fill, slots, locked),
    )
    read, reads = weights.read, Counter[str]()

    def noting(pairs: Any, *rest: Any, **more: Any) -> None:
        pairs = list(pairs)
        reads.update(
            stored.name.split(".")[1] for stored, _ in pairs[:1] if "attn" in pairs[0][0].name
        )
        read(pairs, *rest, **more)

    monkeypatch.setattr(weights, "read", noting)
    plain = QwenImageTransformer2DModel.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ours = Transformer(folder, placement, torch.device("cpu"), torch.bfloat16, Reader())
    latents, prompt = torch.randn(1, 24, 64).bfloat16(), torch.randn(1, 5, 32).bfloat16()
    timesteps = torch.tensor([900.0, 512.5, 20.0])
    forward = Forward(ours, timesteps, (4, 6), Reader())
    for step, timestep in enumerate(timesteps):
        theirs = plain(
            hidden_states=latents,
            timestep=timestep.expand(1).bfloat16() / 1000,
            encoder_hidden_states=prompt,
            img_shapes=SHAPES,
            return_dict=False,
        )[0]
        assert torch.equal(forward(latents, step, [forward.condition(prompt)])[0][0], theirs)
    residents, pinned = interleaved(6, placement.resident), placement.streamed("pinned")
    streamed = [block for block in range(6) if block not in residents]
    on_disk = [place for place, block in enumerate(streamed) if reads[str(block)] == 3]
    assert len(on_disk) == placement.streamed("disk")
    assert sum(reads.values()) == 6 + 2 * len(on_disk)
    gaps = [after - before for before, after in itertools.pairwise(on_disk)]
    assert not gaps or max(gaps) - min(gaps) <= 1, "they are spread evenly"
    buffers = 0 if pinned == len(streamed) else min(2, placement.slots)
    assert len(cudart.locked) == pinned + buffers
    ours.rest()
    assert len(cudart.locked) == pinned
    ours.close()
    gpu.finish()
    assert not cudart.locked


@pytest.mark.parametrize("pictures", [1, 3])
@pytest.mark.parametrize("name", ["qwen-image", "qwen-image-2.1"])
@pytest.mark.usefixtures("_no_grad")
def test_pictures_and_halves_share_each_pass_over_the_weights(
    name: str, pictures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the last blocks of a step are computed while the first of the next are on their way."""
    save = tiny.save if name == "qwen-image" else tiny.save_21
    family, where = families.family(name), save(tmp_path, layers=6) / "transformer"
    device, dtype = torch.device("cpu"), torch.bfloat16
    model = family.Transformer(where, PLACEMENTS[1], device, dtype, Reader())
    forward = family.Forward(model, torch.tensor([900.0, 500.0, 20.0]), (4, 6), Reader())
    conditions = [forward.condition(torch.randn(1, n, 32).to(dtype)) for n in (5, 9)]
    latents = torch.randn(pictures, 24, 64).to(dtype)
    plain, fills = Background.start, []

    def start(self: Background, block: int, slot: int) -> None:
        fills.append(block)
        plain(self, block, slot)

    monkeypatch.setattr(Background, "start", start)
    for step, expected in enumerate((8, 14, 18)):
        forward(latents, step, conditions)
        assert fills == [0, 1, 2, 3, 4, 5] * (expected // 6) + [0, 1][: expected % 6]
    model.close()


@pytest.mark.parametrize("name", ["qwen-image", "qwen-image-2.1"])
@pytest.mark.usefixtures("_no_grad")
def test_prompts_share_one_pass_over_layers_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No head and no vision tower is read, and of the table of words what the prompts say."""
    save = tiny.save if name == "qwen-image" else tiny.save_21
    family, where = families.family(name), save(tmp_path) / "text_encoder"
    known = {each.name: each for each in Checkpoint(where).tensors.values()}
    read = weights.read
    names: list[str] = []

    def noting(pairs: Any, *rest: Any, **more: Any) -> None:
        pairs = list(pairs)
        names.extend(stored.name for stored, _ in pairs)
        read(pairs, *rest, **more)

    monkeypatch.setattr(weights, "read", noting)
    count = len({number for each in known for number in re.findall(r"layers\.(\d+)\.", each)})
    placement = Placement(blocks=count, resident=0, slots=1, source="disk")
    kind, normed, device = family.TEXT_MODEL, family.TEXT_NORMED, torch.device("cpu")
    encoder = text.TextEncoder(kind, normed, where, placement, device, torch.bfloat16, Reader())
    encoder.encode([[1, 2, 3], [4, 5]], Reader())
    encoder.close()
    counted = Counter(names)
    words = [each for each in counted if "embed_tokens" in each]
    assert [counted.pop(each) for each in words] == [5]
    assert {each for each in counted if ".layers." not in each} <= {words[0][:-19] + "norm.weight"}
    assert counted.keys() >= {each for each in known if re.search(r"(model|guage)\S*layers", each)}
    assert set(counted.values()) == {1}
    assert any("visual" in each or "lm_head" in each for each in known)


@pytest.mark.usefixtures("_no_grad")
def test_a_prompt_that_is_left_early_gives_the_slots_back(tmp_path: Path) -> None:
    """The next prompt may be a known one, and nobody walks here then."""
    family, where = families.family("qwen-image"), tiny.save(tmp_path) / "text_encoder"
    placement = Placement(blocks=2, resident=0, slots=1, source="disk")
    kind, device = family.TEXT_MODEL, torch.device("cpu")
    encoder = text.TextEncoder(kind, True, where, placement, device, torch.bfloat16, Reader())
    with pytest.raises(Cancelled):
        encoder.encode([[1, 2, 3]], Reader(lambda: True))
    assert all(each.is_meta for slot in encoder._layers.modules for each in slot.parameters())
    [states] = encoder.encode([[1, 2, 3]], Reader())
    assert states.isfinite().all()
    encoder.close()


@pytest.mark.usefixtures("_no_grad")
def test_the_modulation_is_computed_once_a_schedule(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed = Transformer(folder, PLACEMENTS[0], torch.device("cpu"), torch.bfloat16, Reader())
    reads: list[int] = []
    read = weights.read

    def counting(pairs: Any, *rest: Any, **more: Any) -> None:
        reads.append(len(pairs))
        read(pairs, *rest, **more)

    placed.loading.result()
    monkeypatch.setattr(weights, "read", counting)
    for timesteps in (torch.tensor([900.0, 20.0]), torch.tensor([900.0, 20.0])):
        Forward(placed, timesteps, (4, 6), Reader())
    assert reads == [4] * 6, "weight and bias of two layers, once a block"
    Forward(placed, torch.tensor([800.0, 20.0]), (4, 6), Reader())
    assert len(reads) == 12
    names = {name for name, _ in placed.model.named_parameters()}
    assert not any("_mod." in name for name in names), "modulation weights are not kept"
    placed.close()


@pytest.mark.usefixtures("_no_grad")
def test_a_disk_that_fails_in_mid_run_is_said(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    placement = Placement(blocks=6, resident=0, slots=2, source="disk")
    placed = Transformer(copy, placement, torch.device("cpu"), torch.bfloat16, Reader())
    walk = placed.walk()
    next(walk)
    for shard in copy.glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ModelMissing, match="ends too early"):
        list(walk)
    placed.close()


@pytest.mark.usefixtures("_no_grad")
def test_a_fill_from_a_slow_disk_does_not_hold_up_a_rest(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, began, ended = weights.read, threading.Event(), threading.Event()
    fills = itertools.count()

    def slow(pairs: Any, done: Any, is_cancelled: Callable[[], bool], *rest: Any) -> None:
        if next(fills) == 2:  # two slots are full
            began.set()
            while not is_cancelled():
                time.sleep(0.01)
            ended.set()
        plain(pairs, done, is_cancelled, *rest)

    placement = Placement(blocks=6, resident=0, slots=2, source="disk")
    placed = Transformer(folder, placement, torch.device("cpu"), torch.bfloat16, Reader())
    monkeypatch.setattr(weights, "read", slow)
    walk = placed.walk()
    next(walk)
    next(walk)  # the first slot is filled anew
    assert began.wait(60)
    placed.rest()
    assert ended.is_set()
    assert [number for number, _ in placed.walk(last=True)] == list(range(6))
    placed.close()


def test_memory_that_is_not_locked_leaves_no_error_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA keeps the error of a call for the next kernel of the thread."""
    kept: list[int] = []

    class Runtime:
        def cudaHostRegister(self, *_: int) -> int:  # noqa: N802
            kept.append(2)
            return kept[-1]

    def kernel(*_: Any, device: str) -> None:
        assert device == "cuda"
        if kept:
            raise RuntimeError(f"CUDA error {kept.pop()}")

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch, "ones", kernel)
    memory = HostMemory(4096)
    memory.lock()
    assert not memory.locked
    kernel(device="cuda")


@pytest.mark.usefixtures("_no_grad")
def test_slots_that_nothing_can_fill_are_given_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where their page-locked buffers find no memory."""
    placement = Placement(blocks=6, resident=0, slots=2, source="disk")
    placed = Transformer(folder, placement, torch.device("cpu"), torch.bfloat16, Reader())

    def refuse(*_: Any) -> Background:
        raise MemoryError

    monkeypatch.setattr("qwen_image_tool.engine.placed.Background", refuse)
    with pytest.raises(MemoryError):
        placed.walk()
    placed.rest()
    assert all(weight.is_meta for block in placed.blocks for weight in block.parameters())
    placed.close()


@pytest.mark.usefixtures("_no_grad")
def test_reading_can_be_cancelled(folder: Path) -> None:
    with pytest.raises(Cancelled):
        Transformer(
            folder, PLACEMENTS[0], torch.device("cpu"), torch.bfloat16, Reader(lambda: True)
        )


@pytest.mark.usefixtures("_no_grad")
def test_blocks_that_come_in_the_background_are_cancelled_too(folder: Path) -> None:
    asked = 0

    def is_cancelled() -> bool:  # after the parameters outside the blocks
        nonlocal asked
        asked += 1
        return asked > 20

    placed = Transformer(
        folder, PLACEMENTS[0], torch.device("cpu"), torch.bfloat16, Reader(is_cancelled)
    )
    with pytest.raises(Cancelled):
        list(placed.walk())
    placed.close()


@pytest.mark.usefixtures("_no_grad")
def test_a_schedule_that_was_kept_on_disk_reads_no_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = TensorCache(tmp_path / "cache", ["here"], 1 << 20)
    timesteps, latents = torch.tensor([900.0, 20.0]), torch.randn(1, 24, 64).bfloat16()
    prompt = torch.randn(1, 5, 32).bfloat16()
    made = []
    for _ in range(2):
        reader = Reader()
        placed = Transformer(
            folder, PLACEMENTS[0], torch.device("cpu"), torch.bfloat16, reader, cache
        )
        forward = Forward(placed, timesteps, (4, 6), reader)
        made.append(forward(latents, 0, [forward.condition(prompt)])[0][0])
        placed.close()
        monkeypatch.delattr(Modulation, "_compute", raising=False)
    assert torch.equal(*made)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.usefixtures("_no_grad")
def test_the_table_has_the_row_of_timestep_0_for_reference_pictures(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """As Edit-2511 is configured; a second picture stands for the reference."""
    torch.manual_seed(1)
    config = {k: v for k, v in tiny.pipeline(layers=3).transformer.config.items() if k[0] != "_"}
    plain = QwenImageTransformer2DModel(**config | {"zero_cond_t": True}).to(dtype).eval()
    plain.save_pretrained(tmp_path)
    inputs = {
        "hidden_states": torch.randn(1, 48, 64).to(dtype),
        "encoder_hidden_states": torch.randn(1, 7, 32).to(dtype),
        "img_shapes": [[(1, 4, 6), (1, 4, 6)]],
        "return_dict": False,
    }
    timesteps = torch.tensor([700.0, 30.0])
    times = [timestep.expand(1).to(dtype) / 1000 for timestep in timesteps]
    theirs = [plain(timestep=time, **inputs)[0] for time in times]
    tembs = [
        plain.time_text_embed(torch.cat([time, time * 0]), inputs["hidden_states"], None)
        for time in times
    ]
    blocks = list(plain.transformer_blocks)
    modulation = Modulation(
        blocks, "transformer_blocks.", Checkpoint(tmp_path), torch.device("cpu"), dtype
    )
    table = modulation.table(timesteps, tembs, Reader())
    assert table.rows.shape[:3] == (2, 3, 3)
    for step, scaled in enumerate(times):
        for number, block in enumerate(blocks):
            table.set(block, number, step)
        assert torch.equal(plain(timestep=scaled, **inputs)[0], theirs[step])
