"""How far a job is, and how long it will take: from its own steps, and from jobs like it."""

import time
from collections.abc import Callable, Mapping

from pydantic import Field

from qwen_image_tool.types import (
    Event,
    Loading,
    PhaseName,
    PhaseStarted,
    Plan,
    Planned,
    Request,
    Stepped,
    Value,
)

RECENT = 0.3  # weight of the newest step in the mean


class Progress(Value):
    """Where a running job is. `fraction`: 0 to 1; `seconds_left`: None as long as nothing like it
    has run and no step is done."""

    phase: PhaseName | None = None
    step: int = 0
    steps: int = 0
    fraction: float = 0.0
    seconds_left: float | None = None
    step_seconds: float | None = Field(default=None, description="Mean of the last steps")
    done_bytes: int = Field(default=0, description="Weights read, of those this run needs now")
    total_bytes: int = 0


class Track:
    """Follows one run. `expected`: seconds a phase, from `scaled`, else the plan's; phases it lacks
    are unknown. `clock` gives monotonic seconds."""

    def __init__(
        self, expected: Mapping[PhaseName, float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._expected = dict(expected)
        self._clock = clock
        self._started = self._phase_started = clock()
        self._phase: PhaseName | None = None
        self._spent: dict[PhaseName, float] = {}  # in phases that were begun; loading has two parts
        self._step = self._steps = 0
        self._step_seconds: float | None = None
        self._done_bytes = self._total_bytes = 0

    def follow(self, event: Event) -> None:
        if isinstance(event, PhaseStarted):
            self._leave()
            self._phase = event.phase
        elif isinstance(event, Planned) and not self._expected:
            needs = event.plan.phases
            self._expected = {n.phase: n.seconds for n in needs if n.seconds is not None}
        elif isinstance(event, Loading):
            self._done_bytes, self._total_bytes = event.done_bytes, event.total_bytes
        elif isinstance(event, Stepped):
            mean = self._step_seconds
            self._step_seconds = (
                event.seconds if mean is None else mean + RECENT * (event.seconds - mean)
            )
            self._step, self._steps = event.step, event.steps
            self._phase_started = self._clock()

    @property
    def phase(self) -> PhaseName | None:
        return self._phase

    def progress(self) -> Progress:
        left = self._seconds_left()
        passed = self._clock() - self._started
        fraction = self._step / self._steps if self._steps else 0.0
        if left is not None and passed + left > 0:
            fraction = passed / (passed + left)
        return Progress(
            phase=self._phase,
            step=self._step,
            steps=self._steps,
            fraction=min(1.0, fraction),
            seconds_left=left,
            step_seconds=self._step_seconds,
            done_bytes=self._done_bytes,
            total_bytes=self._total_bytes,
        )

    def _seconds_left(self) -> float | None:
        if not self._expected and self._step_seconds is None:
            return None
        begun = {self._phase, *self._spent}
        later = sum(each for phase, each in self._expected.items() if phase not in begun)
        return later + self._rest_of_phase()

    def _leave(self) -> None:
        now = self._clock()
        if self._phase:
            before = self._spent.get(self._phase, 0.0)
            self._spent[self._phase] = before + now - self._phase_started
        self._phase_started = now

    def _rest_of_phase(self) -> float:
        since = self._clock() - self._phase_started
        if self._phase == "denoise" and self._step_seconds is not None:
            return max(0.0, (self._steps - self._step) * self._step_seconds - since)
        if not self._phase:
            return 0.0
        spent = self._spent.get(self._phase, 0.0) + since
        return max(0.0, self._expected.get(self._phase, 0.0) - spent)


def scaled(
    seconds: Mapping[PhaseName, float], past: tuple[Request, Plan], now: tuple[Request, Plan | None]
) -> dict[PhaseName, float]:
    """Seconds a phase that a run is expected to take, from those of a past run of the same model:
    passes and pixels count, loading and reading the prompt do not change."""
    (was, was_plan), (request, plan) = past, now
    passes = plan.forwards if plan else forwards(request)
    pixels = _pixels(request) / _pixels(was)
    factors: dict[PhaseName, float] = {
        "denoise": pixels * passes / was_plan.forwards,
        "decode": pixels * request.images / was.images,
        "save": pixels * request.images / was.images,
    }
    return {phase: value * factors.get(phase, 1.0) for phase, value in seconds.items()}


def forwards(request: Request) -> int:
    """Passes through the transformer that a resolved request takes."""
    halves = 1 if request.negative_prompt is None else 2
    return (request.steps or 1) * request.images * halves


def _pixels(request: Request) -> int:
    return request.size.pixels if request.size else 1
