"""System: memory and disks as they are now, the worker, whether this computer is ready, the log."""

from dataclasses import dataclass
from typing import Any

import gradio as gr

from qwen_image_tool import logs
from qwen_image_tool.doctor import Check
from qwen_image_tool.feed import QueueState
from qwen_image_tool.gauges import Gauge, process_bytes
from qwen_image_tool.logs import LogEntry
from qwen_image_tool.server.run import running
from qwen_image_tool.service import Service
from qwen_image_tool.ui.cards import disk_fact
from qwen_image_tool.ui.kit import (
    Kit,
    button,
    fact,
    failure_card,
    memory_text,
    meter,
    row,
    text,
    told,
)
from qwen_image_tool.ui.words import Words

SECONDS = 2.0  # between two looks
LOG_ENTRIES = 200
SIGNS = {"pass": "✓", "warn": "!", "fail": "✕"}
COPY = """text => {
  const said = document.querySelector('#qit-diagnostics textarea');
  said?.select();
  navigator.clipboard?.writeText(text).catch(() => document.execCommand('copy'));
}"""


@dataclass(frozen=True)
class State:
    """What the tab shows that changes by itself. `worker_bytes`: RAM of the process that draws."""

    gauges: tuple[Gauge, ...]
    queue: QueueState
    running: str
    worker_bytes: int
    used: int


def build(kit: Kit, tab: gr.Tab) -> None:
    t, service = kit.t, kit.service
    seen, logged = gr.State(), gr.State()
    live = kit.html(elem_id="qit-live")
    with gr.Row(elem_classes="qit-titled"):
        gr.HTML(f"<h3>{text(t('Is this computer ready?'))}</h3>", apply_default_css=False)
        check = gr.Button(t("Check again"), size="sm", min_width=120, scale=0)
    found = kit.html(_waiting(t), elem_id="qit-checks")
    with gr.Row(elem_classes="qit-titled"):
        gr.HTML(f"<h3>{text(t('Log'))}</h3>", apply_default_css=False)
        copy = gr.Button(t("Copy diagnostics"), size="sm", min_width=160, scale=0)
    diagnostics = gr.Textbox(
        label=t("Diagnostics, without your token, name or home folder"),
        visible=False,
        lines=6,
        max_lines=12,
        buttons=["copy"],
        elem_id="qit-diagnostics",
    )
    with gr.Row():
        levels = [
            (t("Everything"), "DEBUG"),
            (t("Messages"), "INFO"),
            (t("Warnings and errors"), "WARNING"),
            (t("Errors alone"), "ERROR"),
        ]
        level = gr.Dropdown(levels, value="DEBUG", label=t("Show"), min_width=180)
        words = gr.Textbox(label=t("Search the log"), max_lines=1, min_width=200, scale=3)
    log = kit.html(elem_id="qit-log")

    def look(before: State | None) -> tuple[Any, Any]:
        now = state(service)
        return (gr.skip(), gr.skip()) if now == before else (live_html(t, now), now)

    def read(level: Any, words: str, before: Any) -> tuple[Any, Any]:
        now = logs.tail(service.app.settings.logs, LOG_ENTRIES, level, words)
        return (gr.skip(), gr.skip()) if now == before else (log_html(t, now), now)

    def diagnose() -> gr.Textbox:
        secret = running(service.data).token
        return gr.Textbox(service.diagnostics([secret]), visible=True)

    kit.watch(tab, look, [seen], [live, seen], SECONDS)
    kit.watch(tab, read, [level, words, logged], [log, logged], SECONDS)
    kit.on([level.input, words.input], read, [level, words, logged], [log, logged])
    kit.on(tab.select, lambda: checks_html(t, service.app.examine(again=False)), [], [found])
    kit.on(check.click, lambda: checks_html(t, service.app.examine()), [], [found])
    kit.on_act(live, lambda act: change(service, act))
    copied = kit.on(copy.click, diagnose, outputs=[diagnostics])
    copied.then(None, [diagnostics], js=COPY)


