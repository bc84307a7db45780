"""The practice model that the package carries: whole, real, and it draws what it is told."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from PIL import Image
from safetensors import safe_open

from qwen_image_tool import planner
from qwen_image_tool.catalog import DEFAULT_MODEL, load_catalog
from qwen_image_tool.device import probe
from qwen_image_tool.engine.engine import Engine
from qwen_image_tool.engine.probe import torch_facts
from qwen_image_tool.store import Installed, locate, practice_folder
from qwen_image_tool.types import Request, Size

PROMPT = "a red circle left of a blue square on a yellow background"
FOLDER = practice_folder()


@pytest.fixture(scope="module")
def installed() -> Installed:
    return locate(DEFAULT_MODEL, load_catalog(), Path())


@pytest.fixture(scope="module")
def draw(installed: Installed) -> Any:
    engine = Engine(installed)
    device = probe(torch_facts())

    def call(prompt: str = PROMPT, **fields: Any) -> list[Any]:
        asked = Request.from_user(**{"model": DEFAULT_MODEL, "prompt": prompt, "seed": 1, **fields})
        request = installed.model.resolve(asked, seed=1)
        plan = planner.plan(request, installed, device)
        run = engine.run(request, [plan], lambda _: None, lambda: False)
        return [np.asarray(image).astype(int) for image in run.images]

    return call


def test_all_files_are_small_and_bfloat16() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 32_000_000
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as weights:
                dtypes = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
            assert dtypes == {"BF16"}


def test_the_catalogue_says_what_is_there(installed: Installed) -> None:
    for name, part in installed.model.components.items():
        assert installed.bytes[name] == part.bytes
    on_disk = json.loads((FOLDER / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    said = installed.model.scheduler.model_dump()
    assert said == {name: on_disk[name] for name in said}


def test_it_has_the_pixels_of_diffusers(draw: Any, installed: Installed) -> None:
    pipe = QwenImagePipeline.from_pretrained(FOLDER, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    sampling = installed.model.sampling
    theirs = pipe(
        PROMPT,
        negative_prompt=sampling.negative_prompt,
        true_cfg_scale=sampling.cfg,
        width=256,
        height=256,
        num_inference_steps=sampling.steps,
        generator=torch.Generator().manual_seed(1),
    ).images[0]
    assert np.array_equal(draw(mode="exact")[0], np.asarray(theirs))
    assert np.abs(draw()[0] - np.asarray(theirs).astype(int)).max() <= 1


def test_the_first_picture_of_the_readme(draw: Any) -> None:
    [pixels] = draw()
    assert pixels.shape == (256, 256, 3)
    corners = pixels[[5, 5, 250, 250], [5, 250, 5, 250]]
    assert (corners[:, 2] < corners[:, :2].min(axis=1) - 60).all(), "yellow at every corner"
    left, right = pixels[:, :128], pixels[:, 128:]
    assert redness(left) > 5 * redness(right)
    assert blueness(right) > 5 * blueness(left)


def redness(pixels: Any) -> float:
    return float((pixels[..., 0] - pixels[..., 1:].max(axis=-1) > 80).mean()) + 1e-3


def blueness(pixels: Any) -> float:
    return float((pixels[..., 2] - pixels[..., :2].max(axis=-1) > 60).mean()) + 1e-3


def test_guidance_and_negative_prompt_change_the_picture(draw: Any) -> None:
    prompt = "a ring and a heart"  # colours and places are left open
    [guided] = draw(prompt)
    [plain] = draw(prompt, cfg=1)
    [without] = draw(prompt, negative_prompt="a white background")
    assert np.abs(guided - plain).mean() > 20
    assert np.abs(guided - without).mean() > 20


@pytest.mark.parametrize("ratio", ["16:9", "9:16", "4:3", "3:4", "3:2", "2:3"])
def test_every_ratio_has_its_pixels(draw: Any, installed: Installed, ratio: str) -> None:
    size = installed.model.sizes.native[ratio]
    [pixels] = draw(size=size, steps=4)
    assert pixels.shape == (size.height, size.width, 3)


def test_seeds_differ_and_neighbours_do_not_matter(draw: Any) -> None:
    three = draw(seed=5, images=3, size=Size(128, 128), steps=4)
    [second] = draw(seed=6, size=Size(128, 128), steps=4)
    assert np.array_equal(three[1], second)
    assert not np.array_equal(three[0], three[1])


def test_pictures_are_rgb(draw: Any) -> None:
    assert Image.fromarray(draw(steps=2)[0].astype(np.uint8)).mode == "RGB"
