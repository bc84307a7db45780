"""Tensors that can be made again, kept on disk: the embeddings of known prompts, the modulation of
known schedules. What is known costs no weights."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qwen_image_tool.store.links import weight_files


class TensorCache:
    """One file a tensor, in `folder`; the least recently used go first above `limit` bytes.

    `identity` names all that the tensors depend on beside their key: checkpoint, dtype, device,
    library versions. A cache that can't be written is no error: the tensor is made again.
    """

    def __init__(self, folder: Path, identity: Sequence[str], limit: int) -> None:
        self._folder, self._identity, self._limit = folder, "\0".join(identity), limit

    def get(self, key: Sequence[object]) -> torch.Tensor | None:
        """The tensor kept under `key`, on the CPU; None if there is none."""
        path = self._path(key)
        try:
            tensor: torch.Tensor = load_file(path)["tensor"]
        except (OSError, SafetensorError, KeyError):
            return None
        with contextlib.suppress(OSError):  # somebody else's file
            os.utime(path)
        return tensor

    def put(self, key: Sequence[object], tensor: torch.Tensor) -> None:
        tensors = {"tensor": tensor.cpu().contiguous()}
        with contextlib.suppress(OSError, SafetensorError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._folder) as made:
                file = Path(made) / "tensor"
                save_file(tensors, file)
                file.replace(self._path(key))
            self._make_room()

    def _path(self, key: Sequence[object]) -> Path:
        words = f"{self._identity}\0{','.join(map(str, key))}"
        return self._folder / f"{hashlib.sha256(words.encode()).hexdigest()}.safetensors"

    def _entries(self) -> list[Path]:
        return list(self._folder.glob("*.safetensors")) if self._folder.is_dir() else []

    def _make_room(self) -> None:
        entries = sorted((e.stat().st_mtime, e.stat().st_size, e) for e in self._entries())
        total = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if total <= self._limit:
                return
            path.unlink(missing_ok=True)
            total -= size


def checkpoint_identity(folder: Path) -> list[str]:
    """Name, size and time of every file: another checkpoint in the same place is another one."""
    found = {path: path.stat() for path in sorted(folder.rglob("*")) if path.is_file()}
    found |= {folder / name: path.stat() for name, path in weight_files(folder).items()}
    return [f"{p.relative_to(folder)}:{s.st_size}:{s.st_mtime_ns}" for p, s in found.items()]
