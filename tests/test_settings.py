"""Settings: environment, else config file, else default; errors name the file and the key."""

import re
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from qwen_image_tool.errors import BadRequest
from qwen_image_tool.settings import (
    Settings,
    config_path,
    load_settings,
    origin,
    save_settings,
)


def test_defaults_lie_under_the_home_folder(home: Path) -> None:
    found = load_settings()
    assert found.output == Path.cwd() / "output"
    assert (found.models, found.cache, found.logs) == (
        home / "models",
        home / "cache",
        home / "logs",
    )
    assert list(home.iterdir()) == []  # nothing is created


def test_without_home_the_platform_decides(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("QIT_HOME", "")
    monkeypatch.setattr("platformdirs.user_config_path", lambda *a, **k: home / "config")
    monkeypatch.setattr("platformdirs.user_data_path", lambda *a, **k: home / "data")
    found = load_settings()
    assert found.models == home / "data" / "models"
    assert found.logs.is_absolute()
    assert config_path() == home / "config" / "config.toml"


def test_environment_beats_file_beats_default(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_path().write_text("output = 'from file'\nmodels = '/srv/models'\n")
    assert load_settings().output == Path.cwd() / "from file"
    monkeypatch.setenv("QIT_OUTPUT", "from environment")
    found = load_settings()
    assert found.output == Path.cwd() / "from environment"
    assert found.models == Path("/srv/models")
    assert Settings(output=Path("from code")).output == Path("from code")


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QIT_OUTPUT", "")
    assert load_settings().output == Path.cwd() / "output"


def test_other_variables_of_ours_are_not_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QIT_TORCH_BACKEND", "cpu")
    load_settings()


def test_tilde_and_a_relative_home(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.setenv("QIT_OUTPUT", "~/pictures")
    assert load_settings().output == home / "pictures"
    monkeypatch.chdir(home)
    monkeypatch.setenv("QIT_HOME", "here")
    assert load_settings().models == home / "here" / "models"


def test_a_byte_order_mark_and_chinese_are_read(home: Path) -> None:
    config_path().write_text("output = '图片'\n", encoding="utf-8-sig")
    assert load_settings().output == Path.cwd() / "图片"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"outptu = 'x'\n", ["'outptu'", "output, models, other_models, source"]),
        (b"output = 7\n", ["output is 7. It has to be a folder."]),
        (b"idle_seconds = 0\n", ["idle_seconds is 0. Use more than 0."]),
        (b"idle_seconds = 'x'\n", ["idle_seconds is 'x'. It has to be a number."]),
        (b"lan = 'maybe'\n", ["lan is 'maybe'. It has to be true or false."]),
        (b"source = 'x'\n", ["source is 'x'. Choose huggingface or modelscope."]),
        (b"home = '/x'\n", ["'home'"]),
        (b'output = "D:\\pictures"\n', ["single quotes"]),
        (b"output\n", ["can't be read"]),
        (b"output = '\xff'\n", ["can't be read"]),
        (b"output = '~nobody-of-this-name/x'\n", ["can't be used"]),
    ],
)
def test_a_broken_file_is_named(home: Path, content: bytes, words: list[str]) -> None:
    config_path().write_bytes(content)
    with pytest.raises(BadRequest, match=re.escape(str(config_path()))) as caught:
        load_settings()
    assert all(word in str(caught.value) for word in words)
    assert caught.value.hint


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        load_settings().output = Path("x")  # type: ignore[misc]


def test_what_is_saved_is_read_and_the_rest_stays(home: Path) -> None:
    config_path().write_text("# my own words\nsource = 'modelscope'  # faster here\n", "utf-8")
    save_settings({"models": home / "new" / "models", "idle_seconds": 5.0, "lan": True})
    found = load_settings()
    assert (found.models, found.idle_seconds, found.lan) == (home / "new" / "models", 5.0, True)
    assert not (home / "new").exists()  # it is made when it is needed
    assert "# my own words\nsource = 'modelscope'  # faster here\n" in config_path().read_text()
    save_settings({"models": None, "lan": None, "output": None})
    assert load_settings().models == home / "models"
    assert origin("source") == "file"
    assert origin("models") == "default"


def test_nothing_broken_is_saved(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadRequest, match=r'The setting "Idle seconds" is -1. Use more than 0.'):
        save_settings({"idle_seconds": -1, "lan": True})
    assert not config_path().exists()
    monkeypatch.setenv("QIT_SOURCE", "modelscope")
    assert origin("source") == "environment"


LONG = "x" * 300


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{home}/file", "can't be {home}/file, because {home}/file is a file."),
        ("{home}/file/a/b", "can't be {home}/file/a/b, because {home}/file is a file."),
        ("{home}/a/" + LONG, "can't be {home}/a/" + LONG + ": "),
        ("{home}/a\0b", "can't be {home}/a"),
        ("~nobody-of-this-name/x", "can't be ~nobody-of-this-name/x: "),
        ("/proc/pictures", "can't be /proc/pictures: "),
    ],
)
def test_a_folder_that_can_not_be_used_is_not_saved(home: Path, given: str, said: str) -> None:
    if given.startswith("/proc") and sys.platform != "linux":
        pytest.skip("there is no folder that nobody can write")
    (home / "file").write_text("")
    with pytest.raises(BadRequest) as caught:
        save_settings({"output": given.format(home=home), "lan": True})
    assert f'The setting "Picture folder" {said.format(home=home)}' in caught.value.message
    assert caught.value.hint.startswith("Choose another folder")
    assert [each.name for each in home.iterdir()] == ["file"]


def test_a_folder_is_saved_as_it_was_given(home: Path, tmp_path: Path) -> None:
    save_settings({"output": "pictures of mine"})
    assert load_settings().output == tmp_path / "pictures of mine"
    (home / "here").mkdir()
    save_settings({"models": str(home / "here")})
    assert list((home / "here").iterdir()) == []


def test_a_broken_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QIT_LAN", "maybe")
    with pytest.raises(BadRequest, match=r"^QIT_LAN is 'maybe'. It has to be true or false.$"):
        load_settings()


def test_a_config_file_that_can_not_be_written_is_named(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "file").write_text("")
    monkeypatch.setenv("QIT_HOME", str(home / "file"))
    with pytest.raises(BadRequest, match="can't be written"):
        save_settings({"lan": True})


def test_every_setting_for_people_has_a_title_and_help() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert bool(field.title) == (name != "local_hub"), name
