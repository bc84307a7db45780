"""Text can be read: contrast as WCAG counts it, light and dark."""

import re
from itertools import product
from pathlib import Path

import pytest

from qwen_image_tool.server.plain import PALETTE, plain_page
from qwen_image_tool.ui import theme
from qwen_image_tool.ui.start import start_page
from qwen_image_tool.ui.words import load_words

TEXT = [
    *product(("ink", "soft", "accent"), ("paper", "card", "field", "sunk")),
    *product(("ink", "accent"), ("tint",)),
    *product(("bad",), ("paper", "card", "bad-tint")),
    *product(("soft", "ink"), ("bad-tint", "warn-tint")),
    ("warn", "warn-tint"),
    ("card", "good"),
    ("on-fill", "fill"),
    ("on-fill", "fill-hover"),
]
EDGES = [*product(("strong-line", "accent"), ("paper", "card", "field")), ("accent", "line")]


@pytest.mark.parametrize("shade", [0, 1], ids=["light", "dark"])
def test_contrast(shade: int) -> None:
    """4.5 for text, 3 for the edges of controls and what a bar shows."""
    pairs = [(pair, 4.5) for pair in TEXT] + [(pair, 3.0) for pair in EDGES]
    for (front, back), least in pairs:
        found = contrast(PALETTE[front][shade], PALETTE[back][shade])
        assert found >= least, f"{front} on {back}: {found:.2f}"


def test_the_palette_is_the_only_place_with_colours() -> None:
    style = Path(theme.__file__).with_name("page.css").read_text(encoding="utf-8")
    assert re.findall(r":[^;{]*#[0-9a-f]{3,8}\b", style) == []
    used = set(re.findall(r"var\(--qit-([a-z-]+)\)", style))
    assert used <= set(PALETTE)
    for page in (plain_page("en", ""), start_page(load_words("en"), ())):
        used = set(re.findall(r"var\(--([a-z-]+)\)", page))
        assert used
        assert used <= set(PALETTE)


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
