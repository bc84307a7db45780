"""What is pinned: the revision of a download, and the wording of a licence that was agreed to."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import tiny
from hub import Fault, LocalHub, serve
from qwen_image_tool.catalog import Model, load_catalog
from qwen_image_tool.errors import DownloadFailed, LicenceNotAccepted
from qwen_image_tool.store.download import Effort
from qwen_image_tool.store.hub import Hub
from qwen_image_tool.store.library import Library
from qwen_image_tool.store.record import HubKind
from qwen_image_tool.types import Event, Notice

CATALOG = load_catalog()
T2I, BASE21 = CATALOG.find("qwen-image"), CATALOG.find("qwen-image-2.1")
TURBO = CATALOG.find("qwen-image-2.1-turbo")
VAE = "vae/diffusion_pytorch_model.safetensors"
NEW = "1234567890abcdef1234567890abcdef12345678"


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repos")
    tiny.save(root / "20b")
    tiny.save_21(root / "21")
    return root


@pytest.fixture
def hub(repos: Path) -> Iterator[LocalHub]:
    with serve() as hub:
        hub.add_folder(T2I.repo, repos / "20b")
        for model in (BASE21, TURBO):
            hub.add_folder(model.repo, repos / "21")
        yield hub


def library_of(hub: LocalHub, models: Path, kind: HubKind = "huggingface") -> Library:
    reached = Hub(hub.endpoint, kind=kind, local=True)
    effort = Effort(tries=2, first_wait=0.01, longest_wait=0.02)
    return Library(CATALOG, models, lambda: reached, None, effort)


@pytest.fixture
def library(hub: LocalHub, tmp_path: Path) -> Library:
    return library_of(hub, tmp_path / "models")


def move_on(hub: LocalHub, model: Model) -> dict[str, bytes]:
    """A new commit at the hub: other weights of the same size, a file more and one less."""
    files = hub.repos[model.repo]
    files[VAE] = files[VAE][:-1] + bytes([files[VAE][-1] ^ 1])
    files["tokenizer/more.json"] = b"{}"
    del files["text_encoder/generation_config.json"]
    hub.commits[model.repo] = NEW
    return files


def assert_holds(library: Library, model: Model, files: dict[str, bytes]) -> None:
    folder = library.folder(model)
    assert {name: (folder / name).read_bytes() for name in files} == files
    assert library.verify(model, full=True) == ()


def test_a_download_stays_at_its_revision(hub: LocalHub, library: Library) -> None:
    library.download(T2I)
    assert library.revision(T2I) == hub.commit(T2I.repo) != NEW
    had = dict(hub.repos[T2I.repo])
    move_on(hub, T2I)
    hub.requests.clear()
    library.download(T2I)
    assert not hub.requests, "a complete model asks nobody"
    assert_holds(library, T2I, had)


def test_an_update_fetches_what_changed_and_nothing_else(hub: LocalHub, library: Library) -> None:
    before = hub.commit(T2I.repo)
    library.download(T2I)
    files = move_on(hub, T2I)
    hub.sent.clear()
    events: list[Event] = []
    library.download(T2I, emit=events.append, update=True)
    assert set(hub.sent) == {VAE, "tokenizer/more.json"}
    assert library.revision(T2I) == NEW
    assert_holds(library, T2I, files)
    assert not (library.folder(T2I) / "text_encoder" / "generation_config.json").exists()
    said = [event.text for event in events if isinstance(event, Notice)]
    assert f"goes from revision {before} to {NEW}: 2 files change." in said[0]
    hub.sent.clear()
    events.clear()
    library.download(T2I, emit=events.append, update=True)
    assert not hub.sent
    assert isinstance(events[0], Notice)
    assert events[0].text == f"Qwen-Image is at the current revision, {NEW}."


def test_an_interrupted_update_takes_no_old_file_for_a_new_one(
    hub: LocalHub, library: Library
) -> None:
    """They have the same size."""
    library.download(T2I)
    files = move_on(hub, T2I)
    hub.faults = [Fault("cut", 99, 0, match=VAE)]
    with pytest.raises(DownloadFailed):
        library.download(T2I, update=True)
    assert VAE in {fault.path for fault in library.verify(T2I)}
    hub.faults.clear()
    library.download(T2I)
    assert library.revision(T2I) == NEW
    assert_holds(library, T2I, files)


def test_the_catalogues_revision_is_kept_by_an_update(hub: LocalHub, library: Library) -> None:
    pinned = T2I.model_copy(update={"revision": hub.commit(T2I.repo)})
    library.download(pinned)
    move_on(hub, T2I)
    with pytest.raises(DownloadFailed) as caught:  # the local hub has forgotten the old commit
        library.download(pinned, update=True)
    assert caught.value.kind == "not found"
    assert hub.requests[-1].path.endswith(f"/revision/{pinned.revision}")


# -- ModelScope ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last", "revision"),
    [
        ({"Id": NEW, "ShortId": NEW[:8]}, NEW),
        ({"Id": "", "ShortId": NEW[:8]}, "master"),
        (None, "master"),
    ],
    ids=["tells its commit", "tells half of it", "tells nothing"],
)
def test_modelscope(
    hub: LocalHub, tmp_path: Path, last: dict[str, str] | None, revision: str
) -> None:
    """Where it does not tell its commit, the files' hashes pin what is fetched."""
    hub.list_modelscope(T2I.repo, last)
    library = library_of(hub, tmp_path / "models", "modelscope")
    library.download(T2I.model_copy(update={"revision": "a commit of Hugging Face's"}))
    assert library.verify(T2I, full=True) == ()
    assert library.revision(T2I) == revision
    assert {seen.token for seen in hub.requests} == {""}
    asked = [s.path for s in hub.requests if s.where == "hub"]
    assert all(f"/resolve/{revision}/" in path for path in asked)


