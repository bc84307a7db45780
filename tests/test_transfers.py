"""Models fetched, proven, mended and removed through the API, from a local hub."""

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiny
from hub import Fault, LocalHub, serve
from qwen_image_tool.catalog import load_catalog
from qwen_image_tool.transfers import Transfer, Transfers
from qwen_image_tool.types import DownloadProgress, VerifyProgress
from qwen_image_tool.ui import cards
from qwen_image_tool.ui.words import load_words
from running import Live, server, wait

MODEL = "qwen-image"


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("repos") / "20b")


@pytest.fixture
def hub(repo: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with serve() as hub:
        hub.add_folder("Qwen/Qwen-Image", repo)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("QIT_LOCAL_HUB", "1")
        yield hub


@pytest.fixture
def live(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    with server(tmp_path) as live:
        yield live


def over(live: Live) -> dict[str, Any]:
    """The transfer, once nothing is under way."""
    found: dict[str, Any] = {}

    def ended() -> bool:
        found.update(live.http.get("/api/transfers").json()[0])
        return bool(found["state"] != "running")

    wait(ended)
    return found


def state(live: Live) -> str:
    return str(live.http.get(f"/api/models/{MODEL}").json()["state"])


def test_a_model_comes_is_mended_and_goes(live: Live) -> None:
    answer = live.http.post(f"/api/models/{MODEL}/download", json={})
    assert (answer.status_code, answer.json()["state"]) == (202, "running")
    found = over(live)
    assert found["state"] == "done", found
    assert found["progress"]["done_bytes"] == found["progress"]["total_bytes"]
    assert state(live) == "ready"

    [shard] = (live.service.app.settings.models / MODEL / "vae").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    live.http.post(f"/api/models/{MODEL}/verify")
    assert [fault["path"] for fault in over(live)["faults"]] == [f"vae/{shard.name}"]
    live.http.post(f"/api/models/{MODEL}/repair")
    assert over(live)["state"] == "done"
    live.http.post(f"/api/models/{MODEL}/verify")
    assert over(live)["faults"] == []

    assert live.http.delete(f"/api/models/{MODEL}").json()["freed_bytes"] > 100_000
    assert state(live) == "not here"


def test_pause_and_go_on(live: Live, hub: LocalHub) -> None:
    hub.bytes_per_second = 100_000
    live.http.post(f"/api/models/{MODEL}/download", json={})
    wait(lambda: bool(live.http.get("/api/transfers").json()[0]["progress"]))
    busy = live.http.post("/api/models/qwen-image-2512/download", json={})
    assert busy.status_code == 409
    assert live.http.post(f"/api/models/{MODEL}/pause").status_code == 200
    paused = over(live)
    assert (paused["state"], state(live)) == ("paused", "not here")
    hub.bytes_per_second = 0
    live.http.post(f"/api/models/{MODEL}/download", json={})
    assert over(live)["state"] == "done"
    assert state(live) == "ready"


def test_cancel_throws_away_what_came(live: Live, hub: LocalHub) -> None:
    hub.bytes_per_second = 100_000
    live.http.post(f"/api/models/{MODEL}/download", json={})
    wait(lambda: bool(live.http.get("/api/transfers").json()[0]["progress"]))
    live.http.post(f"/api/models/{MODEL}/cancel")
    assert over(live)["state"] == "cancelled"


def test_a_failure_is_explained(live: Live, hub: LocalHub) -> None:
    hub.faults.append(Fault("404", times=99, where="api"))
    live.http.post(f"/api/models/{MODEL}/download", json={})
    found = over(live)
    assert found["state"] == "failed"
    assert found["failure"]["kind"] == "network"
    assert found["failure"]["message"]
    assert "stays" in found["failure"]["kept"]


def test_a_licence_that_changed_is_asked_again(live: Live, hub: LocalHub) -> None:
    """Which only the hub can tell, so the transfer begins and says so."""
    repo = hub.repos["Qwen/Qwen-Image-2.1"] = {"LICENSE": b"For research."}
    address = "/api/models/qwen-image-2.1/download"
    live.http.post(address, json={"accept_licence": True})
    assert "has no" in over(live)["failure"]["message"], "there is no more in the repository"
    repo["LICENSE"] = b"For a fee."
    assert live.http.post(address, json={}).status_code == 202
    failure = over(live)["failure"]
    assert "reads otherwise than when you agreed" in failure["message"]
    assert "`accept_licence`" in failure["hint"]


def test_the_end_of_the_service_pauses_it(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    hub.bytes_per_second = 50_000
    with server(tmp_path) as live:
        live.http.post(f"/api/models/{MODEL}/download", json={})
        wait(lambda: bool(live.http.get("/api/transfers").json()[0]["progress"]))
        service = live.service
    [transfer] = service.transfers.all()
    assert transfer.state == "paused"


def test_update_clear_and_a_quick_check(live: Live, hub: LocalHub) -> None:
    live.http.post(f"/api/models/{MODEL}/download", json={})
    assert over(live)["state"] == "done"
    hub.commits["Qwen/Qwen-Image"] = "e" * 40
    hub.repos["Qwen/Qwen-Image"] = hub.repos["Qwen/Qwen-Image"] | {"tokenizer/more.json": b"{}"}
    live.http.post(f"/api/models/{MODEL}/download", json={"how": "update"})
    found = over(live)
    assert (found["action"], found["state"]) == ("update", "done")
    assert f"to {'e' * 40}" in " ".join(found["notes"])
    hub.sent.clear()
    live.http.post(f"/api/models/{MODEL}/download", json={"how": "again"})
    assert over(live)["state"] == "done"
    assert any(name.endswith(".safetensors") for name in hub.sent)
    live.http.post(f"/api/models/{MODEL}/verify?quick=true")
    found = over(live)
    assert (found["action"], found["state"], found["faults"]) == ("check", "done", [])


def test_what_a_removal_frees_is_known_before(live: Live) -> None:
    live.http.post(f"/api/models/{MODEL}/download", json={})
    assert over(live)["state"] == "done"
    library, model = live.service.app.library, live.service.app.catalog.find(MODEL)
    used = library.used_bytes()
    freed, kept = library.frees(model)
    assert (library.remove(model), kept) == (freed, 0)
    assert used == freed
    assert library.used_bytes() == 0
    live.service.transfers.forget(MODEL)
    assert live.http.get("/api/transfers").json() == []


def test_the_next_may_begin_as_soon_as_one_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread may live a moment longer."""
    gone = threading.Event()

    class Lingering(threading.Thread):
        def run(self) -> None:
            super().run()
            gone.wait(60)

    monkeypatch.setattr("qwen_image_tool.transfers.threading.Thread", Lingering)
    told: list[str] = []
    library: Any = SimpleNamespace(verify=lambda *_: ())
    transfers = Transfers(library, lambda transfer: told.append(transfer.state))
    for count in range(1, 4):
        transfers.start(load_catalog().find(MODEL), "check")
        wait(lambda: transfers.all()[0].state == "done")
        assert (transfers.ended, told) == (count, ["done"] * count)
    gone.set()


@pytest.mark.parametrize(
    ("event", "says"), [(DownloadProgress, "Downloading"), (VerifyProgress, "Checking every byte")]
)
def test_the_page_says_whether_bytes_come_or_are_hashed(
    event: type[DownloadProgress | VerifyProgress], says: str
) -> None:
    """Files put there by hand are hashed before a download."""
    progress = event(model="qwen-image", done_bytes=10**9, total_bytes=4 * 10**9, file="x")
    transfer = Transfer(model="qwen-image", action="download", progress=progress)
    assert f"{says} · 1.0 GB of 4.0 GB" in cards._progress(load_words("en"), transfer)
