"""Faults made on purpose at the system's seams, and what came of them: memory, disks, databases,
pictures that go, the clock. The tests ask for a few of each, benchmarks/app.py for many.

Every rig takes an empty folder and a count, and returns what was tried and what went wrong. It
raises CannotTry where this machine lacks what the fault is made with.
"""

import contextlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import psutil

from qwen_image_tool import gallery
from qwen_image_tool.errors import NotOurPicture, NotWritten, ToolError
from qwen_image_tool.gallery.index import Filter
from qwen_image_tool.server.gate import Password
from qwen_image_tool.supervisor import COMMAND
from running import SMALL, Live, process, server, wait

MIB = 1 << 20
ENDED = ("done", "failed", "cancelled")


class CannotTry(Exception):
    """The fault can't be made here."""


@dataclass
class Tally:
    """`wrong`: what each case was in which not the right thing came out."""

    tried: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def right(self) -> int:
        return self.tried - len(self.wrong)

    def check(self, what: str, right: bool, found: object = "") -> None:
        self.tried += 1
        if not right:
            self.wrong.append(f"{what}: {found}")


def seeds_on_disk(folder: Path) -> tuple[dict[str, list[int]], int]:
    """Seeds by job, from the files themselves; and how many files are no whole picture."""
    from PIL import Image

    found: dict[str, list[int]] = {}
    half = 0
    for path in sorted(folder.glob("*.png")):
        try:
            info = gallery.read_image_info(path)
            with Image.open(path) as image:
                image.load()
        except (NotOurPicture, OSError):
            half += 1
        else:
            found.setdefault(info.job, []).append((info.request and info.request.seed) or 0)
    return {job: sorted(seeds) for job, seeds in found.items()}, half


def done_once(live: Live, job: str, seeds: list[int]) -> bool:
    """Done, with each picture once: on disk, in the gallery and none in part."""
    view = live.http.get(f"/api/jobs/{job}").json()
    saved, half = seeds_on_disk(live.service.index.folder)
    in_gallery = sorted(picture["seed"] for picture in view["pictures"])
    return (view["job"]["state"], saved.get(job), in_gallery, half) == ("done", seeds, seeds, 0)


# Memory


class Limiter(Protocol):
    """`command` starts a worker that it can `cut`: it has no more memory than now; until `lift`.
    `may_crash`: a library may not see that it was given none."""

    command: Sequence[str]
    may_crash: bool

    def cut(self, worker: int) -> None: ...
    def lift(self) -> None: ...


class Cgroup:
    """A memory cgroup of our own, below the one that this process is in."""

    SPARE = 4 * MIB
    may_crash = False

    def __init__(self) -> None:
        self._folder = self._made()
        version2 = (self._folder / "memory.max").exists()
        self._limit = self._folder / ("memory.max" if version2 else "memory.limit_in_bytes")
        self._used = self._folder / ("memory.current" if version2 else "memory.usage_in_bytes")
        self._unlimited = "max" if version2 else "-1"
        enter = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
        self.command: Sequence[str] = ("sh", "-c", enter, str(self._folder), *COMMAND)

    def cut(self, worker: int) -> None:
        self._limit.write_text(str(int(self._used.read_text()) + self.SPARE))

    def lift(self) -> None:
        self._limit.write_text(self._unlimited)

    def remove(self) -> None:
        wait(lambda: not (self._folder / "cgroup.procs").read_text())
        self._folder.rmdir()

    @staticmethod
    def _made() -> Path:
        from qwen_image_tool.device import cgroups

        for group in cgroups(Path("/"), "memory") if sys.platform == "linux" else ():
            folder = group / f"qit-{os.getpid()}"
            with contextlib.suppress(OSError):
                folder.mkdir()
                if any((folder / f"memory.{name}").exists() for name in ("max", "limit_in_bytes")):
                    return folder
                folder.rmdir()
        raise CannotTry("no memory cgroup can be made here")


