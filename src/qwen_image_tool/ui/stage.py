"""The stage of Create: the job under way or the last one, as it stands. It only shows."""

from collections.abc import Sequence
from dataclasses import dataclass

from qwen_image_tool.feed import QueueState
from qwen_image_tool.gallery.index import Picture
from qwen_image_tool.jobs import Job
from qwen_image_tool.progress import Progress
from qwen_image_tool.service import Service
from qwen_image_tool.types import Preview, Size
from qwen_image_tool.ui.kit import (
    button,
    failure_card,
    picture_url,
    row,
    sentence,
    size_text,
    text,
    time_text,
    told,
)
from qwen_image_tool.ui.words import Words

LONG = 30.0  # seconds left, from which a person may want to look at something else


@dataclass(frozen=True)
class Scene:
    """What the stage shows. `job`: None where there never was one. Equal scenes look alike."""

    job: Job | None
    progress: Progress | None
    preview: Preview | None
    pictures: tuple[Picture, ...]
    queue: QueueState


def scene(service: Service) -> Scene:
    """The job that runs, else the next one, else the last that ended."""
    queue = service.queue()
    job = _on_stage(service, queue)
    running = job is not None and job.id == queue.running
    return Scene(
        job=job,
        progress=service.progress(job.id) if job and running else None,
        preview=service.preview if running else None,
        pictures=tuple(service.pictures(job)) if job and job.state != "queued" else (),
        queue=queue,
    )


def _on_stage(service: Service, queue: QueueState) -> Job | None:
    if queue.running:
        return service.jobs.get(queue.running)
    found = service.jobs.waiting(1) or service.jobs.latest(("done", "failed", "cancelled"), 1)
    return found[0] if found else None


def stage(t: Words, seen: Scene) -> str:
    """The stage as HTML; `data-state` and `data-said` are for page.js, which announces them."""
    job = seen.job
    if job is None:
        return _frame("", t("Your picture appears here."), Size(800, 600), "empty")
    parts = [_canvas(t, seen, job), _status(t, seen, job), _caption(t, job)]
    said = _headline(t, seen, job)
    return (
        f'<div class="qit-stage" data-job="{job.id}" data-state="{job.state}"'
        f' data-said="{text(said)}">{"".join(parts)}</div>'
    )


def _canvas(t: Words, seen: Scene, job: Job) -> str:
    size = job.request.size or Size(800, 600)
    if seen.pictures:
        return _pictures(t, seen.pictures, job)
    if seen.preview:
        source = f"data:image/jpeg;base64,{seen.preview.jpeg}"
        image = f'<img src="{source}" alt="{text(t("Preview of the picture being drawn"))}">'
        return _frame(image, "", size, "preview")
    if job.state in ("failed", "cancelled"):
        return ""
    return _frame("", t("No preview yet."), size, "empty")


def _frame(image: str, said: str, size: Size, kind: str) -> str:
    inside = f"{image}<span>{text(said)}</span>"
    return f'<div class="qit-frame {kind}" style="{_shape(size)}">{inside}</div>'


def _shape(size: Size) -> str:
    """A frame keeps its place while the picture forms in it."""
    shape = f"{size.width / size.height:.4f}"
    return f"aspect-ratio:{shape};--shape:{shape};--width:{size.width}px"


def _pictures(t: Words, pictures: Sequence[Picture], job: Job) -> str:
    figures = "".join(_figure(t, picture) for picture in pictures)
    left = job.request.images - len(pictures)
    if job.state == "running" and left:
        figures += f'<p class="soft">{text(t("{count} more to come", count=left))}</p>'
    many = "many" if job.request.images > 1 else ""
    return f'<div class="qit-pictures {many}">{figures}</div>'


def _figure(t: Words, picture: Picture) -> str:
    link = f"{picture_url(picture.id)}?download=true"
    actions = [
        f'<a class="qit-button" href="{link}" download>{text(t("Download"))}</a>',
        button(t("Open in gallery"), "open", picture=picture.id),
    ]
    size, seed = picture.size, t("Seed {seed}", seed=picture.seed)
    image = (
        f'<img src="{picture_url(picture.id)}" width="{size.width}" height="{size.height}"'
        f' alt="{text(picture.prompt)}">'
    )
    return (
        f'<figure><div class="qit-frame" style="{_shape(size)}">{image}</div>'
        f'<figcaption class="qit-row">{"".join(actions)}<span class="soft">{text(seed)}</span>'
        "</figcaption></figure>"
    )


