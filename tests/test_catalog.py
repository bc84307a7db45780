import json
from importlib.resources import files

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    QwenImage21Transformer2DModel,
    QwenImageTransformer2DModel,
)

from qwen_image_tool.catalog import Catalog, Model, did_you_mean, load_catalog
from qwen_image_tool.catalog.sizes import RATIOS, RESOLUTIONS, SIZES, menu_size, native_size
from qwen_image_tool.errors import BadRequest
from qwen_image_tool.types import Request, Size

CATALOG = load_catalog()
IDS = [model.id for model in CATALOG.models]
MENU = """
1:1   512x512 1024x1024 1328x1328 2048x2048
16:9  512x288 1024x576 1664x928 2048x1152
9:16  288x512 576x1024 928x1664 1152x2048
4:3   512x384 1024x768 1472x1140 2048x1536
3:4   384x512 768x1024 1140x1472 1536x2048
3:2   512x342 1024x682 1584x1056 2048x1366
2:3   342x512 682x1024 1056x1584 1366x2048
"""


def test_the_file_is_written_as_it_is_read() -> None:
    text = files("qwen_image_tool.catalog").joinpath("models.json").read_text(encoding="utf-8")
    again = json.dumps(CATALOG.to_dict(), ensure_ascii=False, indent=2)
    assert json.loads(again) == json.loads(text)
    assert Catalog.from_json(again) == CATALOG


def test_the_whole_family_is_there_once() -> None:
    assert len(set(IDS)) == len(IDS)
    assert set(IDS) >= {
        "practice",
        "qwen-image",
        "qwen-image-2512",
        "qwen-image-edit",
        "qwen-image-edit-2509",
        "qwen-image-edit-2511",
        "qwen-image-layered",
        "qwen-image-2.1",
        "qwen-image-2.1-turbo",
    }


@pytest.mark.parametrize("model", CATALOG.models, ids=IDS)
def test_every_reference_resolves(model: Model) -> None:
    assert model.licence in CATALOG.licences
    assert hasattr(diffusers, model.pipeline)
    assert {"transformer", "text_encoder", "vae", "scheduler"} <= set(model.components)
    assert model.sizes.native
    for size in model.sizes.native.values():
        model.sizes.check(size)
    for name in ("transformer", "text_encoder", "vae"):
        part = model.components[name]
        assert part.bytes >= 2 * part.parameters > 0
        assert part.files > 0
    assert model.sampling.sigmas is None or len(model.sampling.sigmas) == model.sampling.steps


def test_2_1_is_not_for_commercial_use() -> None:
    free = {m.id for m in CATALOG.models if CATALOG.licence_of(m).commercial}
    assert set(IDS) - free == {"qwen-image-2.1", "qwen-image-2.1-turbo"}


def test_parameters_are_those_of_the_real_classes() -> None:
    """Counted on the meta device, at full size."""
    with torch.device("meta"):
        classes = {
            ("qwen-image", "transformer"): QwenImageTransformer2DModel(),
            ("qwen-image-layered", "transformer"): QwenImageTransformer2DModel(
                use_additional_t_cond=True, use_layer3d_rope=True
            ),
            ("qwen-image", "vae"): AutoencoderKLQwenImage(),
            ("qwen-image-2.1", "transformer"): QwenImage21Transformer2DModel(),
            ("qwen-image-2.1", "vae"): AutoencoderKLQwenImage21(),
        }
    for (name, part), built in classes.items():
        counted = sum(p.numel() for p in built.parameters())
        assert CATALOG.find(name).components[part].parameters == counted, (name, part)


def test_matching_is_exact() -> None:
    assert CATALOG.find("Qwen/Qwen-Image-2512").id == "qwen-image-2512"
    for near in ("qwen-image-25", "Qwen-Image", "qwen-image ", "image", ""):
        assert CATALOG.get(near) is None
    with pytest.raises(BadRequest, match="Did you mean 'qwen-image-2512'"):
        CATALOG.find("qwen-image-2521")


