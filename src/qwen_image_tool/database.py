"""SQLite files: opened in one way, changed by numbered migrations, rescued when they are broken.

A migration is `migrations/<name>/NNNN.sql`; `PRAGMA user_version` says which ones a file has had.
Each runs in a transaction of its own, so a file is never between two versions.
"""

import contextlib
import itertools
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from qwen_image_tool.errors import DatabaseBroken, DiskFull, ToolError

BUSY_SECONDS = 10
Sound = Callable[[sqlite3.Row], bool]
_log = logging.getLogger(__name__)


def migrations(name: str) -> tuple[str, ...]:
    """The SQL of `migrations/<name>`, oldest first."""
    folder = files(__package__).joinpath("migrations", name)
    scripts = sorted((item for item in folder.iterdir()), key=lambda item: item.name)
    return tuple(item.read_text(encoding="utf-8") for item in scripts)


def _any(_: sqlite3.Row) -> bool:
    return True


class Database:
    """One SQLite file, for several threads.

    `durable`: a commit is on the disk when it returns, at the price of a sync. `rescued` is a
    sentence for the user where the file was broken and its readable rows were moved to a new one;
    `sound` says which of them can be used: a row may come back with a part of another's content.
    Raises ToolError where the file can't be opened or a newer version wrote it.
    """

    def __init__(
        self, path: Path, scripts: Sequence[str], durable: bool = True, sound: Sound = _any
    ) -> None:
        self.path = path
        self.rescued = ""
        self._durable, self._sound = durable, sound
        self._lock = threading.RLock()
        with _plain_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._connection = self._open(scripts)
            except sqlite3.DatabaseError as error:
                if not _is_broken(error):
                    raise
                self._connection = self._rescue(scripts)

    def read(self, sql: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        with self._lock, _plain_errors(self.path):
            return self._connection.execute(sql, values).fetchall()

    @contextlib.contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all of it is kept, or nothing."""
        with self._lock, _plain_errors(self.path):
            connection = self._connection
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # SQLite may have rolled back itself
                    connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _open(self, scripts: Sequence[str]) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA synchronous = {'FULL' if self._durable else 'NORMAL'}")
            connection.execute("PRAGMA foreign_keys = ON")
            if connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("malformed")
            self._migrate(connection, scripts)
        except BaseException:
            connection.close()
            raise
        return connection

    def _migrate(self, connection: sqlite3.Connection, scripts: Sequence[str]) -> None:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > len(scripts):
            raise ToolError(
                f"{self.path} was written by a newer version of QwenImageTool.",
                "Update QwenImageTool, or move that file away.",
            )
        for number, script in enumerate(scripts[version:], start=version + 1):
            try:
                connection.executescript(
                    f"BEGIN IMMEDIATE; {script}; PRAGMA user_version = {number}; COMMIT;"
                )
            except sqlite3.Error:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def _rescue(self, scripts: Sequence[str]) -> sqlite3.Connection:
        """Move the broken file aside and copy what can be read of it into a new one."""
        broken = next(
            path
            for number in itertools.count(1)
            if not (path := self.path.with_name(f"{self.path.name}.broken-{number}")).exists()
        )
        for ending in ("-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                self.path.with_name(self.path.name + ending).replace(
                    broken.with_name(broken.name + ending)
                )
        self.path.replace(broken)
        connection = self._open(scripts)
        connection.execute("BEGIN")
        rows = _copy_rows(broken, connection, self._sound)
        connection.execute("COMMIT")
        self.rescued = (
            f"{self.path.name} was damaged: {rows} entries of it could be read and were kept."
            f" The damaged file is beside it as {broken.name}."
        )
        _log.warning(self.rescued)
        return connection


def _copy_rows(broken: Path, target: sqlite3.Connection, sound: Sound) -> int:
    """Rows of the tables that both have, read from either end up to the damage."""
    copied = 0
    with contextlib.closing(sqlite3.connect(broken)) as source:
        source.execute(
            "PRAGMA writable_schema = ON"
        )  # else a file that was cut short can't be read
        source.row_factory = sqlite3.Row
        for table, columns in _tables(target):
            for order in ("ASC", "DESC"):
                copied += _copy_table(source, target, table, columns, order, sound)
    return copied


def _tables(connection: sqlite3.Connection) -> list[tuple[str, list[str]]]:
    names = connection.execute(
        "SELECT name FROM pragma_table_list"
        " WHERE type = 'table' AND schema = 'main' AND name NOT LIKE 'sqlite_%'"
    ).fetchall()
    return [
        (name, [row["name"] for row in connection.execute(f"PRAGMA table_info({name})")])
        for (name,) in names
    ]


def _copy_table(
    source: sqlite3.Connection,
    target: sqlite3.Connection,
    table: str,
    columns: list[str],
    order: str,
    sound: Sound,
) -> int:
    names, marks = ", ".join(columns), ", ".join("?" * len(columns))
    copied = 0
    with contextlib.suppress(sqlite3.Error):
        for row in source.execute(f"SELECT {names} FROM {table} ORDER BY rowid {order}"):  # noqa: S608
            if not sound(row):
                continue
            with contextlib.suppress(sqlite3.IntegrityError):  # it was copied from the other end
                target.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", tuple(row))  # noqa: S608
                copied += 1
    return copied


def _is_broken(error: sqlite3.DatabaseError) -> bool:
    text = str(error)
    return any(word in text for word in ("malformed", "not a database", "encrypted"))


@contextlib.contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.IntegrityError:
        raise
    except sqlite3.DatabaseError as error:
        raise _explained(path, error) from error
    except OSError as error:
        raise ToolError(f"{path} can't be used: {error}.", "Allow writing to it.") from error


def _explained(path: Path, error: sqlite3.DatabaseError) -> ToolError:
    if "disk is full" in str(error) or "disk I/O" in str(error):
        return DiskFull(f"{path} can't be written: {error}.", "Free some space on that disk.")
    if _is_broken(error):
        return DatabaseBroken(
            f"{path.name} is damaged.",
            "Start QwenImageTool again: it keeps what can be read, and says what it kept.",
        )
    return ToolError(f"{path} can't be used: {error}.", "Allow writing to it, then try again.")
