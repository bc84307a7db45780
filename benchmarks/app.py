"""The server on this machine: how soon it is up, what it costs, what it outlasts, what it carries.

    .venv/bin/python benchmarks/app.py [start overhead preview kills load gallery] [--kills N]

Each part runs alone or with the others, and prints its figures as one line of JSON, in a temporary
folder. `kills` uses the tests' worker without torch, everything else the practice model.
"""

import argparse
import collections
import functools
import itertools
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import httpx2
import psutil

from qwen_image_tool import gallery
from qwen_image_tool.app import App
from qwen_image_tool.device import cores, cpu_name
from qwen_image_tool.errors import NotOurPicture
from qwen_image_tool.gallery.index import Filter, Index, put
from qwen_image_tool.settings import Settings
from qwen_image_tool.supervisor import COMMAND
from qwen_image_tool.types import Preview, Request, Stepped
from running import BEARER, process, server, wait

BODY = {"model": "practice", "prompt": "a red circle left of a blue square", "seed": 1}
SMALL = {"size": "64x64", "steps": 2}


def start(_: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Process start to the ready line, and on to the first picture; CPU seconds beside it, because
    other work on the machine does not change them."""
    ready, used, picture = [], [], []
    for number in range(5):
        began = time.perf_counter()
        with process(folder / str(number), fake=False) as running:
            ready.append(time.perf_counter() - began)
            times = psutil.Process(running.child.pid).cpu_times()
            used.append(times.user + times.system)
            if number == 0:
                job = running.http.post("/api/jobs", json=BODY).json()["job"]["id"]
                wait(functools.partial(_is_done, running.http, job), 300)
                picture.append(time.perf_counter() - began)
    return {
        "ready_seconds": statistics.median(ready),
        "ready_cpu_seconds": statistics.median(used),
        "first_picture_seconds": picture[0],
    }


def overhead(_: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A request through the API, less what the engine says that its phases took: everything that is
    not the engine, from the client's first byte to its last."""
    body = {"prompt": BODY["prompt"], "model": "practice", "seed": 1, **SMALL}
    wall, engine = [], []
    with server(folder, command=COMMAND) as live:
        for _each in range(33):
            began = time.perf_counter()
            answer = live.http.post("/v1/images/generations", json=body)
            wall.append(time.perf_counter() - began)
            assert answer.status_code == 200
            engine.append(sum(live.service.jobs.latest(limit=1)[0].seconds.values()))
    apart = [1e3 * (whole - part) for whole, part in zip(wall, engine, strict=True)][3:]
    return {
        "request_ms": 1e3 * statistics.median(wall),
        "overhead_ms": statistics.median(apart),
        "overhead_ms_best_and_worst": [min(apart), max(apart)],
    }


def preview(_: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What a preview takes of a step, at the practice model's own size. The limit of 0.4 s between
    previews is lifted: every step pays."""
    from qwen_image_tool.engine import engine

    engine.PREVIEW_SECONDS = 0.0
    app = App(Settings(output=folder / "out", cache=folder / "cache"), previews=True)
    request = Request.from_user(**BODY, steps=20)
    app.generate(request, print_nothing)
    marks: list[tuple[str, float]] = []
    steps: list[float] = []

    def emit(event: Any) -> None:
        marks.append((event.kind, time.perf_counter()))
        if isinstance(event, Stepped):
            steps.append(event.seconds)

    app.generate(request, emit)
    drawn = [
        after - before
        for (kind, before), (following, after) in itertools.pairwise(marks)
        if kind == "step" and following == Preview.model_fields["kind"].default
    ]
    step, each = statistics.median(steps), statistics.median(drawn)
    return {
        "step_ms": 1e3 * step,
        "preview_ms": 1e3 * each,
        "share_of_a_step": each / step,
        "share_at_one_in_0.4_s": each / 0.4,
    }


def kills(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """SIGKILL at random moments: first the server, then the worker."""
    chance = random.Random(1)
    return {
        "server": _kill_servers(chance, options.kills, folder / "server"),
        "worker": _kill_workers(chance, options.kills, folder / "worker"),
    }


def _kill_servers(chance: random.Random, count: int, folder: Path) -> dict[str, Any]:
    jobs: list[str] = []
    body = BODY | {"prompt": "slow", "steps": 4, "images": 2, "size": "256x256"}
    for _ in range(count):
        with process(folder) as running:
            jobs += [running.http.post("/api/jobs", json=body).json()["job"]["id"] for _ in "ab"]
            time.sleep(chance.uniform(0.0, 1.5))
            running.child.send_signal(signal.SIGKILL)
            running.child.wait()
    with process(folder) as running:
        wait(lambda: all(_state(running.http, job) in ("done", "failed") for job in jobs), 600)
        return _judged(running.http, jobs, folder / "output") | {"kills": count}


def _kill_workers(chance: random.Random, count: int, folder: Path) -> dict[str, Any]:
    jobs: list[str] = []
    done = 0
    with server(folder) as live:
        while done < count:
            job = live.submit("slow", steps=4, images=2, seed=1)
            jobs.append(job)
            time.sleep(chance.uniform(0.0, 0.9))
            if pid := live.service.supervisor.worker_pid:
                os.kill(pid, signal.SIGKILL)
                done += 1
            live.wait(job)
            live.http.post("/api/queue/resume")
        return _judged(live.http, jobs, folder / "output") | {"kills": count}


def _judged(http: httpx2.Client, jobs: list[str], output: Path) -> dict[str, Any]:
    """`lost`: jobs nobody knows; `wrong`: done without each picture once; `unexplained`: failed
    without a sentence; `half`: files that can't be read."""
    seeds: dict[str, list[int]] = collections.defaultdict(list)
    half = 0
    for path in output.glob("*.png"):
        try:
            info = gallery.read_image_info(path)
        except NotOurPicture:
            half += 1
        else:
            seeds[info.job].append(info.request.seed or 0 if info.request else 0)
    figures = collections.Counter(jobs=len(jobs), half=half, lost=0, wrong=0, unexplained=0)
    for job in jobs:
        answer = http.get(f"/api/jobs/{job}")
        if answer.status_code != 200:
            figures["lost"] += 1
            continue
        found = answer.json()["job"]
        figures[found["state"]] += 1
        figures["wrong"] += found["state"] == "done" and sorted(seeds[job]) != [1, 2]
        figures["unexplained"] += found["state"] == "failed" and not found["failure"]["hint"]
    return dict(figures)


def load(_: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """200 clients at once with the practice model, four rounds: the server's own memory after each;
    then a queue of 5,000 jobs."""
    memory, codes = [], []
    with process(folder / "clients", fake=False) as running:
        _round(running.url, 10)
        for _each in range(4):
            began = time.perf_counter()
            codes += _round(running.url, 200)
            seconds = time.perf_counter() - began
            memory.append(round(psutil.Process(running.child.pid).memory_info().rss / 1e6))
    with server(folder / "queue", command=COMMAND) as live:
        live.http.post("/api/queue/pause")
        began = time.perf_counter()
        for number in range(5000):
            live.service.submit(Request.from_user(**BODY | {"seed": number}, **SMALL))
        submitted = time.perf_counter() - began
        asked = [_timed(lambda: live.http.get("/api/queue")) for _ in range(20)]
        taken = [_timed(live.service.jobs.take) for _ in range(50)]
    return {
        "clients": 200,
        "requests": len(codes),
        "failures": len(codes) - codes.count(200),
        "pictures_per_second": 200 / seconds,
        "server_mb_after_each_round": memory,
        "submit_ms": submitted / 5000 * 1e3,
        "queue_of_5000_ms": 1e3 * statistics.median(asked),
        "take_of_5000_ms": 1e3 * statistics.median(taken),
    }


def _round(url: str, clients: int) -> list[int]:
    def ask(number: int) -> int:
        body = {"prompt": BODY["prompt"], "model": "practice", "seed": number, **SMALL}
        with httpx2.Client(base_url=url, headers=BEARER, timeout=600) as http:
            return http.post("/v1/images/generations", json=body).status_code

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(ask, range(clients)))


def gallery_of_100000(_: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """An index of 100,000 pictures: searches for what all, few and none have."""
    index = Index(folder / "pictures", folder / "pictures.db")
    began = time.perf_counter()
    words = fill(index, 100_000)
    filled = time.perf_counter() - began
    searches: dict[str, dict[str, Any]] = {
        "newest": {},
        "in all": {"text": "picture"},
        "in few": {"text": words[5]},
        "two words": {"text": f"{words[5]} {words[6]}"},
        "two letters": {"text": "zq"},
        "in none": {"text": "nothing-at-all"},
        "model": {"model": "practice"},
        "starred": {"starred": True},
    }

    def search(options: dict[str, Any]) -> Callable[[], object]:
        return lambda: index.search(Filter(**options))

    slowest = {
        name: 1e3 * max(_timed(search(options)) for _ in range(20))
        for name, options in searches.items()
    }
    index.close()
    opened = _timed(lambda: Index(folder / "pictures", folder / "pictures.db").close())
    return {"filled_seconds": filled, "opened_seconds": opened, "slowest_search_ms": slowest}


def fill(
    index: Index, count: int, more: Callable[[int], dict[str, Any]] = lambda _: {}
) -> list[str]:
    """Rows of `count` invented pictures, 300 a day, with what `more` says of each. Returns the
    words that their prompts are made of: all have "picture", each word is in about 1 of 120."""
    chance = random.Random(1)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(chance.choices(letters, k=chance.randint(3, 9))) for _ in range(3000)]
    for first in range(0, count, 500):
        with index.database.write() as write:
            put(write, [_row(n, chance, words) | more(n) for n in range(first, first + 500)])
    return words


def _row(number: int, chance: random.Random, words: list[str]) -> dict[str, Any]:
    day, second = divmod(number, 300)
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(1.7e9 + day * 86400 + second * 60))
    return {
        "id": f"{number:016x}",
        "file": f"{number}.png",
        "bytes": 9,
        "changed": 9,
        "taken": moment,
        "width": 1328,
        "height": 1328,
        "model": "practice" if number % 3 else "qwen-image",
        "seed": number,
        "job": "",
        "prompt": "the picture of " + " ".join(chance.choices(words, k=25)),
        "negative": "blurry",
    }


def print_nothing(_: object) -> None:
    pass


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _is_done(http: httpx2.Client, job: str) -> bool:
    return _state(http, job) == "done"


def _state(http: httpx2.Client, job: str) -> str:
    return str(http.get(f"/api/jobs/{job}").json()["job"]["state"])


PARTS: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "start": start,
    "overhead": overhead,
    "preview": preview,
    "kills": kills,
    "load": load,
    "gallery": gallery_of_100000,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []])
    parser.add_argument("--kills", type=int, default=100)
    options = parser.parse_args()
    print(json.dumps({"machine": f"{cpu_name()}, {cores()} cores, {sys.platform}"}))
    for name in options.parts or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps({name: PARTS[name](options, Path(folder))}), flush=True)


if __name__ == "__main__":
    main()