def test_the_menu_has_all_28_sizes_exactly() -> None:
    rows = [line.split() for line in MENU.strip().splitlines()]
    assert [row[0] for row in rows] == list(RATIOS)
    for ratio, *sizes in rows:
        for resolution, text in zip(RESOLUTIONS, sizes, strict=True):
            assert menu_size(ratio, resolution) == Size.parse(text)
    assert len(SIZES) == 28


@pytest.mark.parametrize("size", SIZES.values(), ids=str)
def test_every_menu_size_runs_on_the_20b_models(size: Size) -> None:
    CATALOG.find("qwen-image").sizes.check(size)


@pytest.mark.parametrize(
    ("ratio", "resolution", "hint"),
    [
        ("16:10", "Small", "The nearest is 3:2."),
        ("21:9", "Small", "The nearest is 16:9."),
        ("1:0", "Small", "Did you mean '1:1'?"),
        ("square", "Small", "Choose one of 1:1, 16:9"),
        ("1:1", "smal", "Did you mean 'Small'?"),
        ("1:1", "gigantic", "Choose one of Small, Medium, Large, Max."),
    ],
)
def test_a_wrong_menu_choice_names_the_nearest(ratio: str, resolution: str, hint: str) -> None:
    with pytest.raises(BadRequest) as caught:
        menu_size(ratio, resolution)
    assert hint in str(caught.value)


def test_menu_choices_ignore_case() -> None:
    assert menu_size("1:1", "max") == Size(2048, 2048)


def test_a_ratio_alone_is_the_models_own_size() -> None:
    native = CATALOG.find("qwen-image").sizes.native
    assert native_size(native, "4:3") == Size(1472, 1104)


@pytest.mark.parametrize(
    ("size", "nearest"),
    [("16x16", "64x64"), ("5000x100", "4096x80"), ("4096x4096", "2048x2048"), ("10x90", "64x80")],
)
def test_a_size_beyond_the_limits_names_the_nearest(size: str, nearest: str) -> None:
    sizes = CATALOG.find("qwen-image").sizes
    with pytest.raises(BadRequest) as caught:
        sizes.check(Size.parse(size))
    assert f"--size {nearest}" in str(caught.value)
    sizes.check(Size.parse(nearest))


def test_a_request_is_resolved_with_the_models_own_values() -> None:
    model = CATALOG.find("qwen-image")
    resolved = model.resolve(Request(model="qwen-image", prompt="a cat"), seed=7)
    assert resolved.to_dict() == {
        "model": "qwen-image",
        "prompt": "a cat",
        "negative_prompt": " ",
        "size": "1328x1328",
        "steps": 50,
        "cfg": 4.0,
        "seed": 7,
    }
    assert model.resolve(resolved, seed=8) == resolved


def test_without_guidance_there_is_no_negative_prompt() -> None:
    model = CATALOG.find("qwen-image")
    assert model.resolve(Request(model="m", prompt="x", cfg=1), 1).negative_prompt is None
    with pytest.raises(BadRequest, match="does nothing at CFG 1"):
        model.resolve(Request(model="m", prompt="x", cfg=1, negative_prompt="blurry"), 1)


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        ("qwen-image", {"prompt": "  "}, "The prompt is empty"),
        ("qwen-image", {"prompt": "x", "steps": 1}, "can't draw in one step"),
        ("qwen-image-2.1-turbo", {"prompt": "x", "steps": 20}, "always takes 8 steps"),
        ("qwen-image", {"prompt": "x", "size": Size(8, 8)}, "outside this model's limits"),
    ],
)
def test_what_a_model_cannot_do_is_refused(
    model: str, fields: dict[str, object], message: str
) -> None:
    with pytest.raises(BadRequest, match=message):
        CATALOG.find(model).resolve(Request.from_user(model=model, **fields), seed=1)


def test_did_you_mean() -> None:
    assert did_you_mean("Larg", RESOLUTIONS) == "Did you mean 'Large'?"
