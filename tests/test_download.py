"""Downloads with the real client from a local hub that fails in every way we know."""

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from huggingface_hub import close_session

import tiny
from hub import Fault, LocalHub, download, is_lfs, make_certificate, serve, sha256
from qwen_image_tool.catalog import Model, load_catalog
from qwen_image_tool.errors import (
    BadRequest,
    Cancelled,
    DownloadFailed,
    Paused,
)
from qwen_image_tool.store import locate
from qwen_image_tool.store.download import Control, Effort, write_all
from qwen_image_tool.store.headers import Header, read_header
from qwen_image_tool.store.hub import Hub, connect, safe_name
from qwen_image_tool.store.library import Library
from qwen_image_tool.store.places import Elsewhere
from qwen_image_tool.store.published import TRIES
from qwen_image_tool.store.record import PRIVATE, Digest, Kept
from qwen_image_tool.types import DownloadProgress, Event, VerifyProgress
from test_formats import gguf

CATALOG = load_catalog()
T2I = CATALOG.find("qwen-image")
TURBO, BASE21 = CATALOG.find("qwen-image-2.1-turbo"), CATALOG.find("qwen-image-2.1")
QUICK = Effort(tries=4, first_wait=0.01, longest_wait=0.05)
SHARD = "transformer/diffusion_pytorch_model-00002-of-"


