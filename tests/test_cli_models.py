"""`qit models` from words to files, against the local hub."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from hub import Fault, LocalHub, serve
from qwen_image_tool import device, logs
from qwen_image_tool.app import BF16_ALONE, App
from qwen_image_tool.cli.commands import run
from qwen_image_tool.cli.models import _pause_on_ctrl_c
from qwen_image_tool.cli.screen import Screen
from qwen_image_tool.rates import RateBook
from qwen_image_tool.settings import load_settings
from qwen_image_tool.types import Device, Rates
from test_formats import DIT20, DIT21, LORA, VAE20, Shapes, sparse

pytestmark = pytest.mark.usefixtures("torch_asked_once")
SHARD = "transformer/diffusion_pytorch_model.safetensors"
GIB = 2**30


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

    (folder / SHARD).write_bytes(bytes((folder / SHARD).stat().st_size))
    assert "broken" in qit("list")[1]
    (folder / SHARD).write_bytes(b"<html>")
    code, out, err = qit("verify", "qwen-image")
    assert code == 1
    assert out.startswith("web page: The file ")
    assert "qit models repair qwen-image" in err
    code, out, _ = qit("repair", "qwen-image")
    assert code == 0
    assert out.endswith("1 file(s) were mended.\n")
    code, out, _ = qit("remove", "qwen-image", "--variant", "bf16")
    assert out == (
        "0.2 MB freed. The rest of Qwen-Image stays (0.6 MB, no transformer);"
        " `qit models remove qwen-image` deletes that too.\n"
    )
    assert qit("download", "qwen-image")[0] == 0
    code, out, _ = qit("remove", "qwen-image", "--json")
    assert json.loads(out)["freed_bytes"] > 700_000
    assert json.loads(out)["stays_bytes"] == 0
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


def test_import_refuses_what_is_of_another_model(qit: Any, tmp_path: Path) -> None:
    path = sparse(tmp_path / "some.safetensors", {"x." + k: v for k, v in DIT20.items()})
    assert "no part of a Qwen-Image model" in qit("import", str(path))[2]
    path = sparse(tmp_path / "some.safetensors", dict.fromkeys(DIT21, (2, 2)))
    assert "4096 wide" in qit("import", str(path))[2]


def test_import_asks_where_a_file_fits_several_models(qit: Any, tmp_path: Path) -> None:
    path = sparse(tmp_path / "some.safetensors", DIT21)
    code, _, err = qit("import", str(path))
    assert code == 2
    assert "is a transformer in BF16, and its keys and shapes fit 2 models." in err
    assert "--as, one of: qwen-image-2.1, qwen-image-2.1-turbo." in err
    code, out, _ = qit("import", str(path), "--json")
    assert json.loads(out)["error"]["kind"] == "BadRequest"


@pytest.mark.parametrize("named", [(), ("--as", "qwen-image")])
@pytest.mark.parametrize(
    ("tensors", "what", "then"),
    [(LORA, "is a LoRA", "can't be used yet"), (VAE20, "is a VAE", "Nothing need be done")],
)
def test_import_says_what_it_does_not_take(
    qit: Any, home: Path, tmp_path: Path, tensors: Shapes, what: str, then: str, named: Any
) -> None:
    path = sparse(tmp_path / "some.safetensors", tensors)
    code, _, err = qit("import", str(path), *named)
    assert code == 2
    assert what in err
    assert then in err
    assert not (home / "models" / "qwen-image").exists()


# -- what they need here -----------------------------------------------------------------------


CARD = device.TorchFacts(
    version=metadata.version("torch"),
    kind="cuda",
    gpu="a card",
    gpus=1,
    vram_bytes=24 * 2**30,
    vram_free_bytes=23 * 2**30,
    bf16=True,
)


@pytest.fixture(autouse=True)
def roomy_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Advice depends on the disk's room, which this machine may not have."""
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**12))


