"""One picture with all its settings and what can be done with them, as HTML."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from qwen_image_tool.gallery import ImageInfo
from qwen_image_tool.gallery.index import Picture
from qwen_image_tool.gallery.series import VARIED
from qwen_image_tool.types import Mode, Request
from qwen_image_tool.ui.kit import button, picture_url, size_text, text, told
from qwen_image_tool.ui.words import Words

MODES = get_args(Mode)
OFFERED = {"png": "PNG", "jpeg": "JPEG", "webp": "WebP"}


@dataclass(frozen=True)
class Shown:
    """A picture of the gallery. `alike`: by setting, how many differ from it in that one alone."""

    picture: Picture
    info: ImageInfo
    newer: str
    older: str
    alike: dict[str, int] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Read:
    """A picture file that was dropped on the page: a small WebP of it, and what it says.
    `fields`: of a Request like it."""

    name: str
    image: bytes
    info: ImageInfo
    fields: dict[str, Any]


def setting_name(t: Words, name: str) -> str:
    """As the form calls it."""
    return {
        "seed": t("Seed"),
        "steps": t("Steps"),
        "cfg": t("True CFG scale"),
        "size": t("Size"),
        "model": t("Model"),
        "mode": t("Mode"),
        "prompt": t("Prompt"),
        "negative_prompt": t("Negative prompt"),
    }.get(name, name)


def mode_text(t: Words, mode: str) -> str:
    return t("Exact, as diffusers") if mode == "exact" else t("Standard")


def setting_text(t: Words, name: str, value: object) -> str:
    """A setting's value, as the form calls it; a dash where there is none."""
    if name == "mode":
        return mode_text(t, str(value))
    return "–" if value in (None, "") else f"{value:g}" if isinstance(value, float) else str(value)


def shown_html(t: Words, now: Shown) -> str:
    picture, request = now.picture, now.info.request
    size = picture.size
    image = (
        f'<img src="{picture_url(picture.id)}" width="{size.width}" height="{size.height}"'
        f' alt="{text(picture.prompt or picture.file)}">'
    )
    parts = [
        _note(t, now.note),
        f'<p class="qit-said">{text(picture.prompt or picture.file)}</p>',
        _acts(t, picture, request),
        _settings(_of_request(t, request) if request else _of_text(t, now.info)),
        _settings(_of_file(t, picture, now.info)),
        _how(t, now.info),
        _save(t, picture.id),
        _alike(t, picture.id, now.alike),
        _series(t, picture.id) if request else "",
    ]
    return frame(t, _steps(t, now), image, "".join(parts), picture.id)


def read_html(t: Words, read: Read) -> str:
    """What another file says of itself."""
    source = f"data:image/webp;base64,{base64.b64encode(read.image).decode()}"
    image = f'<img src="{source}" alt="{text(read.name)}">'
    if read.fields:
        act = button(t("Restore settings"), "restore", "primary")
        said = t("This file says what it was made from.")
    else:
        act = ""
        said = t(
            "This file does not say what it was made from. Copies that a chat or a website made"
            " have lost it."
        )
    parts = [
        f'<p class="qit-said">{text(read.name)}</p><p class="soft">{text(said)}</p>',
        f'<div class="qit-row">{act}</div>',
        _settings([(setting_name(t, name), str(read.fields[name])) for name in read.fields]),
        _raw(t, read.info.parameters),
    ]
    return frame(t, "", image, "".join(parts))


def frame(t: Words, more: str, image: str, aside: str, picture: str = "") -> str:
    """A picture with what is said of it beside, and the way back."""
    return (
        f'<section class="qit-detail" data-picture="{picture}">{top(t, more)}'
        f'<div class="qit-detail-parts"><div class="qit-large">{image}</div>'
        f"<div>{aside}</div></div></section>"
    )


def top(t: Words, more: str = "") -> str:
    """The way back, and what else is at the top."""
    back = button(t("Back"), "back", title="") + more
    return f'<div class="qit-detail-top qit-row">{back}</div>'


def _steps(t: Words, now: Shown) -> str:
    """To the next pictures. Their buttons keep the focus from one picture to the next."""

    def step(label: str, title: str, key: str, to: str) -> str:
        gone = "" if to else " disabled"
        return (
            f'<button type="button" class="qit-button" data-do="show" data-key="{key}"'
            f' data-picture="{to}" title="{text(title)}" aria-label="{text(title)}"{gone}>'
            f"{label}</button>"
        )

    return step("←", t("Newer"), "newer", now.newer) + step("→", t("Older"), "older", now.older)


