"""Judges a picture by its pixels: the right things, colours, sizes, places and background."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from world import (
    COLOUR_NAMES,
    KINDS,
    RADII,
    Scene,
    Spot,
    Thing,
    layout,
    paint_mask,
    palette,
)

STRAY = 0.004  # share of the frame that may be of a colour nobody asked for, edges apart
BACKGROUND = 0.9  # share of the pixels outside all things that must be background, edges apart
OVERLAP = 0.6  # least intersection over union with the best-fitting ideal thing
CONFUSION = 0.05  # how much better another kind may fit (a ring and the letter O are close)
OFFSET = 0.12  # of each side: how far a thing may be from where its sentence puts it


@dataclass(frozen=True)
class Verdict:
    right: bool
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Blob:
    """All pixels of one colour: their mask and bounding box's middle and half sides, in pixels."""

    mask: np.ndarray
    x: float
    y: float
    half_width: float
    half_height: float


def check(picture: Image.Image, scene: Scene) -> Verdict:
    """`picture` may be of any size: places are judged as shares of the frame.

    Things said without a colour cannot be judged; `scene` must name each thing's kind and colour.
    """
    pixels = torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)
    labels = (pixels[:, :, None] - palette()).square().sum(-1).argmin(-1).numpy()
    height, width = labels.shape
    faults: list[str] = []
    solid = _solid(labels)
    asked = [COLOUR_NAMES.index(thing.colour) for thing in scene.things]
    background = _background(labels, asked, scene.background, faults)
    blobs = [_blob(labels == colour, solid) for colour in asked]
    spare = solid & (labels != background)
    for blob in blobs:
        spare &= True if blob is None else ~blob.mask
    if spare.mean() > STRAY:
        strays = [COLOUR_NAMES[i] for i in np.unique(labels[spare])]
        faults.append(f"stray colours: {', '.join(strays)}")
    covered = np.zeros_like(solid)
    for thing, blob, (fx, fy), table in zip(
        scene.things, blobs, *layout(scene, width, height), strict=True
    ):
        name = f"{thing.colour} {thing.kind}"
        if blob is None:
            faults.append(f"no {thing.colour} thing")
            continue
        host = scene.relation == "inside" and table == "host"
        covered |= _judge_kind(thing, blob, blobs[0] if host else None, faults)
        if abs(blob.x / width - fx) > OFFSET or abs(blob.y / height - fy) > OFFSET:
            faults.append(f"{name} in the wrong place")
        _judge_size(thing, table, blob, min(width, height), faults)
    outside = solid & ~covered
    if outside.any() and (labels[outside] == background).mean() < BACKGROUND:
        faults.append("the background is not plain")
    return Verdict(not faults, tuple(faults))


def _solid(labels: np.ndarray) -> np.ndarray:
    """Pixels whose 3 x 3 neighbours all have their colour: anti-aliased edges blend into others."""
    plane = torch.from_numpy(labels)[None, None].float()
    padded = functional.pad(plane, (1, 1, 1, 1), mode="replicate")
    return (functional.max_pool2d(padded, 3, 1) == -functional.max_pool2d(-padded, 3, 1))[
        0, 0
    ].numpy()


def _background(labels: np.ndarray, asked: list[int], said: str, faults: list[str]) -> int:
    """The index of the background's colour: what most of the frame's border shows."""
    border = np.concatenate((labels[:4].ravel(), labels[-4:].ravel(), labels[:, :4].ravel()))
    counts = np.bincount(border, minlength=len(COLOUR_NAMES))
    found = int(counts.argmax())
    if said and COLOUR_NAMES[found] != said:
        faults.append(f"the background is {COLOUR_NAMES[found]}, not {said}")
    elif found in asked:
        faults.append("the background has a thing's colour")
    return found


def _blob(mask: np.ndarray, solid: np.ndarray) -> Blob | None:
    """The colour's pixels near its solid ones, or None when there are hardly any.

    A thing is one piece: solid pixels apart from it, as seen along the rows or columns, are strays.
    """
    core = mask & solid
    core &= _main_run(core.sum(1))[:, None] & _main_run(core.sum(0))
    if core.sum() < 40:
        return None
    near = (
        functional.max_pool2d(torch.from_numpy(core)[None, None].float(), 5, 1, 2)[0, 0].numpy() > 0
    )
    mask = mask & near
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    return Blob(
        mask,
        float(left + right) / 2,
        float(top + bottom) / 2,
        float(right - left) / 2,
        float(bottom - top) / 2,
    )


