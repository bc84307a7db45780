"""A real server in a thread of the test, over the fake worker; and one as a process of its own."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2

from qwen_image_tool.app import App
from qwen_image_tool.server import run
from qwen_image_tool.service import Service
from qwen_image_tool.settings import Settings

FAKE = (sys.executable, str(Path(__file__).parent / "fake_worker.py"))
TOKEN = "the-token"
BEARER = {"authorization": f"Bearer {TOKEN}"}
SMALL = "256x256"  # a size that the practice model draws


def keep_bytecode(folder: Path) -> None:
    """Let children keep what they compile, as a user's do, where the environment forbids it: torch
    is up in half the time, the server in a third."""
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
        os.environ["PYTHONPYCACHEPREFIX"] = str(folder)


def settings(folder: Path) -> Settings:
    names = ("output", "models", "data", "cache", "logs")
    return Settings(**{name: folder / name for name in names})  # type: ignore[arg-type]


class Trash:
    """Takes what is deleted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, path: Path) -> None:
        self.folder.mkdir(exist_ok=True)
        path.rename(self.folder / path.name)


class Live:
    """`http`: a client that has the token; `service`: what is behind; `stopper` ends it."""

    def __init__(
        self, service: Service, where: run.Running, http: httpx2.Client, stopper: run.Stopper
    ) -> None:
        self.service, self.where, self.http, self.stopper = service, where, http, stopper
        self.url = where.url

    def wait(self, job: str, seconds: float = 60) -> dict[str, Any]:
        """The job's view once it has ended."""
        found: dict[str, Any] = {}

        def ended() -> bool:
            found.update(self.http.get(f"/api/jobs/{job}").json())
            return found["job"]["state"] in ("done", "failed", "cancelled")

        wait(ended, seconds)
        return found

    def submit(self, prompt: str, **more: Any) -> str:
        body = {"model": "practice", "prompt": prompt, "size": SMALL, "seed": 5, **more}
        answer = self.http.post("/api/jobs", json=body)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["job"]["id"])


@contextlib.contextmanager
def server(folder: Path, lan: bool = False, **options: Any) -> Iterator[Live]:
    """`options` go to the Service."""
    os.environ["QIT_TOKEN"] = TOKEN
    options = {"command": FAKE, "trash": Trash(folder / "trash"), **options}
    service = Service(App(settings(folder)), **options)
    found: list[run.Running] = []
    up = threading.Event()
    stopper = run.Stopper()

    def ready(where: run.Running) -> None:
        found.append(where)
        up.set()

    def serve() -> None:
        try:
            run.serve(service, port=0, lan=lan, ready=ready, stopper=stopper)
        finally:
            up.set()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        assert up.wait(60)
        assert found
        with httpx2.Client(base_url=found[0].url, headers=BEARER, timeout=60) as http:
            live = Live(service, found[0], http, stopper)
            wait(lambda: service.startup.step == "ready")
            yield live
    finally:
        stopper.stop()
        thread.join()
        service.close()


@contextlib.contextmanager
def process(
    folder: Path,
    *arguments: str,
    command: str = "serve",
    fake: bool = True,
    under: tuple[str, ...] = (),
    first: str = "",
) -> Iterator[Any]:
    """`qit serve --json-ready` as a child process; yields its Popen, url and a client. `command`:
    another one that serves; `under`: a command that starts it; `first`: Python that it runs
    before."""
    environ = os.environ | {"QIT_HOME": str(folder), "QIT_OUTPUT": str(folder / "output")}
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environ["XDG_DATA_HOME"] = str(folder / "share")  # a trash of its own
    environ |= {"QIT_TOKEN": TOKEN, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    code = "from qwen_image_tool.cli import main; main()"
    if fake:
        code = f"import qwen_image_tool.supervisor as s; s.COMMAND = {FAKE!r}\n" + code
    code = f"{first}\n{code}"
    child = subprocess.Popen(
        [*under, sys.executable, "-c", code, command, "--json-ready", "--port", "0", *arguments],
        env=environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout
    assert child.stdin
    try:
        text = child.stdout.readline()
        assert text, "it ended before it was ready"
        url = json.loads(text)["url"]
        with httpx2.Client(base_url=url, headers=BEARER, timeout=60) as http:
            yield SimpleNamespace(child=child, url=url, http=http)
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
        with contextlib.suppress(OSError):
            child.stdin.close()


def own_threads() -> set[threading.Thread]:
    """Those of pools in which weights, steps and pictures are worked on. One may live a moment
    longer than what it worked on."""
    pools = ("ahead", "decoding", "load", "preview", "progress", "ring", "staging", "weights")
    return {each for each in threading.enumerate() if each.name.rpartition("_")[0] in pools}


def wait(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