@pytest.fixture(scope="session")
def repos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny, real repositories of both families, several shards each."""
    root = tmp_path_factory.mktemp("repos")
    tiny.save(root / "qwen-image")
    transformer = QwenImageTransformer2DModel.from_pretrained(
        root / "qwen-image" / "transformer", dtype=torch.bfloat16
    )
    shutil.rmtree(root / "qwen-image" / "transformer")
    transformer.save_pretrained(root / "qwen-image" / "transformer", max_shard_size="60KB")
    tiny.save_21(root / "qwen-image-2.1")
    tiny.save_21(root / "qwen-image-2.1-turbo", seed=1)
    return root


@pytest.fixture
def hub(repos: Path, tmp_path: Path) -> Iterator[LocalHub]:
    with serve() as hub:
        for name in ("qwen-image", "qwen-image-2.1", "qwen-image-2.1-turbo"):
            hub.add_folder(CATALOG.find(name).repo, repos / name)
        hub.repos["Qwen/Qwen-Image-2512"] = dict(hub.repos["Qwen/Qwen-Image"])
        shapes = {"img_in.weight": (3072, 256), "txt_norm.weight": (3584,)}
        quantised = gguf(tmp_path / "any.gguf", shapes).read_bytes()
        hub.repos["city96/Qwen-Image-gguf"] = {"qwen-image-Q4_K_M.gguf": quantised}
        yield hub


@pytest.fixture
def library(hub: LocalHub, tmp_path: Path) -> Library:
    return library_of(hub.endpoint, tmp_path / "models")


def library_of(endpoint: str, models: Path, elsewhere: Elsewhere | None = None) -> Library:
    reached = Hub(endpoint, token="secret", local=True, stall_seconds=0.5)
    return Library(CATALOG, models, lambda: reached, elsewhere, QUICK)


def published(hub: LocalHub, model: Model) -> dict[str, bytes]:
    return hub.repos[model.repo]


def assert_whole(hub: LocalHub, library: Library, model: Model) -> None:
    """Every file is there with the published bytes, and nothing else is."""
    folder = library.folder(model)
    for name, data in published(hub, model).items():
        assert (folder / name).read_bytes() == data, name
    left = [p for p in folder.rglob("*") if p.is_file() and PRIVATE not in p.parts]
    assert len(left) == len(published(hub, model))
    assert not (folder / PRIVATE / "partial").exists()
    assert library.verify(model, full=True) == ()


def assert_nothing_false(hub: LocalHub, folder: Path, model: Model) -> None:
    """What has a final name is whole, whatever happened."""
    for name, data in published(hub, model).items():
        if (folder / name).exists():
            assert (folder / name).read_bytes() == data, f"{name} is not whole"


def test_a_download_is_whole_and_runs_with_it(hub: LocalHub, library: Library) -> None:
    events: list[Event] = []
    folder = library.download(T2I, emit=events.append)
    assert_whole(hub, library, T2I)
    assert locate("qwen-image", CATALOG, library.models).folder == folder
    total = sum(map(len, published(hub, T2I).values()))
    last = events[-1]
    assert isinstance(last, DownloadProgress)
    assert last.done_bytes == last.total_bytes == total
    weights = sum(len(d) for name, d in published(hub, T2I).items() if is_lfs(name))
    assert sum(count for name, count in hub.sent.items() if is_lfs(name)) == weights
    hub.requests.clear()
    library.download(T2I)
    assert not hub.requests, "a complete model asks nobody"


def test_the_token_goes_to_the_hub_and_not_to_the_cdn(hub: LocalHub, library: Library) -> None:
    library.download(T2I)
    tokens = {(seen.where, seen.token) for seen in hub.requests}
    assert tokens == {("api", "Bearer secret"), ("hub", "Bearer secret"), ("cdn", "")}


@pytest.mark.parametrize(
    ("endpoint", "token"),
    [("https://huggingface.co", "secret"), ("https://hf-mirror.com", None)],
)
def test_no_token_goes_to_a_mirror(
    endpoint: str, token: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert connect().token == token
    assert connect("modelscope").token is None


@pytest.mark.parametrize(
    "endpoint",
    ["http://mirror.example", "https://[bad", "https://mirror.example:99999", "https://a..b", "m"],
)
def test_what_is_no_https_mirror_is_refused(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(BadRequest, match="https"):
        connect()


MENDED = {
    "cut": [Fault("cut", 3, 9_000, match=SHARD)],
    "cut at once": [Fault("cut", 3, 0, match=SHARD)],
    "dropped": [Fault("drop", 3, match=SHARD)],
    "stalled": [Fault("stall", 1, 20_000, match=SHARD)],
    "busy": [Fault("429", 3, where="api"), Fault("429", 2, match=SHARD)],
    "500": [Fault("500", 3, where="hub"), Fault("500", 2, where="api")],
    "503": [Fault("503", 3, match=SHARD)],
    "too long": [Fault("length+1000", 1, match=SHARD)],
    "too short": [Fault("length-1000", 2, match=SHARD)],
    "flipped": [Fault("flip", 1, match=SHARD)],
    "flipped twice": [Fault("flip", 2, match="text_encoder")],
    "web page": [Fault("html", 2, match=SHARD), Fault("html", 2, where="api")],
    "416": [Fault("416", 1, match=SHARD)],
}


@pytest.mark.parametrize("faults", MENDED.values(), ids=MENDED)
@pytest.mark.parametrize("model", [T2I, TURBO], ids=["20B", "2.1"])
def test_what_goes_away_is_outlasted(
    hub: LocalHub, library: Library, model: Model, faults: list[Fault]
) -> None:
    hub.faults = [Fault(f.kind, f.times, f.at, f.where, f.match) for f in faults]
    library.download(model, accept_licence=True)
    assert_whole(hub, library, model)
    assert not any(fault.times for fault in hub.faults), "the fault was met"


FINAL = {
    "cut": (Fault("cut", 99, 0, match=SHARD), "network"),
    "stalled": (Fault("stall", 99, 0, match=SHARD), "stalled"),
    "busy": (Fault("429", 99, match=SHARD), "busy"),
    "500": (Fault("500", 99, match=SHARD), "server"),
    "api 503": (Fault("503", 99, where="api"), "server"),
    "flipped": (Fault("flip", 99, match=SHARD), "hash"),
    "web page": (Fault("html", 99, match=SHARD), "web page"),
    "etag": (Fault("etag", 1, where="hub", match=SHARD), "changed"),
    "loop": (Fault("loop", 99, match=SHARD), "redirect"),
    "403": (Fault("403", 1, match=SHARD), "no access"),
    "401": (Fault("401", 1, where="hub", match=SHARD), "no access"),
    "404": (Fault("404", 1, match=SHARD), "not found"),
    "410": (Fault("410", 1, match=SHARD), "server"),
}


@pytest.mark.parametrize(("fault", "kind"), FINAL.values(), ids=FINAL)
def test_what_stays_is_said_and_then_resumed(
    hub: LocalHub, library: Library, fault: Fault, kind: str
) -> None:
    hub.faults = [Fault(fault.kind, fault.times, fault.at, fault.where, fault.match)]
    with pytest.raises(DownloadFailed) as caught:
        library.download(T2I)
    assert caught.value.kind == kind
    assert caught.value.hint
    assert_nothing_false(hub, library.folder(T2I), T2I)
    hub.faults.clear()
    library.download(T2I)
    assert_whole(hub, library, T2I)


def test_a_cut_download_fetches_no_byte_twice(hub: LocalHub, library: Library) -> None:
    hub.faults = [Fault("cut", 1, 30_000, match=SHARD), Fault("drop", 99, match=SHARD)]
    library._effort = Effort(tries=1, first_wait=0.01)
    with pytest.raises(DownloadFailed):
        library.download(T2I)
    hub.faults.clear()
    library.download(T2I)
    # Of files that were under way when it failed more has left the hub than was taken
    [(name, data)] = [each for each in published(hub, T2I).items() if SHARD in each[0]]
    assert hub.sent[name] == len(data)


def test_a_file_that_changes_between_tries(hub: LocalHub, library: Library) -> None:
    """What came of the old one is not gone on with as if it were the new one."""
    hub.faults = [Fault("cut", 1, 20_000, match=SHARD), Fault("etag", 1, match=SHARD)]
    with pytest.raises(DownloadFailed, match="another file on the server") as caught:
        library.download(T2I)
    assert caught.value.kind == "changed"
    assert "--again" in caught.value.hint
    assert_nothing_false(hub, library.folder(T2I), T2I)
    library.download(T2I, again=True)
    assert_whole(hub, library, T2I)


def test_the_headers_are_read_once(
    hub: LocalHub, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.download(T2I)
    read: list[Path] = []

    def counted(path: Path) -> Header:
        read.append(path)
        return read_header(path)

    monkeypatch.setattr("qwen_image_tool.store.verify.read_header", counted)
    locate("qwen-image", CATALOG, library.models)
    assert sorted(read) == sorted(library.folder(T2I).rglob("*.safetensors"))


def test_a_server_without_range_still_ends(hub: LocalHub, library: Library) -> None:
    hub.ignore_range = True
    hub.faults = [Fault("cut", 2, 30_000, match=SHARD)]
    library.download(T2I)
    assert_whole(hub, library, T2I)


def test_a_gated_repository_names_the_way_in(hub: LocalHub, tmp_path: Path) -> None:
    hub.gated = True
    open_hub = Hub(hub.endpoint, local=True)
    library = Library(CATALOG, tmp_path / "models", lambda: open_hub, None, QUICK)
    with pytest.raises(DownloadFailed, match="log in") as caught:
        library.download(T2I)
    assert caught.value.kind == "no access"


def test_an_unknown_revision(hub: LocalHub, library: Library) -> None:
    moved = T2I.model_copy(update={"revision": "0" * 40})
    with pytest.raises(DownloadFailed, match="no longer the revision of Qwen/Qwen-Image") as caught:
        library.download(moved)
    assert caught.value.kind == "not found"
    assert "--update" in caught.value.hint


def test_a_missing_repository(hub: LocalHub, library: Library) -> None:
    with pytest.raises(DownloadFailed) as caught:
        library.download(CATALOG.find("qwen-image-edit"))
    assert caught.value.kind == "not found"


def test_a_false_certificate_is_refused(repos: Path, tmp_path: Path) -> None:
    made = make_certificate(tmp_path)
    with serve(made) as hub, pytest.raises(DownloadFailed) as caught:
        library_of(hub.endpoint, tmp_path / "models").download(T2I)
    assert caught.value.kind == "tls"
    assert "SSL_CERT_FILE" in caught.value.hint


def test_over_tls(repos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are read from the TLS socket itself; a cut connection is gone on with."""
    certificate = make_certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    close_session()  # the client reads the variable when it is made
    with serve(certificate) as hub:
        hub.add_folder(T2I.repo, repos / "qwen-image")
        hub.faults = [Fault("cut", 2, 30_000, match=SHARD)]
        library = library_of(hub.endpoint, tmp_path / "models")
        library.download(T2I)
        assert_whole(hub, library, T2I)
        assert sum(hub.sent[name] for name in published(hub, T2I) if is_lfs(name)) == sum(
            len(data) for name, data in published(hub, T2I).items() if is_lfs(name)
        )
    close_session()


