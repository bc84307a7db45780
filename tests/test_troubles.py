"""Rows of the table in errors.py, reached by faults: in the model's files, in torch, in the driver,
in the network and in a folder. The sentence, what was kept, and what to press."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_image_tool import store
from qwen_image_tool.errors import TROUBLES, TroubleKind
from qwen_image_tool.types import Request, Size
from running import SMALL, Live, process, server, wait

FAULTY = (sys.executable, "-X", "utf8", str(Path(__file__).parent / "faulty_worker.py"))
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
PATIENCE = 600  # seconds: torch starts twice where a job is tried again
# Rows that other tests reach
ELSEWHERE: dict[TroubleKind, str] = {
    "request": "test_worker.py: a prompt too long for the model",
    "memory": "test_faults.py: a cgroup and a limit, in a run",
    "disk full": "test_faults.py: small disks",
    "database": "test_database.py: damage while it runs",
    "crashed": "test_supervisor.py: exit 3, SIGSEGV",
    "killed": "test_supervisor.py: SIGKILL",
    "twice interrupted": "test_faults.py: the server killed at random moments",
    "crash loop": "test_supervisor.py: three deaths",
    "other": "test_supervisor.py: a fault of ours",
}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """With a graphics card, as its driver's program tells of it."""
    folder = tmp_path_factory.mktemp("live")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QIT_HOME", str(folder))
        tell = folder / "bin" / "nvidia-smi"
        tell.parent.mkdir()
        tell.write_text("#!/bin/sh\necho 'NVIDIA GeForce RTX 4070, 470.82'\n")
        tell.chmod(0o755)
        patch.setenv("PATH", f"{tell.parent}{os.pathsep}{os.environ['PATH']}")
        with server(folder, command=FAULTY) as live:
            yield live


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The practice model's files, to be broken."""
    return Path(shutil.copytree(store.practice_folder(), tmp_path / "model"))


def asked(model: Path, prompt: str) -> Request:
    return Request(model=str(model), prompt=prompt, size=Size.parse(SMALL), steps=2, seed=1)


def not_a_number(model: Path) -> None:
    tensors = load_file(model / TRANSFORMER)
    name = next(name for name in tensors if name.endswith("proj_out.weight"))
    tensors[name][0, 0] = torch.nan
    save_file(tensors, model / TRANSFORMER)


def flipped(model: Path) -> None:
    """In the header, which says where each tensor is; in the numbers, `qit models verify` sees it
    (test_transfers.py)."""
    content = bytearray((model / VAE).read_bytes())
    for place in range(8, 64):
        content[place] ^= 0xFF
    (model / VAE).write_bytes(content)


