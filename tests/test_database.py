"""Database: numbered migrations from the first one on, and files that were damaged."""

import sqlite3
from pathlib import Path

import pytest

from qwen_image_tool import database
from qwen_image_tool.database import Database, migrations
from qwen_image_tool.errors import DatabaseBroken, DiskFull, ToolError

SCRIPTS = (
    "CREATE TABLE things (id INTEGER PRIMARY KEY, name TEXT NOT NULL)",
    "ALTER TABLE things ADD COLUMN weight INTEGER NOT NULL DEFAULT 3; UPDATE things SET weight = 4",
)


def version(path: Path) -> int:
    connection = sqlite3.connect(path)
    found: int = connection.execute("PRAGMA user_version").fetchone()[0]
    connection.close()
    return found


def filled(path: Path, count: int = 2000) -> None:
    data = Database(path, SCRIPTS)
    with data.write() as write:
        write.executemany(
            "INSERT INTO things (name) VALUES (?)", [(f"{i} " * 20,) for i in range(count)]
        )
    data.close()


def overwrite(path: Path, start: float, end: float) -> None:
    content = bytearray(path.read_bytes())
    first, last = int(len(content) * start), int(len(content) * end)
    content[first:last] = b"\xa5" * (last - first)
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["jobs", "pictures"])
def test_every_version_of_a_file_becomes_the_newest(tmp_path: Path, name: str) -> None:
    scripts = migrations(name)
    schemas = set()
    for old in range(len(scripts) + 1):
        path = tmp_path / f"{old}.db"
        Database(path, scripts[:old]).close()
        assert version(path) == old
        opened = Database(path, scripts)
        schemas.add(str([tuple(row) for row in opened.read("SELECT sql FROM sqlite_master")]))
        opened.close()
        assert version(path) == len(scripts)
    assert len(schemas) == 1


def test_a_migration_keeps_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    old = Database(path, SCRIPTS[:1])
    with old.write() as write:
        write.execute("INSERT INTO things (name) VALUES ('old')")
    old.close()
    new = Database(path, SCRIPTS)
    assert [tuple(row) for row in new.read("SELECT * FROM things")] == [(1, "old", 4)]
    new.close()


def test_a_migration_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    filled(path, 3)
    with pytest.raises(ToolError):
        Database(path, (*SCRIPTS, "CREATE TABLE more (id); CREATE TABLE things (id)"))
    again = Database(path, SCRIPTS)
    assert not again.read("SELECT * FROM sqlite_master WHERE name = 'more'")
    assert len(again.read("SELECT * FROM things")) == 3
    again.close()


def test_a_newer_file_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    filled(path, 3)
    with pytest.raises(ToolError, match="newer version"):
        Database(path, SCRIPTS[:1])
    assert version(path) == 2


def test_a_transaction_is_whole_or_nothing(tmp_path: Path) -> None:
    data = Database(tmp_path / "a.db", SCRIPTS)

    def half() -> None:
        with data.write() as write:
            write.execute("INSERT INTO things (name) VALUES ('half')")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()
    assert data.read("SELECT * FROM things") == []
    data.close()


def test_a_file_that_is_no_database_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    path.write_bytes(b"not at all a database" * 500)
    data = Database(path, SCRIPTS)
    assert "a.db.broken-1" in data.rescued
    assert (tmp_path / "a.db.broken-1").read_bytes().startswith(b"not at all")
    assert data.read("SELECT * FROM things") == []
    data.close()


def test_what_can_be_read_of_a_damaged_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    filled(path)
    overwrite(path, 0.5, 0.6)
    data = Database(path, SCRIPTS)
    kept = len(data.read("SELECT * FROM things"))
    assert 1000 < kept < 2000
    assert f" {kept} entries" in data.rescued
    ids = [row["id"] for row in data.read("SELECT id FROM things ORDER BY id")]
    assert ids[0] == 1
    assert ids[-1] == 2000  # both ends, around the damage
    data.close()
    again = Database(path, SCRIPTS)
    assert not again.rescued
    again.close()


def test_a_file_that_was_cut_short_keeps_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    filled(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    data = Database(path, SCRIPTS)
    assert 900 < len(data.read("SELECT * FROM things")) < 1100
    data.close()


def test_rows_that_cannot_be_used_are_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    filled(path)
    overwrite(path, 0.9, 0.95)
    data = Database(path, SCRIPTS, sound=lambda row: not row["name"].startswith("7 "))
    assert [row["id"] for row in data.read("SELECT id FROM things WHERE id < 10")] == [
        *range(1, 8),
        9,
    ]
    data.close()


def test_damage_while_it_runs_is_said_and_repaired_at_the_next_start(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    filled(path, 40_000)  # more than SQLite keeps in memory
    data = Database(path, SCRIPTS)
    data.read("SELECT count(*) FROM things WHERE id = 1")
    overwrite(path, 0.3, 1.0)
    with pytest.raises(DatabaseBroken, match="Start QwenImageTool again"):
        data.read("SELECT sum(length(name)) FROM things")
    data.close()
    again = Database(path, SCRIPTS)
    assert "damaged" in again.rescued
    again.close()


def test_a_full_disk_is_a_sentence_and_changes_nothing(tmp_path: Path) -> None:
    data = Database(tmp_path / "a.db", SCRIPTS)
    [[pages]] = data.read("PRAGMA page_count")
    data.read(f"PRAGMA max_page_count = {pages}")  # what SQLite answers on a full disk
    with pytest.raises(DiskFull, match="Free some space"), data.write() as write:
        write.executemany("INSERT INTO things (name) VALUES (?)", [("x" * 4000,)] * 9)
    assert data.read("SELECT * FROM things") == []
    data.read("PRAGMA max_page_count = 1000000")
    with data.write() as write:
        write.execute("INSERT INTO things (name) VALUES ('goes on')")
    data.close()


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ToolError, match="can't be used"):
        Database(tmp_path / "file" / "a.db", SCRIPTS)


def test_scripts_are_numbered_without_gaps() -> None:
    for name in ("jobs", "pictures"):
        folder = Path(database.__file__).parent / "migrations" / name
        numbers = sorted(int(path.stem) for path in folder.glob("*.sql"))
        assert numbers == list(range(1, len(numbers) + 1))
