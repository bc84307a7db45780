"""Diagnostics are shared with strangers: nothing of the user is in them."""

from pathlib import Path, PureWindowsPath
from typing import Any, cast

import pytest

from qwen_image_tool.app import App
from qwen_image_tool.diagnostics import discreet, without_names
from qwen_image_tool.service import Service
from qwen_image_tool.settings import load_settings


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("the secret is t0ken", "the secret is ***"),
        ("HF token hf_AbCdEfGhIjKl in use", "HF token hf_*** in use"),
        ("GET /?__t=abc-def&x=1", "GET /?__t=***&x=1"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ("proxy http://me:pass@proxy:3128", "proxy http://***@proxy:3128"),
        ("api_key=12345", "api_key=***"),
    ],
)
def test_keys_are_left_out(text: str, shown: str) -> None:
    assert discreet(text, ["t0ken"]) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/mia/models/x", "~/models/x"),
        ("/home/mia", "~"),
        ("/home/miami/x", "/home/USER/x"),
        ("/mnt/mia/x on MIA-PC", "/mnt/USER/x on HOST"),
        ("mia said amiable", "USER said amiable"),
        (r"C:\Users\Somebody\AppData", r"C:\Users\USER\AppData"),
        ("file:///Users/else/x", "file:///Users/USER/x"),
    ],
)
def test_names_are_left_out(text: str, shown: str) -> None:
    assert without_names(text, Path("/home/mia"), "mia", "mia-pc.lan") == shown


def test_a_windows_home_in_all_its_forms() -> None:
    home = cast("Path", PureWindowsPath(r"C:\Users\mia"))
    text = r"c:\users\MIA\x and C:/Users/mia/x and " + r"C:\\Users\\mia\\x"
    assert without_names(text, home, "mia", "pc") == r"~\x and ~/x and ~\\x"


def test_names_that_say_nothing_stay() -> None:
    assert without_names("root of /root/x", Path("/root"), "root", "a") == "root of ~/x"


def test_the_report_of_a_service(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    kept: dict[str, Any] = {"output": home / "output"}
    service = Service(App(load_settings().model_copy(update=kept)))
    try:
        text = service.diagnostics(["secret"])
    finally:
        service.close()
    for part in ("## QwenImageTool", "## Checks", "## Settings\noutput = ~", "practice: ready"):
        assert part in text
    assert str(home) not in text
