"""Supervisor: what becomes of a job when the process that draws it lives, fails, hangs or dies."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from qwen_image_tool import gallery, supervisor
from qwen_image_tool.errors import BadRequest, DatabaseBroken
from qwen_image_tool.jobs import Job, Jobs
from qwen_image_tool.progress import Progress
from qwen_image_tool.supervisor import OUTPUT_KEPT, Supervisor, WorkerProcess
from qwen_image_tool.types import Event, Preview, Request, Saved, Size, Stepped

HERE = Path(__file__).parent
FAKE = (sys.executable, str(HERE / "fake_worker.py"))
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")


def request(prompt: str, images: int = 1, steps: int = 4) -> Request:
    return Request(
        model="practice", prompt=prompt, size=Size(8, 8), steps=steps, seed=5, images=images
    )


class Recorder:
    """A host that remembers."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Event]] = []
        self.states: list[tuple[str, str]] = []
        self.files: list[Path] = []
        self.progress: list[Progress] = []

    def job_changed(self, job: Job) -> None:
        self.states.append((job.id, job.state))

    def happened(self, job: Job, event: Event, progress: Progress) -> None:
        self.events.append((job.id, event))
        self.progress.append(progress)

    def saved(self, job: Job, path: Path) -> None:
        self.files.append(path)

    def queue_changed(self) -> None:
        pass

    def seeds_saved(self, job: Job) -> set[int]:
        infos = [gallery.read_image_info(path) for path in self.files]
        return {i.request.seed or 0 for i in infos if i.request and i.job == job.id}


class Bench:
    """Jobs, a supervisor over the fake worker, and a recorder."""

    def __init__(self, folder: Path) -> None:
        self.host = Recorder()
        self.jobs = Jobs(folder / "jobs.db")
        self.output = folder / "pictures"
        self.supervisor = Supervisor(self.jobs, self.output, self.host, command=FAKE)
        self.supervisor.start()

    def submit(self, prompt: str, **more: int) -> str:
        job = self.jobs.submit(request(prompt, **more)).id
        self.supervisor.wake()
        return job

    def ended(self, job: str) -> Job:
        wait(lambda: self.jobs.get(job).has_ended)
        return self.jobs.get(job)

    def started(self, job: str) -> None:
        wait(lambda: any(name == job for name, event in self.host.events))


