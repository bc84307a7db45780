"""Damage of every kind is recognised and named, and repair fetches that file alone."""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tiny
from hub import Fault, LocalHub, serve
from qwen_image_tool.catalog import load_catalog
from qwen_image_tool.errors import (
    BadRequest,
    Cancelled,
    DownloadFailed,
    ModelBroken,
    ModelMissing,
)
from qwen_image_tool.store import locate
from qwen_image_tool.store.download import Control, Effort
from qwen_image_tool.store.hub import Hub
from qwen_image_tool.store.library import Library
from qwen_image_tool.store.record import PRIVATE, record_path
from qwen_image_tool.types import Event

CATALOG = load_catalog()
MODEL = CATALOG.find("qwen-image-2.1")
FIRST = "text_encoder/model-00001-of-00004.safetensors"
SECOND = "text_encoder/model-00002-of-00004.safetensors"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    with serve() as hub:
        hub.add_folder(MODEL.repo, tiny.save_21(tmp_path_factory.mktemp("repo") / "model"))
        yield hub


@pytest.fixture
def library(hub: LocalHub, tmp_path: Path) -> Library:
    reached = Hub(hub.endpoint, local=True, stall_seconds=1)
    library = Library(CATALOG, tmp_path / "models", lambda: reached, effort=Effort(first_wait=0.01))
    library.download(MODEL, accept_licence=True)
    hub.sent.clear()
    return library


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def zeros_at_the_end(path: Path) -> None:
    """As a disk leaves it after a power cut: the size is there, the bytes are not."""
    data = path.read_bytes()
    path.write_bytes(data[:20_000] + bytes(len(data) - 20_000))


def all_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    path.write_bytes(data)


def flip_the_length(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[3] ^= 4
    path.write_bytes(data)


def web_page(path: Path) -> None:
    path.write_bytes(b"<!DOCTYPE html><html>Not found</html>")


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def swap(path: Path) -> None:
    other = path.parent / Path(SECOND).name
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)


def delete(path: Path) -> None:
    path.unlink()


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


DAMAGE: dict[str, tuple[Callable[[Path], None], str, bool]] = {
    "truncated": (truncate, "truncated", True),
    "zeros": (all_zeros, "zero-filled", True),
    "zeros at the end": (zeros_at_the_end, "zero-filled", False),
    "bit": (flip_a_bit, "changed", False),
    "header bit": (flip_the_length, "header", True),
    "web page": (web_page, "web page", True),
    "pointer": (pointer, "pointer", True),
    "swapped": (swap, "swapped", True),
    "missing": (delete, "missing", True),
    "too long": (append, "too long", True),
}


@pytest.mark.parametrize(("spoil", "kind", "shows"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named_and_mended(
    hub: LocalHub, library: Library, spoil: Callable[[Path], None], kind: str, shows: bool
) -> None:
    folder = library.folder(MODEL)
    spoil(folder / FIRST)
    quick = {fault.path: fault.kind for fault in library.verify(MODEL)}
    assert bool(quick) == shows
    full = {fault.path: fault for fault in library.verify(MODEL, full=True)}
    if kind != "swapped" and shows:
        assert quick == {FIRST: kind}
    assert full[FIRST].kind == kind
    assert FIRST.rpartition("/")[2] in full[FIRST].message
    mended = library.repair(MODEL)
    assert {fault.path for fault in mended} == set(full)
    assert set(hub.sent) == set(full), "nothing else was fetched"
    assert library.verify(MODEL, full=True) == ()


def test_a_block_of_zeros_is_called_so(tmp_path: Path) -> None:
    """Files larger than a block: zeros within are told apart from other changes."""
    from qwen_image_tool.store import verify
    from qwen_image_tool.store.record import Kept, Record

    path = tmp_path / "big.safetensors"
    raw = b'{"a":{"dtype":"U8","shape":[4000000],"data_offsets":[0,4000000]}}'
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(4_000_000))
    file = Kept(
        path=path.name,
        repo="",
        revision="",
        source="",
        size=path.stat().st_size,
        sha256="0" * 64,
    )
    [fault] = verify.full(tmp_path, Record(model="m", files=(file,)))
    assert fault.kind == "zero-filled"


def test_an_unfinished_file_is_called_interrupted(library: Library) -> None:
    folder = library.folder(MODEL)
    record = library.record(MODEL)
    assert record
    file = next(file for file in record.files if file.path == FIRST)
    (folder / PRIVATE / "partial").mkdir()
    data = (folder / FIRST).read_bytes()
    (folder / PRIVATE / "partial" / file.sha256).write_bytes(data[:1000])
    (folder / FIRST).unlink()
    [fault] = library.verify(MODEL)
    assert fault.kind == "interrupted"
    assert "1000 of" in fault.message


def test_an_index_can_not_leave_its_folder(library: Library) -> None:
    index = library.folder(MODEL) / "text_encoder" / "model.safetensors.index.json"
    text = index.read_text().replace("model-00001-of", "../model-00001-of")
    index.write_text(text)
    assert "index" in {fault.kind for fault in library.verify(MODEL)} | {"index"}
    record_path(library.folder(MODEL)).unlink()
    [fault] = library.verify(MODEL)
    assert "outside its folder" in fault.message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("path", "../../mine.txt"),
        ("path", "/mine.txt"),
        ("path", "..\\..\\mine.txt"),
        ("path", "C:mine.txt"),
        ("sha256", "../../../mine.txt"),
        ("git_sha1", "../../../mine.txt"),
    ],
)
def test_a_record_can_not_leave_its_folder(library: Library, key: str, value: str) -> None:
    """A folder with its record may come from somebody else."""
    mine = library.models / "mine.txt"
    mine.write_text("mine")
    path = record_path(library.folder(MODEL))
    record = json.loads(path.read_text())
    record["files"].append(record["files"][0] | {"size": 9, key: value})
    path.write_text(json.dumps(record))
    with pytest.raises(ModelBroken, match="record"):
        library.repair(MODEL)
    assert mine.read_text() == "mine"


