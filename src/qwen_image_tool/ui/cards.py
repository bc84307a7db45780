"""The Models tab as HTML. It only shows: a book is a model with what is here of it."""

from collections.abc import Sequence

from qwen_image_tool.gauges import Gauge
from qwen_image_tool.store.formats import WORDS, Stranger
from qwen_image_tool.transfers import FETCHING, Transfer
from qwen_image_tool.types import DownloadProgress, Failure, VerifyProgress
from qwen_image_tool.ui.kit import (
    button,
    fact,
    failure_card,
    memory_text,
    meter,
    row,
    sentence,
    size_text,
    text,
    time_text,
    told,
)
from qwen_image_tool.ui.shelf import ACTIONS, Book, Question, Shelf
from qwen_image_tool.ui.words import Words

SHORT = 12  # digits of a commit that are shown


def shelf_html(t: Words, now: Shelf, asked: Question | None) -> str:
    best = now.best.model if now.best and now.best.runs else ""
    books = sorted(now.books, key=lambda book: _order(book, best))
    runnable = [book for book in books if not book.model.unsupported]
    later = [book for book in books if book.model.unsupported]
    disks = "".join(disk_fact(t, disk, now.used) for disk in now.disks)
    waiting = "" if now.knows else _soft(t("Reading what this computer can do …"))
    return "".join(
        [
            f'<dl class="qit-gauges">{disks}</dl>',
            waiting,
            *(_card(t, book, now, best, asked) for book in runnable),
            _fold(
                t("Models that this version can't run yet ({count})", count=len(later)),
                "later",
                "".join(_card(t, book, now, best, asked) for book in later),
            ),
        ]
    )


def _order(book: Book, best: str) -> tuple[bool, bool, int]:
    """What is recommended, what is here or on its way, then the newest."""
    here = book.row["state"] == "ready" or book.transfer is not None
    return book.model.id != best, not here, -int(book.model.released.replace("-", ""))


def disk_fact(t: Words, disk: Gauge, used: int) -> str:
    """A disk that we keep something on, with what the models take of theirs."""
    parts = [
        t(
            "{free} free of {total}",
            free=size_text(disk.free_bytes),
            total=size_text(disk.total_bytes),
        )
    ]
    if "models" in disk.holds:
        parts.append(t("models take {size}", size=size_text(used)))
    taken = 1 - disk.free_bytes / disk.total_bytes if disk.total_bytes else 1.0
    warned = f'<p class="warn">{text(t("Free some space."))}</p>' if disk.low else ""
    name = t("Disk {where}", where=disk.where)
    return fact(name, " · ".join(parts), meter(taken, disk.low) + warned)


# One model


def _card(t: Words, book: Book, now: Shelf, best: str, asked: Question | None) -> str:
    is_best, name = book.model.id == best, text(book.model.id)
    own = asked if asked and asked.model == book.model.id else None
    wanted = ""
    if own and own.kind == "get":
        wanted, own = f' data-wanted="{own.at}" data-key="book-{name}" tabindex="-1"', None
    return (
        f'<article class="qit-card qit-book {"best" if is_best else ""}"{wanted}'
        f' data-model="{name}" aria-labelledby="qit-book-{name}">'
        f"{_head(t, book, is_best)}{_why(t, book, now, is_best)}"
        f'<div class="qit-beside">{_needs(t, book)}{_buttons(t, book, is_best, own)}</div>'
        f"{_work(t, book)}{_asked(t, book, own)}{_more(t, book)}</article>"
    )


def _head(t: Words, book: Book, is_best: bool) -> str:
    marks = [_mark(t("Best for this computer"), "best")] if is_best else []
    if book.row["state"] == "ready":
        marks.append(_mark(t("✓ on this computer"), "good"))
    elif _is_begun(book):
        marks.append(_mark(t("not complete"), "warn"))
    if not book.licence.commercial:
        marks.append(_mark(t("Not for commercial use"), ""))
    tasks = {
        "text-to-image": t("Text to picture"),
        "edit": t("Edits pictures"),
        "layers": t("Makes layers"),
    }
    does = " · ".join(tasks[task] for task in book.model.does)
    return (
        f'<header><h3 id="qit-book-{text(book.model.id)}">{text(t.known(book.model.name))}</h3>'
        f'<span class="soft">{text(does)}</span>{"".join(marks)}</header>'
    )


