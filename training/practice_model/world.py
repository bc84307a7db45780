"""The practice world: flat drawings of one to three things, and sentences that say what is there.

A `Scene` holds what the sentence says. `arrange` turns it into a `Drawing` (numbers for one frame;
whatever the sentence leaves open is drawn by chance), and `render` paints a batch of drawings.
"""

from __future__ import annotations

import random
import string
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond")
LETTERS = tuple(string.ascii_uppercase)
KINDS = SHAPES + LETTERS
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (226, 48, 56),
    "orange": (250, 140, 30),
    "yellow": (255, 214, 60),
    "green": (40, 165, 80),
    "blue": (36, 100, 235),
    "purple": (120, 50, 175),
    "pink": (255, 150, 200),
    "brown": (128, 78, 44),
    "black": (28, 30, 38),
    "white": (250, 250, 246),
}
COLOUR_NAMES = tuple(COLOURS)
PLACES: dict[str, tuple[float, float]] = {
    "top left": (0.19, 0.19),
    "top": (0.5, 0.19),
    "top right": (0.81, 0.19),
    "left": (0.19, 0.5),
    "centre": (0.5, 0.5),
    "right": (0.81, 0.5),
    "bottom left": (0.19, 0.81),
    "bottom": (0.5, 0.81),
    "bottom right": (0.81, 0.81),
}
RELATIONS = ("left of", "right of", "above", "below", "inside")
HOSTS = ("circle", "square", "diamond", "heart", "ring")  # kinds with room for another thing inside
SQUARE = (256, 256)
RATIO_SIZES = {
    "16:9": (320, 192),
    "9:16": (192, 320),
    "4:3": (288, 224),
    "3:4": (224, 288),
    "3:2": (288, 192),
    "2:3": (192, 288),
}
SIZES = (SQUARE, *RATIO_SIZES.values())  # (width, height) in pixels, all multiples of 32

# Radius as a share of the frame's shorter side, for small, unsaid and large.
RADII = {
    "alone": {"small": 0.16, "": 0.26, "large": 0.38},
    "pair": {"small": 0.12, "": 0.18, "large": 0.22},
    "grid": {"small": 0.09, "": 0.125, "large": 0.155},
    "host": {"": 0.40},
    "guest": {"": 0.15},
}
Pick = Callable[..., str]
JITTER = 0.02  # of the shorter side, each way; sizes vary by +-6 %


@dataclass(frozen=True)
class Thing:
    kind: str  # "" = any
    colour: str  # "" = any
    size: str = ""  # "small", "large" or unsaid
    place: str = ""  # a key of PLACES or unsaid


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: str = ""  # "" = any
    relation: str = ""  # of the first thing to the second; "" = none


@dataclass(frozen=True)
class Spot:
    kind: int  # index into KINDS
    colour: int  # index into COLOUR_NAMES
    x: float  # pixels
    y: float
    radius: float


@dataclass(frozen=True)
class Drawing:
    spots: tuple[Spot, ...]  # painted in this order
    background: int
    width: int
    height: int


# Scenes


def sample_scene(rng: random.Random) -> Scene:
    """A scene of any sort, colours distinct, held-out combinations included."""
    count = rng.choices((1, 2, 3), weights=(34, 46, 20))[0]
    colours = rng.sample(COLOUR_NAMES, count + 1)
    background = colours.pop() if rng.random() < 0.8 else ""
    kinds = [rng.choice(SHAPES if rng.random() < 0.62 else LETTERS) for _ in range(count)]
    sizes = [rng.choice(("small", "large")) if rng.random() < 0.3 else "" for _ in range(count)]
    places = [""] * count
    relation = ""
    if count == 1 and rng.random() < 0.5:
        places = [rng.choice(tuple(PLACES))]
    elif count == 2 and rng.random() < 0.72:
        relation = rng.choices(RELATIONS, weights=(3, 3, 3, 3, 2))[0]
        if relation == "inside":
            kinds[1] = rng.choice(HOSTS)
            sizes = ["", ""]
    elif count > 1 and rng.random() < 0.6:
        places = rng.sample(tuple(PLACES), count)
    things = tuple(map(Thing, kinds, colours, sizes, places))
    return Scene(things, background, relation)


