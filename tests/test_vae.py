"""Latents to pixels: our single-frame decoder against diffusers' own, whole and in strips."""

import copy
import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLQwenImage21
from diffusers.utils import logging

import tiny
from live import peak_bytes
from qwen_image_tool import decoding
from qwen_image_tool.decoding import DECODINGS
from qwen_image_tool.engine import vae
from qwen_image_tool.types import Size

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import decode as benchmark

GIB = 2**30
MAKE = {"qwen-image": tiny.vae, "qwen-image-2.1": tiny.vae_21}
FULL_SIZE = {"qwen-image": AutoencoderKLQwenImage, "qwen-image-2.1": AutoencoderKLQwenImage21}
SHAPES = [(1, 1), (5, 7), (13, 9), (16, 3)]  # rows and columns of latent cells
SIZES = [Size(512, 512), Size(1024, 1024), Size(1328, 1328), Size(2048, 2048), Size(768, 2048)]


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.set_verbosity_error()  # `to` warns of a list of modules that is empty


@pytest.fixture(params=MAKE)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


FORMS = [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]


@pytest.fixture(params=FORMS, ids=["float32", "bfloat16", "faithful"])
def pair(family: str, request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A tiny random VAE as diffusers has it, and its single-frame form."""
    dtype, faithful = request.param
    torch.manual_seed(3)
    theirs = MAKE[family]().eval().requires_grad_(False)
    for name, weight in theirs.named_parameters():
        if name.endswith("gamma"):
            weight.data.add_(0.3 * torch.randn_like(weight))
    theirs = theirs.to(dtype)
    ours = copy.deepcopy(theirs)
    vae.keep_decoder(ours)
    vae.make_single_frame(ours, DECODINGS[family], faithful)
    return theirs, ours


def full_size(family: str) -> Any:
    """Sizes without memory."""
    with torch.device("meta"):
        return FULL_SIZE[family]().to(torch.bfloat16).requires_grad_(False)


def cells(model: Any, height: int, width: int) -> torch.Tensor:
    shape = (1, model.config.z_dim, 1, height, width)
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    return drawn.to(model.device, model.dtype)


@torch.inference_mode()
def levels(model: Any, latents: torch.Tensor, strips: int = 1) -> np.ndarray:
    return vae.levels(model, latents, strips)[0].numpy().astype(int)


@torch.inference_mode()
def pixels(model: Any, latents: torch.Tensor, strips: int = 1) -> torch.Tensor:
    """Of our decoder: [1, 3 or 4, height, width], around -1 to 1."""
    return torch.cat(list(model.decoder.strips(latents[:, :, 0], strips)), dim=2)


def apart(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one - other).max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_single_frame_is_within_one_level(pair: tuple[Any, Any], shape: tuple[int, int]) -> None:
    theirs, ours = pair
    latents = cells(theirs, *shape)
    expected = levels(theirs, latents)
    assert apart(levels(ours, latents), expected) <= 1
    assert len(np.unique(expected)) > 20, "a blank picture proves nothing"


@torch.inference_mode()
def test_in_float32_only_roundings_differ(family: str) -> None:
    torch.manual_seed(1)
    model = MAKE[family]().eval()
    latents = cells(model, 9, 6)
    expected = model.decode(latents, return_dict=False)[0][:, :, 0]
    vae.make_single_frame(model, DECODINGS[family], faithful=False)
    torch.testing.assert_close(pixels(model, latents).clamp(-1, 1), expected, rtol=0, atol=2e-5)


@torch.inference_mode()
def test_a_faithful_norm_of_a_large_frame_is_made_as_diffusers_makes_it(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a copy in float32, which torch's kernels for a GPU add part by part."""
    norm = MAKE[family]().decoder.norm_out.bfloat16()
    norm.gamma.data.normal_()
    frame = torch.randn(1, norm.gamma.shape[0], 5, 7).bfloat16()
    expected = norm(frame[:, :, None])[:, :, 0]
    plain: Any = torch.linalg.vector_norm
    copied: list[bool] = []

    def vector_norm(seen: torch.Tensor, **how: Any) -> Any:
        copied.append(seen.dtype == torch.float32)
        return plain(seen, **how)

    monkeypatch.setattr(torch.linalg, "vector_norm", vector_norm)
    for limit, faithful in ((1, False), (frame.numel() * 4, True), (frame.numel() * 4 - 1, True)):
        monkeypatch.setattr(vae, "INDEXED", limit)
        assert torch.equal(vae._Norm(norm, faithful)(frame), expected)
    assert copied == [False, False, True]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_strips_give_the_same_picture(pair: tuple[Any, Any], shape: tuple[int, int]) -> None:
    _, ours = pair
    latents = cells(ours, *shape)
    whole, numbers = levels(ours, latents), pixels(ours, latents)
    for strips in {1, 2, 3, 5, shape[0]} & set(range(1, shape[0] + 1)):
        assert apart(levels(ours, latents, strips), whole) <= 1
        if ours.dtype == torch.float32:
            torch.testing.assert_close(pixels(ours, latents, strips), numbers, rtol=0, atol=2e-5)


@torch.inference_mode()
def test_a_vae_that_doubles_once_more_gives_the_same_picture() -> None:
    """As that of the practice model does."""
    torch.manual_seed(4)
    model = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=16,
        dim_mult=[1, 2, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False] * 4,
    ).eval()
    latents = cells(model, 6, 4)
    expected = levels(model, latents)
    assert expected.shape == (96, 64, 3)
    vae.make_single_frame(model, DECODINGS["qwen-image"], faithful=False)
    for strips in (1, 2, 5):
        assert apart(levels(model, latents, strips), expected) <= 1