def _mark(said: str, kind: str) -> str:
    return f'<span class="qit-mark {kind}">{text(said)}</span>'


def _why(t: Words, book: Book, now: Shelf, is_best: bool) -> str:
    """Why it is recommended, or why it can't run."""
    needs = book.row["needs"]
    if book.model.unsupported:
        return _soft(sentence(t, book.model.unsupported))
    if is_best and now.best:
        return _soft(sentence(t, now.best.reason))
    if needs and not needs["runs"]:
        return f'<p class="warn">{told(t, needs["reason"])}</p>'
    return ""


def _needs(t: Words, book: Book) -> str:
    """What a picture with the model's own settings takes here."""
    needs, size = book.row["needs"], book.row["bytes"]
    facts = [fact(t("Disk"), size_text(size))] if size else []
    if needs and needs["runs"]:
        if needs["vram_bytes"]:
            facts.append(fact(t("GPU memory"), memory_text(needs["vram_bytes"])))
        facts.append(fact(t("Memory"), memory_text(needs["ram_bytes"])))
        seconds = needs["seconds"]
        known = t("not known yet") if seconds is None else time_text(t, seconds)
        facts.append(fact(t("Time for a picture"), known))
    return f'<dl class="qit-needs four">{"".join(facts)}</dl>'


# Work on it


def _work(t: Words, book: Book) -> str:
    """What is done with it now, or what came of the last thing."""
    transfer = book.transfer
    if transfer is None or transfer.state == "cancelled":
        return ""
    if transfer.state in ("running", "paused"):
        return _progress(t, transfer)
    if transfer.failure:
        return _failed(t, book, transfer, transfer.failure)
    return _ended(t, book, transfer)


def _progress(t: Words, transfer: Transfer) -> str:
    names = {
        "import": t("Reading the file"),
        "check": t("Checking"),
        "verify": t("Checking every byte"),
        "repair": t("Repairing"),
        "update": t("Updating"),
    }
    running = transfer.state == "running"
    parts = [names.get(transfer.action, t("Downloading")) if running else t("Paused")]
    found, share = transfer.progress, 0.0
    if running and isinstance(found, VerifyProgress) and transfer.action in FETCHING:
        parts = [t("Checking every byte")]  # of what was here before
    if found and found.total_bytes:
        share = found.done_bytes / found.total_bytes
        sizes = {"done": size_text(found.done_bytes), "total": size_text(found.total_bytes)}
        parts.append(t("{done} of {total}", **sizes))
    if running and isinstance(found, DownloadProgress) and found.bytes_per_second:
        parts.append(t("{size} a second", size=size_text(int(found.bytes_per_second))))
        if found.seconds_left is not None:
            parts.append(t("{time} left", time=time_text(t, found.seconds_left)))
    said = " · ".join(parts)
    bar = (
        f'<div class="qit-bar" role="progressbar" aria-label="{text(parts[0])}" aria-valuemin="0"'
        f' aria-valuemax="100" aria-valuenow="{100 * share:.0f}">'
        f'<i style="width:{share:.2%}"></i></div>'
    )
    return f'<div class="qit-work">{bar}<p>{text(said)}</p>{_notes(t, transfer)}</div>'


def _notes(t: Words, transfer: Transfer) -> str:
    said = "".join(f"<li>{told(t, note)}</li>" for note in transfer.notes)
    return f'<ul class="qit-why">{said}</ul>' if said else ""