def sample_training_scene(rng: random.Random) -> Scene:
    """Like `sample_scene` without the held-out combinations, with some scenes only partly said."""
    while is_held_out(scene := sample_scene(rng)):
        pass
    if rng.random() < 0.06:
        first = scene.things[0]
        vague = rng.choice((Thing(first.kind, ""), Thing("", first.colour), Thing("", "")))
        return Scene((vague,), scene.background if vague.kind or not vague.colour else "")
    return scene


def is_held_out(scene: Scene) -> bool:
    """Whether the scene has a colour-kind pair or kind-relation-kind triple kept for the test."""
    if any(_one_in(12, t.colour, t.kind) for t in scene.things if t.colour and t.kind):
        return True
    if not scene.relation:
        return False
    first, second = scene.things
    return _one_in(12, first.kind, scene.relation, second.kind)


def _one_in(n: int, *words: str) -> bool:
    return zlib.crc32(" ".join(words).encode()) % n == 0


# Sentences


def write_caption(scene: Scene, rng: random.Random, plain: bool = False) -> str:
    """A sentence for the scene; `plain` gives the one standard wording."""

    def pick(*options: str) -> str:
        return options[0] if plain else rng.choice(options)

    bare = not plain and rng.random() < 0.08
    body = _things_words(scene, pick, bare)
    if scene.background:
        back = f"{scene.background} background"
        a_back = f"{_article(back)} {back}"
        ends = (f" on {a_back}", f" on {a_back}", f" on {scene.background}", f", {back}")
        body = body + pick(*ends, f" with {a_back}") if body else back
    if plain:
        return body
    if rng.random() < 0.1 and not bare:
        body = rng.choice(("a picture of ", "a drawing of ", "draw ")) + body
    style = rng.random()
    if style < 0.25:
        body = body[:1].upper() + body[1:]
    elif style < 0.28:
        body = body.upper()
    return body + ("." if rng.random() < 0.2 else "")


_RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under"),
    "inside": ("inside", "inside", "in"),
}


def _things_words(scene: Scene, pick: Pick, bare: bool) -> str:
    phrases = [_thing_words(thing, pick, bare) for thing in scene.things]
    if scene.relation:
        return f"{phrases[0]} {pick(*_RELATION_WORDS[scene.relation])} {phrases[1]}"
    if len(phrases) > 1:
        return f"{', '.join(phrases[:-1])}{pick(' and', ' and', ', and')} {phrases[-1]}"
    return "".join(phrases)


def _thing_words(thing: Thing, pick: Pick, bare: bool) -> str:
    if not thing.kind and not thing.colour:
        return ""
    if not thing.kind:
        return pick(thing.colour, f"something {thing.colour}")
    size = {"small": pick("small", "small", "little"), "large": pick("large", "large", "big")}
    words = [size[thing.size]] if thing.size else []
    words += [thing.colour] if thing.colour else []
    if thing.kind in SHAPES:
        words.append(thing.kind)
    else:
        words.append(pick(f"letter {thing.kind}", f'"{thing.kind}"', f'letter "{thing.kind}"'))
    text = " ".join(words)
    if not bare:
        text = f"{_article(text)} {text}"
    return f"{text} {_place_words(thing.place, pick)}" if thing.place else text


def _place_words(place: str, pick: Pick) -> str:
    if place == "centre":
        return pick("in the centre", "in the center", "in the middle")
    if place in ("left", "right"):
        return pick(f"on the {place}", f"at the {place}")
    if place in ("top", "bottom"):
        return f"at the {place}"
    return pick(f"at the {place}", f"in the {place}", f"in the {place} corner")


def _article(text: str) -> str:
    word = text.split(maxsplit=1)[0]
    if word[0] == '"':
        return "an" if word[1] in "AEFHILMNORSX" else "a"
    return "an" if word[0] in "aeiou" else "a"


# Drawings


