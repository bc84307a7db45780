"""Progress as lines and as a bar: what is under way, how far it is, how long it takes."""

import io

import pytest
from rich.console import Console

from qwen_image_tool.cli.screen import Screen, duration
from qwen_image_tool.types import (
    DownloadProgress,
    Event,
    Loading,
    Notice,
    PhaseStarted,
    Stepped,
    VerifyProgress,
)

PICTURE: list[Event] = [
    Notice(text="Runs on the CPU."),
    PhaseStarted(phase="load"),
    Loading(done_bytes=0, total_bytes=0),
    Loading(done_bytes=2_000_000_000, total_bytes=2_000_000_000),
    PhaseStarted(phase="encode"),
    Loading(done_bytes=3_000_000_000, total_bytes=3_000_000_000),
    PhaseStarted(phase="denoise"),
    Stepped(step=2, steps=2, seconds=1.5),
]
TRANSFER: list[Event] = [
    DownloadProgress(
        model="qwen-image",
        done_bytes=10**9,
        total_bytes=10**9,
        bytes_per_second=12_500_000,
        seconds_left=6300,
    ),
    VerifyProgress(model="qwen-image", done_bytes=5, total_bytes=5),
]


def test_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen().progress() as show:
        for event in PICTURE:
            show(event)
    with Screen().transfer() as show:
        for event in TRANSFER:
            show(event)
    assert capsys.readouterr().err.splitlines() == [
        "Runs on the CPU.",
        "Loading the model ...",
        "  2.0 GB of 2.0 GB",
        "Reading the prompt ...",
        "  3.0 GB of 3.0 GB",
        "Drawing ...",
        "  step 2/2, 1.50 s/step, 0 s left",
        "  qwen-image: 1.0 GB of 1.0 GB, 12.5 MB/s, 1.8 h left",
        "  qwen-image: 0.0 MB of 0.0 MB",
    ]


def test_one_slow_step_does_not_change_the_time_left_by_much(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Screen().progress() as show:
        for step in range(1, 100):
            show(Stepped(step=step, steps=100, seconds=0.1))
        show(Stepped(step=100, steps=100, seconds=1.1))
    assert "step 100/100, 0.40 s/step, 0 s left" in capsys.readouterr().err


def test_lines_are_few(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen().progress() as show:
        for step in range(1, 500):
            show(Stepped(step=step, steps=500, seconds=0.01))
    assert len(capsys.readouterr().err.splitlines()) < 10


@pytest.mark.parametrize(
    ("events", "texts"),
    [(PICTURE, ["Drawing", "step 2/2", "Runs on the CPU."]), (TRANSFER, ["qwen-image", "1.8 h"])],
)
def test_a_bar_on_a_terminal(events: list[Event], texts: list[str]) -> None:
    screen = Screen()
    shown = io.StringIO()
    screen.notes = Console(file=shown, force_terminal=True, width=120)
    with screen.transfer() as show:
        for event in events[:-1] if events is TRANSFER else events:
            show(event)
    for text in texts:
        assert text in shown.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.2, "4 s"), (99, "99 s"), (133.4, "2 min 13 s"), (600, "10 min"), (9000, "2.5 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