@pytest.mark.parametrize("kinds", [("huggingface", "modelscope"), ("modelscope", "huggingface")])
def test_a_download_goes_on_at_the_other_hub(
    hub: LocalHub, tmp_path: Path, kinds: tuple[HubKind, HubKind]
) -> None:
    """Which has the same content, and not the same commits."""
    hub.list_modelscope(T2I.repo, {"Id": NEW})
    scope, hub.listing = hub.listing, b""
    branches = {"huggingface": "main", "modelscope": "master"}
    for step, kind in enumerate(kinds):
        hub.listing = scope if kind == "modelscope" else b""
        hub.faults = [Fault("cut", 99, 0, match=VAE)] if step == 0 else []
        hub.requests.clear()
        library = library_of(hub, tmp_path / "models", kind)
        if step == 0:
            with pytest.raises(DownloadFailed):
                library.download(T2I)
        else:
            library.download(T2I)
    [asked] = {s.path for s in hub.requests if s.where == "hub" and s.path.endswith(VAE)}
    assert f"/resolve/{branches[kinds[1]]}/" in asked
    assert_holds(library, T2I, hub.repos[T2I.repo])


# -- licences --------------------------------------------------------------------------------


def test_the_licence_is_asked_once_and_remembered(hub: LocalHub, library: Library) -> None:
    with pytest.raises(LicenceNotAccepted, match="no commercial use") as caught:
        library.download(BASE21)
    assert "--yes-license" in caught.value.hint
    assert not hub.requests, "nobody need be asked for that"
    assert "Not for commercial use" in library.licence_text(BASE21)
    library.download(BASE21, accept_licence=True)
    accepted = library.accepted(TURBO)
    assert accepted
    assert "Not for commercial use" in accepted.text
    library.download(TURBO)


def test_a_changed_licence_is_asked_again(hub: LocalHub, library: Library) -> None:
    library.download(BASE21, accept_licence=True)
    hub.repos[TURBO.repo]["LICENSE"] = b"Now it costs a fee.\n"
    hub.sent.clear()
    with pytest.raises(LicenceNotAccepted, match="reads otherwise than when you agreed") as caught:
        library.download(TURBO)
    assert "--yes-license" in caught.value.hint
    assert set(hub.sent) == {"LICENSE"}
    library.download(TURBO, accept_licence=True)
    hub.repos[BASE21.repo]["LICENSE"] = b"Now it costs a fee.\n"
    hub.commits[BASE21.repo] = NEW
    library.download(BASE21)
    library.download(BASE21, update=True)  # agreed to, for Turbo
    hub.repos[BASE21.repo]["LICENSE"] = b"Now it costs two.\n"
    with pytest.raises(LicenceNotAccepted):
        library.download(BASE21, update=True)
    assert library.verify(BASE21, full=True) == (), "what is here stays"


def test_a_licence_is_proven_like_any_file(hub: LocalHub, library: Library) -> None:
    hub.faults = [Fault("flip", 1, where="hub", match="LICENSE")]
    library.download(BASE21, accept_licence=True)
    accepted = library.accepted(BASE21)
    assert accepted
    assert accepted.text.encode() == hub.repos[BASE21.repo]["LICENSE"]
    assert not hub.faults[0].times


def test_an_acceptance_that_can_not_be_read_is_asked_again(hub: LocalHub, library: Library) -> None:
    library.download(BASE21, accept_licence=True)
    [kept] = (library.models / "licences").glob("*.json")
    assert json.loads(kept.read_text(encoding="utf-8"))["text"]
    kept.write_text("{", encoding="utf-8")
    with pytest.raises(LicenceNotAccepted, match="no commercial use"):
        library.download(TURBO)
