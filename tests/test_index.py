"""The gallery's index: made from files alone, searched by words, and never wrong about the disk."""

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fake_worker import plan_for
from qwen_image_tool import gallery
from qwen_image_tool.errors import BadRequest, NotOurPicture, ToolError, Unknown
from qwen_image_tool.gallery.index import (
    UNDO_FOLDER,
    UNDO_SECONDS,
    Filter,
    Index,
    Picture,
    picture_id,
    to_trash,
)
from qwen_image_tool.types import Request, Size


def save(
    folder: Path,
    prompt: str,
    seed: int = 1,
    model: str = "practice",
    job: str = "",
    size: Size = Size(8, 8),  # noqa: B008
) -> Path:
    request = Request(model=model, prompt=prompt, size=size, steps=2, seed=seed)
    image = Image.new("RGB", (size.width, size.height), "red")
    return gallery.save_image(image, folder, request, plan_for(request), {}, "Model", job)


class Trash:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def __call__(self, path: Path) -> None:
        (self.folder / path.name).unlink(missing_ok=True)  # one file's two names can't be renamed
        shutil.move(path, self.folder / path.name)


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    index = Index(tmp_path / "pictures", tmp_path / "pictures.db", Trash(tmp_path / "trash"))
    yield index
    index.close()


def prompts(index: Index, text: str = "", **more: object) -> list[str]:
    found = index.search(Filter(text=text, **more))
    return [picture.prompt for picture in found.pictures]


def test_a_saved_picture_is_found(index: Index) -> None:
    path = save(index.folder, "a red fox in the snow", seed=2**63 - 1, job="j1")
    picture = index.add(path)
    assert picture == index.get(picture.id)
    assert (picture.file, picture.seed, picture.job) == (path.name, 2**63 - 1, "j1")
    assert picture.taken[:4] == path.name[:4]
    assert index.path(picture.id) == path
    assert index.info(picture.id).job == "j1"
    assert index.of_job("j1") == [picture]
    assert index.of_job("") == []


def test_words_are_found_in_every_language(index: Index) -> None:
    for prompt in (
        "a red fox",
        "Füchse im Schnee",
        "一只戴帽子的猫",
        '50% "off", it\'s a fox-trot',
    ):
        index.add(save(index.folder, prompt))
    assert len(prompts(index, "fox")) == 2
    assert prompts(index, "FÜCHSE schnee") == ["Füchse im Schnee"]
    assert prompts(index, "帽子的猫") == ["一只戴帽子的猫"]
    assert prompts(index, "帽子") == ["一只戴帽子的猫"]  # two letters
    assert prompts(index, "red a") == ["a red fox"]
    assert prompts(index, '"off",') == ['50% "off", it\'s a fox-trot']
    assert prompts(index, "50%") == ['50% "off", it\'s a fox-trot']
    assert prompts(index, "0%") == ['50% "off", it\'s a fox-trot']
    assert prompts(index, "_x") == prompts(index, "\\") == []
    for odd in ('"', "*", "NEAR(", "a AND", "prompt:fox", "-", "''", "%", "_"):
        index.search(Filter(text=odd))
    for odd in ("\0", "a\0b", "fox\0 snow"):
        with pytest.raises(BadRequest, match="NUL"):
            index.search(Filter(text=odd))
    assert prompts(index, "unicorn") == []


def test_filters(index: Index) -> None:
    first = index.add(save(index.folder, "one", model="practice"))
    index.add(save(index.folder, "two", model="qwen-image"))
    index.star(first.id, True)
    assert prompts(index, model="qwen-image") == ["two"]
    assert prompts(index, starred=True) == ["one"]
    assert prompts(index, since="9999") == []
    assert len(prompts(index, until="9999")) == 2
    assert index.models() == {"practice": 1, "qwen-image": 1}
    assert not index.star(first.id, False).star


