"""Jobs: the queue keeps its order, its states and its promises."""

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_image_tool.errors import BadRequest, Unknown
from qwen_image_tool.jobs import ENDED, Job, Jobs, State
from qwen_image_tool.types import Failure, Placement, Plan, Request, Size

REQUEST = Request(model="practice", prompt="Ein Fuchs 🦊", size=Size(64, 64), steps=4, seed=7)
PLAN = Plan(
    device="cpu",
    dtype="float32",
    working_size=Size(64, 64),
    forwards=8,
    placement=Placement(blocks=6, resident=6),
    text_placement=Placement(blocks=2, resident=2),
    phases=(),
    disk_bytes=4000,
)
FAILURE = Failure(kind="memory", message="It ran out.", hint="Press Retry.", kept="All.")


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    opened = Jobs(tmp_path / "jobs.db")
    yield opened
    opened.close()


def ids(found: list[Job]) -> list[str]:
    return [job.id for job in found]


def end(jobs: Jobs, state: State) -> Job:
    """A new job, brought to this end."""
    job = jobs.submit(REQUEST)
    if state == "cancelled":
        return jobs.cancel(job.id)
    jobs.take()
    return jobs.done(job.id, {"denoise": 2.5}) if state == "done" else jobs.fail(job.id, FAILURE)


def test_a_job_comes_back_as_it_was_submitted(jobs: Jobs) -> None:
    job = jobs.submit(REQUEST, origin="mcp")
    assert job == jobs.get(job.id)
    assert (job.request, job.state, job.origin) == (REQUEST, "queued", "mcp")


def test_jobs_start_in_order_and_once(jobs: Jobs) -> None:
    submitted = [jobs.submit(REQUEST).id for _ in range(3)]
    taken = [jobs.take() for _ in range(4)]
    assert [job and job.id for job in taken] == [*submitted, None]
    assert all(job.state == "running" and job.started_at for job in taken if job)


def test_two_threads_never_take_the_same_job(jobs: Jobs) -> None:
    for _ in range(60):
        jobs.submit(REQUEST)
    taken: list[str] = []

    def take() -> None:
        while job := jobs.take():
            taken.append(job.id)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == len(set(taken)) == 60


def test_results_are_kept(jobs: Jobs) -> None:
    job = jobs.submit(REQUEST)
    jobs.take()
    jobs.planned(job.id, PLAN)
    done = jobs.done(job.id, {"load": 1.5, "denoise": 2.0})
    assert (done.plan, done.seconds) == (PLAN, {"load": 1.5, "denoise": 2.0})
    failed = end(jobs, "failed")
    assert failed.failure == FAILURE
    assert failed.ended_at


@pytest.mark.parametrize("state", ENDED)
def test_what_has_ended_never_changes(jobs: Jobs, state: State) -> None:
    job = end(jobs, state)
    for change in (
        lambda: jobs.done(job.id, {}),
        lambda: jobs.fail(job.id, FAILURE),
        lambda: jobs.cancel(job.id),
        lambda: jobs.put_back(job.id, died=True),
        lambda: jobs.planned(job.id, PLAN),
        lambda: jobs.move(job.id, None),
    ):
        with pytest.raises(BadRequest):
            change()
    for setting in ("state = 'queued'", "request = '{}'", "failure = 'x'"):
        with pytest.raises(sqlite3.IntegrityError, match="has ended"):
            jobs.database._connection.execute(f"UPDATE jobs SET {setting}")
    assert jobs.get(job.id) == job
    assert jobs.take() is None


def test_the_database_knows_the_states(jobs: Jobs) -> None:
    jobs.submit(REQUEST)
    with pytest.raises(sqlite3.IntegrityError):
        jobs.database._connection.execute("UPDATE jobs SET state = 'lost'")


def test_moving(jobs: Jobs) -> None:
    a, b, c = (jobs.submit(REQUEST).id for _ in range(3))
    jobs.move(c, before=a)
    assert ids(jobs.waiting()) == [c, a, b]
    jobs.move(c, before=None)
    assert ids(jobs.waiting()) == [a, b, c]
    jobs.move(b, before=b)
    assert ids(jobs.waiting()) == [a, b, c]
    assert [jobs.ahead(job) for job in (a, b, c)] == [0, 1, 2]
    jobs.take()
    with pytest.raises(BadRequest, match="that wait"):
        jobs.move(a, before=None)
    with pytest.raises(BadRequest, match="that wait"):
        jobs.move(c, before=a)
    with pytest.raises(Unknown):
        jobs.move("nothing", before=None)
    assert ids(jobs.waiting()) == [b, c]


def test_a_job_that_goes_back_is_next(jobs: Jobs) -> None:
    first = jobs.submit(REQUEST).id
    second = jobs.submit(REQUEST).id
    jobs.take()
    assert jobs.put_back(first, died=False).again == 0
    assert ids(jobs.waiting()) == [first, second]
    jobs.take()
    assert jobs.put_back(first, died=True).again == 1
    assert ids(jobs.waiting()) == [first, second]


def test_cancelling_what_runs_is_asked_for_by_name(jobs: Jobs) -> None:
    job = jobs.submit(REQUEST).id
    jobs.take()
    with pytest.raises(BadRequest, match="running"):
        jobs.cancel(job)
    assert jobs.cancel(job, ("running",)).state == "cancelled"


def test_repeat_is_a_new_job(jobs: Jobs) -> None:
    old = end(jobs, "failed")
    same, other = jobs.repeat(old.id), jobs.repeat(old.id, seed=8)
    assert same.id != old.id
    assert same.request == REQUEST
    assert other.request == REQUEST.model_copy(update={"seed": 8})


def test_everything_survives_another_start(tmp_path: Path) -> None:
    first = Jobs(tmp_path / "jobs.db")
    done, queued = end(first, "done"), first.submit(REQUEST)
    first.close()
    second = Jobs(tmp_path / "jobs.db")
    assert second.get(done.id) == done
    assert second.waiting() == [queued]
    second.close()


def test_latest_pages(jobs: Jobs) -> None:
    for state in ("done", "failed", "done", "cancelled", "done"):
        end(jobs, state)
    newest = jobs.latest(["done"], limit=2)
    assert [job.number for job in newest] == [5, 3]
    assert [job.number for job in jobs.latest(["done"], before=3)] == [1]
    assert jobs.counts() == {"queued": 0, "running": 0, "done": 3, "failed": 1, "cancelled": 1}


def test_clear_forgets_only_what_has_ended(jobs: Jobs) -> None:
    for _ in range(3):
        end(jobs, "done")
    queued = jobs.submit(REQUEST)
    assert jobs.clear(keep=1) == 2
    assert [job.number for job in jobs.latest()] == [queued.number, 3]
    assert jobs.submit(REQUEST).number == queued.number + 1


def test_a_clock_that_goes_back_changes_no_order(tmp_path: Path) -> None:
    times = iter(range(1000, 0, -1))
    jobs = Jobs(tmp_path / "jobs.db", clock=lambda: next(times))
    submitted = [jobs.submit(REQUEST).id for _ in range(3)]
    assert ids(jobs.waiting()) == submitted
    first = jobs.take()
    assert first
    assert jobs.done(first.id, {}).state == "done"
    assert [job.number for job in jobs.latest()] == [3, 2, 1]
    jobs.close()


def test_unknown(jobs: Jobs) -> None:
    with pytest.raises(Unknown):
        jobs.get("nothing")
    with pytest.raises(Unknown):
        jobs.cancel("nothing")
    with pytest.raises(Unknown):
        jobs.repeat("nothing")
