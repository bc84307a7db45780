"""The ring's copies beside the computation, on a GPU in words: whatever order its streams take."""

import logging
import mmap
import threading
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from torch import nn

from async_gpu import AsyncGpu, Cudart, Slot
from qwen_image_tool.engine import host
from qwen_image_tool.engine.host import HostMemory
from qwen_image_tool.engine.ring import Fill, PlainCopies, Ring, StreamCopies, interleaved
from qwen_image_tool.errors import Cancelled, ModelMissing

SIZE = 8  # bytes of a block


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Cudart:
    runtime = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    return runtime


def weights_of(block: int) -> torch.Tensor:
    return torch.full((SIZE,), block, dtype=torch.uint8)


def fill(block: int, slab: torch.Tensor) -> None:
    slab.copy_(weights_of(block))


def copies(memory: Any, locked: dict[int, torch.Tensor], fill: Fill = fill) -> StreamCopies:
    """`memory`: of Slots."""
    return StreamCopies(fill, memory, locked)


# How many of three neighbours are page-locked: none (from disk, or from RAM), some, or all
LOCKED = [0, 1, 2, 3]


def locked_of(count: int, share: int) -> dict[int, torch.Tensor]:
    return {block: weights_of(block) for block in range(count) if block % 3 < share}


@pytest.mark.parametrize("share", LOCKED)
@pytest.mark.parametrize(("count", "resident", "slots"), [(7, 0, 2), (9, 4, 3), (5, 3, 1)])
@pytest.mark.parametrize("seed", range(12))
def test_no_slot_is_overwritten_while_it_is_computed_with(
    share: int, count: int, resident: int, slots: int, seed: int,
    cudart: Cudart, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    gpu = AsyncGpu(seed, monkeypatch)
    memory = [Slot(gpu, SIZE) for _ in range(slots)]
    modules: list[nn.Module] = [nn.Identity() for _ in memory]
    residents = {number: nn.Identity() for number in interleaved(count, resident)}
    ring = Ring(count, residents, modules, copies(memory, locked_of(count, share)))
    seen: list[tuple[int, int]] = []

    def compute(block: int, slot: Slot) -> None:
        """Twice: as a block is computed with for every picture and half."""
        for _ in range(2):
            gpu.computing.launch(lambda: seen.append((block, int(slot.holds[0]))))

    for last in (False, False, True):
        for number, module in ring.walk(last):
            if number not in residents:
                compute(number, memory[modules.index(module)])
    gpu.finish()
    ring.close()
    assert [held for _, held in seen] == [block for block, _ in seen]
    assert len(seen) == 3 * 2 * (count - resident)
    assert not cudart.locked, "the buffers are given back"


def held(
    gpu: AsyncGpu, ring: Ring, memory: list[Slot], modules: list[nn.Module], until: int
) -> Any:
    """What each block of a walk up to `until` is computed with."""
    seen: list[tuple[int, int]] = []

    def compute(block: int, slot: Slot) -> None:
        gpu.computing.launch(lambda: seen.append((block, int(slot.holds[0]))))

    for number, module in ring.walk():
        compute(number, memory[modules.index(module)])
        if number == until:
            break
    gpu.finish()
    return seen


@pytest.mark.parametrize("left", range(6))
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", LOCKED)
def test_after_a_walk_that_was_left_early_no_slot_holds_what_was_on_its_way(
    share: int, seed: int, left: int, cudart: Cudart, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = AsyncGpu(seed, monkeypatch)
    memory = [Slot(gpu, SIZE) for _ in range(2)]
    modules: list[nn.Module] = [nn.Identity() for _ in memory]
    ring = Ring(7, {}, modules, copies(memory, locked_of(7, share)))
    for until in (left, left, 6, 6):
        seen = held(gpu, ring, memory, modules, until)
        assert seen == [(block, block) for block in range(until + 1)]
    ring.close()
    assert not cudart.locked


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> AsyncGpu:
    return AsyncGpu(0, monkeypatch)


@pytest.mark.usefixtures("cudart")
def test_a_disk_works_on_while_what_waits_in_ram_is_computed(gpu: AsyncGpu) -> None:
    """Blocks 3 and 7 of 8 come from disk: both are read while the first is still computed, block
    3 of the next walk as soon as a buffer is free, and after the last walk none."""
    reads: SimpleQueue[int] = SimpleQueue()

    def read(block: int, slab: torch.Tensor) -> None:
        fill(block, slab)
        reads.put(block)

    memory = [Slot(gpu, SIZE) for _ in range(2)]
    modules: list[nn.Module] = [nn.Identity() for _ in memory]
    locked = {block: weights_of(block) for block in range(8) if block not in (3, 7)}
    ring = Ring(8, {}, modules, copies(memory, locked, read))
    walk = ring.walk()
    next(walk)
    assert [reads.get(timeout=60) for _ in range(2)] == [3, 7]
    assert [next(walk)[0] for _ in range(3)] == [1, 2, 3]
    assert reads.get(timeout=60) == 3, "of the next walk"
    list(walk)
    assert reads.get(timeout=60) == 7
    list(ring.walk(last=True))
    ring.close()
    assert reads.empty()


@pytest.mark.parametrize("slots", [2, 3])
def test_a_disk_that_fails_is_said_where_its_block_is_needed(
    slots: int, gpu: AsyncGpu, cudart: Cudart
) -> None:
    def read(block: int, slab: torch.Tensor) -> None:
        raise ModelMissing(f"block {block} is broken")

    memory = [Slot(gpu, SIZE) for _ in range(slots)]
    modules: list[nn.Module] = [nn.Identity() for _ in memory]
    locked = {block: weights_of(block) for block in range(8) if block not in (3, 4, 5)}
    ring = Ring(8, {}, modules, copies(memory, locked, read))
    walk = ring.walk()
    assert [next(walk)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ModelMissing, match="block 3"):
        next(walk)
    ring.close()
    assert not cudart.locked


def test_what_is_read_ahead_is_let_go_of_when_the_ring_closes(
    gpu: AsyncGpu, cudart: Cudart
) -> None:
    """While both buffers are full, and while one is being filled."""
    began, closing = threading.Event(), threading.Event()

    def read(block: int, slab: torch.Tensor) -> None:
        if block == 5:
            began.set()
            assert closing.wait(60)
            raise Cancelled("Stopped.")
        fill(block, slab)

    for on_disk in ((3, 4, 6), (3, 5, 6)):
        memory = [Slot(gpu, SIZE) for _ in range(2)]
        locked = {block: weights_of(block) for block in range(8) if block not in on_disk}
        ring = Ring(8, {}, [nn.Identity(), nn.Identity()], copies(memory, locked, read))
        next(ring.walk())
        assert 5 not in on_disk or began.wait(60)
        closing.set()
        ring.close()
        assert not cudart.locked


def test_no_buffer_is_made_where_all_is_page_locked(gpu: AsyncGpu, cudart: Cudart) -> None:
    memory = [Slot(gpu, SIZE) for _ in range(2)]
    ring = Ring(3, {}, [nn.Identity(), nn.Identity()], copies(memory, locked_of(3, 3)))
    next(ring.walk())
    assert not cudart.locked
    ring.close()


def test_plain_copies_wait_for_the_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Apple's and Intel's GPUs, which have no streams of ours."""
    waited: list[int] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: waited.append(1))
    memory = [torch.zeros(SIZE, dtype=torch.uint8) for _ in range(2)]
    modules: list[nn.Module] = [nn.Identity() for _ in memory]
    transfer = PlainCopies(lambda block, slab: slab.copy_(weights_of(block)), memory)
    ring = Ring(5, {}, modules, transfer)
    for last in (False, True):
        for number, module in ring.walk(last):
            assert torch.equal(memory[modules.index(module)], weights_of(number))
            before = len(waited)
        assert len(waited) == before + 1
    assert len(waited) == 10
    ring.close()


# Host memory


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("size", [0, 1, 4097, (1 << 20) + 3])
def test_host_memory_is_as_large_as_asked_for(
    size: int, windows: bool, cudart: Cudart, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What CUDA locks is no byte more, where torch's own would be the next power of two."""
    asked: list[int] = []
    plain = mmap.mmap

    def pages(number: int, length: int, **how: Any) -> mmap.mmap:
        asked.append(length)
        return plain(number, length, **how)

    monkeypatch.setattr(mmap, "mmap", pages)
    if windows:
        monkeypatch.delattr(mmap, "MAP_PRIVATE", raising=False)
    memory = HostMemory(size)
    assert asked == ([size] if size else [])
    assert memory.tensor.shape == (size,)
    memory.tensor.fill_(7)
    memory.lock()
    assert cudart.locked == {memory.tensor.data_ptr(): size}
    memory.close()
    assert not cudart.locked
    memory.close()


def test_pages_that_the_system_does_not_lock_stay_as_they_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = Cudart(refuses=0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(host, "take_error", lambda: None)
    memory = HostMemory(10)
    with caplog.at_level(logging.INFO):
        memory.lock()
    assert not memory.locked
    assert "does not lock 10 bytes" in caplog.text
    memory.close()
