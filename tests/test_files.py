"""Small files: replaced whole, or as they were."""

import os
import stat
from pathlib import Path

import pytest

from qwen_image_tool.files import replace_file


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a"
    for data in (b"one", b"two\r\n"):
        replace_file(path, data, private=True)
        assert path.read_bytes() == data
    assert [found.name for found in path.parent.iterdir()] == ["a"]
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a"
    path.mkdir(parents=True)
    with pytest.raises(OSError):  # noqa: PT011 - the system's own, of many kinds
        replace_file(path, b"data")
    assert list(path.parent.iterdir()) == [path]
