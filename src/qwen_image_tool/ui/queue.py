"""Queue: what runs, what waits and what has ended; order, cancel, retry."""

from dataclasses import dataclass
from typing import Any

import gradio as gr

from qwen_image_tool.feed import QueueState
from qwen_image_tool.jobs import ENDED, Job
from qwen_image_tool.progress import Progress
from qwen_image_tool.service import Service
from qwen_image_tool.ui.kit import (
    Kit,
    button,
    failure_card,
    marked,
    picture_url,
    sentence,
    text,
    time_text,
)
from qwen_image_tool.ui.stage import phase_text
from qwen_image_tool.ui.words import Words

SHOWN_WAITING, SHOWN_ENDED = 200, 40  # jobs
ORIGIN = "page"


@dataclass(frozen=True)
class Board:
    """What the tab shows. `first_pictures`: ids by job."""

    queue: QueueState
    running: Job | None
    progress: Progress | None
    waiting: tuple[Job, ...]
    ended: tuple[Job, ...]
    first_pictures: dict[str, str]


def build(kit: Kit, tab: gr.Tab) -> None:
    shown, seen = kit.html(elem_id="qit-board"), gr.State()

    def look(seen: Board | None) -> tuple[Any, Any]:
        now = board(kit.service)
        return (gr.skip(), gr.skip()) if now == seen else (board_html(kit.t, now), now)

    def act(act: dict[str, str]) -> tuple[Any, Any]:
        if act["do"] == "restore":
            request = kit.service.jobs.get(act["job"]).request
            return kit.ask("create", request=request.to_dict())
        if act["do"] == "open":
            return kit.ask("gallery", picture=act["picture"])
        change(kit.service, act)
        return gr.skip(), gr.skip()

    kit.watch(tab, look, [seen], [shown, seen])
    kit.on_act(shown, act, outputs=[kit.tabs, kit.wanted])


def board(service: Service) -> Board:
    queue = service.queue()
    running = service.jobs.get(queue.running) if queue.running else None
    ended = tuple(service.jobs.latest(ENDED, SHOWN_ENDED))
    if running and running.id in {job.id for job in ended}:  # it ended between these looks
        running = None
    pictures = {job.id: service.pictures(job) for job in ended if job.state != "failed"}
    return Board(
        queue=queue,
        running=running,
        progress=service.progress(running.id) if running else None,
        waiting=tuple(service.jobs.waiting(SHOWN_WAITING)),
        ended=ended,
        first_pictures={job: found[0].id for job, found in pictures.items() if found},
    )


def change(service: Service, act: dict[str, str]) -> None:
    """A button that changes the queue. Raises ToolError where it is too late for that."""
    match act["do"]:
        case "pause":
            service.supervisor.pause()
        case "resume":
            service.supervisor.resume()
        case "clear":
            service.jobs.clear()
            service.queue_changed()
        case "cancel":
            service.cancel(act["job"])
        case "retry":
            service.repeat(act["job"], origin=ORIGIN)
        case "move":
            service.move(act["job"], act["before"] or None)


def board_html(t: Words, now: Board) -> str:
    return "".join(
        [
            _state(t, now),
            _section(t("Running"), [_running(t, now.running, now.progress)] if now.running else []),
            _section(_counted(t("Waiting"), now.queue.counts["queued"]), _waiting(t, now.waiting)),
            _section(t("Ended"), [_ended(t, job, now.first_pictures) for job in now.ended]),
        ]
    )


def _state(t: Words, now: Board) -> str:
    """The queue as a whole, with what can be done to it."""
    clear = button(t("Clear what has ended"), "clear") if now.ended else ""
    if now.queue.halted:
        return failure_card(t, now.queue.halted, button(t("Resume"), "resume", "primary"))
    if now.queue.paused:
        said = t("The queue is paused and the memory is free for other programs.")
        return _bar(said, button(t("Resume"), "resume", "primary") + clear)
    if not (now.running or now.waiting):
        said = t(
            "Nothing waits. What you generate is listed here, and goes on when this page closes."
        )
        return _bar(said, clear)
    pause = button(t("Pause and free the memory"), "pause")
    return _bar(t("Jobs run one after another, also when this page is closed."), pause + clear)


def _bar(said: str, buttons: str) -> str:
    row = f'<div class="qit-row">{buttons}</div>'
    return f'<div class="qit-board-state"><p class="soft">{marked(said)}</p>{row}</div>'


def _counted(name: str, count: int) -> str:
    return f"{name} ({count})" if count else name


def _section(title: str, rows: list[str]) -> str:
    if not rows:
        return ""
    return f'<section><h3>{text(title)}</h3><ul class="qit-jobs">{"".join(rows)}</ul></section>'


def _running(t: Words, job: Job, progress: Progress | None) -> str:
    share = progress.fraction if progress else 0.0
    left = progress.seconds_left if progress else None
    parts = [phase_text(t, progress)]
    if left is not None:
        parts.append(t("{time} left", time=time_text(t, left)))
    bar = f'<div class="qit-bar"><i style="width:{share:.1%}"></i></div>'
    return _row(t, job, " · ".join(parts), bar, button(t("Cancel"), "cancel", "cancel", job=job.id))


def _waiting(t: Words, jobs: tuple[Job, ...]) -> list[str]:
    ids = [job.id for job in jobs]
    rows = []
    for place, job in enumerate(jobs):
        before = ids[place - 1] if place else ""
        after = ids[place + 2] if place + 2 < len(ids) else ""
        moves = ""
        if place:
            moves += button("↑", "move", job=job.id, before=before, title=t("Sooner"))
        if place + 1 < len(ids):
            moves += button("↓", "move", job=job.id, before=after, title=t("Later"))
        cancel = button(t("Cancel"), "cancel", "cancel", job=job.id)
        rows.append(_row(t, job, t("Number {place}", place=place + 1), "", moves + cancel))
    return rows


def _ended(t: Words, job: Job, pictures: dict[str, str]) -> str:
    restore = button(t("Restore settings"), "restore", job=job.id)
    retry = button(t("Retry"), "retry", job=job.id)
    if job.failure:
        said = f"{sentence(t, job.failure.message)} {sentence(t, job.failure.hint)}"
        return _row(t, job, said, "", retry + restore, bad=True)
    if job.state == "cancelled":
        return _row(t, job, t("Stopped"), "", retry + restore)
    took = time_text(t, (job.ended_at or 0) - (job.started_at or 0))
    picture = pictures.get(job.id)
    show = button(t("Open in gallery"), "open", picture=picture) if picture else ""
    return _row(t, job, t("Done in {time}.", time=took), "", show + restore, picture=picture)


def _row(
    t: Words,
    job: Job,
    said: str,
    more: str,
    buttons: str,
    picture: str | None = None,
    bad: bool = False,
) -> str:
    request = job.request
    facts = [request.model, str(request.size or "").replace("x", " x ")]
    if request.images > 1:
        facts.append(t("{count} pictures", count=request.images))
    source = f"{picture_url(picture).removesuffix('/file')}/thumbnail?side=96" if picture else ""
    image = f'<img src="{source}" alt="" loading="lazy">' if picture else "<i></i>"
    return (
        f'<li class="{job.state}" data-job="{job.id}"><span class="qit-thumb">{image}</span>'
        f'<div class="qit-job"><p>{text(request.prompt)}</p>'
        f'<p class="soft">{text(" · ".join(facts))}</p>'
        f'<p class="{"bad" if bad else "soft"}">{marked(said)}</p>{more}</div>'
        f'<div class="qit-row">{buttons}</div></li>'
    )
