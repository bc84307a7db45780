"""What is pinned: the revision of a download, and the wording of a licence that was agreed to."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hub import Fault, LocalHub, serve
from qwen_image_tool.catalog import Model, load_catalog
from qwen_image_tool.errors import Cancelled, DownloadFailed, LicenceNotAccepted
from qwen_image_tool.store import locate, updates
from qwen_image_tool.store.download import Control, Effort
from qwen_image_tool.store.hub import Hub
from qwen_image_tool.store.library import Library
from qwen_image_tool.store.record import PRIVATE, HubKind
from qwen_image_tool.types import DownloadProgress, Event, Notice

CATALOG = load_catalog()
T2I, BASE21 = CATALOG.find("qwen-image"), CATALOG.find("qwen-image-2.1")
TURBO = CATALOG.find("qwen-image-2.1-turbo")
VAE = "vae/diffusion_pytorch_model.safetensors"
NEW = "1234567890abcdef1234567890abcdef12345678"


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


def test_an_interrupted_update_leaves_what_is_here_and_goes_on(
    hub: LocalHub, library: Library
) -> None:
    """The old files and the new ones have the same size: none passes for the other."""
    had = dict(hub.repos[T2I.repo])
    library.download(T2I)
    files = move_on(hub, T2I)
    hub.faults = [Fault("cut", 1, 30_000, match=VAE), Fault("drop", 99, match=VAE)]
    for again in (False, True):
        with pytest.raises(DownloadFailed):
            library.download(T2I, update=not again)
        assert library.revision(T2I) != NEW
        assert locate("qwen-image", CATALOG, library.models).variant == "bf16"
        assert_holds(library, T2I, had)
    hub.faults.clear()
    hub.sent.clear()
    library.download(T2I)
    assert hub.sent[VAE] == len(files[VAE]) - 30_000, "what came is not fetched again"
    assert library.revision(T2I) == NEW
    assert_holds(library, T2I, files)
    assert not list((library.folder(T2I) / PRIVATE).glob("*/qwen-image"))


def test_a_cancelled_update_leaves_what_is_here(hub: LocalHub, library: Library) -> None:
    had = dict(hub.repos[T2I.repo])
    library.download(T2I)
    move_on(hub, T2I)
    control = Control()

    def stop(event: Event) -> None:
        if isinstance(event, DownloadProgress):
            control.cancel()

    with pytest.raises(Cancelled):
        library.download(T2I, emit=stop, control=control, update=True)
    assert_holds(library, T2I, had)
    hub.requests.clear()
    library.download(T2I)
    assert not hub.requests, "nothing is left to go on with"


def test_a_newer_update_takes_over_from_one_that_was_stopped(
    hub: LocalHub, library: Library
) -> None:
    library.download(T2I)
    files = move_on(hub, T2I)
    hub.faults = [Fault("cut", 99, 0, match=VAE)]
    with pytest.raises(DownloadFailed):
        library.download(T2I, update=True)
    files["tokenizer/more.json"] = b"[]"  # of the size of the one that came
    hub.commits[T2I.repo] = "a" * 40
    hub.faults.clear()
    library.download(T2I, update=True)
    assert library.revision(T2I) == "a" * 40
    assert_holds(library, T2I, files)


@pytest.mark.parametrize("step", range(1, 6))
def test_an_update_that_is_killed_at_its_last_step_is_finished(
    hub: LocalHub, library: Library, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """At each of the steps that give the new files their places."""
    had = dict(hub.repos[T2I.repo])
    library.download(T2I)
    files = move_on(hub, T2I)
    kill_at(monkeypatch, step)
    with pytest.raises(Killed):
        library.download(T2I, update=True)
    monkeypatch.undo()
    folder = library.folder(T2I)
    if step == 1:
        assert_holds(library, T2I, had)
    else:
        faults = library.verify(T2I)
        assert not faults or {fault.kind for fault in faults} == {"interrupted"}
        assert faults or (folder / VAE).read_bytes() == files[VAE]
    library.repair(T2I)
    library.download(T2I)
    assert library.revision(T2I) == NEW
    assert_holds(library, T2I, files)
    assert not (folder / "text_encoder" / "generation_config.json").exists()


class Killed(BaseException):
    """As SIGKILL: no `except` of the program sees it coming."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Before the `step`th of what an update does once all is here."""
    left = [step]

    def dying(do: Callable[..., object]) -> Callable[..., object]:
        def instead(*arguments: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return do(*arguments)

        return instead

    monkeypatch.setattr(updates, "put_in_place", dying(updates.put_in_place))
    for name in ("move", "delete", "write_record"):
        monkeypatch.setattr(updates, name, dying(getattr(updates, name)))


def test_an_update_needs_room_for_the_new_beside_the_old(
    hub: LocalHub, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    had = dict(hub.repos[T2I.repo])
    library.download(T2I)
    move_on(hub, T2I)
    size = len(had[VAE])
    usage = shutil.disk_usage(library.models)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size - 1))
    with pytest.raises(DownloadFailed, match="still to come") as caught:
        library.download(T2I, update=True)
    assert caught.value.kind == "disk full"
    assert_holds(library, T2I, had)


def test_what_is_imported_or_removed_meanwhile_is_not_undone_by_an_update(
    hub: LocalHub, library: Library
) -> None:
    library.download(T2I)
    move_on(hub, T2I)
    hub.faults = [Fault("cut", 99, 0, match=VAE)]
    with pytest.raises(DownloadFailed):
        library.download(T2I, update=True)
    library.remove(T2I, "bf16")
    hub.requests.clear()
    with pytest.raises(DownloadFailed):  # the local hub has forgotten the old commit
        library.download(T2I)
    assert NEW not in {seen.path.rpartition("/")[2] for seen in hub.requests}


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
