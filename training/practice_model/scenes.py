"""Training scenes made by all cores: numbers to paint them, sentences as tokens, and what they say.

Everything a training step needs is a tensor on the device, picked by row.
"""

from __future__ import annotations

import multiprocessing
import os
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from text import LONGEST, targets, tokenise
from torch import Tensor
from transformers import Qwen2Tokenizer
from world import (
    RATIO_SIZES,
    SQUARE,
    Scene,
    arrange,
    pack,
    sample_training_scene,
    write_caption,
)

WORDINGS = 4  # sentences a scene
PORTION = 4096  # scenes a worker makes at a time
TURN = 2 * len(RATIO_SIZES)  # portions until every size has had its share


@dataclass(frozen=True)
class Scenes:
    """N scenes of one picture size."""

    size: tuple[int, int]  # width, height in pixels
    what: Tensor  # (N, 3, 2), where (N, 3, 3) and background (N,) as `world.paint` takes them
    where: Tensor
    background: Tensor
    ids: Tensor  # (N, WORDINGS, LONGEST) int16, tokens of sentence and suffix
    lengths: Tensor  # (N, WORDINGS) int16
    targets: Tensor  # (N, 20) int16, see `text.targets`

    def __len__(self) -> int:
        return len(self.background)


def gather_scenes(tokenizer: Path, count: int, seed: int, device: str) -> list[Scenes]:
    """About `count` scenes: half of them 256x256, the rest spread evenly over the six ratios."""
    turns = max(1, round(count / TURN / PORTION))
    portion = max(1, count // turns // TURN)
    spawn = multiprocessing.get_context("spawn")
    indices = range(turns * TURN)
    with ProcessPoolExecutor(os.cpu_count(), spawn, torch.set_num_threads, (1,)) as pool:
        fixed = (repeat(tokenizer), repeat(seed))
        made = list(pool.map(make_portion, *fixed, indices, repeat(portion)))
    sizes = (SQUARE, *RATIO_SIZES.values())
    return [_join([arrays for s, arrays in made if s == size], size, device) for size in sizes]


def make_portion(
    tokenizer: Path, seed: int, index: int, count: int
) -> tuple[tuple[int, int], dict[str, np.ndarray]]:
    """The size and the fields of `Scenes` as arrays. Every second portion is 256x256."""
    rng = random.Random(f"{seed} {index}")
    size = SQUARE if index % 2 == 0 else [*RATIO_SIZES.values()][index // 2 % len(RATIO_SIZES)]
    scenes = [sample_training_scene(rng) for _ in range(count)]
    what, where, background = pack([arrange(scene, *size, rng) for scene in scenes])
    captions = [_sentence(scene, rng) for scene in scenes for _ in range(WORDINGS)]
    ids, lengths = tokenise(Qwen2Tokenizer.from_pretrained(tokenizer), captions)
    return size, {
        "what": what.numpy(),
        "where": where.numpy(),
        "background": background.numpy(),
        "ids": ids.numpy().astype(np.int16).reshape(count, WORDINGS, LONGEST),
        "lengths": lengths.numpy().astype(np.int16).reshape(count, WORDINGS),
        "targets": np.array([targets(scene) for scene in scenes], dtype=np.int16),
    }


def _sentence(scene: Scene, rng: random.Random) -> str:
    return write_caption(scene, rng) or " "


def _join(parts: list[dict[str, np.ndarray]], size: tuple[int, int], device: str) -> Scenes:
    names = [field.name for field in fields(Scenes) if field.name != "size"]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in names}
    return Scenes(size, **{name: torch.from_numpy(a).to(device) for name, a in joined.items()})