def wait(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.supervisor.stop()
    bench.jobs.close()


def test_jobs_run_in_order_in_one_process(bench: Bench) -> None:
    bench.supervisor.pause()
    first, second = bench.submit("one"), bench.submit("two", images=2)
    bench.supervisor.resume()
    assert bench.ended(second).state == "done"
    wait(lambda: len(bench.host.states) == 4)
    assert bench.host.states == [
        (first, "running"),
        (first, "done"),
        (second, "running"),
        (second, "done"),
    ]
    pid = bench.supervisor.worker_pid
    assert bench.ended(bench.submit("three")).state == "done"
    assert bench.supervisor.worker_pid == pid
    assert len(list(bench.output.glob("*.png"))) == 4
    done = bench.jobs.get(second)
    assert done.plan
    assert done.seconds == {"load": 0.1, "denoise": 0.2}


def test_events_arrive_with_their_progress(bench: Bench) -> None:
    job = bench.submit("a fox")
    bench.ended(job)
    kinds = [type(event) for _, event in bench.host.events]
    assert kinds.count(Stepped) == kinds.count(Preview) == 4
    assert kinds.count(Saved) == 1
    fractions = [progress.fraction for progress in bench.host.progress]
    assert fractions[0] == 0
    assert max(fractions) <= 1
    assert bench.host.progress[-1].step == 4


def test_cancel_while_waiting_and_while_running(bench: Bench) -> None:
    running, waiting = bench.submit("slow", steps=400), bench.submit("after")
    bench.started(running)
    assert bench.supervisor.cancel(waiting).state == "cancelled"
    bench.supervisor.cancel(running)
    assert bench.ended(running).state == "cancelled"
    with pytest.raises(BadRequest):
        bench.supervisor.cancel(running)
    assert bench.ended(bench.submit("next")).state == "done"
    assert len(bench.host.files) == 1


def test_a_worker_that_does_not_stop_is_ended(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "STOP_SECONDS", 0.2)
    job = bench.submit("hang")
    bench.started(job)
    bench.supervisor.cancel(job)
    assert bench.ended(job).state == "cancelled"
    assert bench.ended(bench.submit("next")).state == "done"


def test_a_cancel_before_there_is_a_worker(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answered = threading.Event(), threading.Event()

    def looks_long(_: Job) -> set[int]:
        asked.set()
        answered.wait(30)
        return set()

    monkeypatch.setattr(bench.host, "seeds_saved", looks_long)
    monkeypatch.setattr(supervisor, "STOP_SECONDS", 600.0)  # it is told, not ended
    job = bench.submit("very slow", steps=1000)
    assert asked.wait(30)
    bench.supervisor.cancel(job)
    answered.set()
    wait(lambda: bench.jobs.get(job).has_ended, 60)
    assert bench.jobs.get(job).state == "cancelled"


def test_a_picture_that_was_deleted_meanwhile_shifts_no_other(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job was interrupted after its second picture, and the first was deleted."""
    monkeypatch.setattr(bench.host, "seeds_saved", lambda _: {6})
    assert bench.ended(bench.submit("a fox", images=4)).state == "done"
    infos = [gallery.read_image_info(path) for path in bench.host.files]
    assert [info.request and info.request.seed for info in infos] == [7, 8]


def test_a_worker_that_reads_no_orders_keeps_nobody_waiting(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An order may be larger than what a pipe holds."""
    monkeypatch.setattr(supervisor, "STOP_SECONDS", 0.2)
    bench.supervisor._command = (sys.executable, "-c", "import time; time.sleep(1000)")
    job = bench.submit("x" * 100_000)
    wait(lambda: bench.supervisor.worker_pid is not None)
    bench.supervisor.cancel(job)
    assert bench.ended(job).state == "cancelled"


@POSIX
def test_a_child_of_a_dead_worker_holds_nothing_up(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a compiler that torch has started: it has the worker's pipes."""
    monkeypatch.setattr(supervisor, "LET_GO_SECONDS", 0.1)
    parent = tmp_path / "parent.py"
    parent.write_text(
        "import os, subprocess, sys\n"
        f"sys.path.insert(0, {str(HERE)!r})\n"
        f"if not os.path.exists({str(tmp_path / 'child')!r}):\n"
        "    child = subprocess.Popen(['sleep', '1000'])\n"
        f"    open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n"
        "import fake_worker\n"
        "fake_worker.FakeWorker().main()\n",
        encoding="utf-8",
    )
    bench.supervisor._command = (sys.executable, str(parent))
    job = bench.ended(bench.submit("once exit 3"))
    assert (job.state, job.again) == ("done", 1)
    child = psutil.Process(int((tmp_path / "child").read_text()))
    assert child.is_running()
    child.kill()


def test_a_record_that_cannot_be_read_leaves_no_job_running(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(_: Job) -> set[int]:
        raise DatabaseBroken("pictures.db is damaged.", "Start QwenImageTool again.")

    with monkeypatch.context() as patch:
        patch.setattr(bench.host, "seeds_saved", damaged)
        job = bench.ended(bench.submit("one"))
    assert job.failure
    assert (job.failure.kind, job.failure.hint) == ("database", "Start QwenImageTool again.")
    assert bench.ended(bench.submit("two")).state == "done"


def test_a_crash_is_tried_once_more(bench: Bench) -> None:
    job = bench.ended(bench.submit("once exit 3"))
    assert (job.state, job.again) == ("done", 1)
    assert len(bench.host.files) == 1


def test_a_second_crash_ends_the_job_with_a_sentence(bench: Bench) -> None:
    job = bench.ended(bench.submit("exit 3"))
    assert (job.state, job.again) == ("failed", 1)
    assert job.failure
    assert job.failure.kind == "crashed"
    assert "exit code 3" in job.failure.message
    assert "Retry" in job.failure.hint
    assert bench.ended(bench.submit("next")).state == "done"


def test_the_second_try_is_the_next_fallback(bench: Bench, tmp_path: Path) -> None:
    """The order says which plan failed in the process that died, and by what."""
    seen = tmp_path / "orders"
    spy = tmp_path / "spy.py"
    spy.write_text(
        "import sys, os, runpy, threading\n"
        f"sys.path.insert(0, {str(HERE)!r})\n"
        "import fake_worker\n"
        "run = fake_worker.FakeWorker.run\n"
        "def spied(self, order):\n"
        f"    open({str(seen)!r}, 'a').write(order.model_dump_json() + '\\n')\n"
        "    run(self, order)\n"
        "fake_worker.FakeWorker.run = spied\n"
        "fake_worker.FakeWorker().main()\n",
        encoding="utf-8",
    )
    bench.supervisor._command = (sys.executable, str(spy))
    assert bench.ended(bench.submit("once exit 1")).state == "done"
    orders = [json.loads(text) for text in seen.read_text().splitlines()]
    assert [(order["tried"], order["trouble"]) for order in orders] == [
        (0, "other"),
        (3, "crashed"),
    ]


def test_a_process_whose_memory_ran_out_draws_no_other_job(bench: Bench) -> None:
    """Python's libraries may be half imported in it."""
    job = bench.ended(bench.submit("unforeseen fail memory"))
    assert (job.state, job.again) == ("failed", 1)
    assert bench.supervisor._worker is None
    assert bench.ended(bench.submit("next")).state == "done"


@pytest.mark.parametrize("kind", ["broken picture", "gpu memory"])
def test_what_the_engine_has_tried_is_not_tried_again(bench: Bench, kind: str) -> None:
    job = bench.ended(bench.submit(f"fail {kind}"))
    assert (job.state, job.again) == ("failed", 0)
    assert job.failure
    assert (job.failure.kind, job.failure.hint) == (kind, "Do something.")
    assert job.failure.kept


def test_pictures_that_were_saved_are_not_made_again(bench: Bench) -> None:
    job = bench.ended(bench.submit("save 2 once exit 1", images=3))
    assert job.state == "done"
    infos = [gallery.read_image_info(path) for path in sorted(bench.output.glob("*.png"))]
    assert sorted(info.request.seed or 0 for info in infos if info.request) == [5, 6, 7]


def test_a_death_after_the_last_picture_is_no_reason_to_draw_again(bench: Bench) -> None:
    job = bench.ended(bench.submit("save 2 once exit 1", images=2))
    assert job.state == "done"
    assert len(list(bench.output.glob("*.png"))) == 2


def test_a_crash_loop_stops_and_keeps_the_queue(bench: Bench) -> None:
    first, second = bench.submit("exit 1"), bench.submit("exit 1")
    third = bench.submit("fine")
    wait(lambda: bench.supervisor.halted is not None)
    wait(lambda: bench.supervisor.running() is None)
    assert bench.jobs.get(first).state == "failed"
    assert [job.id for job in bench.jobs.waiting()] == [second, third]
    halted = bench.supervisor.halted
    assert halted
    assert "three times" in halted.message
    bench.supervisor.resume()
    assert bench.ended(third).state == "done"
    assert bench.jobs.get(second).state == "failed"


def test_pause_puts_the_job_back_and_ends_the_worker(bench: Bench) -> None:
    job = bench.submit("slow", steps=60)
    bench.started(job)
    pid = bench.supervisor.worker_pid
    bench.supervisor.pause()
    wait(lambda: bench.supervisor.worker_pid is None)
    assert pid
    assert not psutil.pid_exists(pid)
    assert (bench.jobs.get(job).state, bench.jobs.get(job).again) == ("queued", 0)
    bench.supervisor.resume()
    assert bench.ended(job).state == "done"


def test_an_idle_worker_is_ended(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.supervisor._idle_seconds = 0.2
    bench.ended(bench.submit("one"))
    wait(lambda: bench.supervisor.worker_pid is None)
    assert bench.ended(bench.submit("two")).state == "done"
    bench.supervisor.stop()
    bench.jobs.close()


def test_a_second_start_does_nothing(bench: Bench) -> None:
    bench.supervisor.start()
    assert bench.ended(bench.submit("one")).state == "done"


def test_stop_puts_back_what_runs(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    job = bench.submit("slow", steps=500)
    bench.started(job)
    pid = bench.supervisor.worker_pid
    bench.supervisor.stop()
    assert (bench.jobs.get(job).state, bench.jobs.get(job).again) == ("queued", 0)
    assert pid
    assert not psutil.pid_exists(pid)
    bench.jobs.close()


@POSIX
@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("signal 9", "killed"),
        ("signal 11", "crashed"),
        ("say RuntimeError: CUDA error: an illegal memory access exit 1", "GPU failed"),
        ("say torch.OutOfMemoryError: CUDA out of memory. Tried exit 1", "gpu memory"),
        ("say OSError: paging file is too small (os error 1455) exit 1", "memory"),
    ],
)
def test_deaths_are_explained(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt: str, kind: str
) -> None:
    monkeypatch.setattr("qwen_image_tool.exits.ROOT", tmp_path)  # another test may want for memory
    job = bench.ended(bench.submit(prompt))
    assert job.failure
    assert job.failure.kind == kind


@POSIX
def test_a_worker_dies_with_its_parent(tmp_path: Path) -> None:
    """The parent gets no chance to clean up."""
    code = (
        "import sys, time\n"
        "from qwen_image_tool.supervisor import WorkerProcess\n"
        f"worker = WorkerProcess([sys.executable, {str(HERE / 'fake_worker.py')!r}])\n"
        "print(worker.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout
    pid = int(parent.stdout.readline())
    assert psutil.pid_exists(pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()

    def ended() -> bool:
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    wait(ended)


def test_the_last_output_is_kept_and_no_more() -> None:
    code = "import sys\nfor i in range(9000): print('line', i, file=sys.stderr)\nsys.exit(4)"
    worker = WorkerProcess([sys.executable, "-c", code])
    end = worker.next_report(30)
    assert isinstance(end, supervisor.Exit)
    worker.end()
    assert end.code == 4
    assert end.output.endswith("line 8999\n")
    assert OUTPUT_KEPT // 2 < len(end.output) <= OUTPUT_KEPT


def test_a_worker_that_cannot_be_started(bench: Bench) -> None:
    bench.supervisor._command = ("/nowhere/python",)
    job = bench.ended(bench.submit("one"))
    assert job.failure
    assert job.failure.kind == "crashed"
    bench.supervisor._command = FAKE
    assert bench.ended(bench.submit("two")).state == "done"


def test_workers_that_cannot_be_started_do_not_use_up_the_queue(bench: Bench) -> None:
    bench.supervisor._command = ("/nowhere/python",)
    first, *rest = (bench.submit(name) for name in ("one", "two", "three"))
    wait(lambda: bench.supervisor.halted is not None)
    wait(lambda: bench.supervisor.running() is None)
    assert bench.jobs.get(first).state == "failed"
    assert [job.id for job in bench.jobs.waiting()] == rest
    bench.supervisor._command = FAKE
    bench.supervisor.resume()
    assert bench.ended(rest[-1]).state == "done"


def test_a_fault_of_ours_stops_the_queue_with_a_sentence(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Job:
        raise ValueError("not a job")

    monkeypatch.setattr(bench.jobs, "take", broken)
    job = bench.submit("one")
    wait(lambda: bench.supervisor.halted is not None)
    assert bench.supervisor.halted
    assert "not a job" in bench.supervisor.halted.message
    monkeypatch.undo()
    bench.supervisor.resume()
    assert bench.ended(job).state == "done"


def test_nonsense_on_the_pipe_is_passed_over(bench: Bench, tmp_path: Path) -> None:
    noisy = tmp_path / "noisy.py"
    noisy.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(HERE)!r})\n"
        'os.write(1, b\'hello\\n{"kind": "new"}\\n\')\n'
        "import fake_worker\n"
        "worker = fake_worker.FakeWorker()\n"
        "print('a library prints')\n"
        "worker.main()\n",
        encoding="utf-8",
    )
    bench.supervisor._command = (sys.executable, str(noisy))
    assert bench.ended(bench.submit("one")).state == "done"
