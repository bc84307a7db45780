"""What dies, fills up or breaks: no job is lost, none is done twice, the server stays or comes
back, and the sentence is right."""

import collections
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from faults import (
    DAMAGES,
    FULL_DISKS,
    CannotTry,
    Tally,
    broken_database,
    clock_back,
    deleted_pictures,
    memory_cgroup,
    memory_limit,
    newer_database,
)
from qwen_image_tool import gallery
from qwen_image_tool.jobs import Jobs
from qwen_image_tool.types import Request
from running import SMALL, Live, process, server, wait

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="SIGKILL and tmpfs")


def submit(http: httpx2.Client, prompt: str, **more: Any) -> str:
    body = {"model": "practice", "prompt": prompt, "size": SMALL, "seed": 5, **more}
    answer = http.post("/api/jobs", json=body)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["job"]["id"])


def state(http: httpx2.Client, job: str) -> str:
    return str(http.get(f"/api/jobs/{job}").json()["job"]["state"])


def pictures(folder: Path) -> dict[str, list[int]]:
    """Seeds of every job, from the files themselves: each of them has to be whole."""
    found = collections.defaultdict(list)
    for path in folder.glob("*.png"):
        info = gallery.read_image_info(path)
        assert info.request
        assert info.request.seed is not None
        found[info.job].append(info.request.seed)
    return {job: sorted(seeds) for job, seeds in found.items()}


def check_done(http: httpx2.Client, jobs: list[str], folder: Path, images: int) -> None:
    """A job that is done has each picture once; one that isn't says why."""
    saved = pictures(folder)
    for job in jobs:
        view = http.get(f"/api/jobs/{job}").json()
        if view["job"]["state"] == "done":
            assert saved[job] == list(range(5, 5 + images))
            assert len(view["pictures"]) == images
        else:
            assert view["job"]["failure"]["kind"] == "twice interrupted"
            assert view["job"]["failure"]["hint"]


@LINUX
def test_the_server_killed_at_random_moments(tmp_path: Path) -> None:
    chance = random.Random(4)
    jobs: list[str] = []
    for _ in range(3):
        with process(tmp_path) as running:
            jobs += [submit(running.http, "slow", steps=3, images=2) for _ in range(2)]
            time.sleep(chance.uniform(0.1, 1.5))
            running.child.send_signal(signal.SIGKILL)
            running.child.wait()
    with process(tmp_path) as running:
        wait(lambda: all(state(running.http, job) in ("done", "failed") for job in jobs))
        check_done(running.http, jobs, tmp_path / "output", images=2)
        assert any(state(running.http, job) == "done" for job in jobs)


@LINUX
def test_the_worker_killed_at_random_moments(tmp_path: Path) -> None:
    chance = random.Random(5)
    with server(tmp_path) as live:
        for _ in range(4):
            job = live.submit("slow", steps=4, images=2)
            wait(lambda: live.service.supervisor.worker_pid is not None)
            time.sleep(chance.uniform(0.0, 0.7))
            if pid := live.service.supervisor.worker_pid:
                os.kill(pid, signal.SIGKILL)
                wait(lambda pid=pid: live.service.supervisor.worker_pid != pid)  # type: ignore[misc]
            view = live.wait(job)
            live.http.post("/api/queue/resume")
            assert view["job"]["state"] == "done"
            assert [picture["seed"] for picture in view["pictures"]] == [5, 6]
        assert all(seeds == [5, 6] for seeds in pictures(tmp_path / "output").values())


