"""The form of Create and the Request it stands for, without a browser."""

import pytest

from qwen_image_tool.catalog import Model, load_catalog
from qwen_image_tool.catalog.sizes import SIZES
from qwen_image_tool.errors import BadRequest
from qwen_image_tool.types import MAX_SEED, Request, Size
from qwen_image_tool.ui.form import (
    NATIVE,
    Form,
    entry_of,
    form_of,
    nearest_ratio,
    request_of,
    seed_of,
    size_of,
    sizes_of,
)


def model(name: str = "qwen-image-2512") -> Model:
    return load_catalog().find(name)


def form(**changes: object) -> Form:
    return Form(
        **{
            "ratio": "16:9",
            "resolution": "Medium",
            "prompt": " a fox ",
            "negative": "",
            "model": "qwen-image-2512",
            "images": 2,
            "seed": "",
            "steps": 12,
            "cfg": 3.5,
            "mode": "exact",
        }
        | changes  # type: ignore[arg-type]
    )


def test_every_control_is_in_the_request() -> None:
    asked = request_of(form(negative=" fog ", seed="7"), model())
    assert asked == Request(
        model="qwen-image-2512",
        prompt="a fox",
        negative_prompt="fog",
        size=Size(1024, 576),
        steps=12,
        cfg=3.5,
        seed=7,
        images=2,
        mode="exact",
    )


def test_what_is_left_open_is_the_models_own() -> None:
    asked = request_of(form(steps=None, cfg=None, images=None), model())
    assert (asked.steps, asked.cfg, asked.seed, asked.images) == (None, None, None, 1)
    assert asked.negative_prompt is None


@pytest.mark.parametrize(("entry", "size"), SIZES.items())
def test_all_entries_of_the_menu(entry: tuple[str, str], size: Size) -> None:
    ratio, resolution = entry
    own = model()
    assert size_of(ratio, resolution, own) == size
    assert sizes_of(ratio, own)[resolution] == size
    again = entry_of(size, own)
    assert size_of(*again, own) == size


def test_the_models_own_size_comes_first() -> None:
    practice = model("practice")
    assert next(iter(sizes_of("3:4", practice).items())) == (NATIVE, Size(216, 288))
    assert size_of("1:1", NATIVE, practice) == Size(256, 256)
    assert entry_of(None, practice) == ("1:1", NATIVE)


def test_pixels_that_no_menu_has_are_kept() -> None:
    asked = Request(model="practice", prompt="x", size=Size(500, 300), seed=3, steps=9)
    shown = form_of(asked, model("practice"))
    assert (shown.ratio, shown.resolution) == ("16:9", "500x300")
    assert request_of(shown, model("practice")) == asked.model_copy(update={"cfg": shown.cfg})


def test_settings_come_back_as_they_were() -> None:
    was = request_of(form(negative="fog", seed="7"), model())
    assert request_of(form_of(was, model()), model()) == was


def test_seeds_are_text_so_that_no_digit_is_lost() -> None:
    shown = form_of(Request(model="practice", prompt="x", seed=MAX_SEED), model("practice"))
    assert shown.seed == str(MAX_SEED)
    assert seed_of(shown.seed) == MAX_SEED
    assert seed_of(None) is seed_of(" ") is None
    for wrong in ("-1", "1.5", "x", str(MAX_SEED + 1)):
        with pytest.raises(BadRequest, match="seed"):
            seed_of(wrong)


def test_a_number_out_of_range_is_named() -> None:
    with pytest.raises(BadRequest, match="The number of pictures is 101"):
        request_of(form(images=101), model())


def test_the_nearest_ratio() -> None:
    assert nearest_ratio(Size(500, 300)) == "16:9"
    assert nearest_ratio(Size(300, 310)) == "1:1"
    assert nearest_ratio(Size(100, 1000)) == "9:16"
