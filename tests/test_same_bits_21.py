"""Our loop gives the bits of diffusers' QwenImage21Pipeline. This test never leaves the project."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from qwen_image_tool import gallery
from qwen_image_tool.catalog import load_catalog
from qwen_image_tool.engine import vae
from qwen_image_tool.engine.engine import Engine
from qwen_image_tool.engine.families.qwen_image_21 import Forward, Transformer
from qwen_image_tool.engine.weights import Reader
from qwen_image_tool.errors import ModelUnsupported, PromptTooLong
from qwen_image_tool.store import locate
from qwen_image_tool.types import PhaseNeed, Placement, Plan, Request, Size

LONG = "a green heart above a small white letter Q, on a deep blue background, in soft light"
DTYPES = [torch.float32, torch.bfloat16]
BLOCKS, LAYERS = 4, 3
RESIDENT = Placement(blocks=BLOCKS, resident=BLOCKS), Placement(blocks=LAYERS, resident=LAYERS)
DISK = (
    Placement(blocks=BLOCKS, resident=0, slots=2, source="disk"),
    Placement(blocks=LAYERS, resident=0, slots=2, source="disk"),
)
PARTLY = Placement(blocks=BLOCKS, resident=1, slots=2, source="disk"), RESIDENT[1]
PLACEMENTS = [RESIDENT, DISK, PARTLY]
CASES = [
    # prompt, negative, cfg, size, steps
    ("a cat", None, 1.0, Size(64, 64), 4),
    ("a cat", " ", 4.0, Size(64, 64), 4),
    (LONG, "blurry", 2.5, Size(96, 64), 3),
    ("猫 {and} <dog>", LONG, 7.0, Size(64, 128), 2),
    (LONG, "", 2.0, Size(128, 96), 3),
]


def named(case: Any) -> str:
    return f"{case[3]}-cfg{case[2]:g}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_21(tmp_path_factory.mktemp("models") / "tiny-2.1")


@pytest.fixture(scope="module")
def turbo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_21(tmp_path_factory.mktemp("models") / "tiny-turbo", seed=1, turbo=True)


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def theirs(folder: Path, request: pytest.FixtureRequest) -> Any:
    return tiny.load_21(folder, request.param)


class Ours:
    """Our engine over a folder; keeps the latent cells that go into the VAE."""

    def __init__(self, folder: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine = Engine(locate(str(folder), load_catalog(), Path()))
        self.dtype = dtype
        self.cells: list[torch.Tensor] = []
        decode = vae.decode

        def keep(model: Any, cells: torch.Tensor, *how: Any) -> Image.Image:
            self.cells.append(cells)
            return decode(model, cells, *how)

        monkeypatch.setattr(vae, "decode", keep)

    def draw(
        self, request: Request, placements: tuple[Placement, Placement] = RESIDENT
    ) -> list[Image.Image]:
        plan = self.plan(request, placements)
        return self.engine.run(request, [plan], _pass, lambda: False).images

    def plan(self, request: Request, placements: tuple[Placement, Placement] = RESIDENT) -> Plan:
        assert request.size is not None
        return Plan(
            device="cpu",
            dtype="bfloat16" if self.dtype == torch.bfloat16 else "float32",
            mode="exact",
            single_frame=False,
            working_size=request.size.rounded_up(32),
            forwards=1,
            placement=placements[0],
            text_placement=placements[1],
            phases=(PhaseNeed(phase="load", ram_bytes=1),),
            disk_bytes=1,
        )


def _pass(event: object) -> None:
    pass


def request_of(case: Any, seed: int, images: int = 1) -> Request:
    prompt, negative, cfg, size, steps = case
    return Request(
        model="tiny", prompt=prompt, negative_prompt=negative, cfg=cfg, size=size, steps=steps,
        seed=seed, images=images,
    )  # fmt: skip


def their_call(pipe: Any, request: Request, seeds: tuple[int, ...], output: str) -> Any:
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
        output_type=output,
    ).images


def their_cells(pipe: Any, request: Request, seeds: tuple[int, ...]) -> torch.Tensor:
    assert request.size is not None
    latents = their_call(pipe, request, seeds, "latent")
    cells: torch.Tensor = pipe._unpack_latents(
        latents, request.size.height, request.size.width, pipe.vae_scale_factor
    )
    return cells


def check(ours: Ours, images: list[Image.Image], pipe: Any, request: Request) -> None:
    """Each picture has the bits of diffusers' picture of its seed alone."""
    cells = torch.cat(ours.cells)
    for index, seed in enumerate(request.seeds):
        assert torch.equal(cells[index], their_cells(pipe, request, (seed,))[0])
        [theirs] = their_call(pipe, request, (seed,), "pil")
        assert images[index].mode == theirs.mode == "RGBA"
        assert np.array_equal(np.asarray(images[index]), np.asarray(theirs))
        assert len(np.unique(np.asarray(theirs))) > 20, "a blank picture proves nothing"


