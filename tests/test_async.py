"""The ring's copies beside the computation, on a GPU in words: whatever order its streams take."""

import logging
import mmap
from typing import Any

import pytest
import torch
from torch import nn

from async_gpu import AsyncGpu, Cudart, Slot
from qwen_image_tool.engine import host
from qwen_image_tool.engine.host import HostMemory
from qwen_image_tool.engine.ring import (
    PinnedCopies,
    PlainCopies,
    Ring,
    StagedCopies,
    Transfer,
    interleaved,
)

SIZE = 8  # bytes of a block


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Cudart:
    runtime = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    return runtime


def weights_of(block: int) -> torch.Tensor:
    return torch.full((SIZE,), block, dtype=torch.uint8)


def pinned(slots: Any) -> Transfer:
    return PinnedCopies(weights_of, slots)


def staged(slots: Any) -> Transfer:
    return StagedCopies(lambda block, slab: slab.copy_(weights_of(block)), slots)


@pytest.mark.parametrize("copies", [pinned, staged])
@pytest.mark.parametrize(("count", "resident", "slots"), [(7, 0, 2), (9, 4, 3), (5, 3, 1)])
@pytest.mark.parametrize("seed", range(12))
def test_no_slot_is_overwritten_while_it_is_computed_with(
    copies: Any, count: int, resident: int, slots: int, seed: int,
    cudart: Cudart, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    gpu = AsyncGpu(seed, monkeypatch)
    memory = [Slot(gpu, SIZE) for _ in range(slots)]
    modules: list[nn.Module] = [nn.Identity() for _ in memory]
    residents = {number: nn.Identity() for number in interleaved(count, resident)}
    transfer = copies(memory)
    ring = Ring(count, residents, modules, transfer)
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
