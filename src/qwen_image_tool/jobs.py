"""The durable queue: jobs in SQLite, in an order of their own.

A job is queued, then running, then done, failed or cancelled; what has ended never changes again,
which the database itself enforces. To try once more is a new job.
"""

import json
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, ValidationError

from qwen_image_tool.database import Database, migrations
from qwen_image_tool.errors import BadRequest, Unknown
from qwen_image_tool.types import Failure, PhaseName, Plan, Request, Value

State = Literal["queued", "running", "done", "failed", "cancelled"]
STATES: tuple[State, ...] = get_args(State)
ENDED: tuple[State, ...] = ("done", "failed", "cancelled")
KEPT_JOBS = 20_000  # that have ended; older ones are forgotten when the program starts


class Job(Value):
    """A request in the queue. Times are seconds since 1970, by this computer's clock.

    `again`: how often it went back to the queue because a process died under it. `failure`: why it
    failed; before its end, why that process died, where that is known.
    """

    id: str
    number: int = Field(description="Order of arrival, from 1")
    state: State
    request: Request
    origin: str = Field(default="", description="The face it came through")
    anyway: bool = Field(default=False, description="Run it although no plan is sure to fit")
    again: int = 0
    created_at: float
    started_at: float | None = None
    ended_at: float | None = None
    plan: Plan | None = None
    seconds: dict[PhaseName, float] = Field(default_factory=dict)
    failure: Failure | None = None

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED


