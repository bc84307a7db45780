"""What the command line shows: results on stdout, everything on the way on stderr."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from qwen_image_tool.app import Advice
from qwen_image_tool.catalog import Licence, Model
from qwen_image_tool.doctor import Check
from qwen_image_tool.errors import ToolError
from qwen_image_tool.gallery import ImageInfo
from qwen_image_tool.progress import Track
from qwen_image_tool.types import (
    DownloadProgress,
    Event,
    Loading,
    Notice,
    PhaseStarted,
    Plan,
    Request,
    Stepped,
    VerifyProgress,
)

PHASES = {
    "load": "Loading the model",
    "encode": "Reading the prompt",
    "denoise": "Drawing",
    "decode": "Developing the picture",
    "save": "Saving",
}
DOES = {"text-to-image": "draw", "edit": "edit", "layers": "layers"}  # short, for a table
NONE_RUNS = "Of the published models none runs here; the practice model does."
QUIET_SECONDS = 2.0  # between two plain progress lines


class Screen:
    """One command's output. `as_json`: stdout carries one JSON object and nothing else."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self.out = Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self.notes = Console(file=sys.stderr, soft_wrap=True, highlight=False)

    def json(self, data: dict[str, Any]) -> None:
        self.line(json.dumps(data, ensure_ascii=False))

    def line(self, text: str) -> None:
        self.out.print(text, markup=False)

    def note(self, text: str) -> None:
        self.notes.print(text, markup=False)

    def failure(self, error: ToolError) -> None:
        if self.as_json:
            kind = type(error).__name__
            detail = {"kind": kind, "message": error.message, "hint": error.hint}
            self.json({"error": detail})
        else:
            self.note(f"qit: {error}")

    def rows(self, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
        """A plain table that stays readable without colours and in narrow windows."""
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for position, column in enumerate(header):
            table.add_column(column, overflow="fold", no_wrap=position == 0)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self.out.print(table)

    def facts(self, facts: dict[str, object]) -> None:
        """One fact a line; empty ones are left out."""
        width = max(len(name) for name in facts) + 2
        for name, value in facts.items():
            if value not in (None, ""):
                self.line(f"{name + ':':<{width}}{value}")

    def plan(self, request: Request, plans: tuple[Plan, ...], here: bool = True) -> None:
        """`here`: the plans are for this computer."""
        plan, *others = plans
        a_step = "A step reads" if plan.device == "cpu" else "A step copies"
        self.facts(
            {
                "Model": request.model,
                "Size": f"{request.size}"
                + (f", {request.images} pictures" if request.images > 1 else ""),
                "Sampling": f"{request.steps} steps, CFG {request.cfg:g},"
                f" {plan.forwards} passes through the model",
                "Device": f"{plan.device}, {plan.dtype}" + (", compiled" if plan.compiled else ""),
                a_step: amount(plan.bytes_per_step) if plan.bytes_per_step else "",
                "Takes": f"{pace(plan.seconds)}, loading included" if plan.seconds else "",
                "Disk": f"{amount(plan.disk_bytes)} at most",
            }
        )
        self.line("")
        self.rows(
            ("Phase", "RAM", "VRAM", "Reads", "Time"),
            [
                (
                    PHASES[need.phase],
                    gib(need.ram_bytes),
                    gib(need.vram_bytes),
                    amount(need.read_bytes) if need.read_bytes else "",
                    "?" if need.seconds is None else _duration_of_phase(need.seconds),
                )
                for need in plan.phases
            ],
        )
        self.line("")
        if plan.seconds is None:
            self.line(f"? {UNMEASURED if here else UNKNOWN_MACHINE}")
        for reason in plan.reasons:
            self.line(f"- {reason}")
        if others:
            self.line("If memory runs out, in this order (where it is RAM, those that take less):")
        for other in others:
            needs = f"{gib(other.ram_bytes)} RAM, {gib(other.vram_bytes)} VRAM"
            self.line(f"- {other.reasons[0]} ({needs})")

    def image(self, info: ImageInfo) -> None:
        self.line(f"{info.size} pixels")
        self.line(info.parameters or "It says nothing of how it was made.")
        if info.request:
            self.line("")
            self.facts({"Model": info.request.model, **dict(info.versions)})
            if info.plan:
                self.facts({"Made on": f"{info.plan.device}, {info.plan.dtype}"})

    def models(self, rows: list[dict[str, Any]], best: Advice | None) -> None:
        self.rows(
            ("Model", "State", "Disk", "VRAM", "RAM", "Picture", "Does"),
            [
                (
                    row["id"] + ("" if row["commercial"] else "*"),
                    _state(row),
                    amount(row["bytes"]),
                    *_needs(row["needs"]),
                    ", ".join(DOES[task] for task in row["tasks"]),
                )
                for row in rows
            ],
        )
        self.line("")
        if best:
            runs = f"Best here: {best.model} ({best.variant})."
            self.line(f"{runs if best.runs else NONE_RUNS} {best.reason}")
        if any(row["needs"] and _unmeasured(row["needs"]) for row in rows):
            self.line(f"? {UNMEASURED}")
        self.line("* Not for commercial use. Not yet: this version can't run it.")
        self.line("`qit models show MODEL` tells more.")

    def model(self, model: Model, described: dict[str, Any], licence: Licence) -> None:
        sampling = model.sampling
        self.facts(
            {
                "Model": f"{model.name} ({model.id})",
                "State": described["why"] or described["state"],
                "Here": ", ".join(described["variants"]),
                **_needed(described),
                "From": model.repo,
                "Revision": described["revision"],
                "Released": model.released,
                "Licence": f"{licence.name}, "
                + ("" if licence.commercial else "NOT for commercial use, ")
                + licence.url,
                "Does": ", ".join(model.does),
                "Sizes": ", ".join(f"{ratio} {size}" for ratio, size in model.sizes.native.items()),
                "Limits": f"{model.sizes.min_side} to {model.sizes.max_side} pixels a side,"
                f" {model.sizes.max_pixels / 1e6:.2f} megapixels",
                "Steps": sampling.steps,
                "CFG": f"{sampling.cfg:g}",
                "Negative": sampling.negative_prompt and sampling.negative_prompt.strip(),
                "Note": model.note,
            }
        )
        self.line("")
        self.rows(
            ("Component", "Weights", "Files", "Class"),
            [
                (name, amount(part.bytes), str(part.files or "-"), part.class_name)
                for name, part in model.components.items()
            ],
        )
        if model.variants:
            self.line("")
            self.rows(
                ("Variant", "Transformer", "From", "State"),
                [
                    (v.id, f"{v.bytes / 1e9:.1f} GB", v.repo, v.unsupported or "runs")
                    for v in model.variants
                ],
            )
        if described["usable"]:
            self.line("")
            self.line("These files of other programs may be parts of it: keys and shapes fit.")
        for found in described["usable"]:
            self.line(f"- {found['is']}, {found['storage']}: {found['path']}")
            self.line(f'  qit models import "{found["path"]}" --as {model.id}')

    def checks(self, checks: tuple[Check, ...]) -> None:
        colours = {"pass": "green", "warn": "yellow", "fail": "red"}
        for check in checks:
            self.out.print(f"[{colours[check.status]}]{check.status.upper()}[/]  ", end="")
            self.line(f"{check.name}: {check.finding}")
            if check.next_step:
                self.line(f"      -> {check.next_step}")

    @contextmanager
    def transfer(self) -> Iterator[Callable[[Event], None]]:
        """Like `progress`; every event is a line of JSON where that was asked for."""
        if self.as_json:
            yield lambda event: self.json(event.to_dict())
        else:
            with self.progress() as show:
                yield show

    @contextmanager
    def progress(self) -> Iterator[Callable[[Event], None]]:
        """Receives events: a bar on a terminal, elsewhere a plain line every two seconds."""
        if self.notes.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
            )
            with Progress(*columns, console=self.notes, transient=True) as progress:
                yield _Bar(self, progress)
        else:
            yield _Lines(self)


