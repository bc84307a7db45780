"""The size menu: seven ratios with four resolutions each, in pixels (width x height)."""

import math
import re

from qwen_image_tool.catalog import did_you_mean
from qwen_image_tool.errors import BadRequest
from qwen_image_tool.types import Size

RESOLUTIONS = ("Small", "Medium", "Large", "Max")

_MENU = {
    "1:1": "512x512 1024x1024 1328x1328 2048x2048",
    "16:9": "512x288 1024x576 1664x928 2048x1152",
    "9:16": "288x512 576x1024 928x1664 1152x2048",
    "4:3": "512x384 1024x768 1472x1140 2048x1536",
    "3:4": "384x512 768x1024 1140x1472 1536x2048",
    "3:2": "512x342 1024x682 1584x1056 2048x1366",
    "2:3": "342x512 682x1024 1056x1584 1366x2048",
}

SIZES: dict[tuple[str, str], Size] = {
    (ratio, resolution): Size.parse(text)
    for ratio, row in _MENU.items()
    for resolution, text in zip(RESOLUTIONS, row.split(), strict=True)
}
RATIOS = tuple(_MENU)


def menu_size(ratio: str, resolution: str) -> Size:
    """The promised pixels of a menu entry. Raises BadRequest that names the nearest entry."""
    return SIZES[_ratio(ratio, RATIOS), _one_of("resolution", resolution, RESOLUTIONS)]


def native_size(native: dict[str, Size], ratio: str) -> Size:
    """The model's own size for a ratio. Raises BadRequest that names the nearest ratio."""
    return native[_ratio(ratio, tuple(native))]


def _ratio(value: str, choices: tuple[str, ...]) -> str:
    numbers = re.fullmatch(r"\s*(\d{1,4})\s*:\s*(\d{1,4})\s*", value)
    if value in choices or not numbers or "0" in numbers.groups():
        return _one_of("ratio", value, choices)
    asked = math.log(int(numbers[1]) / int(numbers[2]))

    def distance(choice: str) -> float:
        width, height = choice.split(":")
        return abs(math.log(int(width) / int(height)) - asked)

    nearest = min(choices, key=distance)
    raise BadRequest(f"There is no ratio {value!r}.", f"The nearest is {nearest}.")


def _one_of(what: str, value: str, choices: tuple[str, ...]) -> str:
    match = next((c for c in choices if c.lower() == value.strip().lower()), None)
    if match is None:
        raise BadRequest(f"There is no {what} {value!r}.", did_you_mean(value, choices))
    return match