class AddressSpace:
    """A limit of the worker's address space, set while it runs."""

    SPARE = 4 * MIB
    may_crash = True
    command: Sequence[str] = COMMAND

    def __init__(self) -> None:
        if sys.platform != "linux":
            raise CannotTry("another process' limits are Linux's")

    def cut(self, worker: int) -> None:
        process = psutil.Process(worker)
        most = process.memory_info().vms + self.SPARE
        process.rlimit(psutil.RLIMIT_AS, (most, psutil.RLIM_INFINITY))

    def lift(self) -> None:
        """It ended with its process."""


def memory_cgroup(folder: Path, count: int) -> Tally:
    """The kernel kills the worker for want of memory while it draws."""
    group = Cgroup()
    try:
        return _without_memory(folder, count, group)
    finally:
        group.remove()


def memory_limit(folder: Path, count: int) -> Tally:
    """The worker is given no more memory while it draws: torch fails, or a library crashes."""
    return _without_memory(folder, count, AddressSpace())


def _without_memory(folder: Path, count: int, limiter: Limiter) -> Tally:
    """Half of the jobs get the memory back for their second try, which has to make the picture; the
    others fail with a sentence."""
    tally = Tally()
    with server(folder, command=limiter.command) as live:
        for number in range(count):
            given_back = number % 2 == 0
            job = live.submit("a red circle", size="512x512", steps=12, seed=number)
            _cut_in_a_run(live, job, limiter)
            wait(partial(_tried, live, job), 600)
            if given_back:
                limiter.lift()
            else:
                with contextlib.suppress(psutil.Error):  # it died before it drew
                    _cut_in_a_run(live, job, limiter)
            view = live.wait(job, 600)["job"]
            limiter.lift()
            live.http.post("/api/queue/resume")
            if given_back:
                tally.check("the memory came back", done_once(live, job, [number]), view)
            else:
                right = _said(view, "memory", "Close other programs")
                crashed = limiter.may_crash and _said(view, "crashed", "Retry")
                tally.check("no memory", right or crashed, view["failure"])
            tally.check("the server", live.http.get("/healthz").is_success)
    return tally


def _tried(live: Live, job: str) -> bool:
    found = live.service.jobs.get(job)
    return found.again == 1 or found.has_ended


def _cut_in_a_run(live: Live, job: str, limiter: Limiter) -> None:
    """As soon as a first step is done, or the job has ended before."""
    again = live.service.jobs.get(job).again

    def draws() -> bool:
        if (found := live.service.jobs.get(job)).has_ended or found.again > again:
            return True
        progress = live.service.progress(job)
        return progress is not None and progress.step > 0

    wait(draws, 600)
    if worker := live.service.supervisor.worker_pid:
        limiter.cut(worker)


def _said(view: dict[str, Any], kind: str, hint: str) -> bool:
    failure = view["failure"] or {"kind": "", "hint": "", "kept": ""}
    right = view["state"] == "failed" and failure["kind"] == kind
    return bool(right and hint in failure["hint"] and failure["kept"])


# Full disks


class SmallDisk:
    """A disk of a few megabytes at `folder`."""

    def __init__(self, folder: Path) -> None:
        self._filler = folder / ".filler"

    def fill(self) -> None:
        with contextlib.suppress(OSError), self._filler.open("ab", buffering=0) as file:
            for size in (1 << 16, 1 << 12, 1 << 8, 1):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)) == size:
                        pass

    def free(self) -> None:
        self._filler.unlink(missing_ok=True)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[SmallDisk]:
    if sys.platform != "linux" or os.geteuid() != 0:
        raise CannotTry("mounting a small disk needs root on Linux")
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        raise CannotTry("small disks can't be mounted here")
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def full_pictures(folder: Path, count: int) -> Tally:
    """No room for a picture: the job fails and nothing of it is left; Retry makes it."""
    tally = Tally()
    with small_disk(folder / "output") as disk, server(folder) as live:
        for number in range(count):
            disk.fill()
            job = live.submit("a fox", images=2, seed=5 + number)
            view = live.wait(job)["job"]
            tally.check("said", _said(view, "disk full", "Free some space"), view)
            left = [path.name for path in (folder / "output").iterdir() if path.name != ".filler"]
            tally.check("nothing half", len(left) == 2 * number, left)
            disk.free()
            again = live.http.post(f"/api/jobs/{job}/retry").json()["job"]["id"]
            live.wait(again)
            tally.check("retried", done_once(live, again, [5 + number, 6 + number]))
    return tally


