"""Progress: fractions grow, seconds left come from steps and from jobs alike."""

import pytest

from qwen_image_tool.progress import Track, forwards, scaled
from qwen_image_tool.types import (
    PhaseNeed,
    PhaseStarted,
    Placement,
    Plan,
    Planned,
    Request,
    Size,
    Stepped,
)

REQUEST = Request(model="practice", prompt="x", size=Size(100, 100), steps=10, seed=1)


def plan(count: int, **seconds: float) -> Plan:
    return Plan(
        device="cpu",
        dtype="float32",
        working_size=Size(100, 100),
        forwards=count,
        placement=Placement(blocks=1, resident=1),
        text_placement=Placement(blocks=1, resident=1),
        phases=tuple(
            PhaseNeed(phase=name, ram_bytes=1, seconds=value) for name, value in seconds.items()
        ),
        disk_bytes=1,
    )


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_without_a_past_nothing_is_promised_before_the_first_step() -> None:
    clock = Clock()
    track = Track({}, clock)
    track.follow(PhaseStarted(phase="load"))
    assert track.progress().seconds_left is None
    track.follow(PhaseStarted(phase="denoise"))
    clock.now += 2
    track.follow(Stepped(step=1, steps=10, seconds=2))
    assert track.progress().seconds_left == 18
    clock.now += 1
    assert track.progress().seconds_left == 17


def test_a_past_is_used_from_the_start() -> None:
    clock = Clock()
    track = Track({"load": 10, "denoise": 20, "decode": 4}, clock)
    track.follow(PhaseStarted(phase="load"))
    assert track.progress().seconds_left == 34
    clock.now += 4
    assert track.progress().seconds_left == 30
    clock.now += 20  # loading takes longer than ever before
    assert track.progress().seconds_left == 24
    fractions = []
    track.follow(PhaseStarted(phase="denoise"))
    for step in range(1, 6):
        clock.now += 2
        track.follow(Stepped(step=step, steps=5, seconds=2))
        fractions.append(track.progress().fraction)
    assert fractions == sorted(fractions)
    assert track.progress().seconds_left == 4
    track.follow(PhaseStarted(phase="decode"))
    clock.now += 9
    assert track.progress().fraction == 1


def test_the_plan_serves_where_there_is_no_past() -> None:
    track = Track({}, Clock())
    track.follow(Planned(plan=plan(10, load=3, denoise=30)))
    assert track.progress().seconds_left == 33


def test_scaling() -> None:
    past = {"load": 5.0, "encode": 1.0, "denoise": 10.0, "decode": 2.0, "save": 0.5}
    bigger = REQUEST.model_copy(update={"size": Size(200, 100), "steps": 20, "images": 2})
    found = scaled(past, (REQUEST, plan(10)), (bigger, None))  # type: ignore[arg-type]
    assert found == {"load": 5, "encode": 1, "denoise": 80, "decode": 8, "save": 2}


def test_loading_in_two_parts_counts_once() -> None:
    clock = Clock()
    track = Track({"load": 10, "encode": 2, "denoise": 20}, clock)
    track.follow(PhaseStarted(phase="load"))
    clock.now += 4
    track.follow(PhaseStarted(phase="encode"))
    assert track.progress().seconds_left == 22
    clock.now += 2
    track.follow(PhaseStarted(phase="load"))
    assert track.progress().seconds_left == 26
    clock.now += 6
    assert track.progress().seconds_left == 20


@pytest.mark.parametrize(("negative", "count"), [(None, 30), ("", 60)])
def test_forwards(negative: str | None, count: int) -> None:
    asked = REQUEST.model_copy(update={"images": 3, "negative_prompt": negative})
    assert forwards(asked) == count