@LINUX
@pytest.mark.parametrize("end", ["SIGTERM", "SIGHUP"])
def test_an_end_puts_the_job_back_and_leaves_nothing_running(tmp_path: Path, end: str) -> None:
    """SIGHUP: its terminal was closed."""
    with process(tmp_path) as running:
        job = submit(running.http, "slow", steps=900)
        wait(lambda: state(running.http, job) == "running")
        wait(lambda: running.http.get("/api/queue").json()["loaded"])
        children = psutil.Process(running.child.pid).children(recursive=True)
        running.child.send_signal(getattr(signal, end))
        assert running.child.wait(60) == 0
        assert children
        wait(lambda: not any(child.is_running() for child in children))
    with process(tmp_path) as running:
        wait(lambda: state(running.http, job) == "running")
        view = running.http.get(f"/api/jobs/{job}").json()
        assert view["job"]["again"] == 0
        running.http.post(f"/api/jobs/{job}/cancel")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/images/generations", {}),
        ("/v1/images/generations", {"stream": True}),
        ("/sdapi/v1/txt2img", {"width": 256, "height": 256}),
    ],
    ids=["openai", "stream", "a1111"],
)
def test_an_end_keeps_the_jobs_of_clients_that_wait(
    tmp_path: Path, path: str, body: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    answers: list[httpx2.Response] = []

    def ask(http: httpx2.Client) -> None:
        answers.append(http.post(path, json={"prompt": "slow", "steps": 900, **body}))

    with server(tmp_path) as live:
        client = threading.Thread(target=ask, args=(live.http,))
        client.start()
        wait(lambda: live.service.queue().running is not None)
        job = live.service.queue().running
        live.stopper.stop()
        client.join(60)
    [answer] = answers
    assert "is being ended" in answer.text
    if body.get("stream"):
        assert "event: error" in answer.text
        assert "image_generation.completed" not in answer.text
    else:
        assert answer.status_code == 503
    if path.startswith("/v1"):
        assert '"server_ending"' in answer.text
    assert "Traceback" not in caplog.text
    jobs = Jobs(tmp_path / "data" / "jobs.db")
    assert [(waits.id, waits.again) for waits in jobs.waiting()] == [(job, 0)]
    jobs.close()


def test_the_server_ends_with_the_stdin_of_who_started_it(tmp_path: Path) -> None:
    with process(tmp_path, "--guarded") as running:
        assert running.http.get("/healthz").status_code == 200
        running.child.stdin.close()
        assert running.child.wait(60) == 0


@LINUX
def test_full_disks(tmp_path: Path) -> None:
    """Two small disks: one for the pictures, one for the queue. Each is filled while a job runs."""
    output, data = tmp_path / "output", tmp_path / "data"
    for folder in (output, data):
        folder.mkdir()
    mounts = " && ".join(f"mount -t tmpfs -o size=24m none {folder}" for folder in (output, data))
    under = ("unshare", "-rm", "sh", "-c", f'{mounts} && exec "$@"', "sh")
    with process(tmp_path, under=under) as running:
        http = running.http
        full = submit(http, f"fill {output} for 2")
        wait(lambda: state(http, full) == "failed")
        failure = http.get(f"/api/jobs/{full}").json()["job"]["failure"]
        assert failure["kind"] == "disk full"
        assert "Free some space" in failure["hint"]
        assert http.get("/api/gallery").json()["pictures"] == []

        def goes_on() -> bool:
            again = submit(http, "once there is space")
            wait(lambda: state(http, again) in ("done", "failed"))
            return state(http, again) == "done"

        wait(goes_on)
        job = submit(http, f"fill {data} for 4 slow", steps=2)
        body = {"model": "practice", "prompt": "x" * 50_000, "size": SMALL}

        def refused() -> bool:
            answer = http.post("/api/jobs", json=body)
            full: bool = answer.status_code == 507
            assert not full or answer.json()["error"]["kind"] == "disk full"
            return full

        wait(lambda: state(http, job) == "running")
        wait(refused)
        assert http.get("/healthz").status_code == 200
        wait(lambda: state(http, job) == "done")
        wait(lambda: http.post("/api/jobs", json=body).status_code == 201)


def check(rig: Callable[[Path, int], Tally], folder: Path, count: int = 1) -> None:
    try:
        tally = rig(folder, count)
    except CannotTry as reason:
        pytest.skip(str(reason))
    assert tally.tried > 0
    assert tally.wrong == []


@pytest.mark.parametrize("rig", [memory_cgroup, memory_limit])
def test_no_memory_in_a_run(rig: Callable[[Path, int], Tally], tmp_path: Path) -> None:
    """One job, which gets the memory back; benchmarks/app.py has those that don't too."""
    check(rig, tmp_path / "x")


@pytest.mark.parametrize("what", list(FULL_DISKS))
def test_a_full_disk(what: str, tmp_path: Path) -> None:
    check(FULL_DISKS[what], tmp_path / "x")


@pytest.mark.parametrize("name", ["jobs.db", "pictures.db"])
@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_broken_database(damage: str, name: str, tmp_path: Path) -> None:
    check(partial(broken_database, damage=DAMAGES[damage], name=name), tmp_path / "x", 2)


@pytest.mark.parametrize("name", ["jobs.db", "pictures.db"])
def test_a_database_that_a_newer_version_wrote(name: str, tmp_path: Path) -> None:
    check(partial(newer_database, name=name), tmp_path / "x")


def test_pictures_that_were_deleted(tmp_path: Path) -> None:
    check(deleted_pictures, tmp_path / "x")


def test_a_clock_that_goes_back(tmp_path: Path) -> None:
    check(clock_back, tmp_path)


def test_many_jobs_stay_quick_to_ask_for(tmp_path: Path) -> None:
    with server(tmp_path) as live:
        live.http.post("/api/queue/pause")
        request = live.service.app.ready(Request(model="practice", prompt="x", seed=1))
        with live.service.jobs.database.write() as write:
            write.executemany(
                "INSERT INTO jobs (id, position, request, created_at) VALUES (?, ?, ?, 0)",
                [(f"j{i}", i, request.to_json()) for i in range(5000)],
            )
        assert live.http.get("/api/queue").json()["counts"]["queued"] == 5000
        assert live.http.get("/api/jobs/j4999").json()["ahead"] == 4999
        moved = live.http.post("/api/jobs/j4999/move", json={"before": "j0"}).json()
        assert moved["ahead"] == 0
        assert len(live.http.get("/api/queue/jobs", params={"limit": 10_000}).json()) == 5000


def test_many_clients_at_once(live_many: Live) -> None:
    """40 here; benchmarks/app.py has 200."""
    from concurrent.futures import ThreadPoolExecutor

    def ask(number: int) -> int:
        body = {"prompt": f"fox {number}", "seed": number}
        with httpx2.Client(base_url=live_many.url, headers=live_many.http.headers) as http:
            return http.post("/v1/images/generations", json=body, timeout=120).status_code

    with ThreadPoolExecutor(40) as pool:
        assert set(pool.map(ask, range(40))) == {200}


@pytest.fixture
def live_many(tmp_path: Path) -> Any:
    with server(tmp_path) as live:
        yield live
