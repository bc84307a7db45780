"""A worker without torch, for tests of what is around it: it speaks the same words over the same
pipes, saves real files, and does what the prompt says.

Words of a prompt: `slow` steps of 0.05 s, `very slow` ones of 0.3 s; `endless`: after the last step
wait until the job is stopped; `hang` in a step and stop for nobody; `exit N`; `signal N`; `say
TEXT` on stderr before that; `fail KIND` as the engine would; `once` only the first time; `save N`:
do it after N pictures are saved; `fill FOLDER for N`: fill its disk for N seconds.
"""

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from qwen_image_tool import gallery
from qwen_image_tool.errors import Cancelled, ToolError
from qwen_image_tool.lifeline import die_with_parent, private_stdout
from qwen_image_tool.messages import Failed, Finished, Happened, Run, line, order_adapter
from qwen_image_tool.types import (
    Event,
    Failure,
    PhaseNeed,
    PhaseStarted,
    Placement,
    Plan,
    Planned,
    Preview,
    Request,
    Saved,
    Stepped,
)

TINY_JPEG = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAP//////////////////////////////////////////////////////////"
    "////////////////////////////wAALCAABAAEBAREA/8QAFAABAAAAAAAAAAAAAAAAAAAAAv/EABQQAQAAAAAAAAAAA"
    "AAAAAAAAAD/2gAIAQEAAD8AR//Z"
)


def plan_for(request: Request) -> Plan:
    assert request.size
    assert request.steps
    return Plan(
        device="cpu",
        dtype="float32",
        working_size=request.size,
        forwards=request.steps * request.images,
        placement=Placement(blocks=1, resident=1),
        text_placement=Placement(blocks=1, resident=1),
        phases=(PhaseNeed(phase="denoise", ram_bytes=1000, vram_bytes=500),),
        disk_bytes=1000,
    )


class FakeWorker:
    def __init__(self) -> None:
        self.reports = private_stdout()
        self.stopped: set[str] = set()

    def main(self) -> None:
        die_with_parent(int(sys.argv[-1]))
        runs: list[Run] = []
        ready = threading.Semaphore(0)

        def listen() -> None:
            for text in sys.stdin.buffer:
                order = order_adapter.validate_json(text)
                if isinstance(order, Run):
                    runs.append(order)
                    ready.release()
                else:
                    self.stopped.add(order.job)
            os._exit(75)

        threading.Thread(target=listen, daemon=True).start()
        while ready.acquire():
            self.run(runs.pop(0))

    def report(self, message: Happened | Finished | Failed) -> None:
        self.reports.write(line(message))
        self.reports.flush()

    def run(self, run: Run) -> None:
        def emit(event: Event) -> None:
            self.report(Happened(job=run.job, event=event))

        try:
            self.draw(run, emit)
        except ToolError as error:
            self.report(
                Failed(
                    job=run.job,
                    failure=Failure.of(error),
                    foreseen="unforeseen" not in run.request.prompt,
                    stopped=isinstance(error, Cancelled),
                )
            )
        else:
            self.report(Finished(job=run.job, seconds={"load": 0.1, "denoise": 0.2}))

    def draw(self, run: Run, emit: Callable[[Event], None]) -> None:
        request, folder = run.request, Path(run.output)
        words, plan = request.prompt, plan_for(request)
        emit(Planned(plan=plan, number=3))
        emit(PhaseStarted(phase="denoise"))
        for step in range(1, (request.steps or 1) + 1):
            time.sleep(0.3 if "very slow" in words else 0.05 if "slow" in words else 0)
            self.check(run)
            emit(Stepped(step=step, steps=request.steps or 1, seconds=0.05))
            emit(Preview(step=step, jpeg=TINY_JPEG))
        while "endless" in words:
            time.sleep(0.05)
            self.check(run)
        emit(PhaseStarted(phase="save"))
        folder.mkdir(parents=True, exist_ok=True)
        before = int(found[1]) if (found := re.search(r"save (\d+)", words)) else 0
        for index in range(request.images):
            if index == before:
                self.misbehave(words, run, folder)
            alone = request.for_image(index)
            image = Image.new("RGB", (8, 8), "red")
            path = gallery.save_image(image, folder, alone, plan, {}, "Fake", run.job)
            emit(Saved(path=str(path), seed=alone.seeds[0]))
        if before >= request.images:
            self.misbehave(words, run, folder)

    def check(self, run: Run) -> None:
        if run.job in self.stopped:
            raise Cancelled("Stopped.", "Nothing was written.")

    def misbehave(self, words: str, run: Run, folder: Path) -> None:
        if "once" in words:
            marker = folder / f"{run.job}.once"
            if marker.exists():
                return
            marker.touch()
        if found := re.search(r"fill (\S+) for (\d+)", words):
            fill(Path(found[1]), float(found[2]))
        if found := re.search(r"say (.*?)(?=$| exit| signal| fail)", words):
            sys.stderr.write(found[1] + "\n")
            sys.stderr.flush()
        if found := re.search(r"fail ([\w ]+)", words):
            raise ToolError("The fake failed.", "Do something.", found[1].strip())  # type: ignore[arg-type]
        if "hang" in words:
            time.sleep(1000)
        if found := re.search(r"exit (\d+)", words):
            os._exit(int(found[1]))
        if found := re.search(r"signal (\d+)", words):
            os.kill(os.getpid(), signal.Signals(int(found[1])))
            time.sleep(10)


def fill(folder: Path, seconds: float) -> None:
    """Write until the disk is full; give the space back after a while."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1 << 8):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass
    threading.Timer(seconds, filler.unlink).start()


if __name__ == "__main__":
    FakeWorker().main()
