"""Which settings differ, and requests for every value of one or two of them."""

import pytest

from qwen_image_tool.errors import BadRequest
from qwen_image_tool.gallery.series import MAX_SERIES, alone, differing, series
from qwen_image_tool.types import MAX_SEED, Request, Size

FOX = Request(model="practice", prompt="a fox", size=Size(64, 64), steps=20, cfg=3.0, seed=5)


def other(**changes: object) -> Request:
    return FOX.model_copy(update=changes)


def test_what_differs_has_its_values_in_order() -> None:
    assert differing([FOX, FOX]) == {}
    assert differing([FOX, other(seed=10), other(seed=9)]) == {"seed": [5, 9, 10]}
    assert differing([FOX, other(images=3)]) == {}, "the number of pictures changes none of them"
    found = differing([FOX, other(negative_prompt="fog", cfg=None)])
    assert found == {"cfg": [None, 3.0], "negative_prompt": [None, "fog"]}


def test_those_that_differ_in_one_setting_alone() -> None:
    others = {
        "itself": FOX,
        "seed": other(seed=6),
        "seed too": other(seed=7),
        "steps": other(steps=9),
        "two": other(seed=6, steps=9),
    }
    assert alone(FOX, others) == {"seed": ["seed", "seed too"], "steps": ["steps"]}


def test_a_series_has_every_value_and_every_pair() -> None:
    assert [one.steps for one in series(FOX, {"steps": "10, 20,,10"})] == [10, 20]
    assert [one.prompt for one in series(FOX, {"prompt": "a cat, red | a dog"})] == [
        "a cat, red",
        "a dog",
    ]
    pairs = series(other(images=4), {"size": "64x64,96x64", "mode": "exact, default"})
    assert [(str(one.size), one.mode) for one in pairs] == [
        ("64x64", "exact"),
        ("64x64", "default"),
        ("96x64", "exact"),
        ("96x64", "default"),
    ]
    assert {one.images for one in pairs} == {1}


def test_seeds_without_values_follow_the_request() -> None:
    assert [one.seed for one in series(FOX, {"seed": " "})] == [6, 7, 8, 9]
    last = series(other(seed=MAX_SEED - 1), {"seed": ""})
    assert [one.seed for one in last] == [MAX_SEED, 0, 1, 2]


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"steps": "ten"}, "steps"),
        ({"steps": "0"}, "steps"),
        ({"cfg": ""}, "no value for cfg"),
        ({"size": "wide"}, "size"),
        ({"seed": ",".join(map(str, range(MAX_SERIES + 1)))}, "101 pictures"),
    ],
)
def test_what_can_not_be_read_is_named(over: dict[str, str], said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        series(FOX, over)
