"""The gallery's list as HTML: tiles, what can be done to those that are picked, what was deleted.

`tiles.js` keeps only the tiles near the window in the document, and asks for them by their place.
"""

import json
from dataclasses import dataclass

from qwen_image_tool.gallery.index import Filter, Index, Picture
from qwen_image_tool.ui.kit import button, text
from qwen_image_tool.ui.words import Words

PAGE = 60  # tiles that are asked for at once
THUMBNAIL = 320  # pixels


@dataclass(frozen=True)
class Listed:
    """What the list shows. `first`: the pictures of its first page."""

    wanted: Filter
    count: int
    first: tuple[Picture, ...]
    deleted: int
    empty: bool


def listed(index: Index, wanted: Filter) -> Listed:
    """Raises BadRequest where it can't be searched for."""
    count = index.count(wanted)
    return Listed(
        wanted=wanted,
        count=count,
        first=index.search(wanted, PAGE).pictures if count else (),
        deleted=len(index.deleted),
        empty=not count and not index.count(),
    )


def tiles_from(t: Words, index: Index, wanted: Filter, start: int) -> list[str]:
    """One page of tiles, from the place `start` on."""
    return [tile(t, picture) for picture in index.search(wanted, PAGE, start=start).pictures]


def list_html(t: Words, now: Listed) -> str:
    """For tiles.js: `data-filter` tells whether it is another list, `data-first` is its first page
    as JSON."""
    first = json.dumps([tile(t, picture) for picture in now.first])
    return (
        f"{_deleted(t, now.deleted)}{_picked(t)}"
        f'<div class="qit-album" data-filter="{text(now.wanted.to_json())}"'
        f' data-count="{now.count}" data-first="{text(first)}" data-label="{text(t("Pictures"))}">'
        f'<p class="soft" role="status">{_said(t, now)}</p></div>'
    )


def tile(t: Words, picture: Picture) -> str:
    """One picture of the list. Its checkbox and its star have keys of their own, x and s."""
    name = picture.prompt or picture.file
    facts = [name] + ([t("Seed {seed}", seed=picture.seed)] if picture.seed is not None else [])
    star = button("★" if picture.star else "☆", "star", "sign", picture=picture.id)
    label, pressed = text(t("Star")), "true" if picture.star else "false"
    star = star.replace(
        "<button ", f'<button tabindex="-1" title="{label}" aria-pressed="{pressed}" ', 1
    )
    return (
        f'<li data-picture="{picture.id}"{" class=starred" if picture.star else ""}>'
        f'<button type="button" class="qit-tile" data-do="show" data-picture="{picture.id}"'
        f' data-key="show-{picture.id}" tabindex="-1" aria-label="{text(", ".join(facts))}"'
        ' aria-keyshortcuts="x s Delete">'
        f'<img src="{thumbnail_url(picture.id)}" alt="" loading="lazy" decoding="async"'
        ' fetchpriority="low"'
        f' width="{picture.size.width}" height="{picture.size.height}"></button>'
        f'<input type="checkbox" tabindex="-1" data-pick="{picture.id}"'
        f' aria-label="{text(t("Pick {name}", name=name))}">{star}</li>'
    )


def thumbnail_url(picture: str, side: int = THUMBNAIL) -> str:
    """Of a small WebP of it, of `side` pixels a side."""
    return f"/api/gallery/{picture}/thumbnail?side={side}"


def _said(t: Words, now: Listed) -> str:
    if now.empty:
        return text(t("Your pictures appear here, and stay. Draw one on the Create tab."))
    if not now.count:
        return text(t("No picture is like that. Search for fewer words, or take a filter away."))
    keys = t("Keys: arrows move, Enter opens, X picks, S stars, Delete deletes")
    many = t("{count} pictures", count=f"{now.count:,}")
    count = t("1 picture") if now.count == 1 else many
    return f'{text(count)}<span class="qit-keys"> · {text(keys)}</span>'


def _picked(t: Words) -> str:
    """The bar for picked pictures; tiles.js fills in which and how many."""
    many = text(t("{count} picked", count="%s"))
    buttons = "".join(
        (
            button(t("Before / after"), "slider", "two"),
            button(t("Compare in a table"), "table", "several"),
            button(t("Star"), "stars"),
            button(t("Delete"), "delete", "cancel"),
        )
    )
    none = f'<button type="button" class="qit-button plain" data-none>{text(t("Clear"))}</button>'
    return (
        f'<div class="qit-picked qit-card" hidden data-said="{many}"><strong></strong>'
        f'<div class="qit-row">{buttons}{none}</div></div>'
    )


def _deleted(t: Words, count: int) -> str:
    if not count:
        return ""
    said = text(t("{count} in the trash now.", count=count))
    buttons = button(t("Undo"), "undo") + button("×", "forget", "plain", title=t("Close"))
    return f'<div class="qit-deleted qit-card" role="status"><p>{said}</p>{buttons}</div>'