def full_queue(folder: Path, count: int) -> Tally:
    """No room for the queue and the index: new jobs are refused with a sentence, what runs goes on
    and is written down when there is room, its pictures are in the gallery once."""
    tally = Tally()
    with small_disk(folder / "data") as disk, server(folder) as live:
        output = live.service.index.folder
        body = {"model": "practice", "prompt": "x" * 50_000, "size": SMALL}
        for _ in range(count):
            job = live.submit("slow", steps=8, images=2)
            wait(partial(_is_busy, live))
            disk.fill()
            refused = live.http.post("/api/jobs", json=body)
            tally.check("refused", refused.status_code == 507, refused.text[:300])
            tally.check("the server", live.http.get("/api/queue").is_success)
            wait(partial(_has_saved, output, job, 2))
            disk.free()
            live.wait(job)
            tally.check("done once", done_once(live, job, [5, 6]))
            tally.check(
                "found", live.service.index.search(Filter(text="slow")).pictures[0].job == job
            )
            accepted = live.http.post("/api/jobs", json=body)
            tally.check("accepted", accepted.status_code == 201, accepted.text[:300])
            live.wait(accepted.json()["job"]["id"])
    return tally


def full_settings(folder: Path, count: int) -> Tally:
    """No room for a choice or a password: it is said, and the old ones stay whole."""
    tally = Tally()
    with small_disk(folder / "data") as disk, server(folder) as live:
        password = Password(folder / "data")
        password.set("the first one")
        for _ in range(count):
            live.service.remember(model="practice")
            disk.fill()
            chosen = live.http.put("/api/system/default-model", json={"model": "qwen-image"})
            tally.check("a choice", chosen.status_code == 507, chosen.text)
            tally.check("the old one", live.service.remembered()["model"] == "practice")
            try:
                password.set("another one")
            except NotWritten as error:
                tally.check("a password", error.trouble == "disk full", error)
            else:
                tally.check("a password", right=False, found="kept on a full disk")
            tally.check("the old password", password.matches("the first one"))
            disk.free()
            half = list((folder / "data").glob(".*"))
            tally.check("nothing half", not half, half)
            chosen = live.http.put("/api/system/default-model", json={"model": "qwen-image"})
            tally.check("a choice later", chosen.is_success, chosen.text)
    return tally


def full_thumbnails(folder: Path, count: int) -> Tally:
    """No room for small pictures: they are shown, not kept, and nothing half is left."""
    tally = Tally()
    with small_disk(folder / "cache") as disk, server(folder) as live:
        [picture] = live.wait(live.submit("a fox"))["pictures"]
        for number in range(count):
            disk.fill()
            small = live.http.get(f"/api/gallery/{picture['id']}/thumbnail?side={16 + number}")
            tally.check("shown", small.is_success, small.status_code)
            disk.free()
            left = list((folder / "cache").rglob("*.*"))
            tally.check("nothing half", not left, left)
    return tally


def full_caches(folder: Path, count: int) -> Tally:
    """No room for what the engine keeps (known prompts, schedules, previews, rates): the picture is
    made all the same, and by the real worker."""
    tally = Tally()
    with (
        _environment(QIT_HOME=str(folder)),
        small_disk(folder / "cache") as disk,
        server(folder, command=COMMAND) as live,
    ):
        for number in range(count):
            disk.fill()
            job = live.submit(f"a red circle {number}", size="64x64", steps=2 + number % 5)
            live.wait(job, 600)
            tally.check("done", done_once(live, job, [5]), live.service.jobs.get(job).failure)
            disk.free()
    return tally


