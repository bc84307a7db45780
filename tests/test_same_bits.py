"""Our loop gives the bits of diffusers' own pipeline. This test never leaves the project."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from PIL import Image

import tiny
from qwen_image_tool.catalog import load_catalog
from qwen_image_tool.engine import vae
from qwen_image_tool.engine.engine import Engine
from qwen_image_tool.store import locate
from qwen_image_tool.types import PhaseNeed, Placement, Plan, Request, Size

LONG = "a green heart above a small white letter Q, on a deep blue background, in soft light"
DTYPES = [torch.float32, torch.bfloat16]
CASES = [
    # prompt, negative, cfg, size, steps
    ("a cat", " ", 4.0, Size(64, 64), 4),
    ("a cat", None, 1.0, Size(64, 64), 4),
    (LONG, "blurry", 2.5, Size(96, 48), 3),
    ("猫", LONG, 7.0, Size(48, 112), 2),
    (LONG, None, 1.0, Size(128, 80), 2),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def theirs(folder: Path, request: pytest.FixtureRequest) -> Any:
    pipe = QwenImagePipeline.from_pretrained(folder, dtype=request.param)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plan_for(dtype: torch.dtype, size: Size) -> Plan:
    return Plan(
        device="cpu",
        dtype="bfloat16" if dtype == torch.bfloat16 else "float32",
        working_size=size,
        mode="exact",
        single_frame=False,
        forwards=1,
        placement=Placement(blocks=2, resident=2),
        text_placement=Placement(blocks=2, resident=2),
        phases=(PhaseNeed(phase="load", ram_bytes=1),),
        disk_bytes=1,
    )


class Ours:
    """Our engine over a folder; keeps the latents that go into the VAE."""

    def __init__(self, folder: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine = Engine(locate(str(folder), load_catalog(), Path()))
        self.dtype = dtype
        self.cells: list[torch.Tensor] = []
        decode = vae.decode

        def keep(model: Any, cells: torch.Tensor, *how: Any) -> Image.Image:
            self.cells.append(cells)
            return decode(model, cells, *how)

        monkeypatch.setattr(vae, "decode", keep)

    def draw(self, request: Request) -> list[np.ndarray]:
        assert request.size is not None
        plan = plan_for(self.dtype, request.size.rounded_up(16))
        run = self.engine.run(request, [plan], lambda event: None, lambda: False)
        return [np.asarray(image) for image in run.images]


def their_call(pipe: Any, request: Request, seeds: list[int], output: str) -> Any:
    assert request.size is not None
    return pipe(
        request.prompt,
        negative_prompt=request.negative_prompt,
        true_cfg_scale=request.cfg,
        width=request.size.width,
        height=request.size.height,
        num_inference_steps=request.steps,
        num_images_per_prompt=len(seeds),
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        max_sequence_length=1024,
        output_type=output,
    ).images


def as_cells(pipe: Any, latents: torch.Tensor, size: Size) -> torch.Tensor:
    cells: torch.Tensor = pipe._unpack_latents(
        latents, size.height, size.width, pipe.vae_scale_factor
    )
    return cells


@pytest.mark.parametrize("seed", [0, 20_261_123])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[3]}-cfg{case[2]:g}")
def test_one_picture(
    theirs: Any, folder: Path, case: Any, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, negative, cfg, size, steps = case
    request = Request(
        model="tiny", prompt=prompt, negative_prompt=negative, cfg=cfg, size=size, steps=steps,
        seed=seed,
    )  # fmt: skip
    ours = Ours(folder, theirs.dtype, monkeypatch)
    [pixels] = ours.draw(request)
    [their_pixels] = their_call(theirs, request, [seed], "pil")
    latents = their_call(theirs, request, [seed], "latent")
    assert torch.equal(ours.cells[0], as_cells(theirs, latents, size))
    assert np.array_equal(pixels, np.asarray(their_pixels))
    assert len(np.unique(pixels)) > 20, "a blank picture proves nothing"


@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: f"{case[3]}-cfg{case[2]:g}")
def test_three_pictures(
    theirs: Any, folder: Path, case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of our three has the bits of diffusers' picture of that seed alone. diffusers' own batch
    of three has them too in bfloat16; in float32 its batched products round otherwise, by 1e-6."""
    prompt, negative, cfg, size, steps = case
    request = Request(
        model="tiny", prompt=prompt, negative_prompt=negative, cfg=cfg, size=size, steps=steps,
        seed=41, images=3,
    )  # fmt: skip
    ours = Ours(folder, theirs.dtype, monkeypatch)
    pixels = ours.draw(request)
    cells = torch.cat(ours.cells)
    for index, seed in enumerate(request.seeds):
        alone = their_call(theirs, request, [seed], "latent")
        assert torch.equal(cells[index], as_cells(theirs, alone, size)[0])
        [their_pixels] = their_call(theirs, request, [seed], "pil")
        assert np.array_equal(pixels[index], np.asarray(their_pixels))
    batch = as_cells(theirs, their_call(theirs, request, list(request.seeds), "latent"), size)
    tolerance = 0 if theirs.dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(cells, batch, rtol=0, atol=tolerance)
    assert not torch.equal(cells[0], cells[1])


def test_a_size_between_multiples_is_the_centre(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Ours(folder, torch.float32, monkeypatch)
    exact = Request(model="tiny", prompt="x", cfg=1, size=Size(64, 48), steps=2, seed=1)
    [whole] = ours.draw(exact)
    [centre] = ours.draw(exact.model_copy(update={"size": Size(57, 42)}))
    assert np.array_equal(centre, whole[3:45, 3:60])


@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: f"{case[3]}-cfg{case[2]:g}")
def test_the_default_mode_is_within_one_level(
    theirs: Any, folder: Path, case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, negative, cfg, size, steps = case
    request = Request(
        model="tiny", prompt=prompt, negative_prompt=negative, cfg=cfg, size=size, steps=steps,
        seed=2,
    )  # fmt: skip
    ours = Ours(folder, theirs.dtype, monkeypatch)
    [exact] = ours.draw(request)
    plan = plan_for(theirs.dtype, size).model_copy(update={"mode": "default"})
    [image] = ours.engine.run(request, [plan], lambda _: None, lambda: False).images
    assert torch.equal(ours.cells[0], ours.cells[1]), "only the VAE differs"
    assert np.abs(np.asarray(image).astype(int) - exact).max() <= 1


def test_a_long_prompt_cut_as_diffusers_cuts_it(
    theirs: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(
        model="tiny", prompt="word " * 300, cfg=1, size=Size(32, 32), steps=2, seed=5,
        truncate=True,
    )  # fmt: skip
    [pixels] = Ours(folder, theirs.dtype, monkeypatch).draw(request)
    [their_pixels] = their_call(theirs, request, [5], "pil")
    assert np.array_equal(pixels, np.asarray(their_pixels))