@pytest.mark.parametrize("seed", [0, 20_261_123])
@pytest.mark.parametrize("case", CASES, ids=named)
def test_one_picture(
    theirs: Any, folder: Path, case: Any, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of(case, seed)
    ours = Ours(folder, theirs.dtype, monkeypatch)
    check(ours, ours.draw(request), theirs, request)


@pytest.mark.parametrize("case", CASES[:3], ids=named)
def test_three_pictures(
    theirs: Any, folder: Path, case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of(case, seed=41, images=3)
    ours = Ours(folder, theirs.dtype, monkeypatch)
    check(ours, ours.draw(request), theirs, request)
    assert not torch.equal(ours.cells[0], ours.cells[1])


@pytest.mark.parametrize("placements", PLACEMENTS, ids=["resident", "disk", "partly"])
def test_every_placement(
    theirs: Any,
    folder: Path,
    placements: tuple[Placement, Placement],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request = request_of(CASES[3], seed=7, images=2)
    ours = Ours(folder, theirs.dtype, monkeypatch)
    check(ours, ours.draw(request, placements), theirs, request)
    ours.engine.release()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES[:2], ids=named)
def test_turbo_takes_its_own_schedule(
    turbo: Path, dtype: torch.dtype, case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Ours(turbo, dtype, monkeypatch)
    model = ours.engine.installed.model
    assert model.sampling.sigmas == tuple(tiny.TURBO_SIGMAS)
    asked = request_of(case, seed=3).model_copy(update={"steps": None})
    request = model.resolve(asked, seed=3)
    assert request.steps == len(tiny.TURBO_SIGMAS)
    check(ours, ours.draw(request), tiny.load_21(turbo, dtype), request)


def test_a_run_does_not_depend_on_the_last(
    theirs: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Ours(folder, theirs.dtype, monkeypatch)
    for case, seed in itertools.product((CASES[2], CASES[0]), (1, 2)):
        ours.cells.clear()
        request = request_of(case, seed)
        check(ours, ours.draw(request), theirs, request)


def test_a_size_between_multiples_is_the_centre(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Ours(folder, torch.float32, monkeypatch)
    exact = request_of(("x", None, 1.0, Size(96, 64), 2), seed=1)
    [whole] = ours.draw(exact)
    [centre] = ours.draw(exact.model_copy(update={"size": Size(89, 50)}))
    assert np.array_equal(np.asarray(centre), np.asarray(whole)[7:57, 3:92])


def test_transparency_is_kept_on_disk(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Ours(folder, torch.float32, monkeypatch)
    request = request_of(CASES[0], seed=1)
    [image] = ours.draw(request)
    path = gallery.save_image(image, tmp_path, request, ours.plan(request), {}, "Qwen-Image-2.1")
    with Image.open(path) as saved:
        assert saved.mode == "RGBA"
        assert np.array_equal(np.asarray(saved), np.asarray(image))
    assert len(np.unique(np.asarray(image)[..., 3])) > 1
    assert gallery.request_from(path) == request


def test_a_prompt_beyond_the_positions_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Ours(folder, torch.float32, monkeypatch)
    request = request_of(("word " * 110, None, 1.0, Size(64, 64), 2), seed=1)
    with pytest.raises(PromptTooLong, match="the model reads"):
        ours.draw(request)
    assert ours.draw(request.model_copy(update={"truncate": True}))


@pytest.mark.parametrize("placements", [RESIDENT, DISK], ids=["resident", "disk"])
def test_nothing_waits_for_the_device_in_the_loop(
    folder: Path, placements: tuple[Placement, Placement], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor is read back, and the prefixes stay where they are."""
    model = Transformer(
        folder / "transformer", placements[0], torch.device("cpu"), torch.float32, Reader()
    )

    def refuse(*_: object) -> None:
        raise AssertionError("a tensor was read back")

    with torch.inference_mode():
        forward = Forward(model, torch.tensor([900.0, 500.0, 20.0]), (4, 6), Reader())
        conditions = [forward.condition(torch.randn(1, length, 32)) for length in (5, 9)]
        latents = torch.randn(2, 24, 64)
        addresses = [cache.get()[0].data_ptr() for c in conditions for cache in c.caches]
        with monkeypatch.context() as patched:
            for name in ("tolist", "item", "nonzero", "cpu", "__bool__", "__int__", "__float__"):
                patched.setattr(torch.Tensor, name, refuse)
            for step in range(3):
                forward(latents, step, conditions)
    assert len(set(addresses)) == 2 * BLOCKS
    assert addresses == [cache.get()[0].data_ptr() for c in conditions for cache in c.caches]
    model.close()


def test_text_that_depends_on_the_timestep_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = copy / "transformer" / "config.json"
    values = json.loads(config.read_text(encoding="utf-8")) | {"causal_condition": False}
    config.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ModelUnsupported, match="causal condition"):
        Ours(copy, torch.float32, monkeypatch).draw(request_of(CASES[0], seed=1))