def full_logs(folder: Path, count: int) -> Tally:
    """No room for the log: the server goes on."""
    tally = Tally()
    with small_disk(folder / "logs") as disk:
        for number in range(count):
            disk.fill()
            with process(folder) as running:
                body = {"model": "practice", "prompt": "a fox", "size": SMALL, "seed": number}
                job = running.http.post("/api/jobs", json=body).json()["job"]["id"]
                wait(partial(_ended, running.http, job))
                tally.check("done", _state(running.http, job) == "done")
            disk.free()
    return tally


def full_start(folder: Path, count: int) -> Tally:
    """No room for anything when the server starts: a sentence, and all jobs are there later."""
    tally = Tally()
    with small_disk(folder / "data") as disk:
        with server(folder) as live:
            live.http.post("/api/queue/pause")
            jobs = [live.submit(f"number {n}", seed=n) for n in range(3)]
        for number in range(count):
            disk.fill()
            code, said = _serve(folder)
            tally.check("a sentence", code in (1, 2) and "Free some space" in said, said)
            tally.check("no traceback", "Traceback" not in said, said)
            disk.free()
            with server(folder) as live:
                wait(lambda: all(live.service.jobs.get(job).has_ended for job in jobs))
                right = all(done_once(live, job, [n]) for n, job in enumerate(jobs))
                tally.check(f"all done after start {number}", right)
    return tally


def _serve(folder: Path) -> tuple[int, str]:
    """`qit serve` that is expected to end by itself: its code, and what it said."""
    environ = os.environ | {"QIT_HOME": str(folder), "QIT_OUTPUT": str(folder / "output")}
    code = "from qwen_image_tool.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "serve", "--json-ready", "--port", "0", "--guarded"],
        env=environ,
        stdin=subprocess.DEVNULL,  # one that comes up ends at once
        capture_output=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stderr.decode(errors="replace")


FULL_DISKS: dict[str, Callable[[Path, int], Tally]] = {
    "pictures": full_pictures,
    "queue and index": full_queue,
    "settings and password": full_settings,
    "thumbnails": full_thumbnails,
    "the engine's caches": full_caches,
    "log": full_logs,
    "start of the server": full_start,
}


# Broken databases

Damage = Callable[[bytearray, random.Random], None]


def garbage(content: bytearray, chance: random.Random) -> None:
    """All of it, or a part, is something else."""
    length = chance.choice((len(content), 4096, 3 * 4096))
    start = chance.randrange(max(1, len(content) - length))
    content[start : start + length] = chance.randbytes(min(length, len(content) - start))


def truncated(content: bytearray, chance: random.Random) -> None:
    del content[chance.randrange(1, len(content)) :]


