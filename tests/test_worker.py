"""The real worker: torch in a child process, the practice model, real failures."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_image_tool import exits
from qwen_image_tool.app import App
from qwen_image_tool.errors import OutOfMemory, TroubleKind
from qwen_image_tool.jobs import Job
from qwen_image_tool.messages import Failed, Run, line, report_adapter
from qwen_image_tool.progress import Progress
from qwen_image_tool.settings import Settings
from qwen_image_tool.supervisor import COMMAND
from qwen_image_tool.types import Event, Loading, Request, Result
from qwen_image_tool.worker import UNREADABLE, Worker
from running import Live, server, wait


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    home = tmp_path_factory.mktemp("live")
    os.environ |= {"QIT_HOME": str(home)}
    with server(home, command=COMMAND) as live:
        yield live


def test_a_picture_and_its_previews(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a second one, for which nothing is loaded again."""
    loaded: set[str] = set()
    happened = live.service.happened

    def record(job: Job, event: Event, progress: Progress) -> None:
        if isinstance(event, Loading):
            loaded.add(job.id)
        happened(job, event, progress)

    monkeypatch.setattr(live.service, "happened", record)
    first = live.wait(live.submit("a red circle", size="64x64", steps=3), 120)
    assert first["job"]["state"] == "done", first
    assert first["pictures"][0]["size"] == "64x64"
    assert first["job"]["plan"]["device"]
    assert set(first["job"]["seconds"]) == {"load", "encode", "denoise", "decode", "save"}
    process = live.service.supervisor.worker_pid
    second = live.wait(live.submit("a red circle", size="64x64", steps=3, seed=6), 120)
    assert second["job"]["state"] == "done", second
    assert live.service.preview
    assert live.service.supervisor.worker_pid == process
    assert loaded == {first["job"]["id"]}


def test_stopping_within_a_step(live: Live) -> None:
    job = live.submit("a red circle", steps=1000)
    wait(lambda: (live.http.get(f"/api/jobs/{job}").json()["progress"] or {}).get("step", 0) > 0)
    live.http.post(f"/api/jobs/{job}/cancel")
    assert live.wait(job)["job"]["state"] == "cancelled"


def test_what_the_engine_refuses_is_told(live: Live) -> None:
    job = live.wait(live.submit("a red circle " * 500))["job"]
    assert job["state"] == "failed"
    assert job["failure"]["kind"] == "request"
    assert "tokens" in job["failure"]["message"]


@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v")
def test_a_worker_without_memory(tmp_path: Path) -> None:
    """Its address space is cut: torch itself can't be loaded, and the queue stops after the second
    try instead of going on for ever."""
    command = ("sh", "-c", 'ulimit -v 700000; exec "$@"', "sh", *COMMAND)
    with server(tmp_path, command=command) as live:
        view = live.wait(live.submit("a red circle", size="64x64"), 120)
        job = view["job"]
        assert (job["state"], job["again"]) == ("failed", 1), view
        assert job["failure"]["kind"] in ("memory", "crashed"), view
        assert live.http.get("/healthz").status_code == 200


def test_an_order_of_another_version_ends_the_process() -> None:
    """The supervisor explains that, and tries again; nobody would draw it else."""
    prompt = "No space left on device"  # which is no trouble of the process
    order = json.loads(
        line(Run(job="a", request=Request(model="practice", prompt=prompt), output="x"))
    )
    worker = subprocess.run(
        [*COMMAND, str(os.getpid())],
        input=json.dumps(order | {"newer": 1}).encode() + b"\n",
        capture_output=True,
        timeout=60,
    )
    output = worker.stderr.decode()
    assert worker.returncode == UNREADABLE, output
    assert "An order can't be read: Extra inputs are not permitted (run.newer)." in output
    assert exits.explain(worker.returncode, output).kind == "crashed"


@pytest.mark.parametrize(("kind", "foreseen"), [("memory", False), ("gpu memory", True)])
def test_ram_that_ran_out_may_be_had_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: TroubleKind, foreseen: bool
) -> None:
    """Where the engine has no other plan; a GPU's memory it has given back before it tries the
    next."""

    def refuse(*_: Any, **__: Any) -> Result:
        raise OutOfMemory("The memory ran out.", "Close other programs.", kind)

    app = App(Settings(output=tmp_path, cache=tmp_path))
    monkeypatch.setattr(app, "generate", refuse)
    said = io.BytesIO()
    Worker(app, said).run(
        Run(job="a", request=Request(model="practice", prompt="x"), output=str(tmp_path))
    )
    report = report_adapter.validate_json(said.getvalue())
    assert isinstance(report, Failed)
    assert (report.foreseen, report.failure.kind) == (foreseen, kind)
