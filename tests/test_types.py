import json
from typing import Any

import pytest
from pydantic import ValidationError

from qwen_image_tool.errors import BadRequest
from qwen_image_tool.types import (
    MAX_SEED,
    Device,
    ImageFile,
    Notice,
    PhaseNeed,
    PhaseStarted,
    Placement,
    Plan,
    Request,
    Result,
    Saved,
    Size,
    Stepped,
    Value,
    event_adapter,
)

PLAN = Plan(
    device="cpu",
    dtype="float32",
    working_size=Size(64, 32),
    forwards=8,
    placement=Placement(blocks=6, resident=6),
    text_placement=Placement(blocks=2, resident=2),
    phases=(PhaseNeed(phase="load", ram_bytes=5), PhaseNeed(phase="decode", ram_bytes=7)),
    disk_bytes=100,
    reasons=("Because.",),
)
REQUEST = Request(model="practice", prompt='猫 "quoted"\n', size=Size(64, 32), seed=MAX_SEED)
VALUES = [
    REQUEST,
    PLAN,
    Device(kind="mps", name="M4", ram_bytes=1, ram_free_bytes=1, shared_memory=True),
    Result(
        request=REQUEST,
        plan=PLAN,
        images=(ImageFile(path="a.png", seed=3, size=Size(64, 32)),),
        seconds={"load": 0.1, "denoise": 2.5},
        versions={"torch": "2.13.0"},
    ),
]
EVENTS = [
    PhaseStarted(phase="load"),
    Stepped(step=1, steps=4, seconds=0.25),
    Saved(path="x.png", seed=1),
    Notice(text="hello"),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_json_round_trip_is_exact(value: Value) -> None:
    text = value.to_json()
    again = type(value).from_json(text)
    assert again == value
    assert again.to_json() == text
    assert json.loads(text) == value.to_dict()


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.kind)
def test_events_tell_their_kind(event: Any) -> None:
    assert event_adapter.validate_python(event.to_dict()) == event


def test_defaults_are_left_out() -> None:
    assert Request(model="practice", prompt="a cat").to_dict() == {
        "model": "practice",
        "prompt": "a cat",
    }


def test_values_are_frozen_and_refuse_unknown_fields() -> None:
    with pytest.raises(ValidationError):
        REQUEST.steps = 3  # type: ignore[misc]
    with pytest.raises(BadRequest, match=r"colour is not a field here. Leave it out."):
        Request.from_user(model="practice", colour="red")
    with pytest.raises(BadRequest, match=r"model is missing. Give it."):
        Request.from_user(prompt="a cat")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "The number of steps is 0. Use 1 or more."),
        ("steps", 1001, "The number of steps is 1001. Use 1000 or less."),
        ("cfg", 0.5, "The CFG scale is 0.5. Use 1 or more."),
        ("cfg", float("nan"), "The CFG scale is nan"),
        ("seed", -1, "The seed is -1. Use 0 or more."),
        ("seed", MAX_SEED + 1, f"Use {MAX_SEED} or less."),
        ("images", 0, "The number of pictures is 0. Use 1 or more."),
        ("steps", "few", "The number of steps is 'few'. It has to be a whole number."),
        ("steps", 2.5, "The number of steps is 2.5. It has to be a whole number."),
        ("truncate", "maybe", "truncate is 'maybe'. It has to be true or false."),
        ("prompt", 7, "The prompt is 7. It has to be text."),
        ("prompt", "x" * 100_001, "The prompt has 100001 characters. Use 100000 or less."),
        ("model", "", "model is empty. Use 1 or more characters."),
        ("mode", "m" * 99, f"mode is '{'m' * 39} ... {'m' * 39}'. Choose default"),
        ("size", "12", "size is '12'. Write it as WIDTHxHEIGHT: 1024x768."),
        ("size", "0x64", "size is '0x64'. Write it as WIDTHxHEIGHT: 1024x768."),
    ],
)
def test_a_value_out_of_range_is_named(field: str, value: object, message: str) -> None:
    with pytest.raises(BadRequest) as caught:
        Request.from_user(**{"model": "practice", "prompt": "x", field: value})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "Input" not in str(caught.value)


def test_seeds_follow_each_other_and_wrap() -> None:
    request = Request(model="m", seed=MAX_SEED, images=2)
    assert request.seeds == (MAX_SEED, 0)
    assert request.for_image(1) == Request(model="m", seed=0)
    with pytest.raises(ValueError, match="resolve it first"):
        _ = Request(model="m").seeds


def test_size() -> None:
    assert Size.parse(" 1024 x 768") == Size(1024, 768)
    assert str(Size(1024, 768)) == "1024x768"
    assert Size(1472, 1140).rounded_up(16) == Size(1472, 1152)
    assert Size(512, 342).rounded_up(32) == Size(512, 352)
    assert Size(64, 32).rounded_up(32) == Size(64, 32)
    for bad in ("", "10", "axb", "10x", "-1x5", "1.5x2", "10x10x10", "0x5", "9999999x1"):
        with pytest.raises(ValueError, match=r"size|pixels"):
            Size.parse(bad)


def test_a_plans_peak_is_that_of_its_hungriest_phase() -> None:
    assert PLAN.ram_bytes == 7
    assert PLAN.vram_bytes == 0