@dataclass(frozen=True)
class _Standing:
    """How far something is, in steps or bytes."""

    done: int
    total: int
    text: str
    title: str = ""


class _Bar:
    """One bar, for the phase or the transfer that is under way."""

    def __init__(self, screen: Screen, progress: Progress) -> None:
        self._screen, self._progress, self._track = screen, progress, Track({})
        self._task: TaskID | None = None

    def __call__(self, event: Event) -> None:
        self._track.follow(event)
        if isinstance(event, Notice):
            self._screen.note(event.text)
        elif isinstance(event, PhaseStarted):
            self._begin(PHASES[event.phase])
        elif standing := _standing(event, self._track):
            task = self._begin(standing.title) if self._task is None else self._task
            self._progress.update(
                task, completed=standing.done, total=standing.total, text=standing.text
            )

    def _begin(self, title: str) -> TaskID:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(title, total=None, text="")
        return self._task


class _Lines:
    def __init__(self, screen: Screen) -> None:
        self._screen, self._track = screen, Track({})
        self._last = 0.0

    def __call__(self, event: Event) -> None:
        self._track.follow(event)
        if isinstance(event, Notice):
            self._screen.note(event.text)
        elif isinstance(event, PhaseStarted):
            self._screen.note(f"{PHASES[event.phase]} ...")
        elif standing := _standing(event, self._track):
            now = time.monotonic()
            if standing.done >= standing.total or now - self._last > QUIET_SECONDS:
                self._last = now
                self._screen.note(f"  {standing.title and standing.title + ': '}{standing.text}")


