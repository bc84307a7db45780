"""`qit models` from words to files, against the local hub."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from hub import LocalHub, serve
from qwen_image_tool import logs
from qwen_image_tool.app import App
from qwen_image_tool.cli.commands import run
from qwen_image_tool.settings import load_settings
from qwen_image_tool.types import Device, Rates
from test_formats import DIT20, DIT21, sparse

SHARD = "transformer/diffusion_pytorch_model.safetensors"
GIB = 2**30


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repos")
    tiny.save(root / "20b")
    tiny.save_21(root / "21")
    return root


@pytest.fixture
def hub(repos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    with serve() as hub:
        hub.add_folder("Qwen/Qwen-Image", repos / "20b")
        hub.add_folder("Qwen/Qwen-Image-2.1", repos / "21")
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("QIT_LOCAL_HUB", "1")
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
        yield hub


@pytest.fixture(autouse=True)
def _quiet_logs() -> Iterator[None]:
    yield
    logs.tear_down()


@pytest.fixture
def qit(capsys: pytest.CaptureFixture[str], hub: LocalHub) -> Any:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = run(["models", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def lines(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_from_download_to_removal(qit: Any, home: Path, hub: LocalHub) -> None:
    published = hub.repos["Qwen/Qwen-Image"]
    folder = home / "models" / "qwen-image"
    code, out, err = qit("download", "qwen-image")
    assert (code, out) == (0, f"{folder}\n")
    assert f"of {sum(map(len, published.values())) / 1e6:.1f} MB" in err
    code, out, _ = qit("list", "--json")
    state = {row["id"]: (row["state"], row["to_fetch"]) for row in json.loads(out)["models"]}
    assert state["qwen-image"] == ("ready", 0)
    assert state["qwen-image-2512"][0] == "not here"
    assert qit("verify", "qwen-image", "--full")[:2] == (0, "Qwen-Image is whole.\n")

    (folder / SHARD).write_bytes(b"<html>")
    code, out, err = qit("verify", "qwen-image")
    assert code == 1
    assert out.startswith("web page: The file ")
    assert "qit models repair qwen-image" in err
    code, out, _ = qit("repair", "qwen-image")
    assert code == 0
    assert out.endswith("1 file(s) were mended.\n")
    code, out, _ = qit("remove", "qwen-image", "--json")
    assert json.loads(out)["freed_bytes"] > 700_000
    assert not folder.exists()


def test_events_as_lines_of_json(qit: Any, home: Path) -> None:
    code, out, _ = qit("download", "qwen-image", "--json")
    events = lines(out)
    assert code == 0
    assert {event["kind"] for event in events[:-1]} <= {"download", "notice"}
    assert events[-1] == {"kind": "done", "folder": str(home / "models" / "qwen-image")}
    code, out, _ = qit("verify", "qwen-image", "--full", "--json")
    assert lines(out)[-1] == {"kind": "done", "faults": []}


def test_errors_as_json(qit: Any) -> None:
    code, out, _ = qit("download", "qwen-image-edit", "--json")
    assert code == 1
    assert lines(out)[-1]["error"]["kind"] == "DownloadFailed"


def test_the_licence_is_shown_and_asked_for(qit: Any) -> None:
    code, _, err = qit("download", "qwen-image-2.1")
    assert code == 2
    assert "Not for commercial use." in err
    assert "--yes-license" in err
    assert qit("download", "qwen-image-2.1", "--yes-license")[0] == 0


def test_import_asks_where_a_file_fits_several_models(qit: Any, home: Path, tmp_path: Path) -> None:
    path = sparse(tmp_path / "some.safetensors", {"x." + k: v for k, v in DIT20.items()})
    assert "no part of a Qwen-Image model" in qit("import", str(path))[2]
    path = sparse(tmp_path / "some.safetensors", dict.fromkeys(DIT21, (2, 2)))
    assert "4096 wide" in qit("import", str(path))[2]


def test_where_lists_other_programs_files(qit: Any, tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "nobody" / "ComfyUI" / "models" / "unet"
    folder.mkdir(parents=True)
    sparse(folder / "anything.safetensors", DIT20, "F8_E4M3")
    more = tmp_path / "more"
    more.mkdir()
    (more / "broken.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("QIT_OTHER_MODELS", str(more))
    _, out, _ = qit("where", "--json")
    files = {Path(row["path"]).name: row["is"] for row in json.loads(out)["files"]}
    assert files["anything.safetensors"] == "qwen-image transformer, F8_E4M3"
    assert files["broken.gguf"] == "not ours"
    assert qit("where")[0] == 0


def test_show_lists_the_variants(qit: Any) -> None:
    code, out, _ = qit("show", "qwen-image")
    assert code == 0
    assert "Q4_K_M" in out
    assert "city96/Qwen-Image-gguf" in out


def test_ctrl_c_pauses(hub: LocalHub, home: Path) -> None:
    hub.bytes_per_second = 60_000
    start = "from qwen_image_tool.cli import main; main()"
    command = [sys.executable, "-c", start, "models", "download", "qwen-image"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ.copy())
    until = time.monotonic() + 30
    while not hub.sent and time.monotonic() < until:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 130, err
    assert "paused" in err
    assert "goes on from there" in err
    hub.bytes_per_second = 0
    assert run(["models", "download", "qwen-image"]) == 0


BIG = Device(
    kind="cuda",
    name="card",
    ram_bytes=128 * GIB,
    ram_free_bytes=120 * GIB,
    vram_bytes=96 * GIB,
    vram_free_bytes=95 * GIB,
)
SMALL = Device(kind="cpu", name="CPU", ram_bytes=4 * GIB, ram_free_bytes=2 * GIB)


@pytest.mark.usefixtures("hub")
def test_recommendations_carry_their_reason() -> None:
    app = App(load_settings())
    best = app.recommend(BIG)[0]
    assert (best.model, best.variant, best.runs) == ("qwen-image-2.1-turbo", "bf16", True)
    assert "fits" in best.reason
    assert best.seconds is None, "the card's rates are not known"
    rates = Rates(matmul=7e14, attention=3e14, memory=2e12, bus=5e10, pageable=1e10, disk=2e9)
    timed = app.recommend(BIG.model_copy(update={"rates": rates}))[0]
    assert timed.seconds
    assert 1 < timed.seconds < 600
    assert 14e9 < timed.vram_bytes < BIG.vram_bytes
    assert best.to_fetch == app.catalog.find("qwen-image-2.1-turbo").weight_bytes
    assert not any(each.runs for each in app.recommend(SMALL))
    assert "needs" in app.recommend(SMALL)[0].reason


def test_the_command_line_starts_without_the_hub_client() -> None:
    code = "import sys, qwen_image_tool.cli.commands\n"
    code += "print(sorted({'huggingface_hub', 'httpx2', 'requests'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_model_is_made_of_what_was_downloaded(qit: Any, home: Path) -> None:
    """The engine's own check accepts it: configuration, index, headers."""
    qit("download", "qwen-image")
    shutil.rmtree(home / "models" / "qwen-image" / "vae")
    _, out, _ = qit("list", "--json")
    row = next(row for row in json.loads(out)["models"] if row["id"] == "qwen-image")
    assert row["state"] == "not here"
    assert "vae" in row["why"]