def test_no_connection_at_all(tmp_path: Path) -> None:
    library = library_of("http://127.0.0.1:9", tmp_path / "models")
    with pytest.raises(DownloadFailed, match="HF_ENDPOINT") as caught:
        library.download(T2I)
    assert caught.value.kind == "network"


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/x",
        "a/../b",
        "a//b",
        "a\\b",
        "C:x",
        "nul.json",
        "a/con",
        "x.",
        "",
        "a\nb",
        "x" * 300,
    ],
)
def test_names_stay_in_the_folder(name: str) -> None:
    with pytest.raises(DownloadFailed) as caught:
        safe_name(name)
    assert caught.value.kind == "bad name"


def test_only_weights_and_texts_are_fetched(hub: LocalHub, library: Library) -> None:
    extra = {"transformer/run.py": b"1", "model.ckpt": b"1", "transformer/x.bin": b"1"}
    published(hub, T2I).update(extra)
    folder = library.download(T2I)
    assert not [name for name in extra if (folder / name).exists()]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of half a megabyte."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small disk takes root on Linux")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)]
    subprocess.run(mount, check=True)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_too_small_a_disk_is_said_before(hub: LocalHub, small_disk: Path) -> None:
    library = library_of(hub.endpoint, small_disk)
    with pytest.raises(DownloadFailed, match="still to come") as caught:
        library.download(T2I)
    assert caught.value.kind == "disk full"
    assert not hub.sent


