"""What is no picture is found, and the next plan answers it."""

import pytest
import torch
from PIL import Image

from qwen_image_tool.engine.checks import SAFER, check_finite, check_image
from qwen_image_tool.errors import BrokenPicture
from qwen_image_tool.ui.kit import sentence
from qwen_image_tool.ui.words import load_words


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_number_is_enough(bad: float, dtype: torch.dtype) -> None:
    latents = torch.randn(2, 64, 16).to(dtype)
    check_finite(latents)
    latents[1, 63, 15] = bad
    with pytest.raises(BrokenPicture, match="--mode exact"):
        check_finite(latents)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (12, 200, 7)])
def test_one_colour_is_no_picture(mode: str, colour: tuple[int, int, int]) -> None:
    image = Image.new("RGB", (32, 16), colour).convert(mode)
    with pytest.raises(BrokenPicture, match="one single colour"):
        check_image(image)
    image.putpixel((31, 15), (13, *image.getpixel((0, 0))[1:]))  # type: ignore[index]
    check_image(image)


def test_what_to_do_is_said_in_chinese() -> None:
    assert sentence(load_words("zh"), SAFER).startswith("请校验模型")