class Jobs:
    """All jobs. Methods that change one raise Unknown where there is no such job, BadRequest where
    its state forbids it. `clock` gives seconds since 1970; nothing but the record depends on it."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.database = Database(path, migrations("jobs"), sound=_is_sound)
        self._clock = clock

    def submit(self, request: Request, origin: str = "", anyway: bool = False) -> Job:
        """Put a resolved request at the end of the queue."""
        job = secrets.token_hex(8)
        with self.database.write() as write:
            write.execute(
                "INSERT INTO jobs (id, position, request, origin, anyway, created_at) SELECT ?,"
                " coalesce(max(position), 0) + 1, ?, ?, ?, ? FROM jobs WHERE state = 'queued'",
                (job, request.to_json(), origin, anyway, self._clock()),
            )
        return self.get(job)

    def get(self, job: str) -> Job:
        return _job(self._row(job))

    def waiting(self, limit: int = -1) -> list[Job]:
        """The queued jobs, the next one first."""
        rows = self.database.read(
            "SELECT * FROM jobs WHERE state = 'queued' ORDER BY position LIMIT ?", (limit,)
        )
        return [_job(row) for row in rows]

    def latest(
        self, states: Iterable[State] = STATES, limit: int = 100, before: int | None = None
    ) -> list[Job]:
        """Jobs in these states, the newest first; `before`: only with a smaller number."""
        wanted = tuple(states)
        rows = self.database.read(
            f"SELECT * FROM jobs WHERE state IN ({', '.join('?' * len(wanted))})"  # noqa: S608
            " AND number < ? ORDER BY number DESC LIMIT ?",
            (*wanted, before or 2**62, limit),
        )
        return [_job(row) for row in rows]

    def counts(self) -> dict[State, int]:
        rows = self.database.read("SELECT state, count(*) FROM jobs GROUP BY state")
        return dict.fromkeys(STATES, 0) | {row[0]: row[1] for row in rows}

    def ahead(self, job: str) -> int:
        """How many jobs are before this one: 0 for the next, and for one that isn't queued."""
        [[count]] = self.database.read(
            "SELECT count(*) FROM jobs WHERE state = 'queued' AND position <"
            " (SELECT position FROM jobs WHERE id = ? AND state = 'queued')",
            (job,),
        )
        return int(count)

    def take(self) -> Job | None:
        """Start the next job: it is running when this returns. None where none is queued."""
        with self.database.write() as write:
            row = write.execute(
                "UPDATE jobs SET state = 'running', started_at = ? WHERE number ="
                " (SELECT number FROM jobs WHERE state = 'queued' ORDER BY position LIMIT 1)"
                " RETURNING *",
                (self._clock(),),
            ).fetchone()
        return _job(row) if row else None

    def planned(self, job: str, plan: Plan) -> None:
        """Keep how a running job runs."""
        self._change(job, "running", "plan = ?", plan.to_json())

    def done(self, job: str, seconds: dict[PhaseName, float]) -> Job:
        return self._end(
            job, ("running", "queued"), "done", "failure = NULL, seconds = ?", json.dumps(seconds)
        )

    def fail(self, job: str, failure: Failure) -> Job:
        return self._end(job, ("running", "queued"), "failed", "failure = ?", failure.to_json())

    def cancel(self, job: str, states: tuple[State, ...] = ("queued",)) -> Job:
        return self._end(job, states, "cancelled", "failure = NULL")

    def put_back(self, job: str, died: bool, why: Failure | None = None) -> Job:
        """A running job goes back to the front of the queue. `died`: a process died under it, for
        the reason `why`, which is told until the job ends."""
        self._change(
            job,
            "running",
            "state = 'queued', started_at = NULL, again = again + ?, failure = ?, position ="
            " (SELECT coalesce(min(position), 1) - 1 FROM jobs WHERE state = 'queued')",
            int(died),
            why and why.to_json(),
        )
        return self.get(job)

    def move(self, job: str, before: str | None) -> Job:
        """Put a queued job before another queued one; None: at the end."""
        with self.database.write() as write:
            order = [
                row["id"]
                for row in write.execute(
                    "SELECT id FROM jobs WHERE state = 'queued' ORDER BY position"
                )
            ]
            for name in {job, before} - {None}:
                if name not in order:
                    self._row(str(name))
                    raise BadRequest(
                        "Only jobs that wait can be moved.", "Look at the queue again."
                    )
            if job != before:
                order.remove(job)
                order.insert(order.index(before) if before else len(order), job)
            write.executemany(
                "UPDATE jobs SET position = ? WHERE id = ?", list(enumerate(order, start=1))
            )
        return self.get(job)

    def repeat(self, job: str, seed: int | None = None, origin: str = "") -> Job:
        """A new job with the same request, or with another seed."""
        old = self.get(job)
        change = {} if seed is None else {"seed": seed}
        request = old.request.model_copy(update=change)
        return self.submit(request, origin or old.origin, old.anyway)

    def running(self) -> list[Job]:
        rows = self.database.read("SELECT * FROM jobs WHERE state = 'running'")
        return [_job(row) for row in rows]

    def clear(self, keep: int = 0) -> int:
        """Forget the jobs that have ended but for the newest `keep`; their pictures stay.
        Returns how many."""
        with self.database.write() as write:
            return write.execute(
                "DELETE FROM jobs WHERE number IN (SELECT number FROM jobs WHERE state IN"
                " ('done', 'failed', 'cancelled') ORDER BY number DESC LIMIT -1 OFFSET ?)",
                (keep,),
            ).rowcount

    def close(self) -> None:
        self.database.close()

    def _row(self, job: str) -> sqlite3.Row:
        rows = self.database.read("SELECT * FROM jobs WHERE id = ?", (job,))
        if not rows:
            raise Unknown(f"There is no job {job!r}.", "It may have been cleared.")
        return rows[0]

    def _end(
        self, job: str, states: tuple[State, ...], state: State, setting: str, *values: object
    ) -> Job:
        marks = ", ".join("?" * len(states))
        with self.database.write() as write:
            changed = write.execute(
                f"UPDATE jobs SET state = ?, ended_at = ?, {setting}"  # noqa: S608
                f" WHERE id = ? AND state IN ({marks})",
                (state, self._clock(), *values, job, *states),
            ).rowcount
        found = self.get(job)
        if not changed:
            raise BadRequest(f"The job is {found.state} already.", "Look at the queue again.")
        return found

    def _change(self, job: str, state: State, setting: str, *values: object) -> None:
        with self.database.write() as write:
            changed = write.execute(
                f"UPDATE jobs SET {setting} WHERE id = ? AND state = ?",  # noqa: S608
                (*values, job, state),
            ).rowcount
        if not changed:
            found = self.get(job)
            raise BadRequest(f"The job is {found.state}.", "Look at the queue again.")


def _is_sound(row: sqlite3.Row) -> bool:
    try:
        _job(row)
    except ValueError:
        return False
    return True


def _job(row: sqlite3.Row) -> Job:
    plan = None
    try:
        plan = row["plan"] and Plan.from_json(row["plan"])
    except ValidationError:  # another version's: it is only for reading
        plan = None
    return Job(
        id=row["id"],
        number=row["number"],
        state=row["state"],
        request=Request.from_json(row["request"]),
        origin=row["origin"],
        anyway=bool(row["anyway"]),
        again=row["again"],
        created_at=row["created_at"],
        started_at=row["started_at"],
        ended_at=row["ended_at"],
        plan=plan,
        seconds=json.loads(row["seconds"]),
        failure=row["failure"] and Failure.from_json(row["failure"]),
    )