def zeroed(content: bytearray, chance: random.Random) -> None:
    for page in chance.sample(range(len(content) // 4096), 2):
        content[page * 4096 : (page + 1) * 4096] = bytes(4096)


DAMAGES: dict[str, Damage] = {"garbage": garbage, "truncated": truncated, "zeroed pages": zeroed}
JOBS = 40


def broken_database(folder: Path, count: int, damage: Damage, name: str) -> Tally:
    """`name` is damaged while nobody has it open. The server starts, says what it kept, works on,
    and the gallery is whole, because the pictures are; the damaged file is kept."""
    tally = Tally()
    chance = random.Random(damage.__name__ + name)
    for number in range(count):
        here = folder / str(number)
        jobs, pictures = _filled(here)
        path = here / "data" / name
        content = bytearray(path.read_bytes())
        damage(content, chance)
        path.write_bytes(content)
        _after_damage(tally, here, name, jobs, pictures)
        shutil.rmtree(here)
    return tally


def _filled(folder: Path) -> tuple[list[str], list[str]]:
    """A data folder with jobs that wait, and pictures of one that is done."""
    with server(folder) as live:
        pictures = live.wait(live.submit("drawn before " * 200, images=8))["pictures"]
        live.http.post("/api/queue/pause")
        jobs = [live.submit(f"number {n} " * 60, seed=n) for n in range(JOBS)]
    return jobs, [picture["id"] for picture in pictures]


def _after_damage(
    tally: Tally, folder: Path, name: str, jobs: list[str], pictures: list[str]
) -> None:
    with server(folder) as live:
        rescued = live.http.get("/api/system").json()["rescued"]
        known = [job for job in jobs if live.http.get(f"/api/jobs/{job}").is_success]
        kept = len(list((folder / "data").glob(f"{name}.broken-1")))
        # Damage in pages that nothing is in has no consequence and no message
        said = [text for text in rescued if text.startswith(f"{name} was damaged")]
        whole = len(known) == len(jobs)
        tally.check("said and kept aside", bool(said and kept) or (whole and not rescued), rescued)
        if name == "pictures.db":
            tally.check("all jobs", whole, len(known))
        wait(lambda: all(live.service.jobs.get(job).has_ended for job in known))
        right = all(done_once(live, job, [jobs.index(job)]) for job in known)
        tally.check("what is known is done once", right)
        found = {picture.id for picture in live.service.index.search(limit=500).pictures}
        tally.check("all pictures", found >= set(pictures), len(found))
        again = live.submit("after the damage")
        tally.check("it works on", live.wait(again)["job"]["state"] == "done")


def newer_database(folder: Path, count: int, name: str) -> Tally:
    """A newer version wrote it: a sentence, and not one byte is changed."""
    tally = Tally()
    with server(folder):
        pass
    path = folder / "data" / name
    for number in range(count):
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute(f"PRAGMA user_version = {900 + number}")
        before = path.read_bytes()
        try:
            with server(folder):
                tally.check("refused", right=False)
        except ToolError as error:
            tally.check("refused", "newer version" in error.message, error)
            tally.check("what to do", "Update" in error.hint, error)
        tally.check("untouched", path.read_bytes() == before)
    return tally


# Pictures that go


def deleted_pictures(folder: Path, count: int) -> Tally:
    """Files are deleted by hand, while the server runs and while it does not."""
    tally = Tally()
    chance = random.Random(6)
    for number in range(count):
        here = folder / str(number)
        with server(here) as live:
            job = live.submit("a fox", images=3)
            pictures = live.wait(job)["pictures"]
            gone, *others = chance.sample(pictures, 3)
            (here / "output" / gone["file"]).unlink()
            for part in ("", "/file", "/thumbnail"):
                answer = live.http.get(f"/api/gallery/{gone['id']}{part}")
                right = answer.status_code == 404 and answer.json()["error"]["hint"]
                tally.check(f"gone{part}", bool(right), answer.text[:200])
            found = {p["id"] for p in live.http.get("/api/gallery").json()["pictures"]}
            tally.check("the others", found == {other["id"] for other in others}, found)
            view = live.http.get(f"/api/jobs/{job}").json()
            tally.check("the job", view["job"]["state"] == "done" and len(view["pictures"]) == 2)
            again = live.http.post(f"/api/jobs/{job}/retry").json()["job"]["id"]
            live.wait(again)
            tally.check("retried", done_once(live, again, [5, 6, 7]))
        shutil.rmtree(here / "output")
        with server(here) as live:
            tally.check("all gone", live.http.get("/api/gallery").json()["pictures"] == [])
            tally.check(
                "not drawn again",
                _state(live.http, job) == "done" and not list(here.glob("output/*.png")),
            )
            new = live.submit("a new one")
            live.wait(new)
            tally.check("the folder is made again", done_once(live, new, [5]))
        _deleted_before_the_second_start(tally, folder / f"{number} killed")
    return tally


def _deleted_before_the_second_start(tally: Tally, folder: Path) -> None:
    """A job dies with its server, and the picture it had saved is deleted: it is drawn again."""
    if not hasattr(signal, "SIGKILL"):
        return
    with process(folder) as running:
        body = {"model": "practice", "prompt": "save 1 once hang", "size": SMALL, "seed": 5}
        body["images"] = 2
        job = running.http.post("/api/jobs", json=body).json()["job"]["id"]
        wait(lambda: len(list((folder / "output").glob("*.once"))) == 1)
        running.child.kill()
        running.child.wait()
    [path] = (folder / "output").glob("*.png")
    path.unlink()
    with server(folder) as live:
        live.wait(job)
        tally.check("drawn again", done_once(live, job, [5, 6]), seeds_on_disk(folder / "output"))


# A clock that goes back

# Every program that asks the C library for the time of day gets it with what stands in a file
SHIFTED = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
static long shift(void) {
    long seconds = 0;
    FILE *file = fopen(getenv("QIT_SHIFT"), "r");
    if (file) { if (fscanf(file, "%ld", &seconds) != 1) seconds = 0; fclose(file); }
    return seconds;
}
int clock_gettime(clockid_t clock, struct timespec *found) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(clock, found);
    if (!code && clock == CLOCK_REALTIME) found->tv_sec += shift();
    return code;
}
int gettimeofday(struct timeval *found, void *zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    found->tv_sec = now.tv_sec;
    found->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *found) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (found) *found = now.tv_sec;
    return now.tv_sec;
}
"""
HOUR, DAY = 3600, 86400


def clock_back(folder: Path, count: int) -> Tally:
    """The clock of the server and its worker goes back between jobs, in a job, and between two
    starts: the order stays, no picture replaces another, none is missed by the gallery."""
    tally = Tally()
    shift = folder / "shift"
    environment = {"LD_PRELOAD": str(_shifted_clock(folder)), "QIT_SHIFT": str(shift)}
    at, jobs = 0, []
    for number in range(count):
        _shift(shift, at)
        with _environment(**environment), process(folder) as running:
            http = running.http
            new = [_queue(http, "slow", number * 10 + n) for n in range(3)]
            wait(partial(_ended, http, new[0], "running"))
            for job, back in zip(new, (HOUR, DAY, 400 * DAY), strict=True):
                at -= back
                _shift(shift, at)
                wait(partial(_ended, http, job))
            jobs += new
            _check_clock(tally, http, folder, jobs)
        at += 300 * DAY
    return tally


def _shift(file: Path, seconds: int) -> None:
    """At once: an empty file would be a clock that is right."""
    new = file.with_suffix(".new")
    new.write_text(str(seconds))
    new.replace(file)


def _queue(http: Any, prompt: str, seed: int) -> str:
    body = {"model": "practice", "prompt": prompt, "size": SMALL, "seed": seed, "steps": 4}
    return str(http.post("/api/jobs", json=body).json()["job"]["id"])


def _check_clock(tally: Tally, http: Any, folder: Path, jobs: list[str]) -> None:
    saved, half = seeds_on_disk(folder / "output")
    views = [http.get(f"/api/jobs/{job}").json() for job in jobs]
    states = [view["job"]["state"] for view in views]
    went_back = all(view["job"]["ended_at"] < view["job"]["created_at"] for view in views)
    tally.check("it did go back", went_back)
    tally.check("all done", states == ["done"] * len(jobs), states)
    right = half == 0 and all(len(saved.get(job, ())) == 1 for job in jobs)
    tally.check("each picture once", right, saved)
    numbers = [view["job"]["number"] for view in views]
    tally.check("in order", numbers == sorted(numbers), numbers)
    found, after = [], None
    while True:
        page = http.get(
            "/api/gallery", params={"limit": 2} | ({"after": after} if after else {})
        ).json()
        found += [picture["id"] for picture in page["pictures"]]
        if (after := page["next"]) is None:
            break
    tally.check("all in the gallery", len(set(found)) == len(found) == len(jobs), found)


def _shifted_clock(folder: Path) -> Path:
    compiler = shutil.which("cc")
    if sys.platform != "linux" or compiler is None:
        raise CannotTry("a clock of its own for a process needs Linux and a C compiler")
    source, library = folder / "clock.c", folder / "clock.so"
    source.write_text(SHIFTED)
    command = [compiler, "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return library


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _ended(http: Any, job: str, *others: str) -> bool:
    return _state(http, job) in (*ENDED, *others)


def _has_saved(output: Path, job: str, count: int) -> bool:
    return len(seeds_on_disk(output)[0].get(job, ())) == count


def _is_busy(live: Live) -> bool:
    return live.service.queue().running is not None


def _state(http: Any, job: str) -> str:
    return str(http.get(f"/api/jobs/{job}").json()["job"]["state"])