def _status(t: Words, seen: Scene, job: Job) -> str:
    again = button(t("Again with another seed"), "again", "primary", job=job.id)
    restore = button(t("Restore settings"), "restore", job=job.id)
    headline = f"<strong>{text(_headline(t, seen, job))}</strong>"
    if job.state == "failed" and job.failure:
        retry = button(t("Retry"), "retry", "primary", job=job.id)
        return failure_card(t, job.failure, retry + restore)
    if job.state in ("done", "cancelled"):
        return (
            f'<div class="qit-status">{headline}<div class="qit-row">{again}{restore}</div></div>'
        )
    left = seen.progress.seconds_left if seen.progress else None
    long = left is not None and left > LONG
    if job.state == "queued" and seen.queue.halted:
        resume = button(t("Resume"), "resume", "primary")
        return failure_card(t, seen.queue.halted, resume)
    notify = button(t("Tell me when it is done"), "notify", "plain") if long else ""
    paused = job.state == "queued" and seen.queue.paused
    act = row(button(t("Resume"), "resume", "primary")) if paused else notify
    return (
        f'<div class="qit-status">{headline}{_bar(seen.progress)}'
        f'<p class="soft">{text(_details(t, seen, job))}</p>{_interrupted(t, job)}{act}</div>'
    )


def _headline(t: Words, seen: Scene, job: Job) -> str:
    if job.state == "running":
        return phase_text(t, seen.progress)
    if job.state == "queued":
        return _why_waiting(t, seen.queue)
    if job.state == "done":
        seconds = (job.ended_at or 0) - (job.started_at or 0)
        return t("Done in {time}.", time=time_text(t, seconds))
    return (
        t("Stopped. Pictures that were finished are kept.")
        if job.state == "cancelled"
        else (sentence(t, job.failure.message) if job.failure else t("It failed."))
    )


def phase_text(t: Words, progress: Progress | None) -> str:
    """What a running job is at."""
    phase = progress.phase if progress else None
    if phase == "denoise" and progress and progress.steps:
        return t("Drawing: step {step} of {steps}", step=progress.step, steps=progress.steps)
    return {
        None: t("Starting the process that draws"),
        "load": t("Reading the model"),
        "encode": t("Reading the prompt"),
        "denoise": t("Drawing"),
        "decode": t("Developing the picture"),
        "save": t("Saving the picture"),
    }[phase]


def _why_waiting(t: Words, queue: QueueState) -> str:
    if queue.halted:
        return sentence(t, queue.halted.message)
    if queue.paused:
        return t("The queue is paused.")
    return t("Waiting for the process that draws")


def _bar(progress: Progress | None) -> str:
    share = progress.fraction if progress else 0.0
    return (
        f'<div class="qit-bar" role="progressbar" aria-valuemin="0" aria-valuemax="100"'
        f' aria-valuenow="{share * 100:.0f}" aria-label="%"><i style="width:{share:.1%}"></i></div>'
    )


def _details(t: Words, seen: Scene, job: Job) -> str:
    """ETA, seconds a step, bytes read, jobs that wait: what is known of these."""
    parts, progress = [], seen.progress
    if progress and progress.seconds_left is not None:
        parts.append(t("{time} left", time=time_text(t, progress.seconds_left)))
    if progress and progress.phase == "denoise" and progress.step_seconds is not None:
        parts.append(t("{seconds} s a step", seconds=f"{progress.step_seconds:.2f}"))
    if progress and progress.phase in ("load", "encode") and progress.total_bytes:
        done, total = size_text(progress.done_bytes), size_text(progress.total_bytes)
        parts.append(t("{done} of {total} read", done=done, total=total))
    waiting = seen.queue.counts["queued"] - (job.state == "queued")
    if waiting:
        parts.append(t("{count} more in the queue", count=waiting))
    return " · ".join(parts)


def _interrupted(t: Words, job: Job) -> str:
    """Why the process died under it."""
    if not job.again:
        return ""
    why = sentence(t, job.failure.message) if job.failure else t("QwenImageTool was interrupted.")
    said = t("The job goes on by itself.")
    return (
        f'<div class="qit-card warn" role="status"><p><strong>{text(why)}</strong> {text(said)}</p>'
        "</div>"
    )


def _caption(t: Words, job: Job) -> str:
    reasons = "".join(
        f"<li>{told(t, reason)}</li>" for reason in (job.plan.reasons if job.plan else ())
    )
    how = f"<details><summary>{text(t('How it runs'))}</summary><ul>{reasons}</ul></details>"
    return f'<p class="qit-prompt">{text(job.request.prompt)}</p>{how if reasons else ""}'