@pytest.fixture
def seen(home: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    """This machine was looked at before, and has a card; torch must not be asked again."""

    def never(*_: object) -> device.TorchFacts:
        raise AssertionError("torch was asked")

    monkeypatch.setattr(device, "memory", lambda: (64 * 2**30, 60 * 2**30))
    with monkeypatch.context() as patch:
        patch.setattr(device, "probe_in_child", lambda: CARD)
        device.look(home / "cache" / "device.json")
    monkeypatch.setattr(device, "probe_in_child", never)
    return device.probe(CARD)


def test_the_list_tells_what_each_model_needs_here(qit: Any, home: Path, seen: Device) -> None:
    code, out, err = qit("list", "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    rows = {row["id"]: row for row in answer["models"]}
    needs = rows["qwen-image"]["needs"]
    assert rows["qwen-image"]["bytes"] == 57_698_920_550
    assert 8e9 < needs["vram_bytes"] < 23 * 2**30
    assert needs["ram_bytes"] > 1e9
    assert needs["seconds"] is None
    assert rows["qwen-image-edit"]["needs"] is None, "this version can't run it"
    assert rows["practice"]["needs"]["to_fetch"] == 0
    assert answer["recommended"]["model"] == "qwen-image-2.1-turbo"
    _, out, _ = qit("list")
    assert "? Seconds are not measured yet" in out
    assert "Best here: qwen-image-2.1-turbo (bf16). Runs on a card:" in out

    rates = Rates(matmul=2e14, attention=1e14, memory=1e12, bus=2e10, pageable=1e10, disk=2e9)
    RateBook(home / "cache" / "rates").put(seen, rates)
    _, out, _ = qit("list", "--json")
    timed = {row["id"]: row["needs"] for row in json.loads(out)["models"]}
    assert 5 < timed["qwen-image-2.1-turbo"]["seconds"] < timed["qwen-image"]["seconds"] < 3600
    _, out, _ = qit("list")
    assert "not measured" not in out


def test_alone_it_is_the_list(seen: Device, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models"]) == 0
    assert "Best here: " in capsys.readouterr().out


def test_what_can_not_run_yet_is_said_before_it_is_fetched(qit: Any) -> None:
    assert "This version can't run it. " in qit("download", "qwen-image-edit")[2]
    assert "reads bf16 only" in qit("download", "qwen-image", "--variant", "q4_k_m")[2]
    assert "can't run" not in qit("download", "qwen-image")[2]


def test_recommendations_in_words(qit: Any, seen: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "probe_in_child", lambda: CARD)
    _, out, _ = qit("recommend")
    *rows, last = out.splitlines()
    assert rows[0].startswith("qwen-image-2.1-turbo (bf16): 33.1 GB to fetch, needs ")
    assert "GiB of GPU memory. Runs on a card:" in rows[0]
    assert last.startswith("For each that runs here: ")


def test_what_all_recommendations_share_is_said_once(
    qit: Any, seen: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "probe_in_child", lambda: CARD)
    _, out, _ = qit("recommend")
    for shared in (BF16_ALONE, "Seconds are not measured yet"):
        assert out.count(shared) == 1
        assert shared in out.splitlines()[-1]
    _, out, _ = qit("recommend", "--json")
    assert all(BF16_ALONE in each["reason"] for each in json.loads(out)["models"])


def test_where_nothing_runs_each_model_says_why(
    qit: Any, seen: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "probe_in_child", lambda: device.TorchFacts(version="2.13"))
    monkeypatch.setattr(device, "memory", lambda: (4 * 2**30, 2 * 2**30))
    rows = qit("recommend")[1].splitlines()
    assert len(rows) == 4
    assert all(" needs " in row for row in rows)


def test_show_tells_it_with_the_reason(qit: Any, seen: Device) -> None:
    _, out, _ = qit("show", "qwen-image-2.1")
    assert "33.1 GB of disk (33.1 GB to fetch), " in out
    assert "GiB of GPU memory, " in out
    assert "Best here: bf16. Runs on a card:" in out
    assert "Seconds are not measured yet" in out
    _, out, _ = qit("show", "qwen-image-2.1", "--json")
    assert json.loads(out)["needs"]["reason"].startswith("Runs on a card:")


def test_a_machine_that_is_too_small_is_told_so(
    qit: Any, seen: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = CARD.model_copy(update={"kind": "cpu", "gpu": "", "vram_bytes": 0})
    monkeypatch.setattr(device, "last_look", lambda _: small)
    monkeypatch.setattr(device, "memory", lambda: (4 * 2**30, 2 * 2**30))
    _, out, _ = qit("list")
    assert "can't run" in out
    assert "none runs here; the practice model does. Qwen-Image-2.1-Turbo at 2048x2048 needs" in out
    _, out, _ = qit("show", "qwen-image")
    assert "can't run: Qwen-Image at 1328x1328 needs" in out


def test_without_torch_the_models_are_listed_all_the_same(
    qit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = device.TorchFacts(error="it is not installed.")
    monkeypatch.setattr(device, "probe_in_child", lambda: broken)
    code, out, err = qit("list", "--json")
    assert code == 0
    assert "can't be told" in err
    answer = json.loads(out)
    assert answer["recommended"] is None
    assert all(row["needs"] is None for row in answer["models"])


def test_the_revision_is_shown_and_updated(qit: Any, hub: LocalHub, seen: Device) -> None:
    qit("download", "qwen-image")
    before = hub.commit("Qwen/Qwen-Image")
    assert f"Revision:  {before}" in qit("show", "qwen-image")[1]
    hub.commits["Qwen/Qwen-Image"] = "f" * 40
    hub.repos["Qwen/Qwen-Image"]["tokenizer/more.json"] = b"{}"
    code, _, err = qit("download", "qwen-image", "--update")
    assert code == 0
    assert f"goes from revision {before} to {'f' * 40}: 1 files change." in err
    assert json.loads(qit("show", "qwen-image", "--json")[1])["revision"] == "f" * 40


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
    sparse(folder / "anything.safetensors", DIT21)
    text = " ".join(qit("where")[1].split())
    assert "fits qwen-image-2.1, qwen-image-2.1-turbo" in text
    assert "`qit models import FILE` uses" in text
    _, out, _ = qit("show", "qwen-image-2.1")
    assert f'qit models import "{folder / "anything.safetensors"}" --as qwen-image-2.1' in out
    assert files["broken.gguf"] == "not ours"
    assert qit("where")[0] == 0


def test_show_lists_the_variants(qit: Any) -> None:
    code, out, _ = qit("show", "qwen-image")
    assert code == 0
    assert "Q4_K_M" in out
    assert "city96/Qwen-Image-gguf" in out


def interrupted(begun: Callable[[], object]) -> subprocess.Popen[str]:
    """A download in a process of its own, which got Ctrl-C once it had `begun`."""
    start = "from qwen_image_tool.cli import main; main()"
    command = [sys.executable, "-c", start, "models", "download", "qwen-image"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ.copy())
    until = time.monotonic() + 30
    while not begun() and time.monotonic() < until:
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    return child


def test_ctrl_c_pauses(hub: LocalHub, home: Path) -> None:
    hub.bytes_per_second = 60_000
    child = interrupted(lambda: hub.sent)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 130, err
    assert "paused" in err
    assert "goes on from there" in err
    hub.bytes_per_second = 0
    assert run(["models", "download", "qwen-image"]) == 0


STALLS = {
    "the hub says nothing": Fault("hold", 99, where="api"),
    "the list stops": Fault("stall", 99, 100, where="api"),
    "the CDN says nothing": Fault("hold", 99),
    "no byte comes": Fault("stall", 99, 0),
    "in the middle": Fault("stall", 99, 20_000),
}


@pytest.mark.parametrize("fault", STALLS.values(), ids=STALLS)
def test_ctrl_c_is_answered_at_once_where_the_connection_stalls(
    hub: LocalHub, fault: Fault
) -> None:
    hub.faults = [fault]
    child = interrupted(lambda: hub.holding)
    _, err = child.communicate(timeout=10)  # a stall is given up after 30 s, and held for 20
    assert hub.holding, "the server has not given up"
    assert child.returncode == 130, err
    assert "Stopping ..." in err
    assert "goes on from there" in err


def test_a_second_ctrl_c_waits_for_nothing() -> None:
    with _pause_on_ctrl_c(Screen()) as control:
        signal.raise_signal(signal.SIGINT)
        assert control.stopped.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


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


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("vram", [0, 4, 8, 16, 24, 48, 96])
@pytest.mark.parametrize("ram", [8, 16, 32, 64, 128])
def test_what_can_not_be_run_is_not_recommended(vram: int, ram: int) -> None:
    """And where one storage alone runs, the reason says so."""
    memory = {"ram_bytes": ram * GIB, "ram_free_bytes": ram * GIB * 9 // 10}
    card = {"vram_bytes": vram * GIB, "vram_free_bytes": vram * GIB * 9 // 10}
    here = Device(kind="cuda" if vram else "cpu", name="card", **memory, **card)
    app = App(load_settings())
    for each in app.recommend(here):
        model = app.catalog.find(each.model)
        variant = model.variant(each.variant)
        assert not (variant and variant.unsupported)
        smaller = [v for v in model.variants if v.bytes < model.components["transformer"].bytes]
        only = all(v.unsupported for v in smaller)
        assert (("This version runs bf16 alone" in each.reason) == only) or not each.runs


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("ram", [8, 16, 32])
def test_a_model_that_the_gpu_draws_comes_before_newer_ones_on_the_cpu(ram: int) -> None:
    card = {"vram_bytes": 4 * GIB, "vram_free_bytes": 4 * GIB, "ram_free_bytes": ram * GIB}
    here = Device(kind="cuda", name="card", ram_bytes=ram * GIB, **card)
    best, *others = App(load_settings()).recommend(here)
    assert best.model == "qwen-image-2512"
    assert best.vram_bytes
    assert "qwen-image-2.1-turbo" in {each.model for each in others if not each.vram_bytes}


@pytest.mark.usefixtures("hub")
def test_a_disk_that_is_too_full_is_said_and_put_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    app = App(load_settings())
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**9))
    for each in app.recommend(BIG):
        assert f"{each.to_fetch / 1e9:.1f} GB are to be fetched, and 1.0 GB of the disk" in (
            each.reason
        )
        assert not each.fits_disk
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=40 * 10**9))
    advice = app.recommend(BIG)
    assert [each.fits_disk for each in advice] == sorted(each.fits_disk for each in advice)[::-1]
    assert advice[0].fits_disk
    assert "to be fetched" not in advice[0].reason


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
