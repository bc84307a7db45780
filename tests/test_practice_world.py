"""The practice model's world: its drawings pass its own checker, and what is held out stays out."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parents[1] / "training/practice_model"))

from checker import check
from PIL import Image
from world import (
    COLOUR_NAMES,
    COLOURS,
    KINDS,
    PLACES,
    RELATIONS,
    SIZES,
    SQUARE,
    Scene,
    Thing,
    arrange,
    is_held_out,
    render,
    sample_scene,
    sample_training_scene,
    write_caption,
)

PAIR = Scene((Thing("circle", "red"), Thing("square", "blue")), "yellow", "left of")


def ideal(scene: Scene, size: tuple[int, int] = SQUARE, seed: int = 0) -> Image.Image:
    picture = render([arrange(scene, *size, random.Random(seed))])[0]
    return Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_the_ideal_drawing_of_every_kind_is_right(kind: str) -> None:
    assert check(
        ideal(Scene((Thing(kind, "red"),), "white")), Scene((Thing(kind, "red"),), "white")
    ).right


@pytest.mark.parametrize("size", SIZES)
def test_ideal_drawings_of_any_scene_are_right_at_every_size(size: tuple[int, int]) -> None:
    rng = random.Random(str(size))
    for _ in range(6):
        scene = sample_scene(rng)
        assert check(ideal(scene, size), scene).faults == ()


@pytest.mark.parametrize("place", PLACES)
def test_every_place_and_no_other_is_right(place: str) -> None:
    picture = ideal(Scene((Thing("star", "green", place=place),), "white"))
    for asked in PLACES:
        verdict = check(picture, Scene((Thing("star", "green", place=asked),), "white"))
        assert verdict.right == (asked == place)


@pytest.mark.parametrize("relation", RELATIONS)
def test_every_relation_and_no_other_is_right(relation: str) -> None:
    picture = ideal(replace(PAIR, relation=relation))
    for asked in RELATIONS:
        assert check(picture, replace(PAIR, relation=asked)).right == (asked == relation)


@pytest.mark.parametrize(
    ("asked", "fault"),
    [
        (replace(PAIR, background="green"), "background"),
        (replace(PAIR, things=(Thing("circle", "pink"), PAIR.things[1])), "no pink thing"),
        (replace(PAIR, things=(Thing("triangle", "red"), PAIR.things[1])), "triangle"),
        (replace(PAIR, things=(Thing("circle", "red", "small"), PAIR.things[1])), "not small"),
        (replace(PAIR, things=PAIR.things[:1], relation=""), "stray"),
        (replace(PAIR, things=PAIR.things[::-1]), "wrong place"),
    ],
)
def test_a_wrong_picture_is_named(asked: Scene, fault: str) -> None:
    verdict = check(ideal(PAIR), asked)
    assert not verdict.right
    assert any(fault in named for named in verdict.faults)


@pytest.mark.parametrize(("side", "right"), [(6, True), (24, False)])
def test_a_few_stray_pixels_of_a_things_colour_do_not_matter(side: int, right: bool) -> None:
    picture = ideal(PAIR)
    picture.paste(COLOURS["red"], (230, 10, 230 + side, 10 + side))
    assert check(picture, PAIR).right == right


def test_sizes_are_told_apart() -> None:
    for drawn in ("small", "large"):
        picture = ideal(Scene((Thing("heart", "pink", drawn),), "black"))
        for asked in ("small", "large"):
            verdict = check(picture, Scene((Thing("heart", "pink", asked),), "black"))
            assert verdict.right == (asked == drawn)


def test_held_out_combinations_never_occur_in_training() -> None:
    rng = random.Random(0)
    scenes = [sample_training_scene(rng) for _ in range(20_000)]
    assert not any(is_held_out(scene) for scene in scenes)
    seen = {(t.colour, t.kind) for scene in scenes for t in scene.things if t.colour and t.kind}
    every = {(colour, kind) for colour in COLOUR_NAMES for kind in KINDS}
    assert 10 < len(every - seen) < len(every) / 6


def test_the_plain_sentence_says_everything() -> None:
    assert write_caption(PAIR, random.Random(0), plain=True) == (
        "a red circle left of a blue square on a yellow background"
    )


def test_sentences_name_every_thing() -> None:
    rng = random.Random(1)
    for _ in range(500):
        scene = sample_training_scene(rng)
        sentence = write_caption(scene, rng).lower()
        for thing in scene.things:
            assert thing.colour in sentence
            assert thing.kind.lower() in sentence
        assert scene.background in sentence


def test_the_trained_form_of_the_vae_is_the_shipped_class() -> None:
    import torch
    from vae import SingleFrameVae, to_real

    torch.manual_seed(0)
    flat = SingleFrameVae()
    real = to_real(flat, torch.zeros(16), torch.ones(16))
    pictures = torch.rand(1, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        latents = real.encode(pictures[:, :, None]).latent_dist.mean
        torch.testing.assert_close(latents[:, :, 0], flat.encode(pictures))
        decoded = real.decode(latents).sample[:, :, 0]
        torch.testing.assert_close(decoded, flat.decode(latents[:, :, 0]).clamp(-1, 1))