def state(service: Service) -> State:
    queue = service.queue()
    job = service.jobs.get(queue.running) if queue.running else None
    return State(
        gauges=service.gauges(),
        queue=queue,
        running=job.request.prompt if job else "",
        worker_bytes=process_bytes(service.supervisor.worker_pid),
        used=service.app.library.used_bytes(),
    )


def change(service: Service, act: dict[str, str]) -> None:
    if act["do"] == "pause":
        service.supervisor.pause()
    elif act["do"] == "unload":
        service.supervisor.unload()
    else:
        service.supervisor.resume()


def live_html(t: Words, now: State) -> str:
    facts = [
        disk_fact(t, each, now.used) if each.kind == "disk" else _gauge(t, each)
        for each in now.gauges
    ]
    return f'<dl class="qit-gauges">{"".join(facts)}</dl>{_worker(t, now)}'


def _gauge(t: Words, one: Gauge) -> str:
    name = t("GPU memory") if one.kind == "vram" else t("Memory")
    sizes = {"free": memory_text(one.free_bytes), "total": memory_text(one.total_bytes)}
    close = t("Close other programs before a run.")
    gpu = t("Close other programs that use the GPU before a run.")
    warned = ""
    if one.low:
        warned = f'<p class="warn">{text(gpu if one.kind == "vram" else close)}</p>'
    taken = 1 - one.free_bytes / one.total_bytes if one.total_bytes else 1.0
    return fact(name, t("{free} free of {total}", **sizes), meter(taken, one.low) + warned)


def _worker(t: Words, now: State) -> str:
    """The process that holds the model, and what gives its memory back."""
    queue = now.queue
    if queue.halted:
        return failure_card(t, queue.halted, button(t("Resume"), "resume", "primary"))
    if queue.paused:
        said = t("The queue is paused and the memory is free for other programs.")
        return _card(said, button(t("Resume"), "resume", "primary"))
    pause = button(t("Pause and free the memory"), "pause")
    size = memory_text(now.worker_bytes)
    if now.running:
        return _card(
            t("Drawing “{prompt}”, with {size} of memory.", prompt=now.running, size=size), pause
        )
    if queue.loaded:
        free = button(t("Free the memory now"), "unload")
        return _card(
            t("Ready for the next picture: the model holds {size} of memory.", size=size),
            free + pause,
        )
    return _card(t("No model is loaded: the next picture loads it."), pause)


def _card(said: str, buttons: str) -> str:
    return f'<div class="qit-card qit-worker"><p>{text(said)}</p>{row(buttons)}</div>'


def checks_html(t: Words, checks: tuple[Check, ...]) -> str:
    """What needs something done first, and that it is."""
    rank = {"fail": 0, "warn": 1, "pass": 2}
    ordered = sorted(checks, key=lambda each: rank[each.status])
    return f'<ul class="qit-checks">{"".join(_check(t, each) for each in ordered)}</ul>'


def _check(t: Words, one: Check) -> str:
    words = {"pass": t("fine"), "warn": t("warning"), "fail": t("problem")}
    step = f"<p>{told(t, one.next_step)}</p>" if one.next_step else ""
    return (
        f'<li class="{one.status}"><span role="img" aria-label="{text(words[one.status])}">'
        f"{SIGNS[one.status]}</span><div><strong>{text(t.known(one.name))}</strong>"
        f'<p class="soft">{told(t, one.finding)}</p>{step}</div></li>'
    )


def _waiting(t: Words) -> str:
    return f'<p class="soft">{text(t("Reading what this computer can do …"))}</p>'


def log_html(t: Words, entries: tuple[LogEntry, ...]) -> str:
    """The newest first."""
    if not entries:
        return f'<p class="soft">{text(t("The log has nothing like that."))}</p>'
    lines = "".join(
        f'<span class="{entry.level.lower()}">{text(entry.text)}\n</span>'
        for entry in reversed(entries)
    )
    return f'<pre tabindex="0" role="region" aria-label="{text(t("Log"))}">{lines}</pre>'
