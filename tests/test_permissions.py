"""Folders and files that this user may not write or read, for real: as somebody who is not root."""

import multiprocessing
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

import tiny
from hub import LocalHub, attempt, serve
from qwen_image_tool.catalog import load_catalog
from qwen_image_tool.errors import BadRequest
from qwen_image_tool.store.download import Effort
from qwen_image_tool.store.hub import Hub, connect
from qwen_image_tool.store.library import Library

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="modes say nothing there")

NOBODY = 65534
CATALOG = load_catalog()
T2I = CATALOG.find("qwen-image")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    with serve() as hub:
        hub.add_folder(T2I.repo, tiny.save(tmp_path / "repo"))
        yield hub


def library(endpoint: str, models: Path) -> Library:
    reached = Hub(endpoint, local=True)
    return Library(CATALOG, models, lambda: reached, None, Effort(tries=1))


def as_nobody(folder: Path, endpoint: str, action: str) -> str:
    """What `action` ends with in a process that may do no more than the modes say."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qwen_image_tool.store.library", "huggingface_hub.hf_api"])
    ours, theirs = context.Pipe()
    arguments = (endpoint, str(folder / "models"), action, NOBODY, theirs)
    child = context.Process(target=attempt, args=arguments)
    child.start()
    theirs.close()
    said = str(ours.recv())
    child.join()
    return said


def closed(path: Path, mode: int) -> Path:
    path.chmod(mode)
    return path


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that anybody may enter, as pytest's own are not; opened again, so that it can go."""
    with tempfile.TemporaryDirectory() as made:
        found = closed(Path(made), 0o755)
        (found / "models").mkdir()
        yield found
        for path in found.rglob("*"):
            if path.is_dir():
                path.chmod(0o755)


def test_a_models_folder_that_is_not_ours(hub: LocalHub, folder: Path) -> None:
    closed(folder / "models", 0o555)
    said = as_nobody(folder, hub.endpoint, "download")
    assert said.startswith("DownloadFailed not writable:"), said
    assert f"{folder / 'models' / T2I.id} can't be written" in said
    assert "Permission denied" in said
    assert "set `models` in the config file" in said
    assert not hub.sent, "nothing was fetched in vain"


def test_a_component_that_is_not_ours(hub: LocalHub, folder: Path) -> None:
    """It shows in the middle of a download."""
    model = folder / "models" / T2I.id
    for path in (folder / "models", model, model / "vae"):
        path.mkdir(exist_ok=True)
        closed(path, 0o777)
    closed(model / "vae", 0o555)
    said = as_nobody(folder, hub.endpoint, "download")
    assert said.startswith("DownloadFailed not writable:"), said
    assert "Check who may write there." in said
    assert not list((model / "vae").iterdir())
    closed(model / "vae", 0o777)
    assert as_nobody(folder, hub.endpoint, "download") == str(model)


def test_a_file_that_can_not_be_read(hub: LocalHub, folder: Path) -> None:
    store = library(hub.endpoint, folder / "models")
    store.download(T2I)
    name = "vae/diffusion_pytorch_model.safetensors"
    closed(store.folder(T2I) / name, 0o000)
    assert as_nobody(folder, hub.endpoint, "verify") == f"[('unreadable', '{name}')]"


def test_what_can_not_be_deleted(hub: LocalHub, folder: Path) -> None:
    store = library(hub.endpoint, folder / "models")
    store.download(T2I)
    for path in [folder / "models", *(folder / "models").rglob("*")]:
        closed(path, 0o777)
    closed(store.folder(T2I) / "vae", 0o555)
    said = as_nobody(folder, hub.endpoint, "again")
    assert said.startswith("DownloadFailed not writable:"), said


def test_a_token_that_can_not_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `sudo hf auth login` leaves it. A folder in its place can't be read by root either."""
    (folder / "token").mkdir()
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    with pytest.raises(BadRequest, match=r"token in .*token can't be read") as caught:
        connect()
    assert "most models need no token" in caught.value.hint
    assert connect("modelscope").token is None
