"""Previews: a linear map that was learned from decoded pictures shows what is coming."""

import base64
import io
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_image_tool.app import App
from qwen_image_tool.engine.sketch import SIDE, Sideshow, Sketch
from qwen_image_tool.settings import Settings
from qwen_image_tool.types import Event, Notice, PhaseStarted, Preview, Request, Size


def pair(seed: int, width: int = 12, height: int = 8) -> tuple[torch.Tensor, Image.Image]:
    """Latents of 5 channels, and a picture whose colours are a linear map of them."""
    cells = torch.rand((5, 1, height, width), generator=torch.Generator().manual_seed(seed))
    mixer = torch.tensor([[90.0, 0, 20, 0, 30], [0, 80, 0, 60, 0], [10, 10, 90, 10, 10]])
    colours = torch.einsum("ck,khw->hwc", mixer, cells[:, 0]) + 20
    small = Image.fromarray(colours.round().to(torch.uint8).numpy())
    return cells, small.resize((width * 16, height * 16), Image.Resampling.NEAREST)


def small(jpeg: bytes, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)).resize(size, Image.Resampling.BOX), dtype=float)


def test_nothing_is_drawn_before_anything_was_learned(tmp_path: Path) -> None:
    assert Sketch(tmp_path, ["vae"]).draw(pair(1)[0]) is None


def test_a_linear_world_is_learned(tmp_path: Path) -> None:
    sketch = Sketch(tmp_path / "new", ["vae"])
    for seed in range(3):
        sketch.learn(*pair(seed))
    cells, image = pair(9)
    jpeg = Sketch(tmp_path / "new", ["vae"]).draw(cells)
    assert jpeg
    assert max(Image.open(io.BytesIO(jpeg)).size) >= SIDE
    truth = np.asarray(image.resize((12, 8), Image.Resampling.BOX), dtype=float)
    assert np.abs(small(jpeg, (12, 8)) - truth).mean() < 12
    assert Sketch(tmp_path / "new", ["another vae"]).draw(cells) is None


def test_what_can_teach_nothing_is_passed_over(tmp_path: Path) -> None:
    cells, image = pair(1)
    Sketch(tmp_path / "new", ["vae"]).learn(cells, image.crop((0, 0, 96, 96)))
    assert not (tmp_path / "new").exists()


def test_transparency_is_learned_on_white(tmp_path: Path) -> None:
    cells, image = pair(1)
    clear = Image.new("RGBA", image.size, (0, 0, 0, 0))
    sketch = Sketch(tmp_path, ["vae"])
    sketch.learn(cells, clear)
    jpeg = sketch.draw(cells)
    assert jpeg
    assert small(jpeg, (1, 1)).min() > 245


def test_a_damaged_or_missing_folder_is_no_error(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    sketch = Sketch(folder, ["vae"])
    sketch.learn(*pair(1))
    [kept] = folder.iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    assert Sketch(folder, ["vae"]).draw(pair(1)[0]) is None
    sketch.learn(*pair(1))
    assert Sketch(folder, ["vae"]).draw(pair(1)[0])
    file = tmp_path / "file"
    file.touch()
    Sketch(file, ["vae"]).learn(*pair(1))
    shutil.rmtree(folder)
    assert sketch.draw(pair(1)[0])  # what it has learned itself it knows
    assert Sketch(folder, ["vae"]).draw(pair(1)[0]) is None


class Gate:
    """Draws a number of latents as that number, and the first one when it may."""

    def __init__(self) -> None:
        self.begun, self.may = threading.Event(), threading.Event()
        self.told: list[tuple[int, bytes]] = []
        self.errors: list[Exception] = []
        self.drawn: list[int] = []

    def draw(self, latents: torch.Tensor) -> bytes | None:
        assert torch.is_inference_mode_enabled()
        self.begun.set()
        assert self.may.wait(30)
        self.drawn.append(int(latents))
        if latents == 9:
            raise RuntimeError("no memory for it")
        return None if latents == 8 else bytes([int(latents)])

    def sideshow(self) -> Sideshow:
        return Sideshow(
            self.draw, lambda step, picture: self.told.append((step, picture)), self.errors.append
        )


def test_the_loop_does_not_wait_and_the_newest_is_drawn() -> None:
    gate = Gate()
    with gate.sideshow() as sideshow:
        sideshow.show(1, torch.tensor(1))
        assert gate.begun.wait(30)
        for step in (2, 3, 4):
            sideshow.show(step, torch.tensor(step))
        assert gate.told == []
        gate.may.set()
    assert gate.told == [(1, b"\x01"), (4, b"\x04")]


def test_what_has_no_picture_yet_is_not_told() -> None:
    gate = Gate()
    gate.may.set()
    with gate.sideshow() as sideshow:
        sideshow.show(1, torch.tensor(8))
    assert (gate.drawn, gate.told, gate.errors) == ([8], [], [])


def test_a_preview_that_fails_is_told_once_and_is_the_last() -> None:
    gate = Gate()
    with gate.sideshow() as sideshow:
        sideshow.show(1, torch.tensor(9))
        assert gate.begun.wait(30)
        sideshow.show(2, torch.tensor(2))
        gate.may.set()
    sideshow.show(3, torch.tensor(3))
    assert (gate.drawn, gate.told) == ([9], [])
    assert [str(error) for error in gate.errors] == ["no memory for it"]


def test_a_run_outlives_its_previews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> bytes:
        raise ValueError("no such map")

    monkeypatch.setattr(Sketch, "draw", broken)
    app = App(Settings(output=tmp_path / "out", cache=tmp_path / "cache"), previews=True)
    events: list[Event] = []
    request = Request(model="practice", prompt="x", size=Size(64, 64), steps=3, seed=1)
    assert app.generate(request, events.append).images
    said = [event.text for event in events if isinstance(event, Notice)]
    assert "There are no more previews of this run: no such map" in said


@pytest.mark.parametrize("size", [Size(64, 64), Size(70, 64)], ids=["whole", "cut"])
def test_the_practice_model_shows_itself_from_the_second_picture_on(
    tmp_path: Path, size: Size
) -> None:
    app = App(Settings(output=tmp_path / "out", cache=tmp_path / "cache"), previews=True)
    request = Request(model="practice", prompt="a red circle", size=size, steps=3, seed=1)
    events: list[Event] = []
    app.generate(request, events.append)
    assert not [event for event in events if isinstance(event, Preview)]
    app.generate(request, events.append)
    previews = [event for event in events if isinstance(event, Preview)]
    later = events[events.index(previews[-1]) :]
    assert PhaseStarted(phase="decode") in later  # none comes when the picture itself is made
    assert Image.open(io.BytesIO(base64.b64decode(previews[0].jpeg))).format == "JPEG"
    without = App(app.settings)
    events.clear()
    without.generate(request, events.append)
    assert not [event for event in events if isinstance(event, Preview)]
