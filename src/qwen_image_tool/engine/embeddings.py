"""Embeddings of known prompts, kept on disk: a known prompt never loads the text encoder."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

LIMIT = 256 << 20  # bytes of all entries; a prompt of the 20B family takes about 0.3 MB


class EmbeddingCache:
    """One file a prompt, in `folder`; the least recently used go first when it is full.

    `identity` names all that the embeddings depend on beside the tokens: checkpoint, dtype, device,
    library versions. A cache that can't be written is no error: the prompt is encoded again.
    """

    def __init__(self, folder: Path, identity: Sequence[str], limit: int = LIMIT) -> None:
        self._folder, self._identity, self._limit = folder, "\0".join(identity), limit

    def get(self, ids: Sequence[int]) -> torch.Tensor | None:
        """The embeddings of these token ids, [1, tokens, width], on the CPU; None if not known."""
        path = self._path(ids)
        try:
            embeddings: torch.Tensor = load_file(path)["embeddings"]
            os.utime(path)
        except (OSError, SafetensorError, KeyError):
            return None
        return embeddings

    def put(self, ids: Sequence[int], embeddings: torch.Tensor) -> None:
        data = save({"embeddings": embeddings.cpu().contiguous()})
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
                file.write(data)
            Path(file.name).replace(self._path(ids))
            self._make_room()

    def _path(self, ids: Sequence[int]) -> Path:
        words = f"{self._identity}\0{','.join(map(str, ids))}"
        return self._folder / f"{hashlib.sha256(words.encode()).hexdigest()}.safetensors"

    def _entries(self) -> list[Path]:
        return list(self._folder.glob("*")) if self._folder.is_dir() else []

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
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [f"{p.relative_to(folder)}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files]