def _ended(t: Words, book: Book, transfer: Transfer) -> str:
    if transfer.faults:
        found = "".join(f"<li>{told(t, each.message)}</li>" for each in transfer.faults)
        if transfer.action == "repair":
            return f'<div class="qit-work"><p>{text(t("Mended:"))}</p><ul>{found}</ul></div>'
        absent = any(each.path in book.model.components for each in transfer.faults)
        repair = (
            _do(t("Download"), "get", book, "primary")
            if absent
            else _do(t("Repair"), "repair", book)
        )
        return f'<div class="qit-card bad" role="alert"><ul>{found}</ul>{row(repair)}</div>'
    said = {
        "check": t("Nothing is missing: sizes and headers are right."),
        "verify": t("Every byte is as published."),
        "repair": t("Nothing was broken."),
        "import": t("The file is used where it lies."),
    }.get(transfer.action, t("The download is complete."))
    return f'<div class="qit-work"><p class="good">✓ {text(said)}</p>{_notes(t, transfer)}</div>'


def _failed(t: Words, book: Book, transfer: Transfer, failure: Failure) -> str:
    if failure.kind == "request" and not book.licence.commercial:  # its words have changed
        read = _do(t("Read the licence"), "licence", book, "primary", then=_button_of(transfer))
        hint = t("Press “Read the licence”: the download goes on once you agree.")
        return failure_card(t, failure.model_copy(update={"hint": hint}), read)
    return failure_card(t, failure, _remedy(t, book, transfer, failure))


def _button_of(transfer: Transfer) -> str:
    return next(do for do, action in ACTIONS.items() if action == transfer.action)


def _remedy(t: Words, book: Book, transfer: Transfer, failure: Failure) -> str:
    """The button that fits what went wrong."""
    if failure.kind in ("broken file", "wrong component"):
        return _do(t("Repair"), "repair", book)
    if failure.kind == "missing file":
        return _do(t("Download"), "get", book)
    again = t("Resume") if transfer.action in FETCHING else t("Try again")
    return _do(again, "go-on", book, "primary")


# What can be done


def _buttons(t: Words, book: Book, is_best: bool, asked: Question | None) -> str:
    transfer, kind = book.transfer, "primary" if is_best else ""
    if asked:
        return ""
    if transfer and transfer.state == "running":
        pause = _do(t("Pause"), "pause", book) if transfer.action in FETCHING else ""
        return row(pause + _do(t("Cancel"), "cancel", book, "cancel"))
    if transfer and transfer.state == "paused":
        resume = _do(t("Resume"), "go-on", book, "primary")
        return row(resume + _do(t("Delete"), "ask-remove", book, "cancel"))
    if book.row["state"] == "ready" and not book.model.unsupported:
        return row(_do(t("Draw with this model"), "use", book))
    failed = transfer is not None and transfer.failure is not None
    if book.model.unsupported or not book.model.repo or failed:
        return ""
    size = size_text(book.row["to_fetch"])
    if _is_begun(book):
        return row(_do(t("Resume: {size} to come", size=size), "get", book, kind))
    return row(_do(t("Get: {size} to download", size=size), "get", book, kind))


def _is_begun(book: Book) -> bool:
    return book.row["state"] != "ready" and bool(book.row["variants"])


def _asked(t: Words, book: Book, asked: Question | None) -> str:
    if asked is None:
        return ""
    close = _do(t("Close"), "close", book)
    if asked.kind == "licence":
        return _licence(t, book, asked, close)
    sizes = {"freed": size_text(asked.freed), "kept": size_text(asked.kept)}
    said = t("{freed} become free.", **sizes)
    if asked.kept:
        said += " " + t("{kept} are shared with other models or programs, and stay.", **sizes)
    if asked.kind == "again":
        said += " " + t("Then everything is fetched anew. What was imported stays.")
        do = _do(t("Clear and download again"), "again", book, "cancel")
    else:
        do = _do(t("Delete {model}", model=book.model.name), "remove", book, "cancel")
    return f'<div class="qit-card warn" role="alert"><p>{text(said)}</p>{row(do + close)}</div>'