def arrange(scene: Scene, width: int, height: int, rng: random.Random) -> Drawing:
    """Numbers for one frame of `width` x `height` pixels; what is unsaid is drawn by chance."""
    said = {t.colour for t in scene.things} | {scene.background}
    spare = [name for name in COLOUR_NAMES if name not in said]
    rng.shuffle(spare)
    side = min(width, height)
    spots = []
    for thing, (fx, fy), table in zip(scene.things, *layout(scene, width, height), strict=True):
        kind = thing.kind or rng.choice(SHAPES)
        colour = thing.colour or spare.pop()
        spots.append(
            Spot(
                kind=KINDS.index(kind),
                colour=COLOUR_NAMES.index(colour),
                x=fx * width + rng.uniform(-JITTER, JITTER) * side,
                y=fy * height + rng.uniform(-JITTER, JITTER) * side,
                radius=RADII[table][thing.size] * side * rng.uniform(0.94, 1.06),
            )
        )
    background = COLOUR_NAMES.index(scene.background or spare.pop())
    if scene.relation == "inside":
        spots.reverse()  # the host is painted first
    return Drawing(tuple(spots), background, width, height)


def layout(scene: Scene, width: int, height: int) -> tuple[list[tuple[float, float]], list[str]]:
    """Where each thing goes (shares of the frame) and which radius table it uses."""
    count = len(scene.things)
    if any(thing.place for thing in scene.things):
        spots = [PLACES[thing.place] for thing in scene.things]
        alone = count == 1 and scene.things[0].place == "centre"
        return spots, ["alone" if alone else "grid"] * count
    if count == 1:
        return [(0.5, 0.5)], ["alone"]
    if scene.relation == "inside":
        return [(0.5, 0.5)] * 2, ["guest", "host"]
    if count == 2:
        relation = scene.relation or ("left of" if width >= height else "above")
        near, far = (0.26, 0.74) if relation in ("left of", "above") else (0.74, 0.26)
        across = relation in ("left of", "right of")
        pair = [(near, 0.5), (far, 0.5)] if across else [(0.5, near), (0.5, far)]
        return pair, ["pair"] * 2
    line = (0.19, 0.5, 0.81)
    row = [(x, 0.5) for x in line] if width >= height else [(0.5, y) for y in line]
    return row, ["grid"] * 3


