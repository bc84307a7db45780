"""Pictures beside each other as HTML: one over the other with a slider, or in a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_image_tool.gallery.index import Picture
from qwen_image_tool.gallery.series import differing, in_order, settings
from qwen_image_tool.types import Request
from qwen_image_tool.ui.detail import setting_name, setting_text, top
from qwen_image_tool.ui.kit import picture_url, text
from qwen_image_tool.ui.tiles import thumbnail_url
from qwen_image_tool.ui.words import Words


@dataclass(frozen=True)
class Entry:
    """A picture of a table, or one that is still to come. `said`: what becomes of that one."""

    request: Request
    picture: str = ""
    said: str = ""


def slider_html(t: Words, before: Picture, after: Picture, requests: Sequence[Request]) -> str:
    """Two pictures in one frame; a slider moves the edge between them."""
    shape = f"{before.size.width} / {before.size.height}"
    images = "".join(
        f'<img src="{picture_url(one.id)}" alt="{text(one.prompt or one.file)}">'
        for one in (after, before)
    )
    label = text(t("How much of the first picture is seen"))
    ratio = f"{before.size.width / before.size.height:.4f}"
    return (
        f'<section class="qit-detail">{top(t)}'
        f'<div class="qit-slider" style="aspect-ratio:{shape};--shape:{ratio};'
        f'--width:{before.size.width}px">{images}'
        f'<input type="range" min="0" max="100" value="50" aria-label="{label}"></div>'
        f"{_differences(t, requests)}</section>"
    )


def _differences(t: Words, requests: Sequence[Request]) -> str:
    """What stands left and right; nothing where a picture has no request."""
    if len(requests) < 2:
        return ""
    every = [settings(request) for request in requests]
    rows = "".join(
        f'<tr><th scope="row">{text(setting_name(t, name))}</th>'
        + "".join(f"<td>{text(setting_text(t, name, one.get(name)))}</td>" for one in every)
        + "</tr>"
        for name in differing(requests)
    )
    heads = "".join(f'<th scope="col">{text(name)}</th>' for name in (t("Before"), t("After")))
    nothing = f"<p>{text(t('They have the same settings.'))}</p>"
    table = f'<table class="qit-table"><thead><tr><td></td>{heads}</tr></thead>{rows}</table>'
    return table if rows else nothing


def table_html(t: Words, entries: Sequence[Entry], x: str, y: str) -> str:
    """The entries by the settings `x` and `y`; "" for x: the setting with the most values."""
    apart = differing([entry.request for entry in entries])
    x, y = _axes(apart, x, y)
    columns, rows = _values(entries, x), _values(entries, y)
    heads = "".join(f'<th scope="col">{text(setting_text(t, x, value))}</th>' for value in columns)
    lines = "".join(
        f'<tr><th scope="row">{text(setting_text(t, y, value)) if y else ""}</th>'
        + "".join(f"<td>{_cell(t, _at(entries, {x: column, y: value}))}</td>" for column in columns)
        + "</tr>"
        for value in rows
    )
    corner = f"<td>{text(setting_name(t, y) if y else '')}</td>"
    caption = text(setting_name(t, x)) if x else text(t("They have the same settings."))
    return (
        f'<section class="qit-detail">{top(t, _chooser(t, list(apart), x, y))}'
        f'<div class="qit-scroll" tabindex="0" role="region" aria-label="{caption}">'
        f'<table class="qit-table pictures"><caption>{caption}</caption>'
        f"<thead><tr>{corner}{heads}</tr></thead><tbody>{lines}</tbody></table></div></section>"
    )


def _axes(apart: Mapping[str, Sequence[Any]], x: str, y: str) -> tuple[str, str]:
    """Those that were chosen, where the entries differ in them; else the longest ones."""
    longest = sorted(apart, key=lambda name: -len(apart[name]))
    x = x if x in apart else next(iter(longest), "")
    if y not in apart or y == x:
        y = next((name for name in longest if name != x), "") if y != "-" else ""
    return x, y


def _values(entries: Sequence[Entry], name: str) -> list[Any]:
    found = [settings(entry.request).get(name) for entry in entries]
    return in_order(list({str(value): value for value in found}.values()))


def _at(entries: Sequence[Entry], values: Mapping[str, Any]) -> list[Entry]:
    return [
        entry
        for entry in entries
        if all(not n or settings(entry.request).get(n) == v for n, v in values.items())
    ]


def _cell(t: Words, entries: Sequence[Entry]) -> str:
    return "".join(_entry(t, entry) for entry in entries) or '<span class="soft">–</span>'


def _entry(t: Words, entry: Entry) -> str:
    if not entry.picture:
        size = entry.request.size
        shape = f"aspect-ratio:{size.width}/{size.height}" if size else ""
        return f'<span class="qit-later soft" style="{shape}">{text(entry.said)}</span>'
    name = text(t("Seed {seed}", seed=entry.request.seed))
    return (
        f'<button type="button" class="qit-tile" data-do="show" data-picture="{entry.picture}"'
        f' data-key="show-{entry.picture}" aria-label="{name}">'
        f'<img src="{thumbnail_url(entry.picture)}" alt="" loading="lazy"></button>'
    )


def _chooser(t: Words, names: Sequence[str], x: str, y: str) -> str:
    """Which settings are the columns and the rows."""
    if len(names) < 2:
        return ""

    def select(axis: str, label: str, chosen: str, none: bool) -> str:
        options = ['<option value="-">–</option>'] if none else []
        options += [
            f'<option value="{name}"{" selected" if name == chosen else ""}>'
            f"{text(setting_name(t, name))}</option>"
            for name in names
        ]
        return f'<label>{text(label)} <select name="{axis}">{"".join(options)}</select></label>'

    return (
        '<form class="qit-axes" data-form="axes" data-at-once>'
        f"{select('x', t('Columns'), x, none=False)}{select('y', t('Rows'), y, none=True)}</form>"
    )