def _licence(t: Words, book: Book, asked: Question, close: str) -> str:
    agree = ""
    if asked.action and not book.licence.commercial:
        said = t("I have read it and agree: download")
        more = {"then": asked.action, "variant": asked.variant}
        agree = _do(said, "agree", book, "primary", **more)
    name = f"{book.licence.name} · {book.licence.url}"
    return (
        f'<div class="qit-card qit-licence"><h4>{text(name)}</h4>'
        f'<pre tabindex="0" role="region" aria-label="{text(t("Text of the licence"))}">'
        f"{text(asked.text)}</pre>{row(agree + close)}</div>"
    )


def _more(t: Words, book: Book) -> str:
    """What is seldom needed, folded."""
    if not book.model.repo:
        return ""
    revision = str(book.row["revision"])
    facts = [fact(t("Licence"), book.licence.name), fact(t("Published"), book.model.released)]
    if revision:
        facts.append(fact(t("Revision"), revision[:SHORT]))
    if book.row["variants"]:
        facts.append(fact(t("Storage"), ", ".join(book.row["variants"])))
    buttons = _do(t("Read the licence"), "licence", book)
    if book.row["variants"] or book.row["state"] == "ready":
        buttons += "".join(
            [
                _do(t("Check quickly"), "check", book),
                _do(t("Check every byte"), "verify", book),
                _do(t("Repair"), "repair", book),
                _do(t("Update"), "update", book),
                _do(t("Clear and download again"), "ask-again", book),
                _do(t("Delete"), "ask-remove", book, "cancel"),
            ]
        )
    variants = "".join(_variant(t, book, each.id) for each in book.model.variants)
    inside = f'<dl class="qit-needs four">{"".join(facts)}</dl>{row(buttons)}{variants}'
    return _fold(t("Files, licence and repair"), f"more-{book.model.id}", inside)


def _variant(t: Words, book: Book, name: str) -> str:
    """The transformer in other storage: got by its own button, or why it can't be used."""
    one = next(each for each in book.model.variants if each.id == name)
    if one.unsupported:
        return ""
    get = _do(t("Get"), "get", book, variant=name) if name not in book.row["variants"] else ""
    return f'<p class="qit-variant"><span>{text(name)} · {size_text(one.bytes)}</span>{get}</p>'


def _do(label: str, do: str, book: Book, kind: str = "", **more: str) -> str:
    more = {name: value for name, value in more.items() if value}
    return button(label, do, kind, model=book.model.id, **more)


def _fold(name: str, key: str, inside: str) -> str:
    if not inside:
        return ""
    return (
        f'<details class="qit-fold" data-key="{text(key)}"><summary data-key="s-{text(key)}">'
        f"{text(name)}</summary>{inside}</details>"
    )


def _soft(said: str) -> str:
    return f'<p class="soft">{text(said)}</p>'


# Files of other programs


def found_html(t: Words, strangers: Sequence[Stranger]) -> str:
    if not strangers:
        return _soft(t("No safetensors or GGUF file is there."))
    rows = "".join(_stranger(t, place, each) for place, each in enumerate(strangers))
    said = t("A file is used where it lies: it is neither copied nor changed.")
    return f'{_soft(said)}<ul class="qit-jobs">{rows}</ul>'


def _stranger(t: Words, place: int, one: Stranger) -> str:
    what = one.why and sentence(t, one.why)
    if one.checkpoint:
        read = one.checkpoint
        facts = (read.family, t.known(WORDS[read.kind]), read.storage, size_text(read.bytes))
        known = " · ".join(facts)
        what = f"{known}. {what}" if what else known
    runnable = [model for model in one.models if not model.unsupported]
    buttons = "".join(
        button(t("Use for {model}", model=model.name), "take", file=place, model=model.id)
        for model in runnable
    )
    return (
        f'<li><div class="qit-job"><p>{text(one.path)}</p><p class="soft">{text(what)}</p></div>'
        f'<div class="qit-row">{buttons}</div></li>'
    )
