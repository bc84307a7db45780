"""One calm theme: our colours, sizes and system fonts on Gradio's tokens, light and dark.

Text has a contrast of 4.5 or more on what it stands on (WCAG AA); `tests/ui/test_theme.py` counts.
"""

from typing import Any

from gradio.themes.base import Base
from gradio.themes.utils import sizes
from gradio.themes.utils.colors import Color

from qwen_image_tool.server.plain import PALETTE

FONTS = (
    "system-ui",
    "-apple-system",
    "Segoe UI",
    "Roboto",
    "Noto Sans",
    "PingFang SC",
    "Microsoft YaHei",
    "Noto Sans CJK SC",
    "sans-serif",
)
MONOSPACE = ("ui-monospace", "SFMono-Regular", "Consolas", "DejaVu Sans Mono", "monospace")

# Gradio's token: our colour
_TOKENS = {
    "body_background_fill": "paper",
    "body_text_color": "ink",
    "body_text_color_subdued": "soft",
    "background_fill_primary": "card",
    "background_fill_secondary": "sunk",
    "border_color_primary": "line",
    "border_color_accent": "accent",
    "color_accent_soft": "tint",
    "link_text_color": "accent",
    "link_text_color_hover": "accent",
    "link_text_color_active": "accent",
    "link_text_color_visited": "accent",
    "block_background_fill": "card",
    "block_border_color": "line",
    "block_info_text_color": "soft",
    "block_label_background_fill": "card",
    "block_label_text_color": "soft",
    "block_title_text_color": "ink",
    "panel_background_fill": "card",
    "panel_border_color": "line",
    "accordion_text_color": "ink",
    "input_background_fill": "field",
    "input_background_fill_focus": "field",
    "input_background_fill_hover": "field",
    "input_border_color": "strong-line",
    "input_border_color_focus": "accent",
    "input_border_color_hover": "accent",
    "input_placeholder_color": "soft",
    "checkbox_background_color": "field",
    "checkbox_background_color_hover": "field",
    "checkbox_background_color_focus": "field",
    "checkbox_background_color_selected": "fill",
    "checkbox_border_color": "strong-line",
    "checkbox_border_color_focus": "accent",
    "checkbox_border_color_hover": "accent",
    "checkbox_border_color_selected": "fill",
    "checkbox_label_background_fill": "card",
    "checkbox_label_background_fill_hover": "tint",
    "checkbox_label_background_fill_selected": "tint",
    "checkbox_label_border_color": "line",
    "checkbox_label_text_color": "ink",
    "checkbox_label_text_color_selected": "ink",
    "error_background_fill": "bad-tint",
    "error_border_color": "bad",
    "error_text_color": "bad",
    "error_icon_color": "bad",
    "slider_color": "fill",
    "loader_color": "fill",
    "table_border_color": "line",
    "table_even_background_fill": "card",
    "table_odd_background_fill": "sunk",
    "button_primary_background_fill": "fill",
    "button_primary_background_fill_hover": "fill-hover",
    "button_primary_border_color": "fill",
    "button_primary_border_color_hover": "fill-hover",
    "button_primary_text_color": "on-fill",
    "button_primary_text_color_hover": "on-fill",
    "button_secondary_background_fill": "card",
    "button_secondary_background_fill_hover": "tint",
    "button_secondary_border_color": "strong-line",
    "button_secondary_border_color_hover": "accent",
    "button_secondary_text_color": "ink",
    "button_secondary_text_color_hover": "ink",
    "button_cancel_background_fill": "card",
    "button_cancel_background_fill_hover": "bad-tint",
    "button_cancel_border_color": "bad",
    "button_cancel_border_color_hover": "bad",
    "button_cancel_text_color": "bad",
    "button_cancel_text_color_hover": "bad",
}

_SHAPES = {
    "block_border_width": "0px",
    "block_shadow": "none",
    "block_padding": "0px",
    "block_label_text_weight": "500",
    "block_title_text_weight": "550",
    "block_title_text_size": "14px",
    "block_info_text_size": "13px",
    "block_radius": "10px",
    "input_border_width": "1px",
    "input_padding": "9px 12px",
    "input_radius": "8px",
    "input_shadow": "none",
    "input_shadow_focus": "none",
    "input_text_size": "15px",
    "button_border_width": "1px",
    "button_large_radius": "8px",
    "button_medium_radius": "8px",
    "button_small_radius": "8px",
    "button_large_text_size": "15px",
    "button_large_text_weight": "550",
    "button_medium_text_weight": "500",
    "button_small_text_size": "14px",
    "button_small_text_weight": "500",
    "button_large_padding": "10px 18px",
    "button_primary_shadow": "none",
    "button_primary_shadow_hover": "none",
    "button_secondary_shadow": "none",
    "button_secondary_shadow_hover": "none",
    "button_transition": "background-color 120ms ease",
    "checkbox_label_shadow": "none",
    "checkbox_border_width": "1px",
    "form_gap_width": "0px",
    "layout_gap": "16px",
    "panel_border_width": "0px",
}


def theme() -> Base:
    """Gradio's theme of the page."""
    made = Base(
        primary_hue=_ramp("accent"),
        secondary_hue=_ramp("accent"),
        neutral_hue="zinc",
        text_size=sizes.text_md,
        spacing_size=sizes.spacing_md,
        radius_size=sizes.radius_md,
        font=FONTS,
        font_mono=MONOSPACE,
    )
    colours: dict[str, Any] = {}
    for token, name in _TOKENS.items():
        colours[token], colours[f"{token}_dark"] = PALETTE[name]
    return made.set(**colours, **_SHAPES)


def palette_css() -> str:
    """The palette as custom properties, for light and dark."""
    light = "".join(f"--qit-{name}:{pair[0]};" for name, pair in PALETTE.items())
    dark = "".join(f"--qit-{name}:{pair[1]};" for name, pair in PALETTE.items())
    return f":root{{{light}}} :root .dark, .dark{{{dark}}}\n"


_SHADES = (50, 100, 200, 300, 400, 500, 600, 700, 800, 900, 950)


def _ramp(name: str) -> Color:
    """Gradio wants eleven shades where our tokens name the few that are used."""
    light, dark = PALETTE[name]
    tint, dark_tint = PALETTE["tint"]
    values = [tint, tint, dark, dark, dark, light, light, light, light, dark_tint, dark_tint]
    return Color(name=name, **{f"c{shade}": v for shade, v in zip(_SHADES, values, strict=True)})
