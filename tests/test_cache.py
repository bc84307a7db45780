import os
import time
from pathlib import Path

import pytest
import torch

from qwen_image_tool.engine.cache import TensorCache, checkpoint_identity

IDS = [5, 6, 7]
LIMIT = 1 << 20
VALUES = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "cache"
    made.mkdir()
    return made


def test_what_was_put_is_got_to_the_bit(folder: Path) -> None:
    cache = TensorCache(folder, ["a"], LIMIT)
    assert cache.get(IDS) is None
    cache.put(IDS, VALUES)
    found = cache.get(IDS)
    assert found is not None
    assert torch.equal(found, VALUES)
    assert found.dtype == torch.bfloat16
    assert [path.suffix for path in folder.iterdir()] == [".safetensors"]


def test_other_words_and_other_models_are_not_mixed_up(folder: Path) -> None:
    TensorCache(folder, ["a"], LIMIT).put(IDS, VALUES)
    assert TensorCache(folder, ["b"], LIMIT).get(IDS) is None
    assert TensorCache(folder, ["a"], LIMIT).get([5, 67]) is None
    assert TensorCache(folder, ["a"], LIMIT).get([56, 7]) is None


def test_a_damaged_entry_is_not_known(folder: Path) -> None:
    cache = TensorCache(folder, ["a"], LIMIT)
    cache.put(IDS, VALUES)
    [path] = folder.iterdir()
    for keep in (0, 10, path.stat().st_size - 1):
        data = path.read_bytes()
        path.write_bytes(data[:keep])
        assert cache.get(IDS) is None
        path.write_bytes(data)
    assert cache.get(IDS) is not None


def test_the_least_recently_used_go_first(folder: Path) -> None:
    TensorCache(folder, ["a"], LIMIT).put([0], VALUES)
    [file] = folder.iterdir()
    limit = 3 * file.stat().st_size
    cache = TensorCache(folder, ["a"], limit)
    for number in (1, 2):
        cache.put([number], VALUES)
    for age, path in enumerate(sorted(folder.iterdir(), key=lambda path: path == file)):
        os.utime(path, (time.time() - 100 - age, time.time() - 100 - age))
    assert cache.get([0]) is not None  # the oldest until now
    cache.put([9], VALUES)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= limit
    kept = [number for number in (0, 1, 2, 9) if cache.get([number]) is not None]
    assert kept in ([0, 1, 9], [0, 2, 9])


def test_a_cache_that_cannot_be_written_is_no_error(folder: Path) -> None:
    (folder / "file").write_text("not a folder", encoding="utf-8")
    cache = TensorCache(folder / "file", ["a"], LIMIT)
    cache.put(IDS, VALUES)
    assert cache.get(IDS) is None


def test_a_cache_that_can_only_be_read_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = TensorCache(folder, ["a"], LIMIT)
    cache.put(IDS, VALUES)

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refuse)
    found = cache.get(IDS)
    assert found is not None
    assert torch.equal(found, VALUES)


@pytest.mark.parametrize("change", ["size", "time", "name"])
def test_another_checkpoint_has_another_identity(folder: Path, change: str) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(b"123")
    before = checkpoint_identity(folder)
    assert checkpoint_identity(folder) == before
    if change == "size":
        file.write_bytes(b"1234")
    elif change == "time":
        os.utime(file, (1, 1))
    else:
        file.rename(folder / "other.safetensors")
    assert checkpoint_identity(folder) != before
