"""The server on this machine: how soon it is up, what it costs, what it outlasts, what it carries.

    .venv/bin/python benchmarks/app.py [PART ...] [--write] [--kills N] [--faults N] [--examples N]

Each part runs alone or with the others, prints its figures as one line of JSON, and with --write
puts its table into docs/benchmarks.md. `kills` and most of `faults` use the tests' worker without
torch, everything else the practice model. Small disks and memory cgroups need root on Linux; what
can't be tried is said in the table.
"""

import argparse
import collections
import functools
import itertools
import json
import math
import os
import platform
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import httpx2
import psutil

import faults as made
import strangers
from qwen_image_tool import gallery
from qwen_image_tool.app import App
from qwen_image_tool.device import cores, cpu_name
from qwen_image_tool.errors import NotOurPicture
from qwen_image_tool.gallery.index import Filter, Index, put
from qwen_image_tool.messages import Happened, line
from qwen_image_tool.settings import Settings
from qwen_image_tool.supervisor import COMMAND
from qwen_image_tool.types import Request, Stepped
from running import BEARER, Live, keep_bytecode, process, server, wait
from sections import PAGE, write_section

BODY = {"model": "practice", "prompt": "a red circle left of a blue square", "seed": 1}
SMALL = {"size": "64x64", "steps": 2}
LANES = 4  # servers that are killed side by side


