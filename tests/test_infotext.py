"""Requests read back from the text of other programs, and of our own."""

import pytest

from qwen_image_tool.gallery import parameters
from qwen_image_tool.gallery.infotext import recalled
from qwen_image_tool.types import Request, Size

REQUEST = Request(
    model="practice",
    prompt='a fox, "sly": in snow\nsecond line',
    negative_prompt="blurry,\ntext",
    size=Size(64, 48),
    steps=12,
    cfg=4.5,
    seed=2**63 - 1,
)


def test_our_own_text_comes_back() -> None:
    found = recalled(parameters(REQUEST, Size(64, 48), 'Qwen, "the" model'))
    assert found.pop("model") == 'Qwen, "the" model'
    assert Request(model="practice", **found) == REQUEST


def test_automatic1111() -> None:
    text = (
        "a cat <lora:x:0.8>\nNegative prompt: dog\nSteps: 20, Sampler: DPM++ 2M, CFG scale: 7,"
        ' Seed: 42, Size: 512x768, Model hash: abc, Model: v1-5, Lora hashes: "x: 01, y: 02"'
    )
    assert recalled(text) == {
        "prompt": "a cat <lora:x:0.8>",
        "negative_prompt": "dog",
        "steps": 20,
        "cfg": 7,
        "seed": 42,
        "size": Size(512, 768),
        "model": "v1-5",
    }


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("", {}),
        ("only words, nothing: else", {"prompt": "only words, nothing: else"}),
        ("Steps: 20, CFG scale: 5, Seed: 1", {"steps": 20, "cfg": 5, "seed": 1}),
        ("a\nSteps: 9999, CFG scale: 0, Seed: -1", {"prompt": "a"}),
        ("a\nSteps: x, CFG scale: nan, Seed: 1e400", {"prompt": "a"}),
        ("Negative prompt: b\nSteps: 1, Seed: 1, Size: 1x", {"negative_prompt": "b"}),
        ("{", {}),
        ("{}", {}),
        ('{"sui_image_params": []}', {}),
    ],
)
def test_odd_texts(text: str, fields: dict[str, object]) -> None:
    found = recalled(text)
    assert {name: found.get(name) for name in fields} == fields
    Request(model="practice", **{k: v for k, v in found.items() if k != "model"})


def test_swarm() -> None:
    text = (
        '{"sui_image_params": {"prompt": "a cat", "negativeprompt": "dog", "model": "m",'
        ' "seed": 5, "steps": 20, "cfgscale": 4.0, "width": 64, "height": 32}}'
    )
    assert recalled(text)["size"] == Size(64, 32)
    assert recalled(text)["negative_prompt"] == "dog"