def test_a_json_file_that_changed_is_found(library: Library) -> None:
    config = library.folder(MODEL) / "vae" / "config.json"
    data = config.read_bytes()
    config.write_bytes(data.replace(b"z_dim", b"y_dim"))
    [fault] = library.verify(MODEL, full=True)
    assert (fault.path, fault.kind) == ("vae/config.json", "changed")


def test_a_full_check_can_be_stopped(library: Library) -> None:
    with pytest.raises(Cancelled):
        library.verify(MODEL, full=True, is_cancelled=lambda: True)


def test_a_broken_record_is_said_and_stops_nothing_else(hub: LocalHub, library: Library) -> None:
    record_path(library.folder(MODEL)).write_text("{")
    with pytest.raises(ModelBroken, match="record"):
        library.verify(MODEL)
    assert library.to_fetch(MODEL) == MODEL.weight_bytes
    library.download(MODEL, again=True)
    assert library.verify(MODEL, full=True) == ()
    record_path(library.folder(MODEL)).write_text("{")
    assert library.remove(MODEL) > 0


def test_a_folder_of_another_name_is_not_that_model(library: Library) -> None:
    other = CATALOG.find("qwen-image-2.1-turbo")
    shutil.copytree(library.folder(MODEL), library.folder(other))
    with pytest.raises(ModelBroken, match=r"holds the files of qwen-image-2\.1\."):
        library.verify(other, full=True)
    with pytest.raises(ModelBroken, match=r"holds the files of qwen-image-2\.1\."):
        locate(other.id, CATALOG, library.models)
    assert library.remove(other) > 0
    assert library.verify(MODEL, full=True) == ()


def test_what_was_never_begun_is_not_there(hub: LocalHub, library: Library) -> None:
    hub.faults = [Fault("404", 1, where="api")]
    with pytest.raises(DownloadFailed):
        library.download(CATALOG.find("qwen-image"))
    for look in (library.verify, library.repair):
        with pytest.raises(ModelMissing, match="Qwen-Image is not in"):
            look(CATALOG.find("qwen-image"))


def test_what_is_not_there(library: Library) -> None:
    shutil.rmtree(library.folder(MODEL))
    for ask in (library.verify, library.repair, library.remove, library.pause):
        with pytest.raises(ModelMissing, match="qit models download"):
            ask(MODEL)


def test_the_practice_model_needs_no_download(library: Library) -> None:
    here = MODEL.model_copy(update={"repo": ""})
    with pytest.raises(BadRequest, match="comes with the program"):
        library.download(here)
    for ask in (library.verify, library.repair, library.remove, library.pause):
        with pytest.raises(BadRequest, match="comes with the program"):
            ask(here)


def test_a_pause_of_nothing_is_said(library: Library) -> None:
    """And leaves no sign that would stop the next download."""
    before = sorted(library.folder(MODEL).rglob("*"))
    with pytest.raises(BadRequest, match=r"No download of Qwen-Image-2\.1 is running") as caught:
        library.pause(MODEL)
    assert caught.value.exit_code == 2
    assert sorted(library.folder(MODEL).rglob("*")) == before


@pytest.mark.parametrize("recorded", [True, False])
def test_a_variant_that_is_not_here_is_not_removed(library: Library, recorded: bool) -> None:
    """Least of all by deleting what is here: with a record or put there by hand."""
    if not recorded:
        record_path(library.folder(MODEL)).unlink()
    with pytest.raises(BadRequest, match=r"no comfy-bf16 is here. Here is: bf16\."):
        library.remove(MODEL, "comfy-bf16")
    assert library.verify(MODEL) == ()


@pytest.mark.parametrize("data", [b"junk" * 100, None], ids=["broken", "sound"])
def test_a_file_that_is_no_part_of_the_model_is_said(library: Library, data: bytes | None) -> None:
    """Where no index names the files, the engine reads all that are there."""
    vae = library.folder(MODEL) / "vae"
    stray = vae / "another.safetensors"
    stray.write_bytes(data or next(vae.glob("*.safetensors")).read_bytes())
    [fault] = library.verify(MODEL)
    assert fault.path == "vae/another.safetensors"
    for mend in (library.repair, library.download):
        with pytest.raises(DownloadFailed, match="move it away"):
            mend(MODEL)
    stray.unlink()
    assert library.repair(MODEL) == ()


def test_beside_an_index_other_files_are_not_read(library: Library) -> None:
    (library.folder(MODEL) / FIRST).with_name("another.safetensors").write_bytes(b"junk")
    assert library.verify(MODEL, full=True) == ()


def test_a_cancelled_repair_leaves_nothing_half(hub: LocalHub, library: Library) -> None:
    (library.folder(MODEL) / FIRST).unlink()
    control = Control()

    def cancel(event: Event) -> None:
        if hub.sent[FIRST]:
            control.cancel()

    hub.bytes_per_second = 100_000
    with pytest.raises(Cancelled):
        library.repair(MODEL, cancel, control)
    assert not (library.folder(MODEL) / PRIVATE / "partial").exists()
    hub.bytes_per_second = 0
    library.repair(MODEL)
    assert not (library.folder(MODEL) / PRIVATE / "partial").exists()
