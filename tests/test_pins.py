"""The catalogue's pins: used where there are some, and filled by the maintainers' command."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pin_models
import tiny
from hub import LocalHub, is_lfs, serve, sha256
from qwen_image_tool.catalog import Catalog, Model, PinnedFile, load_catalog
from qwen_image_tool.errors import DownloadFailed
from qwen_image_tool.store.download import Effort
from qwen_image_tool.store.hub import Hub
from qwen_image_tool.store.library import Library
from qwen_image_tool.store.record import HubKind
from test_formats import gguf

CATALOG = load_catalog()
T2I = CATALOG.find("qwen-image")
VAE = "vae/diffusion_pytorch_model.safetensors"
GGUF = "city96/Qwen-Image-gguf"
NEW = "1234567890abcdef1234567890abcdef12345678"


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("repos") / "20b")


@pytest.fixture
def hub(repo: Path, tmp_path: Path) -> Iterator[LocalHub]:
    with serve() as hub:
        hub.add_folder(T2I.repo, repo)
        shapes = {"img_in.weight": (3072, 256), "txt_norm.weight": (3584,)}
        quantised = gguf(tmp_path / "any.gguf", shapes).read_bytes()
        hub.repos[GGUF] = {"qwen-image-Q4_K_M.gguf": quantised}
        yield hub


def library_of(hub: LocalHub, models: Path, kind: HubKind = "huggingface") -> Library:
    reached = Hub(hub.endpoint, kind=kind, local=True)
    return Library(CATALOG, models, lambda: reached, None, Effort(tries=2, first_wait=0.01))


def pinned(hub: LocalHub, model: Model = T2I) -> Model:
    files = {name: data for name, data in hub.repos[model.repo].items() if is_lfs(name)}
    pins = {name: PinnedFile(bytes=len(data), sha256=sha256(data)) for name, data in files.items()}
    commit = hub.commit(model.repo)
    return model.model_copy(update={"revision": commit, "pinned": pins})


def test_a_pinned_revision_is_asked_for_and_its_files_are_proven(
    hub: LocalHub, tmp_path: Path
) -> None:
    library, model = library_of(hub, tmp_path / "models"), pinned(hub)
    library.download(model)
    assert hub.requests[0].path.endswith(f"/revision/{model.revision}")
    record = library.record(model)
    assert record
    assert {file.sha256 for file in record.files if file.is_weights} == {
        pin.sha256 for pin in model.pinned.values()
    }
    assert library.verify(model, full=True) == ()


@pytest.mark.parametrize("kind", ["huggingface", "modelscope"])
def test_a_hub_that_lists_another_file_is_refused(
    hub: LocalHub, tmp_path: Path, kind: HubKind
) -> None:
    """Be it under the pinned commit."""
    model, files = pinned(hub), hub.repos[T2I.repo]
    files[VAE] = files[VAE][:-1] + bytes([files[VAE][-1] ^ 1])
    if kind == "modelscope":
        hub.list_modelscope(T2I.repo, None)
    with pytest.raises(DownloadFailed, match=f"has another {VAE} than") as caught:
        library_of(hub, tmp_path / "models", kind).download(model)
    assert caught.value.kind == "changed"
    assert not hub.sent


def test_pinned_hashes_prove_files_of_a_mirror_that_lists_none(
    hub: LocalHub, tmp_path: Path
) -> None:
    """What it sends has to agree, of course."""
    model, files = pinned(hub), hub.repos[T2I.repo]
    names = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
    hub.listing = json.dumps({"sha": model.revision, "siblings": names}).encode()
    library = library_of(hub, tmp_path / "models")
    with pytest.raises(DownloadFailed, match="gives no hash"):
        library.download(T2I.model_copy(update={"revision": model.revision}))
    library.download(model)
    assert library.verify(model, full=True) == ()
    shutil.rmtree(library.models)
    good, files[VAE] = files[VAE], files[VAE][:-1] + bytes([files[VAE][-1] ^ 1])
    with pytest.raises(DownloadFailed, match="another file on the server"):
        library.download(model)
    assert not (library.folder(model) / VAE).exists()
    files[VAE] = good


def test_a_pinned_file_that_is_gone_is_said(hub: LocalHub, tmp_path: Path) -> None:
    more = {"vae/more.safetensors": PinnedFile(bytes=1, sha256="0" * 64)}
    model = pinned(hub)
    model = model.model_copy(update={"pinned": model.pinned | more})
    with pytest.raises(DownloadFailed, match=r"has no vae/more\.safetensors") as caught:
        library_of(hub, tmp_path / "models").download(model)
    assert caught.value.kind == "not found"


def test_an_earlier_download_of_another_revision_goes_on_by_its_own_hashes(
    hub: LocalHub, tmp_path: Path
) -> None:
    """A program that is newer than the download has pins that it does not meet."""
    library = library_of(hub, tmp_path / "models")
    library.download(T2I, "Q4_K_M")
    foreign = {name: PinnedFile(bytes=1, sha256="0" * 64) for name in pinned(hub).pinned}
    newer = T2I.model_copy(update={"revision": NEW, "pinned": foreign})
    library.download(newer, "bf16")
    assert library.verify(newer, full=True) == ()
    with pytest.raises(DownloadFailed):  # the local hub has no such commit
        library.download(newer, update=True)


@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    """Of one model with one variant, with nothing pinned."""
    row = T2I.model_copy(update={"variants": (T2I.variant("Q4_K_M"),), "revision": ""})
    path = tmp_path / "models.json"
    text = CATALOG.model_copy(update={"models": (CATALOG.find("practice"), row)}).to_json()
    path.write_text(text, encoding="utf-8")
    return path


def read(catalog: Path) -> Model:
    return Catalog.from_json(catalog.read_bytes()).find("qwen-image")


def test_the_maintainers_command_pins_what_the_hub_has(
    hub: LocalHub, catalog: Path, tmp_path: Path
) -> None:
    command = [sys.executable, pin_models.__file__, "--catalog", str(catalog)]
    env = os.environ | {"HF_ENDPOINT": hub.endpoint, "QIT_LOCAL_HUB": "1"}

    def run(*more: str) -> tuple[int, str]:
        done = subprocess.run([*command, *more], env=env, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    commit = hub.commit(T2I.repo)
    before = catalog.read_bytes()
    code, said = run("--check")
    assert (code, catalog.read_bytes()) == (1, before)
    assert f"qwen-image: nothing -> {commit}" in said
    assert run()[0] == 0
    model = read(catalog)
    assert model == pinned(hub, model.model_copy(update={"variants": model.variants}))
    [variant] = model.variants
    data = hub.repos[GGUF]["qwen-image-Q4_K_M.gguf"]
    assert variant.pinned == PinnedFile(bytes=len(data), sha256=sha256(data))
    assert (variant.revision, variant.bytes) == (hub.commit(GGUF), len(data))
    assert run("--check") == (0, "All is pinned as the hub has it.\n")

    library = library_of(hub, tmp_path / "models")
    hub.requests.clear()
    library.download(model, "Q4_K_M")
    asked = [seen.path for seen in hub.requests if seen.where == "api"]
    assert [path.rpartition("/")[2] for path in asked] == [commit, variant.revision]


def test_a_variant_that_changed_at_its_pinned_commit_is_refused(
    hub: LocalHub, catalog: Path, tmp_path: Path
) -> None:
    pin_models.pin(catalog, [], Hub(hub.endpoint, local=True), write=True)
    hub.repos[GGUF]["qwen-image-Q4_K_M.gguf"] += b"x"
    with pytest.raises(DownloadFailed, match="has another qwen-image-Q4_K_M"):
        library_of(hub, tmp_path / "models").download(read(catalog), "Q4_K_M")


def test_pinning_goes_on_with_the_hub(hub: LocalHub, catalog: Path) -> None:
    reached = Hub(hub.endpoint, local=True)
    pin_models.pin(catalog, ["qwen-image"], reached, write=True)
    before, commit = read(catalog), hub.commit(T2I.repo)
    hub.commits[T2I.repo] = NEW
    files = hub.repos[T2I.repo]
    files[VAE] = files[VAE][:-1] + bytes([files[VAE][-1] ^ 1])
    said = pin_models.pin(catalog, ["qwen-image"], reached, write=True)
    assert said == [f"qwen-image: {commit} -> {NEW}"]
    changed = {name for name, pin in read(catalog).pinned.items() if pin != before.pinned[name]}
    assert changed == {VAE}


@pytest.mark.parametrize("lacks", ["a repository", "hashes", "a commit"])
def test_nothing_is_written_where_something_is_not_known(
    hub: LocalHub,
    catalog: Path,
    lacks: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = catalog.read_bytes()
    match lacks:
        case "a repository":
            del hub.repos[GGUF]
        case "hashes":
            hub.hashes = False
        case _:
            hub.commits[T2I.repo] = "main"
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("QIT_LOCAL_HUB", "1")
    assert pin_models.main(["--catalog", str(catalog)]) == 1
    assert capsys.readouterr().err.startswith("pin_models: ")
    assert catalog.read_bytes() == before
