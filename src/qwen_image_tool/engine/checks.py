"""Whether what came out is a picture: a kernel that computes wrongly says nothing itself."""

import torch
from PIL import Image

from qwen_image_tool.errors import BrokenPicture

SAFER = (
    "Verify the model; if it is whole, draw it with --mode exact, and with a GPU update its driver."
)


def check_finite(numbers: torch.Tensor) -> None:
    """Raises BrokenPicture where one is not. Waits for the device, once."""
    if not bool(torch.isfinite(numbers).all()):
        raise BrokenPicture("The numbers left their range on the way to the picture.", SAFER)


def check_image(image: Image.Image) -> None:
    """Raises BrokenPicture where every pixel has the same colour: numbers that are not finite
    become black, and no decoder gives exactly one value everywhere."""
    extrema = image.convert("RGB").getextrema()
    if all(low == high for low, high in extrema):  # type: ignore[misc]
        raise BrokenPicture("The picture came out in one single colour.", SAFER)