def test_a_disk_that_fills_up_meanwhile(
    hub: LocalHub, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_image_tool.store.download.check_space", lambda *_: None)
    library = library_of(hub.endpoint, small_disk)
    with pytest.raises(DownloadFailed, match="is full") as caught:
        library.download(T2I)
    assert caught.value.kind == "disk full"
    assert_nothing_false(hub, library.folder(T2I), T2I)
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    library.download(T2I)
    assert_whole(hub, library, T2I)


def test_the_disk_is_looked_at_meanwhile(hub: LocalHub, small_disk: Path) -> None:
    """What another program takes is noticed before the last byte is gone."""
    subprocess.run(["mount", "-o", "remount,size=3m", str(small_disk)], check=True)
    library = library_of(hub.endpoint, small_disk)
    library._effort = Effort(look_every=0.05)
    hub.bytes_per_second = 200_000
    other = small_disk / "other"

    def fill() -> None:
        other.write_bytes(bytes(shutil.disk_usage(small_disk).free - 300_000))

    begun = when(lambda: sum(hub.sent.values()) > 50_000, fill)
    with begun, pytest.raises(DownloadFailed, match="still to come") as caught:
        library.download(T2I)
    assert caught.value.kind == "disk full"
    hub.bytes_per_second = 0
    other.unlink()
    kept = _sizes(library.folder(T2I) / PRIVATE / "partial")
    hub.requests.clear()
    library.download(T2I)
    assert_resumed(hub, kept)
    assert_whole(hub, library, T2I)


def test_what_is_here_already_takes_no_space_again(hub: LocalHub, small_disk: Path) -> None:
    """Resuming needs room for the rest alone."""
    subprocess.run(["mount", "-o", "remount,size=3m", str(small_disk)], check=True)
    library = library_of(hub.endpoint, small_disk)
    hub.bytes_per_second = 200_000
    control = Control()
    with when(lambda: sum(hub.sent.values()) > 300_000, control.pause), pytest.raises(Paused):
        library.download(T2I, control=control)
    hub.bytes_per_second = 0
    have = sum(p.stat().st_size for p in small_disk.rglob("*") if p.is_file())
    rest = sum(map(len, published(hub, T2I).values())) - have
    free = shutil.disk_usage(small_disk).free
    (small_disk / "other").write_bytes(bytes(free - rest - 200_000))
    assert have > 250_000
    library.download(T2I)
    assert_whole(hub, library, T2I)


class _AlmostFull(io.RawIOBase):
    """Takes three bytes at a time, as an unbuffered file may."""

    def __init__(self) -> None:
        self.taken = b""

    def write(self, piece: Any) -> int:
        self.taken += bytes(piece[:3])
        return min(3, len(piece))


def test_a_short_write_is_gone_on_with() -> None:
    stream = _AlmostFull()
    write_all(cast(BinaryIO, stream), memoryview(b"0123456789"))
    assert stream.taken == b"0123456789"


def test_a_folder_that_can_not_be_written(hub: LocalHub, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file, not a folder")
    with pytest.raises(DownloadFailed) as caught:
        library_of(hub.endpoint, tmp_path / "models").download(T2I)
    assert caught.value.kind == "not writable"


def test_pause_and_resume(hub: LocalHub, library: Library) -> None:
    slow_down(hub)
    control = Control()
    with (
        when(lambda: has_begun(library), control.pause),
        pytest.raises(Paused, match="goes on from there"),
    ):
        library.download(T2I, control=control)
    assert_nothing_false(hub, library.folder(T2I), T2I)
    hub.bytes_per_second = 0
    kept = _sizes(library.folder(T2I) / PRIVATE / "partial")
    assert sum(kept.values()) > 0
    hub.requests.clear()
    library.download(T2I)
    assert_resumed(hub, kept)
    assert_whole(hub, library, T2I)


def test_a_pause_ends_a_stall(hub: LocalHub, tmp_path: Path) -> None:
    """Not only when the patience with the server is over."""
    hub.faults = [Fault("stall", 99, 20_000, match=SHARD)]
    patient = Hub(hub.endpoint, local=True, stall_seconds=600)
    library = Library(CATALOG, tmp_path / "models", lambda: patient, None, QUICK)
    control, partial = Control(), library.folder(T2I) / PRIVATE / "partial"
    [shard] = [data for name, data in published(hub, T2I).items() if SHARD in name]

    def stalled() -> bool:
        return bool(hub.holding) and _sizes(partial).get(sha256(shard)) == 20_000

    with when(stalled, control.pause), pytest.raises(Paused):
        library.download(T2I, control=control)
    assert hub.holding, "the server has not given up"
    assert stalled()


def test_bodies_without_a_length(hub: LocalHub, library: Library) -> None:
    hub.chunked = True
    library.download(T2I)
    assert_whole(hub, library, T2I)


def assert_resumed(hub: LocalHub, kept: dict[str, int]) -> None:
    """Every file that had begun was asked for from the byte where it stopped."""
    for repo in hub.repos.values():
        for name, data in repo.items():
            size = kept.get(hashlib.sha256(data).hexdigest(), 0)
            asked = [s.range for s in hub.requests if s.path.endswith(name) and s.where == "cdn"]
            if 0 < size < len(data) and asked:
                assert asked[0] == f"bytes={size}-", name


def test_another_process_can_pause(hub: LocalHub, library: Library) -> None:
    slow_down(hub)
    started = time.monotonic()
    with when(lambda: has_begun(library), lambda: library.pause(T2I)), pytest.raises(Paused):
        library.download(T2I)
    assert time.monotonic() - started < 30


def test_cancel_deletes_what_came(hub: LocalHub, library: Library) -> None:
    slow_down(hub)
    control = Control()
    with when(lambda: has_begun(library), control.cancel), pytest.raises(Cancelled):
        library.download(T2I, control=control)
    assert not (library.folder(T2I) / PRIVATE / "partial").exists()


def test_two_at_once_are_refused(hub: LocalHub, library: Library) -> None:
    slow_down(hub)
    control = Control()
    first = threading.Thread(
        target=lambda: _quietly(lambda: library.download(T2I, control=control))
    )
    first.start()
    _wait_for(lambda: has_begun(library))
    with pytest.raises(DownloadFailed) as caught:
        library_of(hub.endpoint, library.models).download(T2I)
    assert caught.value.kind == "locked"
    control.pause()
    first.join()


def _quietly(run: Callable[[], object]) -> None:
    with contextlib.suppress(Paused):
        run()


# -- sharing ---------------------------------------------------------------------------------


def test_shared_components_are_stored_once(hub: LocalHub, library: Library) -> None:
    library.download(BASE21, accept_licence=True)
    before = sum(hub.sent.values())
    library.download(TURBO)
    assert_whole(hub, library, TURBO)
    fetched = sum(hub.sent.values()) - before
    own = [d for name, d in published(hub, TURBO).items() if name.startswith("transformer/")]
    assert fetched < sum(map(len, own)) + 10_000
    encoder = "text_encoder/model-00001-of-00004.safetensors"
    one, two = library.folder(BASE21) / encoder, library.folder(TURBO) / encoder
    assert one.samefile(two)
    freed = library.remove(BASE21)
    assert freed < sum(map(len, published(hub, BASE21).values())) / 2
    assert not library.folder(BASE21).exists()
    assert_whole(hub, library, TURBO)


def test_equal_files_of_a_model_are_fetched_once(hub: LocalHub, library: Library) -> None:
    """As the edit models have their tokenizer twice."""
    files = published(hub, T2I)
    twins = [f"scheduler/twin{number}.json" for number in range(6)]
    files.update(dict.fromkeys(twins, b'{"the": "same"}'))
    library.download(T2I)
    assert_whole(hub, library, T2I)
    assert sum(name in hub.sent for name in twins) == 1


def test_what_turbo_adds_is_known_before(library: Library) -> None:
    assert library.to_fetch(TURBO) == TURBO.weight_bytes
    library.download(BASE21, accept_licence=True)
    assert library.to_fetch(TURBO) == TURBO.components["transformer"].bytes


def test_what_an_interruption_left_to_fetch_is_known(hub: LocalHub, library: Library) -> None:
    """A component is here when all its shards are, not when its configuration is."""
    total = sum(len(data) for name, data in published(hub, T2I).items() if "/" in name)
    hub.faults.append(Fault("404", times=9, match=SHARD))
    with pytest.raises(DownloadFailed):
        library.download(T2I)
    folder = library.folder(T2I)
    record = library.record(T2I)
    assert record
    have = [file for file in record.files if "/" in file.path and (folder / file.path).exists()]
    partial = sum(path.stat().st_size for path in (folder / PRIVATE / "partial").iterdir())
    left = library.to_fetch(T2I)
    assert left == total - sum(file.size for file in have) - partial
    assert left >= sum(len(data) for name, data in published(hub, T2I).items() if SHARD in name)
    hub.faults.clear()
    library.download(T2I)
    assert library.to_fetch(T2I) == 0
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    size = len(published(hub, T2I)["vae/diffusion_pytorch_model.safetensors"])
    assert library.to_fetch(T2I) == size


def test_the_hugging_face_cache_is_used_and_not_changed(
    hub: LocalHub, repos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_image_tool.store.places.SMALLEST", 1)
    blobs = tmp_path / "cache" / "models--Qwen--Qwen-Image" / "blobs"
    snapshot = blobs.parent / "snapshots" / hub.commit(T2I.repo)
    for name, data in published(hub, T2I).items():
        blob = blobs / hashlib.sha256(data).hexdigest()
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        blobs.mkdir(exist_ok=True)
        blob.write_bytes(data)
        (snapshot / name).symlink_to(blob)
    elsewhere = Elsewhere(tmp_path / "cache")
    found = locate("qwen-image", CATALOG, tmp_path / "models", elsewhere)
    assert found.folder == snapshot
    before = {p: p.stat().st_mtime_ns for p in blobs.iterdir()}
    library = library_of(hub.endpoint, tmp_path / "models", elsewhere)
    library.download(T2I)
    assert sum(hub.sent.values()) == 0
    assert_whole(hub, library, T2I)
    assert {p: p.stat().st_mtime_ns for p in blobs.iterdir()} == before


def test_a_stranger_of_the_same_size_is_not_taken(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_image_tool.store.places.SMALLEST", 1)
    other = tmp_path / "ComfyUI"
    other.mkdir()
    for index, data in enumerate(published(hub, T2I).values()):
        (other / f"{index}.safetensors").write_bytes(os.urandom(len(data)))
    library = library_of(hub.endpoint, tmp_path / "models", Elsewhere(None, (other,)))
    library.download(T2I)
    assert_whole(hub, library, T2I)


def test_files_put_there_by_hand_are_proven(hub: LocalHub, repos: Path, library: Library) -> None:
    folder = library.folder(T2I)
    shutil.copytree(repos / "qwen-image", folder)
    [shard] = folder.glob(SHARD + "*")
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(BadRequest, match="by hand"):
        library.verify(T2I, full=True)
    library.download(T2I)
    assert_whole(hub, library, T2I)
    assert {name for name in hub.sent if is_lfs(name)} == {shard.relative_to(folder).as_posix()}


# -- variants, again -------------------------------------------------------------------------


def test_a_variant_is_the_named_file_or_an_error(hub: LocalHub, library: Library) -> None:
    folder = library.download(T2I, "q4_k_m")
    assert (folder / "variants" / "Q4_K_M" / "qwen-image-Q4_K_M.gguf").is_file()
    assert (folder / "variants" / "Q4_K_M" / "config.json").is_file()
    assert not (folder / "transformer").exists()
    with pytest.raises(BadRequest, match="only Q4_K_M is here"):
        locate("qwen-image", CATALOG, library.models)
    with pytest.raises(DownloadFailed, match=r"has no qwen-image-Q5_K_M\.gguf"):
        library.download(T2I, "Q5_K_M")
    with pytest.raises(BadRequest, match="Did you mean"):
        library.download(T2I, "Q4_K_N")
    library.download(T2I)
    assert locate("qwen-image", CATALOG, library.models).folder == folder
    assert library.remove(T2I, "Q4_K_M") > 3072 * 256 / 2
    assert not (folder / "variants" / "Q4_K_M").exists()
    assert_whole(hub, library, T2I)


@pytest.mark.parametrize("broken", ["half of it", "another content"])
def test_a_variant_on_its_way_or_broken_does_not_stop_the_one_that_runs(
    hub: LocalHub, library: Library, broken: str
) -> None:
    folder = library.download(T2I)
    gguf = "city96/Qwen-Image-gguf"
    if broken == "half of it":
        hub.faults = [Fault("drop", 99, match="Q4_K_M")]
    else:
        hub.repos[gguf]["qwen-image-Q4_K_M.gguf"] = b"GGUF"
    with pytest.raises(DownloadFailed):
        library.download(T2I, "Q4_K_M")
    assert locate("qwen-image", CATALOG, library.models).variant == "bf16"
    assert {fault.path.split("/")[1] for fault in library.verify(T2I)} == {"Q4_K_M"}
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(BadRequest, match="vae"):
        locate("qwen-image", CATALOG, library.models)


def test_again_starts_from_nothing(hub: LocalHub, library: Library) -> None:
    library.download(T2I)
    first = sum(hub.sent.values())
    library.download(T2I, again=True)
    assert sum(hub.sent.values()) == 2 * first
    assert_whole(hub, library, T2I)


def test_again_deletes_nothing_where_the_hub_gives_nothing(hub: LocalHub, library: Library) -> None:
    library.download(T2I)
    hub.faults = [Fault("403", 99, where="api")]
    with pytest.raises(DownloadFailed):
        library.download(T2I, again=True)
    assert_whole(hub, library, T2I)


def test_a_pause_ends_the_questions_too(hub: LocalHub, library: Library) -> None:
    control = Control()
    control.pause()
    with pytest.raises(Paused):
        library.download(T2I, control=control)
    assert not hub.requests


def test_a_pause_ends_the_tries_to_ask(hub: LocalHub, library: Library) -> None:
    control = Control()
    hub.faults = [Fault("500", 99, where="api")]
    with pytest.raises(Paused), when(lambda: hub.requests, control.pause):
        library.download(T2I, control=control)
    assert len(hub.requests) < TRIES


def test_a_list_that_is_nested_without_end(hub: LocalHub, library: Library) -> None:
    hub.listing = b"[" * 300_000
    with pytest.raises(DownloadFailed, match="did not answer with a file list"):
        library.download(T2I)


# -- kill -9 ---------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL and no forkserver there")
def test_fifty_kills_lose_nothing_and_claim_nothing(hub: LocalHub, tmp_path: Path) -> None:
    """SIGKILL at random points; afterwards what has a name is whole, and what came is not fetched
    again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qwen_image_tool.store.library", "huggingface_hub.hf_api"])
    library = library_of(hub.endpoint, tmp_path / "models")
    folder = library.folder(T2I)
    rng = random.Random(1)
    kills = false_complete = lost = 0
    while kills < 50:
        hub.bytes_per_second = 150_000
        kept = _sizes(folder / PRIVATE / "partial")
        hub.requests.clear()
        child = context.Process(target=download, args=(hub.endpoint, str(library.models)))
        child.start()
        _wait_for(lambda child=child: hub.requests or not child.is_alive())  # type: ignore[misc]
        child.join(rng.uniform(0, 0.6))
        if child.is_alive():
            assert child.pid
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            kills += 1
        else:
            assert child.exitcode == 0
            assert_whole(hub, library, T2I)
            library.remove(T2I)
            continue
        assert_resumed(hub, kept)
        false_complete += _claims_falsely(hub, library)
        now = _sizes(folder / PRIVATE / "partial")
        lost += sum(now.get(name, size) < size for name, size in kept.items())
    hub.bytes_per_second = 0
    library.download(T2I)
    assert_whole(hub, library, T2I)
    assert (lost, false_complete) == (0, 0)


@contextlib.contextmanager
def when(happened: Callable[[], object], act: Callable[[], None]) -> Iterator[None]:
    """Beside what is done within: `act`, as soon as it `happened`."""

    def watch() -> None:
        _wait_for(happened)
        act()

    watching = threading.Thread(target=watch)
    watching.start()
    yield
    watching.join()


def slow_down(hub: LocalHub) -> None:
    """A download takes more than a minute, and the next byte is never long in coming."""
    hub.piece, hub.bytes_per_second = 400, 8_000


def has_begun(library: Library) -> bool:
    return sum(_sizes(library.folder(T2I) / PRIVATE / "partial").values()) > 10_000


def _sizes(folder: Path) -> dict[str, int]:
    found = {}
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):  # it has its final name meanwhile
            found[path.name] = path.stat().st_size
    return found


def _claims_falsely(hub: LocalHub, library: Library) -> bool:
    """Says it is whole without being so, or has a final name without the content."""
    folder = library.folder(T2I)
    assert_nothing_false(hub, folder, T2I)
    record = library.record(T2I)
    whole = all((folder / name).exists() for name in published(hub, T2I))
    return bool(record) and not library.verify(T2I) and not whole


def _wait_for(happened: Callable[[], object], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.005)


@pytest.mark.parametrize(
    "answer",
    [
        {"foo": 1},
        {"siblings": None},
        {"siblings": [{"size": 3}]},
        {"siblings": [{"rfilename": 7}]},
        {"siblings": [{"rfilename": "a.json", "size": -3}]},
        {"siblings": [{"rfilename": "a.json", "size": 1, "blobId": "../../../outside"}]},
        {"siblings": [{"rfilename": "a.safetensors", "lfs": {"sha256": "../x", "size": 1}}]},
        {"Code": 404},
        {"Data": None},
        {"Data": {"Files": [{"Type": "blob"}]}},
        {"Data": {"Files": [{"Path": "a", "Type": "blob", "Size": "many"}]}},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["huggingface", "modelscope"])
def test_an_answer_of_another_form_is_said(
    hub: LocalHub, tmp_path: Path, kind: Any, answer: object
) -> None:
    hub.listing = json.dumps(answer).encode()
    reached = Hub(hub.endpoint, kind=kind, local=True)
    library = Library(CATALOG, tmp_path / "models", lambda: reached, None, QUICK)
    with pytest.raises(DownloadFailed) as caught:
        library.download(T2I)
    assert caught.value.kind == "server"
    assert hub.endpoint in caught.value.message
    assert "another source" in caught.value.hint
    assert not re.search("Input|String|Field required", caught.value.message)


@pytest.mark.parametrize("lacks", ["hashes", "sizes"])
def test_what_nobody_could_prove_is_not_fetched(
    hub: LocalHub, library: Library, lacks: str
) -> None:
    setattr(hub, lacks, False)
    with pytest.raises(DownloadFailed, match=r"gives no (hash|size) for") as caught:
        library.download(T2I)
    assert "another source" in caught.value.hint
    assert not hub.sent
    assert not [p for p in library.folder(T2I).rglob("*.*") if PRIVATE not in p.parts]
    setattr(hub, lacks, True)
    library.download(T2I)
    assert_whole(hub, library, T2I)


def test_the_size_has_to_do_for_a_small_text(hub: LocalHub, library: Library) -> None:
    """As on mirrors that list the hashes of weights alone."""
    files = [
        {"rfilename": name, "size": len(data)}
        | ({"lfs": {"size": len(data), "sha256": sha256(data)}} if is_lfs(name) else {})
        for name, data in published(hub, T2I).items()
    ]
    hub.listing = json.dumps({"sha": hub.commit(T2I.repo), "siblings": files}).encode()
    library.download(T2I)
    assert_whole(hub, library, T2I)


def test_weights_without_a_hash_never_agree() -> None:
    file = Kept(path="a.gguf", repo="", revision="", source="", size=0)
    assert not Digest(file).agrees
    assert Digest(file.model_copy(update={"path": "a.json"})).agrees


# -- odd names, and what is in the way ------------------------------------------------------


@pytest.mark.parametrize("name", ["transformer/con.safetensors", "vae/a\\..\\b.json", "vae/x?.txt"])
def test_an_odd_name_of_a_file_that_is_needed_is_refused(
    hub: LocalHub, library: Library, name: str
) -> None:
    published(hub, T2I)[name] = b"x"
    with pytest.raises(DownloadFailed, match="has a file of the name") as caught:
        library.download(T2I)
    assert caught.value.kind == "bad name"
    assert not hub.sent


@pytest.mark.parametrize("kind", ["huggingface", "modelscope"])
def test_an_odd_name_of_a_file_that_is_not_needed_is_passed_over(
    hub: LocalHub, tmp_path: Path, kind: Any
) -> None:
    odd = ["transformer/../../evil.safetensors", "images/a: b?.png", "nul", "..\\evil.json"]
    for repo in (T2I.repo, "city96/Qwen-Image-gguf"):
        hub.repos[repo] |= dict.fromkeys(odd, b"x")
    if kind == "modelscope":
        hub.list_modelscope(T2I.repo, None)
    reached = Hub(hub.endpoint, kind=kind, local=True)
    library = Library(CATALOG, tmp_path / "models", lambda: reached, None, QUICK)
    folder = library.download(T2I)
    if kind == "huggingface":
        library.download(T2I, "Q4_K_M")
    assert library.verify(T2I, full=True) == ()
    found = {path.name for path in tmp_path.rglob("*")}
    assert not found & {"evil.safetensors", "nul", "..\\evil.json", "evil.json", "images"}
    assert folder.is_dir()


def test_an_empty_folder_in_a_files_place_is_mended(hub: LocalHub, library: Library) -> None:
    [shard] = library.download(T2I).glob(SHARD + "*")
    for full in (False, True):
        shard.unlink()
        shard.mkdir()
        [fault] = library.verify(T2I, full=full)
        assert fault.kind == "swapped"
        assert "is a folder, and a file of the model belongs there" in fault.message
        assert library.repair(T2I) == (fault,)
        assert_whole(hub, library, T2I)


@pytest.mark.parametrize("command", ["repair", "download"])
def test_a_folder_with_something_in_it_is_not_deleted(
    hub: LocalHub, library: Library, command: str
) -> None:
    [shard] = library.download(T2I).glob(SHARD + "*")
    shard.unlink()
    shard.mkdir()
    (shard / "mine.txt").write_text("mine")
    hub.requests.clear()
    with pytest.raises(DownloadFailed, match="is a folder") as caught:
        getattr(library, command)(T2I)
    assert str(shard) in caught.value.message
    assert "Move that folder away" in caught.value.hint
    assert not hub.requests, "it is said before anything is fetched"
    shard.rename(shard.with_name("elsewhere"))
    library.repair(T2I)
    assert library.verify(T2I, full=True) == ()


def test_a_file_in_a_folders_place_is_said(hub: LocalHub, library: Library) -> None:
    folder = library.folder(T2I)
    folder.mkdir(parents=True)
    (folder / "vae").write_text("mine")
    with pytest.raises(DownloadFailed, match="is a file, and a folder") as caught:
        library.download(T2I)
    assert "Move that file away" in caught.value.hint
    (folder / "vae").unlink()
    library.download(T2I)
    assert_whole(hub, library, T2I)


# -- the last transformer --------------------------------------------------------------------


def test_without_its_last_transformer_the_rest_stays(hub: LocalHub, library: Library) -> None:
    folder = library.download(T2I)
    library.remove(T2I, "bf16")
    gone = {name for name in published(hub, T2I) if name.startswith("transformer/")}
    left = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert {name for name in left if not name.startswith(PRIVATE)} == {*published(hub, T2I)} - gone
    with pytest.raises(BadRequest, match="only text_encoder, vae is here"):
        locate("qwen-image", CATALOG, library.models)
    assert library.to_fetch(T2I) == T2I.components["transformer"].bytes
    hub.sent.clear()
    library.download(T2I)
    assert {name for name in hub.sent if is_lfs(name)} == {name for name in gone if is_lfs(name)}
    assert_whole(hub, library, T2I)


def test_of_a_folder_put_there_by_hand_only_the_transformer_goes(
    repos: Path, library: Library
) -> None:
    folder = library.folder(T2I)
    shutil.copytree(repos / "qwen-image", folder)
    assert library.remove(T2I, "bf16") > 100_000
    assert not list(folder.rglob("transformer/*"))
    assert (folder / "vae" / "diffusion_pytorch_model.safetensors").is_file()


# -- what is read is told --------------------------------------------------------------------


def test_how_far_the_proof_of_files_by_hand_is_is_told(
    repos: Path, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_image_tool.store.verify.REPORT_EVERY", 50_000)
    shutil.copytree(repos / "qwen-image", library.folder(T2I))
    events: list[Event] = []
    library.download(T2I, emit=events.append)
    assert "of the files: they are looked at." in next(e.text for e in events if e.kind == "notice")
    told = [event for event in events if isinstance(event, VerifyProgress)]
    assert len(told) > 2
    done = [event.done_bytes for event in told]
    assert done == sorted(done)
    assert (
        done[-1]
        == told[-1].total_bytes
        == sum(path.stat().st_size for path in (repos / "qwen-image").rglob("*") if path.is_file())
    )


def test_a_vae_that_another_program_has_is_linked_by_its_hash(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As every published file; while it is read for its hash, how far that is is told."""
    monkeypatch.setattr("qwen_image_tool.store.verify.REPORT_EVERY", 10_000)
    monkeypatch.setattr("qwen_image_tool.store.places.SMALLEST", 1)
    name = "vae/diffusion_pytorch_model.safetensors"
    theirs = tmp_path / "ComfyUI" / "vae" / "some.safetensors"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(published(hub, T2I)[name])
    library = library_of(
        hub.endpoint, tmp_path / "models", Elsewhere(None, (tmp_path / "ComfyUI",))
    )
    events: list[Event] = []
    folder = library.download(T2I, emit=events.append)
    assert name not in hub.sent
    assert (folder / name).samefile(theirs)
    told = [event for event in events if isinstance(event, VerifyProgress)]
    assert told[-1].done_bytes == told[-1].total_bytes == len(published(hub, T2I)[name])
    assert f"{theirs} may be {name}: its hash is looked at." in [
        event.text for event in events if event.kind == "notice"
    ]
    library.remove(T2I)
    assert theirs.is_file()