def _main_run(counts: np.ndarray) -> np.ndarray:
    """Where the run with most pixels lies, (n,) bool; gaps of up to two lines do not part a run."""
    ends = np.flatnonzero(np.diff(np.concatenate(([0], counts > 0, [0]))))
    runs: list[list[int]] = []
    for start, stop in ends.reshape(-1, 2):
        if runs and start - runs[-1][1] <= 2:
            runs[-1][1] = stop
        else:
            runs.append([start, stop])
    inside = np.zeros(len(counts), dtype=bool)
    if runs:
        start, stop = max(runs, key=lambda run: counts[run[0] : run[1]].sum())
        inside[start:stop] = True
    return inside


def _judge_kind(thing: Thing, blob: Blob, guest: Blob | None, faults: list[str]) -> np.ndarray:
    """Compares with every kind fitted to the same box; returns where the ideal thing lies."""
    seen = blob.mask if guest is None else blob.mask | _filled_box(guest)
    fits = {kind: _ideal(kind, blob) for kind in KINDS}
    if guest is not None:
        fits = {kind: ideal | _filled_box(guest) for kind, ideal in fits.items()}
    scores = {kind: _overlap(seen, ideal) for kind, ideal in fits.items()}
    best = max(scores, key=lambda kind: scores[kind])
    mine = scores[thing.kind]
    if mine < OVERLAP:
        faults.append(f"no clear {thing.kind} in {thing.colour} (overlap {mine:.2f})")
    elif mine < scores[best] - CONFUSION:
        faults.append(f"the {thing.colour} thing looks like {best}, not {thing.kind}")
    return np.asarray(fits[thing.kind] | blob.mask)


def _filled_box(blob: Blob) -> np.ndarray:
    """The box of a thing inside another, which hides part of its host."""
    filled = np.zeros_like(blob.mask)
    y, x = round(blob.y - blob.half_height), round(blob.x - blob.half_width)
    filled[y : y + round(2 * blob.half_height), x : x + round(2 * blob.half_width)] = True
    return filled


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max((a | b).sum(), 1))


def _ideal(kind: str, blob: Blob) -> np.ndarray:
    """The kind drawn so that its box's middle and mean side are the blob's."""
    x0, y0, half_width, half_height = _extent(kind)
    radius = (blob.half_width + blob.half_height) / (half_width + half_height)
    spot = Spot(KINDS.index(kind), 0, blob.x - x0 * radius, blob.y - y0 * radius, radius)
    height, width = blob.mask.shape
    return paint_mask(spot, width, height)


@lru_cache(maxsize=len(KINDS))
def _extent(kind: str) -> tuple[float, float, float, float]:
    """Middle and half sides of the kind's box, in radii from its origin."""
    mask = paint_mask(Spot(KINDS.index(kind), 0, 200, 200, 150), 400, 400)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    return (
        ((left + right) / 2 - 200) / 150,
        ((top + bottom) / 2 - 200) / 150,
        (right - left) / 300,
        (bottom - top) / 300,
    )


def _judge_size(thing: Thing, table: str, blob: Blob, side: int, faults: list[str]) -> None:
    """Nearest of the world's radii, where the sentence says one; otherwise within a wide band."""
    _, _, half_width, half_height = _extent(thing.kind)
    radius = (blob.half_width + blob.half_height) / (half_width + half_height) / side
    radii = RADII[table]
    if thing.size:
        nearest = min(radii, key=lambda size: abs(radii[size] - radius))
        if nearest != thing.size and abs(radii[thing.size] - radius) > 0.15 * radii[thing.size]:
            faults.append(f"the {thing.colour} {thing.kind} is not {thing.size}")
    elif not 0.65 < radius / radii[""] < 1.5:
        faults.append(f"the {thing.colour} {thing.kind} has an odd size")
