"""The gallery's index: which pictures are on disk, found again by their words.

The files are the truth. The index is made from them alone and can be made again; only stars are
kept here and nowhere else.
"""

import contextlib
import hashlib
import logging
import os
import re
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from qwen_image_tool.database import Database, migrations
from qwen_image_tool.errors import BadRequest, NotOurPicture, ToolError, Unknown
from qwen_image_tool.files import replace_file
from qwen_image_tool.gallery import ImageInfo, read_image_info
from qwen_image_tool.gallery.infotext import recalled
from qwen_image_tool.types import Size, Value

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
BATCH = 500  # files of one transaction
LEFTOVER_SECONDS = 3600.0  # a temporary file of this age has no writer any more
_STAMP = re.compile(r"(\d{4})(\d{2})(\d{2})-(\d{2})(\d{2})(\d{2})\b")
_SEED = re.compile(r"-seed(\d{1,19})(?:-\d+)?\.png$")
SAME_SECOND = 10_000  # pictures that can be told apart
UNDO_SECONDS = 600.0  # in which a deletion can be undone
UNDO_FOLDER = ".undo"
RELATIVES = 500  # of a picture, at most
Shape = Literal["", "square", "wide", "tall"]
_SHAPES: dict[Shape, str] = {
    "square": "pictures.width = pictures.height",
    "wide": "pictures.width > pictures.height",
    "tall": "pictures.width < pictures.height",
}
_NAMES = "number id file bytes taken width height model seed job prompt negative star"
_COLUMNS = ", ".join(f"pictures.{name}" for name in _NAMES.split())
_HOLDS = " OR ".join(
    f"pictures.{name} LIKE ? ESCAPE '\\'" for name in ("prompt", "negative", "model")
)
_log = logging.getLogger(__name__)


class Picture(Value):
    """A picture of the gallery. `id` comes from its file's name: it stays as long as that does."""

    id: str
    file: str = Field(description="Below the gallery's folder, with /")
    bytes: int
    taken: str = Field(description="Local time, ISO 8601")
    size: Size
    model: str = ""
    seed: int | None = None
    job: str = ""
    prompt: str = ""
    negative_prompt: str = ""
    star: bool = False


class Page(Value):
    """Part of what was found, the newest first. `next`: where the following part begins."""

    pictures: tuple[Picture, ...]
    next: str | None = None


class Filter(Value):
    """Which pictures: those whose prompt, negative prompt or model hold every word of `text` (parts
    of words count), made by `model`, of a `shape`, between the ISO times `since` and `until`."""

    text: str = ""
    model: str = ""
    starred: bool = False
    shape: Shape = ""
    since: str = ""
    until: str = ""


EVERYTHING = Filter()


class Changes(Value):
    """What a look at the files brought."""

    added: int = 0
    changed: int = 0
    gone: int = 0


class Deletion(Value):
    """The last one: what it took, and when, in seconds since 1970. Its files wait in UNDO_FOLDER,
    it beside them, so that it can be undone after a restart too."""

    at: float = 0.0
    pictures: tuple[Picture, ...] = ()

    @property
    def is_old(self) -> bool:
        return bool(self.pictures) and not 0 <= time.time() - self.at <= UNDO_SECONDS