@pytest.mark.parametrize("band", [4, 40, 150], ids="of {} pixels".format)
def test_bands_give_the_same_picture(
    pair: tuple[Any, Any], band: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a few rows each, made when a strip sees them first."""
    _, ours = pair
    latents = cells(ours, 16, 3)
    whole, numbers = levels(ours, latents), pixels(ours, latents)
    monkeypatch.setattr(decoding, "BAND", band)
    made, cut = [], vae._cut

    def counted(height: int, count: int) -> list[vae.Rows]:
        made.append(count)
        return cut(height, count)

    monkeypatch.setattr(vae, "_cut", counted)
    for strips in (2, 3, 7, 16):
        assert apart(levels(ours, latents, strips), whole) <= 1
        if ours.dtype == torch.float32:
            torch.testing.assert_close(pixels(ours, latents, strips), numbers, rtol=0, atol=2e-5)
    bands = {4: 192, 40: 19, 150: 5}[band] if ours.decoder._decoding.band else 1
    assert set(made[::2]) == {bands}


@pytest.mark.parametrize("rows", [(0, 1), (0, 20), (19, 21), (30, 40)], ids=str)
@torch.inference_mode()
def test_a_strip_is_given_all_that_it_sees_and_no_more(family: str, rows: tuple[int, int]) -> None:
    """What is not a number spreads as far as a decoder looks."""
    model = MAKE[family]().eval()
    vae.make_single_frame(model, DECODINGS[family], faithful=False)
    decoder, height, scale = model.decoder, 40, vae.scale(model)
    parts = list(decoder.tail)
    made = rows[0] * scale, rows[1] * scale
    low, high = vae._needs(parts, made, height * scale)[0]
    assert low == 0 or low < rows[0]
    assert high == height or high > rows[1]
    clean = decoder.head(cells(model, height, 4)[:, :, 0])

    def reached(row: int) -> bool:
        poisoned = clean.clone()
        poisoned[:, :, row] = torch.nan
        seen = decoder._strip(parts, poisoned, (0, height * scale), height * scale)
        return bool(seen[:, :, slice(*made)].isnan().any())

    assert reached(low)
    assert reached(high - 1)
    assert low == 0 or not reached(low - 1)
    assert high == height or not reached(high)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("faithful", [False, True])
@torch.inference_mode()
def test_a_decode_never_exceeds_its_plan(family: str, size: Size, faithful: bool) -> None:
    """Full-size decoders; and the plan does not ask for much more than they take, the most where
    they are faithful."""
    decoding, model = DECODINGS[family], full_size(family)
    assert decoding.cell == vae.scale(model)
    latents = cells(model, size.height // decoding.cell, size.width // decoding.cell)
    vae.make_single_frame(model, decoding, faithful)
    known, taken = [*model.parameters(), latents], []
    for strips in (1, 2, 3, 4, 6, 8, 10, 20):
        taken.append(peak_bytes(functools.partial(vae.levels, model, latents, strips), known))
        assert (0.7 if faithful else 0.6) <= taken[-1] / decoding.bytes(size, strips) <= 1
    assert taken == sorted(taken, reverse=True)


@torch.inference_mode()
def test_diffusers_own_takes_twice_that_and_more(family: str) -> None:
    decoding, model, size = DECODINGS[family], full_size(family), Size(1024, 1024)
    latents = cells(model, size.height // decoding.cell, size.width // decoding.cell)
    peak = peak_bytes(lambda: vae.levels(model, latents), [*model.parameters(), latents])
    assert 2 * decoding.bytes(size, strips=1) < peak <= decoding.whole * size.pixels


def test_the_decoder_alone_is_kept(family: str) -> None:
    model, published = full_size(family), DECODINGS[family].parameters
    vae.keep_decoder(model)
    assert sum(weight.numel() for weight in model.parameters()) == published
    vae.make_single_frame(model, DECODINGS[family], faithful=True)
    kept = sum(weight.numel() for weight in model.parameters())
    assert 0.9 * published < kept <= published, "what only other frames need is gone"


@torch.inference_mode()
def test_diffusers_own_decodes_without_the_encoder(family: str) -> None:
    whole = MAKE[family]().eval().requires_grad_(False)
    alone = copy.deepcopy(whole)
    vae.keep_decoder(alone)
    assert np.array_equal(levels(whole, cells(whole, 6, 4)), levels(alone, cells(alone, 6, 4)))


def test_more_strips_than_take_less_are_none(family: str) -> None:
    decoding = DECODINGS[family]
    for size in SIZES:
        most = decoding.most_strips(size)
        least = decoding.bytes(size, most)
        allowed = range(1, min(20, size.height // 64) + 1)
        assert all(decoding.bytes(size, strips) >= least for strips in allowed)
        assert decoding.bytes(size, most - 1) > least
    assert decoding.most_strips(Size(2048, 100)) == 1, "most of a thinner strip is worked twice"


def test_a_budget_becomes_strips(family: str) -> None:
    decoding, size = DECODINGS[family], Size(2048, 2048)
    needs = [decoding.bytes(size, n) for n in range(1, 2048 // decoding.cell + 1)]
    assert needs == sorted(needs, reverse=True)
    for budget in (GIB, 3 * GIB // 2, 4 * GIB, 8 * GIB):
        strips = decoding.strips(size, budget)
        assert strips is not None
        assert needs[strips - 1] <= budget
        assert strips == 1 or needs[strips - 2] > budget
    assert decoding.strips(size, 100 << 20) is None


@torch.inference_mode()
def test_a_picture_has_its_modes_and_size(pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    latents = cells(theirs, 6, 4)
    images = [
        vae.decode(model, latents, lambda cells, mean, std: cells * std + mean, strips)
        for model, strips in ((theirs, 1), (ours, 1), (ours, 4))
    ]
    assert {image.mode for image in images} == {"RGBA" if vae.scale(theirs) == 16 else "RGB"}
    assert {image.size for image in images} == {(4 * vae.scale(theirs), 6 * vae.scale(theirs))}
    assert apart(*(np.asarray(image).astype(int) for image in images[1:])) <= 1


def test_strips_that_cannot_be(family: str) -> None:
    model = MAKE[family]()
    latents = cells(model, 4, 4)
    with pytest.raises(ValueError, match="no strips"):
        levels(model, latents, 2)
    vae.make_single_frame(model, DECODINGS[family], faithful=False)
    for strips in (0, 5):
        with pytest.raises(ValueError, match=f"don't make {strips} strips"):
            levels(model, latents, strips)


def test_the_benchmark_runs_and_writes_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text(
        "Before\n<!-- decode -->\nold\n<!-- end of decode -->\nAfter\n", encoding="utf-8"
    )
    monkeypatch.setattr(benchmark, "PAGE", page)
    arguments = ["--device", "cpu", "--small", "--sizes", "64x64", "--repeats", "1", "--write"]
    arguments += ["--caps", "2", "--run-out"]
    rows = benchmark.main([*arguments, "--json", str(tmp_path / "figures.json")])
    ours = [row for row in rows if row["what"].startswith("ours")]
    assert len(ours) == 12
    assert all(row["levels_apart"] <= 1 and row["seconds"] > 0 for row in ours)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("Before\n")
    assert text.endswith("\nAfter\n")
    assert text.count("ours") == 12
    assert "old" not in text
    assert (tmp_path / "figures.json").stat().st_size > 100