def cut(model: Path) -> None:
    os.truncate(model / TRANSFORMER, (model / TRANSFORMER).stat().st_size // 2)


def gone(model: Path) -> None:
    (model / VAE).unlink()


def swapped(model: Path) -> None:
    shutil.copy(model / TRANSFORMER, model / VAE)


def whole(_: Path) -> None:
    """The fault is elsewhere."""


Break = Callable[[Path], None]
# What is broken, the prompt that names the fault, the row, words of the sentence and of the hint
CASES: dict[str, tuple[Break, str, TroubleKind, str, str]] = {
    "NaN": (not_a_number, "x", "broken picture", "left their range", "--mode exact"),
    "flipped": (flipped, "x", "broken file", "diffusion_pytorch_model", ""),
    "cut": (cut, "x", "broken file", "diffusion_pytorch_model", ""),
    "gone": (gone, "x", "missing file", "vae", ""),
    "swapped": (swapped, "x", "wrong component", "vae", ""),
    "GPU memory": (
        whole,
        "attention runs out of memory",
        "gpu memory",
        "CUDA out of memory",
        "Close other programs",
    ),
    "GPU": (whole, "attention fails", "GPU failed", "illegal memory access", "Press Retry"),
    "old driver": (
        whole,
        "old driver, little RAM",
        "old driver",
        "The NVIDIA driver on your system is too old (found version 11040)",
        "Update the driver, restart the computer",
    ),
    "CPU build": (
        whole,
        "CPU build, little RAM",
        "torch without GPU",
        "this torch was built without support for the NVIDIA GeForce RTX 4070",
        "qit setup",
    ),
}
REACHED = {kind for _, _, kind, _, _ in CASES.values()}


@pytest.mark.skipif(os.name != "posix", reason="its nvidia-smi is a shell script")
@pytest.mark.parametrize("case", list(CASES))
def test_a_fault_becomes_a_sentence(live: Live, model: Path, case: str) -> None:
    """The files break before the queue is told of the job: it was accepted when they were whole."""
    break_it, prompt, kind, happened, press = CASES[case]
    job = live.service.jobs.submit(live.service.app.ready(asked(model, prompt)))
    break_it(model)
    live.service.supervisor.wake()
    view = live.wait(job.id, PATIENCE)
    assert view["job"]["state"] == "failed"
    failure = view["job"]["failure"]
    assert failure["kind"] == kind, failure
    assert happened in failure["message"]
    assert failure["kept"] == TROUBLES[kind].kept
    assert failure["hint"]
    assert press in failure["hint"]
    assert view["pictures"] == []
    assert list(live.service.index.folder.glob("*")) == []
    assert live.http.get("/healthz").is_success


@pytest.mark.skipif(os.name != "posix", reason="its nvidia-smi is a shell script")
@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (
            "old driver",
            "The GPU is not used: CUDA initialization: The NVIDIA driver on your system",
        ),
        ("CPU build", "The GPU is not used: this torch was built without support for the NVIDIA"),
    ],
)
def test_where_the_cpu_can_do_it_the_plan_says_why_the_gpu_does_not(
    live: Live, model: Path, prompt: str, said: str
) -> None:
    job = live.service.submit(asked(model, prompt))
    view = live.wait(job.id, PATIENCE)
    assert view["job"]["state"] == "done", view
    assert any(reason.startswith(said) for reason in view["job"]["plan"]["reasons"])
    for path in live.service.index.folder.glob("*"):
        path.unlink()


def test_an_unsupported_size(live: Live) -> None:
    body = {"model": "practice", "prompt": "x", "size": "4000x4000"}
    answer = live.http.post("/api/jobs", json=body)
    assert answer.status_code == 400
    _check(answer.json()["error"], "unsupported size", "outside this model's limits", "512x512")


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens at the hub's address."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("QIT_LOCAL_HUB", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    with server(tmp_path) as live:
        live.http.post("/api/models/qwen-image/download", json={})
        wait(lambda: live.http.get("/api/transfers").json()[0]["state"] != "running", 120)
        transfer = live.http.get("/api/transfers").json()[0]
    assert transfer["state"] == "failed"
    _check(transfer["failure"], "network", "127.0.0.1", "connection")


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    """The server has no right that its user has not: root's are taken away."""
    under: tuple[str, ...] = ()
    if os.geteuid() == 0:
        under = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")
    output = tmp_path / "output"
    output.mkdir()
    output.chmod(0o555)
    with process(tmp_path, under=under) as running:
        body = {"model": "practice", "prompt": "x", "size": SMALL, "seed": 1}
        job = running.http.post("/api/jobs", json=body).json()["job"]["id"]

        def view() -> Any:
            return running.http.get(f"/api/jobs/{job}").json()["job"]

        wait(lambda: view()["state"] == "failed")
        _check(view()["failure"], "not writable", str(output), "Allow writing")
        output.chmod(0o755)
        again = running.http.post(f"/api/jobs/{job}/retry").json()["job"]["id"]
        wait(lambda: running.http.get(f"/api/jobs/{again}").json()["job"]["state"] == "done")


def test_every_row_is_reached() -> None:
    here = {*REACHED, "unsupported size", "network", "not writable"}
    assert here.isdisjoint(ELSEWHERE)
    assert here | set(ELSEWHERE) == set(get_args(TroubleKind)) == set(TROUBLES)


def _check(failure: dict[str, str], kind: TroubleKind, happened: str, press: str) -> None:
    assert failure["kind"] == kind
    assert happened in failure["message"]
    assert failure["kept"] == TROUBLES[kind].kept
    assert press in failure["hint"]
