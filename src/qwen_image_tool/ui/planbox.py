"""The plan box: what a request will need on this computer, before it runs."""

from qwen_image_tool.errors import CannotRun, ToolError
from qwen_image_tool.types import Device, Plan
from qwen_image_tool.ui.kit import (
    button,
    fact,
    memory_text,
    meter,
    size_text,
    text,
    time_text,
    told,
)
from qwen_image_tool.ui.words import Words


def plan_box(
    t: Words, plan: Plan, seconds: float | None, device: Device, model: str, to_fetch: int
) -> str:
    """`to_fetch`: bytes of the model that are not on this computer; it can be got from here."""
    needs = [
        _meter(t("Memory"), plan.ram_bytes, device.ram_free_bytes, t),
        fact(t("Time"), t("not known yet") if seconds is None else time_text(t, seconds)),
        fact(t("Disk"), size_text(plan.disk_bytes)),
    ]
    if plan.vram_bytes:
        needs.insert(0, _meter(t("GPU memory"), plan.vram_bytes, device.vram_free_bytes, t))
    if to_fetch:
        needs.append(fact(t("To download"), size_text(to_fetch)))
    get = button(t("Get this model"), "get", "primary", model=model) if to_fetch else ""
    reasons = "".join(f"<li>{told(t, reason)}</li>" for reason in plan.reasons)
    return _box(
        t, f'<dl class="qit-needs">{"".join(needs)}</dl><ul class="qit-why">{reasons}</ul>{get}'
    )


def waiting_box(t: Words) -> str:
    return _box(t, f'<p class="soft">{text(t("Reading what this computer can do …"))}</p>')


def refused_box(t: Words, error: ToolError) -> str:
    """Why the request can't run as it stands; running anyway is offered where that can be tried."""
    anyway = isinstance(error, CannotRun)
    more = f'<div class="qit-row">{button(t("Run anyway"), "anyway")}</div>' if anyway else ""
    what, then = told(t, error.message), told(t, error.hint)
    said = f"<p><strong>{what}</strong></p><p>{then}</p>"
    return f'<div class="qit-card warn qit-plan">{said}{more}</div>'


def _box(t: Words, inside: str) -> str:
    return f'<div class="qit-card qit-plan"><h3>{text(t("What it will need"))}</h3>{inside}</div>'


def _meter(name: str, needed: int, free: int, t: Words) -> str:
    said = t("{needed} of {free} free", needed=memory_text(needed), free=memory_text(free))
    return fact(name, said, meter(needed / free if free else 1.0, full=needed > free))