def _acts(t: Words, picture: Picture, request: Request | None) -> str:
    label = t("★ Starred") if picture.star else t("☆ Star")
    star = button(label, "star", picture=picture.id)
    star = star.replace("<button ", f'<button aria-pressed="{str(picture.star).lower()}" ', 1)
    acts = [star, button(t("Delete"), "delete", "cancel", pictures=picture.id)]
    if request:
        again = button(t("Again with another seed"), "again", "primary", picture=picture.id)
        acts = [again, button(t("Restore settings"), "restore", picture=picture.id), *acts]
    elif picture.prompt:
        acts.insert(0, button(t("Restore settings"), "restore", "primary", picture=picture.id))
    return f'<div class="qit-row">{"".join(acts)}</div>'


def _note(t: Words, note: str) -> str:
    if not note:
        return ""
    watch = button(t("Watch it"), "watch", "plain")
    return f'<div class="qit-card qit-note" role="status"><p>{text(note)}</p>{watch}</div>'


def _of_request(t: Words, request: Request) -> list[tuple[str, str]]:
    values = request.model_dump(mode="json")
    return [
        (setting_name(t, name), setting_text(t, name, values[name]))
        for name in VARIED
        if name != "prompt" and values[name] is not None and str(values[name]).strip()
    ]


def _of_text(t: Words, info: ImageInfo) -> list[tuple[str, str]]:
    """Another program's picture: its text is what there is."""
    return [(t("Settings as text"), info.parameters)] if info.parameters else []


def _of_file(t: Words, picture: Picture, info: ImageInfo) -> list[tuple[str, str]]:
    versions = " · ".join(f"{name} {version}" for name, version in info.versions.items())
    return [
        (t("Made"), picture.taken.replace("T", " ")),
        (t("File"), f"{picture.file} · {size_text(picture.bytes)}"),
        *([(t("Versions"), versions)] if versions else []),
    ]


def _settings(rows: Sequence[tuple[str, str]]) -> str:
    inside = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in rows
    )
    return f'<dl class="qit-settings">{inside}</dl>' if rows else ""


def _how(t: Words, info: ImageInfo) -> str:
    reasons = "".join(
        f"<li>{told(t, reason)}</li>" for reason in (info.plan.reasons if info.plan else ())
    )
    how = f"<details><summary>{text(t('How it was run'))}</summary><ul>{reasons}</ul></details>"
    return how if reasons else ""


def _raw(t: Words, said: str) -> str:
    if not said:
        return ""
    summary = text(t("The text in the file"))
    return f"<details><summary>{summary}</summary><pre>{text(said)}</pre></details>"


def _save(t: Words, picture: str) -> str:
    options = "".join(f'<option value="{form}">{name}</option>' for form, name in OFFERED.items())
    return (
        f'<form class="qit-form" data-save="{picture_url(picture)}"><h3>{text(t("Save"))}</h3>'
        f'<div class="qit-row"><label>{text(t("Format"))} '
        f'<select name="format">{options}</select></label>'
        f'<label><input type="checkbox" name="metadata" value="false"> '
        f"{text(t('without its settings'))}</label>"
        f'<button class="qit-button">{text(t("Save as"))}</button></div></form>'
    )


def _alike(t: Words, picture: str, alike: dict[str, int]) -> str:
    """Comparisons with pictures that were made before."""
    if not alike:
        return ""
    buttons = "".join(
        button(f"{setting_name(t, name)} ({count + 1})", "alike", picture=picture, setting=name)
        for name, count in alike.items()
    )
    title = t("Compare with pictures that differ only in")
    return f'<div class="qit-form"><h3>{text(title)}</h3><div class="qit-row">{buttons}</div></div>'


def _series(t: Words, picture: str) -> str:
    """A form that queues this picture again for each value of one setting, or of two."""

    def axis(number: str, label: str, first: str) -> str:
        none = "" if first else '<option value="">–</option>'
        options = none + "".join(
            f'<option value="{name}">{text(setting_name(t, name))}</option>' for name in VARIED
        )
        return (
            f'<div class="qit-axis"><label>{text(label)}'
            f'<select name="{number}">{options}</select></label>'
            f"<label>{text(t('Values'))}"
            f'<input name="{number}_values" autocomplete="off"></label>'
            "</div>"
        )

    said = t("Commas between values, | between prompts. No values for the seed: the next four.")
    return (
        f'<form class="qit-form" data-form="series" data-picture="{picture}">'
        f"<h3>{text(t('Queue a series'))}</h3>"
        f"{axis('x', t('Columns'), 'seed')}{axis('y', t('Rows'), '')}"
        f'<p class="soft">{text(said)}</p>'
        f'<button class="qit-button">{text(t("Queue the series"))}</button></form>'
    )