def test_what_is_found_can_be_counted_and_stepped_through(index: Index) -> None:
    sizes = {"wide": Size(9, 8), "tall": Size(8, 9), "square": Size(8, 8)}
    for number, (shape, size) in enumerate(sizes.items()):
        path = save(index.folder, f"a {shape} fox", seed=number, size=size)
        path.rename(index.folder / f"2026{number + 1:02}05-000000-seed{number}.png")
    index.sync()
    for wanted in (Filter(), Filter(text="fox"), Filter(text="fo"), Filter(model="practice")):
        found = index.search(wanted).pictures
        assert index.count(wanted) == len(found) == 3
        assert index.search(wanted, 1, start=1).pictures == found[1:2]
        assert index.beside(found[1].id, wanted) == (found[0], found[2])
        assert index.beside(found[0].id, wanted) == (None, found[1])
    assert prompts(index, shape="wide") == ["a wide fox"]
    assert prompts(index, shape="tall") == ["a tall fox"]
    assert index.beside(found[1].id, Filter(shape="square")) == (found[0], None)
    assert index.months() == {"2026-03": 1, "2026-02": 1, "2026-01": 1}


def test_relatives_have_the_prompt_or_the_seed(index: Index) -> None:
    fox, other_seed, other_prompt, *_ = [
        index.add(save(index.folder, prompt, seed, model))
        for prompt, seed, model in (
            ("fox", 1, "practice"),
            ("fox", 2, "practice"),
            ("cat", 1, "practice"),
            ("cat", 2, "practice"),
            ("fox", 1, "qwen-image"),
        )
    ]
    found = {picture.id for picture in index.relatives(fox.id)}
    assert found == {fox.id, other_seed.id, other_prompt.id}


def test_the_version_tells_of_every_change(index: Index) -> None:
    seen = [index.version]

    def changed() -> bool:
        seen.append(index.version)
        return seen[-1] > seen[-2]

    picture = index.add(save(index.folder, "fox"))
    assert changed()
    index.star(picture.id, True)
    assert changed()
    index.sync()
    index.search()
    assert not changed()
    index.delete([picture.id])
    assert changed()
    index.undo()
    assert changed()


def test_pages_have_every_picture_once(index: Index) -> None:
    index.folder.mkdir()
    for number in range(7):
        path = save(index.folder, f"number {number}")
        path.rename(index.folder / f"2026010{number % 3 + 1}-000000-seed{number}.png")
    index.sync()
    seen: list[Picture] = []
    after = None
    while True:
        page = index.search(Filter(text="number"), limit=2, after=after)
        seen += page.pictures
        if (after := page.next) is None:
            break
    assert len(seen) == len({picture.id for picture in seen}) == 7
    assert [p.taken for p in seen] == sorted((p.taken for p in seen), reverse=True)
    for odd in ("x", "-1", "²", "9" * 30):
        with pytest.raises(BadRequest, match="no place"):
            index.search(after=odd)


def test_the_index_can_be_made_again_from_the_files(index: Index, tmp_path: Path) -> None:
    for number in range(3):
        save(index.folder, f"fox {number}", job="j")
    save(index.folder / "sub folder", "deep")
    told: list[tuple[int, int]] = []
    assert index.sync(lambda done, total: told.append((done, total))).added == 4
    assert told[0] == (0, 4)
    before = index.search().pictures
    again = Index(index.folder, tmp_path / "other.db")
    again.sync()
    assert again.search().pictures == before
    again.close()
    assert index.sync().model_dump() == {"added": 0, "changed": 0, "gone": 0}


def test_what_changes_on_disk_is_noticed(index: Index) -> None:
    kept, gone = save(index.folder, "kept"), save(index.folder, "gone", seed=2)
    index.sync()
    index.star(picture_id(kept.name), True)
    gone.unlink()
    other = save(index.folder.parent, "edited", seed=3)
    other.replace(kept)
    assert index.sync().model_dump() == {"added": 0, "changed": 1, "gone": 1}
    assert prompts(index) == ["edited"]
    assert prompts(index, "kept") == []
    assert index.get(picture_id(kept.name)).star


def test_a_picture_deleted_by_hand_is_forgotten_when_asked_for(index: Index) -> None:
    picture = index.add(save(index.folder, "one"))
    (index.folder / picture.file).unlink()
    with pytest.raises(Unknown, match="not there any more"):
        index.path(picture.id)
    with pytest.raises(Unknown):
        index.get(picture.id)
    assert prompts(index, "one") == []