def _standing(event: Event, track: Track) -> _Standing | None:
    """Steps are told by `track`, as on the page: the mean of the last ones."""
    if isinstance(event, Stepped):
        step = track.progress().step_seconds or event.seconds
        left = duration(step * (event.steps - event.step))
        text = f"step {event.step}/{event.steps}, {step:.2f} s/step, {left} left"
        return _Standing(event.step, event.steps, text)
    if isinstance(event, Loading | DownloadProgress | VerifyProgress) and event.total_bytes:
        text = f"{amount(event.done_bytes)} of {amount(event.total_bytes)}"
        title = "" if isinstance(event, Loading) else event.model
        if isinstance(event, DownloadProgress) and event.bytes_per_second:
            text += f", {event.bytes_per_second / 1e6:.1f} MB/s"
            text += f", {duration(event.seconds_left)} left" if event.seconds_left else ""
        return _Standing(event.done_bytes, event.total_bytes, text, title)
    return None


UNKNOWN_MACHINE = "Seconds are not known of this machine; --card names cards of which they are."
UNMEASURED = (
    "Seconds are not measured yet: the first picture with a large model measures this computer."
)


def _state(row: dict[str, Any]) -> str:
    """With what a download takes; where that is nothing, the files are broken."""
    if row["state"] != "not here":
        return str(row["state"])
    return f"get {amount(row['to_fetch'])}" if row["to_fetch"] else "broken"


def _unmeasured(needs: dict[str, Any]) -> bool:
    return bool(needs["runs"]) and needs["seconds"] is None


def _needs(needs: dict[str, Any] | None) -> tuple[str, str, str]:
    """GPU memory, RAM and seconds of one picture; nothing of what can't run."""
    if needs is None:
        return "", "", ""
    if not needs["runs"]:
        return "", "", "can't run"
    seconds = "?" if _unmeasured(needs) else pace(needs["seconds"])
    return gib(needs["vram_bytes"], 1), gib(needs["ram_bytes"], 1), seconds


def _needed(described: dict[str, Any]) -> dict[str, object]:
    disk = f"{amount(described['bytes'])} of disk"
    disk += f" ({amount(described['to_fetch'])} to fetch)" if described["to_fetch"] else ""
    needs = described["needs"]
    if needs is None or not needs["runs"]:
        return {"Needs": disk, "Here it": needs and f"can't run: {needs['reason']}"}
    memory = f"{gib(needs['ram_bytes'])} of RAM"
    if needs["vram_bytes"]:
        memory = f"{gib(needs['vram_bytes'])} of GPU memory, {memory}"
    return {
        "Needs": f"{disk}, {memory}",
        "A picture": UNMEASURED if _unmeasured(needs) else f"{pace(needs['seconds'])}, loaded anew",
        "Best here": f"{needs['variant']}. {needs['reason']}",
    }


def pace(seconds: float | None) -> str:
    return "not measured" if seconds is None else f"about {duration(seconds)}"


def _duration_of_phase(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 600:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def amount(size: int) -> str:
    """Bytes of files, as disks and downloads count them."""
    if not size:
        return "-"
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def gib(size: int, digits: int = 2) -> str:
    """Bytes of memory, as it is sold."""
    return f"{size / 2**30:.{digits}f} GiB" if size else "-"