class Index:
    """The pictures below `folder`. `trash` takes a path to the system's waste basket. `version`
    counts what was changed since the start: where it is the same, so is every answer."""

    def __init__(
        self, folder: Path, database: Path, trash: Callable[[Path], None] | None = None
    ) -> None:
        self.folder = folder
        self.database = Database(database, migrations("pictures"), durable=False)
        self._trash = trash or to_trash
        self.version = 0
        if self.database.rescued:  # a row may have come back with other content: read its file
            with self.database.write() as write:
                write.execute("UPDATE pictures SET changed = 0")
        self._late: dict[str, dict[str, Any]] = {}  # rows by id that the database did not take yet
        self._deletion = self._remembered()
        self._deleting = threading.RLock()

    def add(self, path: Path) -> Picture:
        """Take up a picture file that was just saved, also where the database can't be written
        now. Raises NotOurPicture."""
        file = path.relative_to(self.folder).as_posix()
        row = _row(file, path, path.stat())
        self._late[row["id"]] = row
        self._take_late()
        return self.get(row["id"])

    def add_by_seed(self, job: str, seeds: Collection[int]) -> None:
        """Take up those pictures of a job that the index does not know: their files' names carry
        the seed."""
        for path in self.folder.glob("*-seed*.png"):
            seed = _SEED.search(path.name)
            if seed and int(seed[1]) in seeds and not self._knows(picture_id(path.name)):
                with contextlib.suppress(OSError, NotOurPicture):
                    if read_image_info(path).job == job:
                        self.add(path)

    def sync(self, told: Callable[[int, int], None] | None = None) -> Changes:
        """Make the index agree with the files; `told(done, total)` is called on the way. Pictures
        that another program is still writing, or that are damaged, are passed over."""
        known = {
            row["file"]: (row["bytes"], row["changed"])
            for row in self.database.read("SELECT file, bytes, changed FROM pictures")
        }
        found = dict(self._files())
        gone = [file for file in known if file not in found]
        new = [
            file
            for file, stat in found.items()
            if known.get(file) != (stat.st_size, stat.st_mtime_ns)
        ]
        new.sort(key=lambda file: _taken(file, found[file]))
        self._miss(gone)
        added = 0
        for start in range(0, len(new), BATCH):
            if told:
                told(start, len(new))
            batch = [row for file in new[start : start + BATCH] for row in self._read(file)]
            with self._write() as write:
                put(write, batch)
            added += sum(row["file"] not in known for row in batch)
        return Changes(added=added, changed=len(new) - added, gone=len(gone))

    def search(
        self,
        wanted: Filter = EVERYTHING,
        limit: int = 60,
        after: str | None = None,
        start: int = 0,
    ) -> Page:
        """The newest first, without the first `start`. `after`: the last page's `next`. Raises
        BadRequest where a value can't be searched for."""
        found = _query(wanted)
        if after:
            found = found.but("pictures.number < ?", _cursor(after))
        rows = self._rows(found, limit + 1, start)
        last = str(rows[limit - 1]["number"]) if len(rows) > limit else None
        return Page(pictures=tuple(_picture(row) for row in rows[:limit]), next=last)

    def count(self, wanted: Filter = EVERYTHING) -> int:
        """How many there are. Raises BadRequest."""
        found = _query(wanted).counted
        [[count]] = self.database.read(f"SELECT count(*) {found.sql}", found.values)
        return int(count)

    def beside(self, picture: str, wanted: Filter) -> tuple[Picture | None, Picture | None]:
        """The next newer and the next older one among those that are wanted. Raises Unknown."""
        number, found = self._number(picture), _query(wanted)
        newer = self._rows(found.but("pictures.number > ?", number), 1, order="ASC")
        older = self._rows(found.but("pictures.number < ?", number), 1)
        return (
            _picture(newer[0]) if newer else None,
            _picture(older[0]) if older else None,
        )

    def relatives(self, picture: str) -> list[Picture]:
        """The newest pictures of the same model with its prompt or its seed, itself among them.
        Raises Unknown."""
        one = self.get(picture)
        found = _query(Filter(model=one.model)).but(
            "(pictures.prompt = ? OR pictures.seed = ?)", one.prompt, one.seed
        )
        others = [_picture(row) for row in self._rows(found, RELATIVES)]
        return others if one in others else [one, *others]

    def months(self) -> dict[str, int]:
        """How many pictures each month has, as "2026-11", the newest first."""
        month = SAME_SECOND * 10**8  # a number's digits below the month
        rows = self.database.read(
            f"SELECT number / {month} AS month, count(*) AS pictures FROM pictures"  # noqa: S608
            " GROUP BY month ORDER BY month DESC"
        )
        return {
            f"{row['month'] // 100:04}-{row['month'] % 100:02}": row["pictures"] for row in rows
        }

    def models(self) -> dict[str, int]:
        """How many pictures each model made."""
        rows = self.database.read(
            "SELECT model, count(*) AS pictures FROM pictures GROUP BY model ORDER BY pictures DESC"
        )
        return {row["model"]: row["pictures"] for row in rows}

    def of_job(self, job: str) -> list[Picture]:
        """Its pictures, in the order of their files."""
        self._take_late()
        rows = self.database.read(
            f"SELECT {_COLUMNS} FROM pictures WHERE job = ? AND job != '' ORDER BY number",  # noqa: S608
            (job,),
        )
        late = [row for row in self._late.copy().values() if job and row["job"] == job]
        return [*(_picture(row) for row in rows), *(_picture(row | {"star": 0}) for row in late)]

    def get(self, picture: str) -> Picture:
        """Raises Unknown."""
        rows = self._rows(_Query("pictures", ("pictures.id = ?",), (picture,)), 1)
        if not rows and (late := self._late.get(picture)):
            return _picture(late | {"star": 0})
        if not rows:
            raise Unknown(f"There is no picture {picture!r}.", "It may have been deleted.")
        return _picture(rows[0])

    def path(self, picture: str) -> Path:
        """Its file. Raises Unknown, also where the file was deleted by hand: then the index
        forgets it."""
        found = self.get(picture)
        path = self.folder / found.file
        if not path.is_file():
            self._miss([found.file])
            raise Unknown(f"{found.file} is not there any more.", "It was deleted or moved.")
        return path

    def info(self, picture: str) -> ImageInfo:
        """What the file says of itself. Raises Unknown or NotOurPicture."""
        return read_image_info(self.path(picture))

    def star(self, picture: str, star: bool) -> Picture:
        with self._write() as write:
            write.execute("UPDATE pictures SET star = ? WHERE id = ?", (star, picture))
        return self.get(picture)

    def delete(self, pictures: Iterable[str]) -> list[str]:
        """Put pictures into the system's trash; returns the ids that are gone. Raises Unknown where
        one is not known, and none is deleted then; or ToolError where the trash does not take one:
        that one stays."""
        with self._deleting:
            all_found = [self.get(picture) for picture in dict.fromkeys(pictures)]
            self.forget_deleted()
            put_away = list[Picture]()
            try:
                for found in all_found:
                    path = self.folder / found.file
                    if path.exists():
                        self._put_away(found, path)
                        put_away.append(found)
                    self._forget([found.file])
            finally:
                self._remember(put_away)
            return [found.id for found in all_found]

    def _put_away(self, picture: Picture, path: Path) -> None:
        kept = self._keep(picture, path)
        try:
            self._trash(path)
        except BaseException:
            kept.unlink()
            raise

    @property
    def deleted(self) -> tuple[Picture, ...]:
        """What `undo` would bring back."""
        if self._deletion.is_old:
            self.forget_deleted()
        return self._deletion.pictures

    def undo(self) -> list[str]:
        """Bring back what was deleted last, with its stars; the trash keeps its copies. Raises
        ToolError where a file can't be put back: it is in the trash."""
        with self._deleting:
            back, left = list[str](), list(self.deleted)
            try:
                while left:
                    self._put_back(picture := left.pop())
                    back.append(picture.id)
            finally:
                self._remember(left)
        return back

    def _put_back(self, picture: Picture) -> None:
        path = self.folder / picture.file
        try:
            if path.exists():
                raise FileExistsError("another file has its name")
            path.parent.mkdir(parents=True, exist_ok=True)
            self._kept(picture).rename(path)
        except OSError as error:
            raise ToolError(
                f"{picture.file} can't be put back: {error}.", "Restore it from the trash."
            ) from error
        self.add(path)
        self.star(picture.id, picture.star)

    def forget_deleted(self) -> None:
        """What was deleted is in the trash alone from now on."""
        with self._deleting:
            self._deletion = Deletion()
            shutil.rmtree(self.folder / UNDO_FOLDER, ignore_errors=True)
            self.version += 1

    def _remember(self, deleted: Sequence[Picture]) -> None:
        """Of the last deletion `deleted` can be undone from now on. Where that can't be written
        down, it can be until the end of this process."""
        if not deleted:
            return self.forget_deleted()
        self._deletion = Deletion(at=time.time(), pictures=tuple(deleted))
        self.version += 1
        try:
            replace_file(self._note, self._deletion.to_json().encode())
        except OSError as error:
            _log.warning("%s can't be written: %s", self._note, error)

    def _remembered(self) -> Deletion:
        with contextlib.suppress(OSError, ValueError):
            return Deletion.from_json(self._note.read_bytes())
        return Deletion()

    @property
    def _note(self) -> Path:
        return self.folder / UNDO_FOLDER / "deleted.json"

    def clean(self) -> None:
        """Remove temporary files whose writer died, and what can't be undone any more."""
        if not self.deleted:
            self.forget_deleted()
        for path in self.folder.glob(".*.part"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                    path.unlink()

    def close(self) -> None:
        self.database.close()

    def _rows(
        self, found: "_Query", limit: int, start: int = 0, order: Literal["ASC", "DESC"] = "DESC"
    ) -> list[sqlite3.Row]:
        return self.database.read(
            f"SELECT {_COLUMNS} {found.sql} ORDER BY {found.number} {order} LIMIT ? OFFSET ?",
            (*found.values, limit, start),
        )

    def _number(self, picture: str) -> int:
        rows = self.database.read("SELECT number FROM pictures WHERE id = ?", (picture,))
        return int(rows[0]["number"]) if rows else _first_number(self.get(picture).taken)

    @contextlib.contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with self.database.write() as write:
            yield write
        self.version += 1

    def _kept(self, picture: Picture) -> Path:
        return self.folder / UNDO_FOLDER / f"{picture.id}{Path(picture.file).suffix}"

    def _keep(self, picture: Picture, path: Path) -> Path:
        """The file a second time, where `_files` does not look: a link where the disk has links."""
        kept = self._kept(picture)
        kept.parent.mkdir(exist_ok=True)
        kept.unlink(missing_ok=True)
        try:
            os.link(path, kept)
        except OSError:
            shutil.copy2(path, kept)
        return kept

    def _files(self) -> Iterator[tuple[str, os.stat_result]]:
        folders = [self.folder]
        while folders:
            with contextlib.suppress(OSError), os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or not _is_text(entry.name):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(Path(entry.path))
                    elif entry.name.lower().endswith(SUFFIXES):
                        yield Path(entry.path).relative_to(self.folder).as_posix(), entry.stat()

    def _read(self, file: str) -> list[dict[str, Any]]:
        path = self.folder / file
        try:
            return [_row(file, path, path.stat())]
        except (OSError, NotOurPicture) as error:
            _log.info("%s is passed over: %s", file, error)
            return []

    def _take_late(self) -> None:
        late = self._late.copy()
        if not late:
            return
        try:
            with self._write() as write:
                put(write, list(late.values()))
        except ToolError as error:
            _log.warning("%d pictures are not in the index yet: %s", len(late), error)
        else:
            for picture in late:
                self._late.pop(picture, None)

    def _knows(self, picture: str) -> bool:
        known = self.database.read("SELECT 1 FROM pictures WHERE id = ?", (picture,))
        return picture in self._late or bool(known)

    def _miss(self, gone: Sequence[str]) -> None:
        """They went without us, and may come back: their disk may not be plugged in."""
        if gone:
            with self._write() as write:
                write.executemany(
                    "INSERT OR IGNORE INTO waiting_stars SELECT file FROM pictures"
                    " WHERE file = ? AND star = 1",
                    [(file,) for file in gone],
                )
        self._forget(gone)

    def _forget(self, gone: Sequence[str]) -> None:
        for file in gone:
            self._late.pop(picture_id(file), None)
        if gone:
            with self._write() as write:
                write.executemany("DELETE FROM pictures WHERE file = ?", [(file,) for file in gone])


def to_trash(path: Path) -> None:
    """Raises ToolError where the system's trash can't take it: nothing is deleted for good."""
    import send2trash

    try:
        send2trash.send2trash(path)
    except (OSError, send2trash.TrashPermissionError) as error:
        raise ToolError(
            f"{path.name} can't be put into the trash: {error}.", "Delete it by hand."
        ) from error


def picture_id(file: str) -> str:
    return hashlib.blake2b(file.encode(), digest_size=8).hexdigest()


def _is_text(name: str) -> bool:
    """Old programs left names that are no UTF-8; no database or answer can hold one."""
    try:
        name.encode()
    except UnicodeEncodeError:
        _log.warning("%a is passed over: its name is not UTF-8. Rename it.", name)
        return False
    return True


def _row(file: str, path: Path, stat: os.stat_result) -> dict[str, Any]:
    info = read_image_info(path)
    said = info.request.to_dict() if info.request else recalled(info.parameters)
    return {
        "id": picture_id(file),
        "file": file,
        "bytes": stat.st_size,
        "changed": stat.st_mtime_ns,
        "taken": _taken(file, stat),
        "width": info.size.width,
        "height": info.size.height,
        "model": said.get("model", ""),
        "seed": said.get("seed"),
        "job": info.job,
        "prompt": said.get("prompt", ""),
        "negative": said.get("negative_prompt", ""),
    }


def _taken(file: str, stat: os.stat_result) -> str:
    """Our names carry the time; it outlives copies."""
    if found := _STAMP.search(file):
        with contextlib.suppress(ValueError):
            return datetime(*map(int, found.groups())).isoformat()  # type: ignore[arg-type]
    return datetime.fromtimestamp(stat.st_mtime).isoformat(timespec="seconds")


def put(write: sqlite3.Connection, rows: Sequence[dict[str, Any]]) -> None:
    """The words are indexed at insertion, so a changed picture goes out and in, with its star; one
    that was away has its star back."""
    for row in rows:
        old = write.execute(
            "DELETE FROM pictures WHERE file = ? RETURNING star", (row["file"],)
        ).fetchone()
        back = write.execute("DELETE FROM waiting_stars WHERE file = ?", (row["file"],)).rowcount
        first = _first_number(row["taken"])
        [taken] = write.execute(
            "SELECT coalesce(max(number) + 1, ?) FROM pictures WHERE number >= ? AND number < ?",
            (first, first, first + SAME_SECOND - 1),
        ).fetchone()
        new = row | {"number": taken, "star": old["star"] if old else back}
        write.execute(
            f"INSERT INTO pictures ({', '.join(new)}) VALUES ({', '.join('?' * len(new))})",  # noqa: S608
            tuple(new.values()),
        )


@dataclass(frozen=True)
class _Query:
    """What stands behind a SELECT: tables, conditions, and their values."""

    tables: str
    conditions: tuple[str, ...] = ()
    values: tuple[Any, ...] = ()

    def but(self, condition: str, *values: Any) -> "_Query":
        """With one condition more."""
        return replace(
            self, conditions=(*self.conditions, condition), values=(*self.values, *values)
        )

    @property
    def sql(self) -> str:
        where = f"WHERE {' AND '.join(self.conditions)}" if self.conditions else ""
        return f"FROM {self.tables} {where}"

    @property
    def counted(self) -> "_Query":
        """The same for counting: words alone need no look at the pictures."""
        alone = self.conditions == ("words MATCH ?",)
        return replace(self, tables="words") if alone else self

    @property
    def number(self) -> str:
        """The column that yields the newest first without sorting."""
        return "words.rowid" if "words" in self.tables else "pictures.number"


def _query(wanted: Filter) -> _Query:
    if "\0" in wanted.text:
        raise BadRequest("No picture's words hold the character NUL.", "Search without it.")
    found = _Query("pictures")
    words = wanted.text.split()
    long = [word for word in words if len(word) >= 3]  # the index is of three letters each
    if long:
        found = _Query("words JOIN pictures ON pictures.number = words.rowid").but(
            "words MATCH ?", " ".join('"' + word.replace('"', '""') + '"' for word in long)
        )
    for word in (word for word in words if len(word) < 3):
        part = "%" + re.sub(r"[%_\\]", r"\\\g<0>", word) + "%"
        found = found.but(f"({_HOLDS})", part, part, part)
    if wanted.model:
        found = found.but("pictures.model = ?", wanted.model)
    if wanted.starred:
        found = found.but("pictures.star = 1")
    if wanted.shape:
        found = found.but(_SHAPES[wanted.shape])
    if wanted.since:
        found = found.but("pictures.number >= ?", _first_number(wanted.since))
    if wanted.until:
        found = found.but("pictures.number < ?", _first_number(wanted.until))
    return found


def _first_number(moment: str) -> int:
    """The smallest number of a picture taken at an ISO time, or within a date's part."""
    digits = re.sub(r"\D", "", moment)[:14]
    return int(digits.ljust(14, "0") or 0) * SAME_SECOND


def _cursor(after: str) -> int:
    if not after.isdecimal() or len(after) > 18:
        raise BadRequest(f"{after!r} is no place in the gallery.", "Use the last page's `next`.")
    return int(after)


def _picture(row: sqlite3.Row | dict[str, Any]) -> Picture:
    return Picture(
        id=row["id"],
        file=row["file"],
        bytes=row["bytes"],
        taken=row["taken"],
        size=Size(row["width"], row["height"]),
        model=row["model"],
        seed=row["seed"],
        job=row["job"],
        prompt=row["prompt"],
        negative_prompt=row["negative"],
        star=bool(row["star"]),
    )