def test_strangers_and_rubbish(index: Index) -> None:
    index.folder.mkdir()
    chunks = PngInfo()
    text = "a cat\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 9, Model: x"
    chunks.add_text("parameters", text)
    Image.new("RGB", (9, 7)).save(index.folder / "a1111.png", pnginfo=chunks)
    Image.new("RGB", (9, 7)).save(index.folder / "plain.jpg")
    (index.folder / "broken.png").write_bytes(b"\x89PNG\r\n")
    (index.folder / "notes.txt").write_text("no picture")
    (index.folder / ".hidden.png.part").write_bytes(b"half")
    assert index.sync().added == 2
    [cat] = index.search(Filter(text="cat")).pictures
    assert (cat.model, cat.seed, cat.size) == ("x", 9, Size(9, 7))
    with pytest.raises(NotOurPicture):
        index.add(index.folder / "broken.png")


def test_a_name_that_is_no_text_is_passed_over(
    index: Index, caplog: pytest.LogCaptureFixture
) -> None:
    save(index.folder, "kept")
    with contextlib.suppress(OSError):  # macOS takes no such name
        shutil.copy(save(index.folder, "other"), index.folder / "caf\udce9.png")
        (index.folder / "d\udce9p\udcf4t").mkdir()
    assert index.sync().added == 2
    assert index.sync().added == 0
    assert ("caf\\udce9.png" in caplog.text) == (sys.platform != "darwin")


def test_pictures_are_known_while_the_database_is_full(index: Index) -> None:
    index.database._connection.execute("PRAGMA query_only = ON")
    picture = index.add(save(index.folder, "one", job="j"))
    save(index.folder, "two", seed=2, job="j")
    save(index.folder, "stranger", seed=2, job="k")
    index.add_by_seed("j", {2})
    assert [found.seed for found in index.of_job("j")] == [1, 2]
    assert index.path(picture.id).exists()
    assert index.count() == 0
    index.database._connection.execute("PRAGMA query_only = OFF")
    assert [found.seed for found in index.of_job("j")] == [1, 2]
    assert index.count() == 2


def test_delete_goes_to_the_trash(index: Index, tmp_path: Path) -> None:
    first, second = (index.add(save(index.folder, "fox", seed=n)) for n in (1, 2))
    (index.folder / second.file).unlink()
    assert index.delete([first.id, second.id]) == [first.id, second.id]
    assert [path.name for path in (tmp_path / "trash").iterdir()] == [first.file]
    assert prompts(index) == []
    with pytest.raises(Unknown):
        index.delete([first.id])


def test_nothing_is_deleted_where_one_is_not_known(index: Index) -> None:
    one = index.add(save(index.folder, "a fox"))
    with pytest.raises(Unknown):
        index.delete([one.id, "unheard of"])
    assert index.path(one.id).exists()
    assert index.delete([one.id, one.id]) == [one.id]


