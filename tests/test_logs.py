"""Logs: one line for people, all of it in the file, stdout untouched, never a stop."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_image_tool import logs
from qwen_image_tool.logs import adopt_libraries, log_path, set_up, tail, tear_down

ours = logging.getLogger("qwen_image_tool.test")


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    root = logging.getLogger()
    level = root.level
    yield
    tear_down()
    root.setLevel(level)


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


class Closed:
    def write(self, _: str) -> None:
        raise BrokenPipeError


def fail() -> None:
    try:
        raise ValueError("the cause")
    except ValueError:
        ours.exception("It broke\nin two lines")


def test_one_line_for_people_and_the_traceback_in_the_file(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up(empty / "logs")
    ours.info("画 ready")
    ours.debug("a detail")
    fail()
    seen = capsys.readouterr()
    assert seen.err.splitlines() == ["画 ready", "error: It broke in two lines"]
    assert seen.out == ""
    kept = log_path(empty / "logs").read_text(encoding="utf-8")
    assert "画 ready" in kept
    assert "a detail" in kept
    assert "ValueError: the cause" in kept
    assert "Traceback" in kept


def test_libraries_go_to_the_file_alone(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library = logging.getLogger("transformers")
    library.addHandler(logging.StreamHandler(sys.stderr))  # as each does when it is imported
    library.propagate = False
    set_up(empty)
    logging.getLogger("transformers.models").error("library error")
    assert capsys.readouterr().err == ""
    assert "library error" in log_path(empty).read_text(encoding="utf-8")


def test_warnings_go_to_the_file_alone(empty: Path) -> None:
    code = (
        "import sys, warnings; from pathlib import Path; from qwen_image_tool import logs;"
        "logs.set_up(Path(sys.argv[1]), verbose=True); warnings.warn('old way'); print('result')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(empty)], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("result\n", "")
    assert "UserWarning: old way" in log_path(empty).read_text(encoding="utf-8")


def test_a_library_imported_later_is_adopted(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up(empty)
    library = logging.getLogger("diffusers")
    library.addHandler(logging.StreamHandler(sys.stderr))
    library.propagate = False
    adopt_libraries()
    library.warning("late")
    assert capsys.readouterr().err == ""
    assert "late" in log_path(empty).read_text(encoding="utf-8")


def test_verbose_shows_details_and_library_warnings(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up(empty, verbose=True)
    set_up(empty, verbose=True)  # replaces: no line twice
    ours.debug("a detail")
    logging.getLogger("diffusers").warning("from a library")
    assert capsys.readouterr().err.splitlines() == ["a detail", "warning: from a library"]


def test_a_closed_or_missing_console_stops_nobody(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_up(empty)
    for stderr in (None, Closed()):
        monkeypatch.setattr(sys, "stderr", stderr)
        ours.info("kept")
    assert log_path(empty).read_text(encoding="utf-8").count("kept") == 2


def test_a_log_folder_that_cannot_be_written_costs_one_warning(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (empty / "file").write_text("")
    set_up(empty / "file" / "logs")
    ours.info("on we go")
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("warning: No log file is kept:")
    assert second == "on we go"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_costs_one_warning(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_up(empty)
    log_path(empty).unlink()
    log_path(empty).symlink_to("/dev/full")
    set_up(empty)
    ours.info("one")
    ours.info("two")
    lines = capsys.readouterr().err.splitlines()
    assert sorted(line for line in lines if not line.startswith("warning:")) == ["one", "two"]
    assert sum(line.startswith("warning: The log file is given up") for line in lines) == 1
    assert len(lines) == 3


def test_the_file_rotates_and_stays_bounded(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "FILE_BYTES", 2000)
    set_up(empty)
    for number in range(300):
        ours.debug("line %d", number)
    files = sorted(empty.iterdir())
    assert len(files) == 6
    assert all(file.stat().st_size <= 2000 for file in files)
    assert "line 299" in log_path(empty).read_text(encoding="utf-8")


def test_a_file_that_another_process_holds_grows_instead(
    empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def held(source: str, target: str) -> None:  # what Windows says
        raise PermissionError(13, "used by another process")

    monkeypatch.setattr(logs, "FILE_BYTES", 500)
    monkeypatch.setattr(os, "rename", held)
    set_up(empty)
    for number in range(20):
        ours.debug("line %d", number)
    assert [file.name for file in empty.iterdir()] == ["qit.log"]
    assert log_path(empty).read_text(encoding="utf-8").count("line") == 20
    assert capsys.readouterr().err == ""


def test_two_processes_share_the_file(empty: Path) -> None:
    code = (
        "import sys, logging; from pathlib import Path; from qwen_image_tool import logs;"
        "logs.set_up(Path(sys.argv[1]));"
        "[logging.getLogger('qwen_image_tool').debug('%s %d', sys.argv[2], i) for i in range(200)]"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, str(empty), name]) for name in "ab"]
    assert [child.wait(60) for child in children] == [0, 0]
    lines = log_path(empty).read_text(encoding="utf-8").splitlines()
    assert len(lines) == 400


def test_the_tail_is_filtered_by_words_and_gravity(empty: Path) -> None:
    set_up(empty)
    ours.info("A picture is drawn.")
    ours.warning("The disk is nearly full.")
    fail()
    tear_down()
    assert [entry.level for entry in tail(empty, 10)] == ["INFO", "WARNING", "ERROR"]
    assert [entry.level for entry in tail(empty, 10, "WARNING")] == ["WARNING", "ERROR"]
    assert [entry.level for entry in tail(empty, 1)] == ["ERROR"]
    [broken] = tail(empty, 10, words="traceback VALUEERROR")
    assert broken.text.splitlines()[0].endswith("It broke")
    assert broken.text.splitlines()[2].startswith("Traceback")
    assert tail(empty, 10, words="picture nowhere") == ()


def test_the_tail_goes_on_into_the_older_file(empty: Path) -> None:
    set_up(empty)
    ours.info("now")
    tear_down()
    line = log_path(empty).read_text("utf-8").replace("now", "before")
    log_path(empty).with_name("qit.log.1").write_text("half a line\n" + line, "utf-8")
    assert [entry.text.rpartition(" ")[2] for entry in tail(empty, 10)] == ["before", "now"]


def test_the_tail_of_no_log_is_empty(tmp_path: Path) -> None:
    assert tail(tmp_path / "none", 10) == ()