def pack(drawings: Sequence[Drawing]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Drawings as tensors: kind and colour (B, 3, 2), -1 for none; x, y, radius (B, 3, 3)."""
    what = torch.full((len(drawings), 3, 2), -1, dtype=torch.long)
    where = torch.ones(len(drawings), 3, 3)
    for row, drawing in enumerate(drawings):
        for slot, spot in enumerate(drawing.spots):
            what[row, slot] = torch.tensor((spot.kind, spot.colour))
            where[row, slot] = torch.tensor((spot.x, spot.y, spot.radius))
    return what, where, torch.tensor([d.background for d in drawings])


def paint(
    what: torch.Tensor, where: torch.Tensor, background: torch.Tensor, width: int, height: int
) -> torch.Tensor:
    """Pictures (B, 3, height, width) in 0..1 from packed drawings, anti-aliased over one pixel."""
    device = where.device
    colours = palette().to(device)
    fields = distance_fields().to(device)
    ys = torch.arange(height, device=device) + 0.5
    xs = torch.arange(width, device=device) + 0.5
    picture = colours[background][:, :, None, None].expand(-1, -1, height, width)
    for slot in range(what.shape[1]):
        kind, colour = what[:, slot, 0], what[:, slot, 1]
        x, y, radius = (value[:, None] for value in where[:, slot].unbind(-1))
        u = ((xs - x) / radius / FIELD_REACH)[:, None, :].expand(-1, height, -1)
        v = ((ys - y) / radius / FIELD_REACH)[:, :, None].expand(-1, -1, width)
        field = fields[kind.clamp(min=0)][:, None]
        grid = torch.stack((u, v), dim=-1)
        distance = functional.grid_sample(field, grid, padding_mode="border", align_corners=False)
        alpha = (0.5 - distance * radius[:, :, None, None]).clamp(0, 1)
        alpha = alpha * (kind >= 0)[:, None, None, None]
        picture = torch.lerp(picture, colours[colour.clamp(min=0)][:, :, None, None], alpha)
    return picture


def paint_mask(spot: Spot, width: int, height: int) -> np.ndarray:
    """Where one thing lies, (height, width) bool."""
    what = torch.tensor([[[spot.kind, COLOUR_NAMES.index("white")]]])
    where = torch.tensor([[[spot.x, spot.y, spot.radius]]], dtype=torch.float32)
    black = torch.tensor([COLOUR_NAMES.index("black")])
    picture = paint(what, where, black, width, height)
    return np.asarray(picture[0, 0].numpy() > 0.5)


def render(drawings: Sequence[Drawing]) -> torch.Tensor:
    """Pictures (B, 3, H, W) in 0..1 of drawings that share one size."""
    return paint(*pack(drawings), drawings[0].width, drawings[0].height)


@lru_cache(maxsize=1)
def palette() -> torch.Tensor:
    """(10, 3) in 0..1."""
    return torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 255


# Outlines: one signed distance field a kind, in units of the radius, over +-FIELD_REACH radii

FIELD_REACH = 1.3
FIELD_SIDE = 128
_MASK_SIDE = 256
_LETTER_GROWTH = 0.07  # radii added all round the font's strokes, which are thin at these sizes


@lru_cache(maxsize=1)
def distance_fields() -> torch.Tensor:
    """(34, 128, 128), negative inside."""
    masks = torch.from_numpy(np.stack([_mask(kind) for kind in KINDS]))
    unit = 2 * FIELD_REACH / _MASK_SIDE
    signed = (_distance_to(masks) - _distance_to(~masks)) * unit
    letters = torch.tensor([kind in LETTERS for kind in KINDS])
    signed = signed - letters[:, None, None] * _LETTER_GROWTH
    return functional.avg_pool2d(signed[:, None], _MASK_SIDE // FIELD_SIDE)[:, 0]


def _distance_to(masks: torch.Tensor) -> torch.Tensor:
    """Exact distance in pixels from every pixel to the nearest True, one axis after the other."""
    line = torch.arange(masks.shape[-1], dtype=torch.float32)
    gap = (line[:, None] - line[None, :]) ** 2
    far = torch.full(masks.shape, 1e9).masked_fill(masks, 0)
    out = []
    for plane in far:
        rows = torch.stack([(row[None, :] + gap).amin(dim=1) for row in plane])
        columns = torch.stack([(column[None, :] + gap).amin(dim=1) for column in rows.T])
        out.append(columns.T.sqrt())
    return torch.stack(out)


def _mask(kind: str) -> np.ndarray:
    """The kind filled in, (256, 256) bool, over +-FIELD_REACH radii."""
    scale = _MASK_SIDE / (2 * FIELD_REACH)
    image = Image.new("L", (_MASK_SIDE, _MASK_SIDE))
    pen = ImageDraw.Draw(image)
    if kind in LETTERS:
        font = ImageFont.load_default(1.62 * scale / 0.72)
        pen.text(
            (_MASK_SIDE / 2, _MASK_SIDE / 2 + 0.81 * scale), kind, fill=255, font=font, anchor="ms"
        )
        box = image.getbbox()
        assert box is not None
        shift = (int(_MASK_SIDE - box[0] - box[2]) // 2, int(_MASK_SIDE - box[1] - box[3]) // 2)
        moved = Image.new("L", image.size)
        moved.paste(image, shift)
        return np.asarray(moved) > 127
    for points, fill in _outline(kind):
        pen.polygon([tuple(p * scale + _MASK_SIDE / 2 - 0.5) for p in points], fill=fill)
    return np.asarray(image) > 127


def _outline(kind: str) -> list[tuple[np.ndarray, int]]:
    """Polygons (n, 2) in radii, y down, painted in order with 255 or, for holes, 0."""
    turn = np.linspace(0, 2 * np.pi, 240, endpoint=False)
    circle = np.stack((np.sin(turn), -np.cos(turn)), axis=1)
    if kind == "circle":
        return [(circle * 0.95, 255)]
    if kind == "ring":
        return [(circle * 0.98, 255), (circle * 0.58, 0)]
    if kind == "square":
        return [(circle[30::60] / np.abs(circle[30]).max() * 0.85, 255)]
    if kind == "diamond":
        return [(circle[::60] * (0.8, 1.05), 255)]
    if kind == "triangle":
        return [(circle[::80] * 1.12 + (0, 0.2), 255)]
    if kind == "star":
        points = circle[::24].copy()
        points[1::2] *= 0.46
        return [(points * 1.1 + (0, 0.06), 255)]
    if kind == "cross":
        arm, end = 0.31, 0.92
        upright = np.array([(-arm, -end), (arm, -end), (arm, end), (-arm, end)])
        return [(upright, 255), (upright[:, ::-1], 255)]
    x = 16 * np.sin(turn) ** 3
    y = -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn))
    return [(np.stack((x, y - 2.5), axis=1) / 15.5, 255)]
