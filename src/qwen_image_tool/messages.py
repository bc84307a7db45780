"""What the supervisor and its worker say to each other: one JSON object a line."""

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from qwen_image_tool.errors import TroubleKind
from qwen_image_tool.types import Event, Failure, PhaseName, Request, Value


class Run(Value):
    """Make the pictures of a resolved request. `tried`: the number of the plan that failed before
    in another process, 0 for none, by `trouble`."""

    kind: Literal["run"] = "run"
    job: str
    request: Request
    output: str
    anyway: bool = False
    tried: int = 0
    trouble: TroubleKind = "other"


class Stop(Value):
    """End the run within a step."""

    kind: Literal["stop"] = "stop"
    job: str


Order = Annotated[Run | Stop, Field(discriminator="kind")]
order_adapter: TypeAdapter[Order] = TypeAdapter(Order)


class Happened(Value):
    kind: Literal["event"] = "event"
    job: str
    event: Event


class Finished(Value):
    """All pictures are saved."""

    kind: Literal["finished"] = "finished"
    job: str
    seconds: dict[PhaseName, float]


class Failed(Value):
    """The run ended without all its pictures; the worker goes on living. `foreseen`: the engine has
    tried all its plans, or none would help, in another process neither."""

    kind: Literal["failed"] = "failed"
    job: str
    failure: Failure
    foreseen: bool = True
    stopped: bool = Field(default=False, description="Because of a Stop")


Report = Annotated[Happened | Finished | Failed, Field(discriminator="kind")]
report_adapter: TypeAdapter[Report] = TypeAdapter(Report)


def line(message: Run | Stop | Happened | Finished | Failed) -> bytes:
    """The message as it goes over the pipe. Fields at their default are written too: `kind` is
    one of them."""
    return message.model_dump_json().encode() + b"\n"