def start(_: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Process start to the ready line, and on to a picture; CPU seconds beside it, because other
    work on the machine does not change them. The very first start compiles Python's files."""
    ready, used, picture = [], [], []
    with patch.dict(os.environ, PYTHONPYCACHEPREFIX=str(folder / "bytecode")):
        for number in range(6):
            began = time.perf_counter()
            with process(folder / str(number), fake=False) as running:
                ready.append(time.perf_counter() - began)
                times = psutil.Process(running.child.pid).cpu_times()
                used.append(times.user + times.system)
                if number in (0, 1):
                    job = running.http.post("/api/jobs", json=BODY).json()["job"]["id"]
                    wait(functools.partial(_is_done, running.http, job), 300)
                    picture.append(time.perf_counter() - began)
    return {
        "first_ready_seconds": ready[0],
        "ready_seconds": statistics.median(ready[1:]),
        "ready_cpu_seconds": statistics.median(used[1:]),
        "first_picture_seconds": picture[0],
        "picture_seconds": picture[1],
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
    """What a preview takes of a step, at the practice model's own size, written as JSON and passed
    on as the worker does: with the limit of 0.4 s lifted, every second step has one drawn beside
    it; and what that is of 0.4 s. And the CPU of the thread that draws."""
    from qwen_image_tool.engine import engine, sketch

    drawn: list[float] = []
    apart, draw = engine.PREVIEW_SECONDS, sketch.Sketch.draw

    def timed(self: Any, cells: Any) -> bytes | None:
        began = time.thread_time()
        picture = draw(self, cells)
        drawn.append(time.thread_time() - began)
        return picture

    sketch.Sketch.draw = timed  # type: ignore[method-assign]
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with open(os.devnull, "wb", buffering=0) as pipe:  # noqa: PTH123

        def emit(event: Any) -> None:
            pipe.write(line(Happened(job="0123456789abcdef", event=event)))
            if isinstance(event, Stepped):
                beside = event.step % 2 == 0  # the step before was shown while this one ran
                seconds[beside].append(event.seconds)
                engine.PREVIEW_SECONDS = math.inf if beside else 0.0

        app = App(Settings(output=folder / "out", cache=folder / "cache"), previews=True)
        for steps in (20, *[200] * 4):
            app.generate(Request.from_user(**BODY, steps=steps), emit)
    shown, plain = (statistics.median(seconds[beside]) for beside in (True, False))
    return {
        "step_ms": 1e3 * plain,
        "share_of_a_step": shown / plain - 1,
        "share_as_drawn": (shown - plain) / max(apart, plain),
        "drawing_cpu_ms": 1e3 * statistics.median(drawn),
        "drawn": len(drawn),
    }


def kills(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """SIGKILL at random moments: first the server, then the worker."""
    return {
        "server": _side_by_side(_kill_servers, options.kills, folder / "server"),
        "worker": _side_by_side(_kill_workers, options.kills, folder / "worker"),
    }


def _side_by_side(
    kill: Callable[[random.Random, int, Path], dict[str, Any]], count: int, folder: Path
) -> dict[str, Any]:
    """Several servers at a time, each with a folder of its own: nothing here is timed."""
    lanes = min(LANES, count)
    shares = [count // lanes + (lane < count % lanes) for lane in range(lanes)]
    whole: collections.Counter[str] = collections.Counter()
    with ThreadPoolExecutor(lanes) as pool:
        chances = [random.Random(lane) for lane in range(lanes)]
        folders = [folder / str(lane) for lane in range(lanes)]
        for figures in pool.map(kill, chances, shares, folders):
            whole.update(figures)
    return dict(whole)


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


Rig = Callable[[Path], made.Tally]


def faults(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every other fault: how often it was tried, and what went wrong."""
    rows: dict[str, Any] = {}
    for number, (name, rig) in enumerate(_rigs(options.faults, options.examples)):
        rows[name] = _tried(rig, folder / str(number))
        print(json.dumps({name: rows[name]}), file=sys.stderr, flush=True)
    return rows


def _tried(rig: Rig, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    try:
        tally = rig(folder)
    except made.CannotTry as reason:
        return {"not_tried": str(reason)}
    except AssertionError as error:  # what should have happened did not
        return {"tried": 1, "right": 0, "wrong": [str(error)]}
    return {"tried": tally.tried, "right": tally.right, "wrong": tally.wrong[:5]}


def _rigs(count: int, examples: int) -> Iterator[tuple[str, Rig]]:
    def times(rig: Callable[[Path, int], made.Tally], number: int = count) -> Rig:
        return lambda folder: rig(folder, number)

    few = max(1, count // 4)  # each takes torch's start twice or more
    yield "worker out of memory in a run, by a cgroup", times(made.memory_cgroup, few)
    yield "worker out of memory in a run, by its limit", times(made.memory_limit, few)
    for name, full in made.FULL_DISKS.items():
        yield f"full disk: {name}", times(full)
    for file, (name, damage) in itertools.product(("jobs.db", "pictures.db"), made.DAMAGES.items()):
        broken = functools.partial(made.broken_database, damage=damage, name=file)
        yield f"{file}: {name}", times(broken)
    for file in ("jobs.db", "pictures.db"):
        newer = functools.partial(made.newer_database, name=file)
        yield f"{file}: of a newer version", times(newer)
    yield "pictures deleted by hand", times(made.deleted_pictures)
    yield "clock going backwards", times(made.clock_back)
    for name, refused in strangers.REFUSED.items():
        yield f"refused: {name}", functools.partial(_on_a_server, refused)
    yield "Schemathesis: no 5xx", functools.partial(_on_a_server, lambda live: _odd(live, examples))


def _on_a_server(ask: Callable[[Live], made.Tally], folder: Path) -> made.Tally:
    with server(folder) as live:
        return ask(live)


def _odd(live: Live, examples: int) -> made.Tally:
    whole = made.Tally()
    for operation in strangers.operations():
        tally = strangers.odd_requests(live, operation, examples)
        whole.tried += tally.tried
        whole.wrong += tally.wrong
    return whole


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
    "faults": faults,
    "load": load,
    "gallery": gallery_of_100000,
}


# The tables


def _start_table(found: dict[str, Any]) -> str:
    return _facts(
        ("process start to the ready line", f"{found['ready_seconds']:.1f} s", "2 s"),
        ("CPU of it", f"{found['ready_cpu_seconds']:.2f} s", ""),
        (
            "the very first time, when Python compiles its files",
            f"{found['first_ready_seconds']:.1f} s",
            "2 s",
        ),
        (
            "process start to a picture of the practice model, most of it importing torch",
            f"{found['picture_seconds']:.1f} s",
            "",
        ),
        (
            "the very first time",
            f"{found['first_picture_seconds']:.1f} s",
            "",
        ),
    )


def _overhead_table(found: dict[str, Any]) -> str:
    best, worst = found["overhead_ms_best_and_worst"]
    each = f"{found['overhead_ms']:.0f} ms ({best:.0f} to {worst:.0f})"
    return _facts(("API over the engine, a request of 64x64 in 2 steps", each, "30 ms"))


def _preview_table(found: dict[str, Any]) -> str:
    share = f"{found['share_of_a_step']:.1%} of {found['step_ms']:.1f} ms"
    as_drawn = f"{found['share_as_drawn']:.2%}"
    return _facts(
        ("previews as the program draws them, one in 0.4 s at most", as_drawn, "2 %"),
        ("a preview at every single step, practice model at 256x256", share, ""),
        ("CPU of the thread that draws it", f"{found['drawing_cpu_ms']:.2f} ms", ""),
    )


def _kills_table(found: dict[str, Any]) -> str:
    names = ("jobs", "done", "failed", "unexplained", "lost", "wrong", "half")
    rows = [
        (f"the {who}, {row['kills']} times", *(row.get(name, 0) for name in names))
        for who, row in found.items()
    ]
    first = ("SIGKILL at random moments", "jobs", "done", "failed with a sentence")
    heads = (*first, "without one", "lost", "done twice or in part", "half pictures")
    return _table(heads, rows)


def _faults_table(found: dict[str, Any]) -> str:
    rows = [
        (name, row.get("tried", "not tried: " + row.get("not_tried", "")), row.get("right", ""))
        for name, row in found.items()
    ]
    return _table(("fault", "outcomes checked", "right"), rows)


def _load_table(found: dict[str, Any]) -> str:
    memory = ", ".join(map(str, found["server_mb_after_each_round"]))
    answered = f"{found['requests'] - found['failures']} of {found['requests']}"
    queue = [
        f"{found[name]:.1f} ms" for name in ("submit_ms", "queue_of_5000_ms", "take_of_5000_ms")
    ]
    return _facts(
        (
            f"{found['clients']} clients at once, OpenAI API, 64x64 in 2 steps, four rounds",
            f"{answered} answered, {found['pictures_per_second']:.0f} pictures a second",
            "no failure",
        ),
        ("the server's memory after each round", f"{memory} MB", "flat"),
        ("in a queue of 5,000: to submit, to ask, to take one", ", ".join(queue), ""),
    )


def _gallery_table(found: dict[str, Any]) -> str:
    slowest = found["slowest_search_ms"]
    name = max(slowest, key=lambda each: slowest[each])
    return _facts(
        (
            "slowest search in 100,000 pictures (rows of the index, without files)",
            f"{slowest[name]:.1f} ms ({name})",
            "100 ms",
        ),
        ("index of 100,000 pictures, opened", f"{found['opened_seconds']:.2f} s", ""),
    )


def _facts(*rows: tuple[str, str, str]) -> str:
    return _table(("", "measured", "wanted"), rows)


def _table(heads: tuple[str, ...], rows: Any) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "start": _start_table,
    "overhead": _overhead_table,
    "preview": _preview_table,
    "kills": _kills_table,
    "faults": _faults_table,
    "load": _load_table,
    "gallery": _gallery_table,
}


def _origin(name: str, options: argparse.Namespace, busy: float) -> str:
    more = f" --faults {options.faults} --examples {options.examples}" if name == "faults" else ""
    where = f"{cpu_name()}, {cores()} cores, {platform.system()}, load {busy:.0f} before"
    command = f"`.venv/bin/python benchmarks/app.py {name}{more} --write`"
    return f"{command}, {datetime.now(UTC):%Y-%m-%d}: {where}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--faults", type=int, default=20, help="of each kind")
    parser.add_argument("--examples", type=int, default=50, help="of Schemathesis, a route")
    parser.add_argument("--write", action="store_true", help="the tables into docs/benchmarks.md")
    options = parser.parse_args()
    keep_bytecode(Path(__file__).parent.parent / ".venv" / "bytecode")
    print(json.dumps({"machine": f"{cpu_name()}, {cores()} cores, {sys.platform}"}))
    for name in options.parts or PARTS:
        busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        with tempfile.TemporaryDirectory() as folder:
            found = PARTS[name](options, Path(folder))
        print(json.dumps({name: found}), flush=True)
        if options.write:
            table = f"{_origin(name, options, busy)}\n\n{TABLES[name](found)}"
            write_section(PAGE, f"server {name}", table)


if __name__ == "__main__":
    main()