def test_two_that_delete_at_once(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second begins while the trash takes the first one's picture, and does not clear away what
    brings that back."""
    first, second = (index.add(save(index.folder, "a fox", seed)) for seed in (1, 2))
    other = threading.Thread(target=index.delete, args=([second.id],))

    def full(_: Path) -> None:
        monkeypatch.undo()
        other.start()
        other.join(0.2)
        raise ToolError("The trash is full.")

    monkeypatch.setattr(index, "_trash", full)
    with pytest.raises(ToolError, match="full"):
        index.delete([first.id])
    other.join()
    assert [picture.id for picture in index.search().pictures] == [first.id]
    assert index.undo() == [second.id]


def test_stars_come_back_with_their_disk(index: Index, tmp_path: Path) -> None:
    files = [save(index.folder, "a fox", seed) for seed in (1, 2)]
    starred, plain = (index.add(file) for file in files)
    index.star(starred.id, star=True)
    index.folder.rename(tmp_path / "unplugged")
    assert index.sync().gone == 2
    (tmp_path / "unplugged").rename(index.folder)
    assert index.sync().added == 2
    assert [index.get(picture.id).star for picture in (starred, plain)] == [True, False]
    same = files[0].read_bytes()
    index.delete([starred.id])
    files[0].write_bytes(same)
    index.add(files[0])
    assert not index.get(starred.id).star


def test_a_deletion_can_be_undone(index: Index, tmp_path: Path) -> None:
    one, two, three = (index.add(save(index.folder, "fox", seed=n)) for n in (1, 2, 3))
    index.star(one.id, True)
    before = index.search(Filter(text="fox")).pictures
    index.delete([one.id, two.id])
    assert {picture.id for picture in index.deleted} == {one.id, two.id}
    assert {path.name for path in (tmp_path / "trash").iterdir()} == {one.file, two.file}
    assert index.sync().added == 0, "what is kept for undo is no picture of the gallery"
    assert sorted(index.undo()) == sorted([one.id, two.id])
    after = index.search(Filter(text="fox")).pictures
    assert sorted(after, key=lambda p: p.id) == sorted(before, key=lambda p: p.id)
    assert index.undo() == [] == list(index.deleted)
    index.delete([three.id])
    index.delete([two.id])
    assert index.undo() == [two.id], "only the last deletion"


def test_undo_does_not_replace_a_file(index: Index) -> None:
    picture = index.add(save(index.folder, "fox"))
    index.delete([picture.id])
    (index.folder / picture.file).write_bytes(b"another")
    with pytest.raises(ToolError, match="Restore it from the trash"):
        index.undo()
    assert (index.folder / picture.file).read_bytes() == b"another"
    assert index.deleted == ()


def test_a_deletion_can_be_undone_after_a_restart_but_not_for_ever(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = index.add(save(index.folder, "fox"))
    picture = index.star(picture.id, True)
    index.delete([picture.id])
    again = Index(index.folder, tmp_path / "other.db", Trash(tmp_path / "trash again"))
    again.clean()
    assert again.deleted == (picture,)
    assert again.undo() == [picture.id]
    assert again.get(picture.id) == picture
    again.delete([picture.id])
    later = time.time() + UNDO_SECONDS + 1
    monkeypatch.setattr(time, "time", lambda: later)
    last = Index(index.folder, tmp_path / "another.db")
    last.clean()
    assert last.deleted == ()
    assert not (index.folder / UNDO_FOLDER).exists()
    again.close()
    last.close()


def test_undo_where_the_disk_has_no_links(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    picture = index.add(save(index.folder, "fox"))
    index.delete([picture.id])
    assert index.undo() == [picture.id]
    assert index.get(picture.id) == picture


def test_where_the_trash_refuses_nothing_is_lost(index: Index) -> None:
    def refuse(path: Path) -> None:
        raise ToolError("No trash here.", "Delete it by hand.")

    index._trash = refuse
    picture = index.add(save(index.folder, "fox"))
    with pytest.raises(ToolError):
        index.delete([picture.id])
    assert index.path(picture.id).exists()
    assert index.deleted == ()


def test_the_system_trash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real library, in a home of its own."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    monkeypatch.setenv("HOME", str(tmp_path))
    path = save(tmp_path / "pictures", "fox")
    to_trash(path)
    assert not path.exists()
    with pytest.raises(ToolError, match="Delete it by hand"):
        to_trash(path)


def test_old_temporary_files_are_removed(index: Index) -> None:
    index.folder.mkdir()
    old, new = index.folder / ".a.png.part", index.folder / ".b.png.part"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    index.clean()
    assert (old.exists(), new.exists()) == (False, True)


@pytest.mark.parametrize(
    "filters",
    [{}, {"text": "snow"}, {"model": "practice"}, {"starred": True}, {"since": "2026"}],
    ids=str,
)
def test_no_search_sorts_what_it_found(index: Index, filters: dict[str, str]) -> None:
    plans: list[str] = []
    read = index.database.read

    def spied(sql: str, values: tuple[object, ...] = ()) -> list[object]:
        plans.extend(str(row["detail"]) for row in read("EXPLAIN QUERY PLAN " + sql, values))
        return list(read(sql, values))

    index.database.read = spied  # type: ignore[assignment, method-assign]
    index.search(Filter(**filters))
    assert plans
    assert not [plan for plan in plans if "TEMP B-TREE" in plan]
