"""Settings, declared once: where things lie on this computer.

Each one is read from the environment (QIT_OUTPUT), else from the config file, else has its default.
They are read when the program starts. One without a title is not meant for people.
QIT_HOME puts everything but the pictures under one folder; tests always set it.
"""

import os
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import platformdirs
import tomlkit
from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from qwen_image_tool.errors import BadRequest
from qwen_image_tool.files import replace_file, try_making
from qwen_image_tool.types import wrong_field

APP = "QwenImage"
ENV_PREFIX = "QIT_"


def home() -> Path | None:
    """The folder in QIT_HOME, absolute; None where the platform's own folders are used."""
    text = os.environ.get(ENV_PREFIX + "HOME", "")
    return Path(os.path.abspath(Path(text).expanduser())) if text else None  # noqa: PTH100


def config_path() -> Path:
    """The config file: it need not exist."""
    return (home() or platformdirs.user_config_path(APP, appauthor=False)) / "config.toml"


def _models() -> Path:
    return (home() or platformdirs.user_data_path(APP, appauthor=False)) / "models"


def _data() -> Path:
    return (home() or platformdirs.user_data_path(APP, appauthor=False)) / "data"


def _cache() -> Path:
    own = home()
    return own / "cache" if own else platformdirs.user_cache_path(APP, appauthor=False)


def _logs() -> Path:
    own = home()
    return own / "logs" if own else platformdirs.user_log_path(APP, appauthor=False)


class _ConfigFile(TomlConfigSettingsSource):
    def _read_file(self, file_path: Any) -> dict[str, Any]:
        # Windows' Notepad may start the file with a byte order mark, which TOML refuses
        return tomllib.loads(file_path.read_text(encoding="utf-8-sig"))


class Settings(BaseSettings):
    """As given by the user; `load_settings` makes every folder absolute."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_ignore_empty=True, frozen=True, extra="forbid"
    )

    output: Path = Field(
        default=Path("output"),
        title="Picture folder",
        description="Folder that pictures are saved in",
    )
    models: Path = Field(
        default_factory=_models, title="Model folder", description="Folder that holds the models"
    )
    other_models: str = Field(
        default="",
        title="Other programs' models",
        description="More folders to look for models in, read-only, separated like PATH",
    )
    source: Literal["huggingface", "modelscope"] = Field(
        default="huggingface", title="Model hub", description="Where models are fetched from"
    )
    idle_seconds: float = Field(
        default=600,
        gt=0,
        title="Idle seconds",
        description="A model without work for so long leaves the memory",
    )
    lan: bool = Field(
        default=False,
        title="Other computers",
        description="Computers of the network may come in, with the password",
    )
    data: Path = Field(
        default_factory=_data,
        title="Data folder",
        description="Folder of the queue, the gallery's index and the access",
    )
    cache: Path = Field(
        default_factory=_cache,
        title="Cache folder",
        description="Folder for what can be made again",
    )
    logs: Path = Field(
        default_factory=_logs, title="Log folder", description="Folder of the log files"
    )
    local_hub: bool = Field(
        default=False, description="For tests: the hub may be plain http on a private address"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _ConfigFile(settings_cls, config_path())


def load_settings() -> Settings:
    """Environment, else config file, else default. Folders are absolute: `~` is expanded, and a
    relative one counts from the current folder.

    Raises BadRequest that names the file and the key where a setting is broken or unknown.
    """
    try:
        settings = Settings()
        folders = {
            name: value.expanduser().absolute()
            for name, value in settings
            if isinstance(value, Path)
        }
    except ValidationError as error:
        raise _broken_setting(error) from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise BadRequest(
            f"{config_path()} can't be read: {error}.",
            "Write one setting a line, paths in single quotes: output = 'D:\\pictures'.",
        ) from error
    except (OSError, RuntimeError) as error:  # RuntimeError: ~name of an unknown user
        raise BadRequest(
            f"{config_path()} can't be used: {error}.", "Correct it, or move it away."
        ) from error
    return settings.model_copy(update=folders)


def origin(name: str) -> Literal["environment", "file", "default"]:
    """Where a setting has its value from."""
    if os.environ.get(ENV_PREFIX + name.upper()):
        return "environment"
    return "file" if name in _written() else "default"


def save_settings(changes: Mapping[str, object]) -> None:
    """Write settings into the config file; None goes back to the default. What else is there stays,
    comments too. Raises BadRequest where one is broken, a folder can't be used, or the file can't
    be written.
    """
    try:
        wanted = Settings(**{name: value for name, value in changes.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        raise _broken_setting(error, changes) from error
    for name, value in wanted:
        if isinstance(value, Path) and changes.get(name) is not None:
            _check_folder(name, value)
    document = _written()
    for name, value in changes.items():
        if value is None:
            document.pop(name, None)
        else:
            document[name] = str(value) if isinstance(value, Path) else value
    _write(document)


def _check_folder(name: str, given: Path) -> None:
    """Raises BadRequest where nothing could be saved there. The folder need not exist, and is not
    made."""
    title, folder = Settings.model_fields[name].title or name, given
    try:
        folder = given.expanduser().absolute()
        if file := next((each for each in (folder, *folder.parents) if each.is_file()), None):
            raise BadRequest(
                f'The setting "{title}" can\'t be {folder}, because {file} is a file.',
                "Choose another folder.",
            )
        try_making(folder)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: ~name of an unknown user
        why = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise BadRequest(
            f'The setting "{title}" can\'t be {folder}: {why}.',
            "Choose another folder, or allow writing to this one.",
        ) from error


def _written() -> tomlkit.TOMLDocument:
    """The config file; an empty one where there is none."""
    path = config_path()
    return tomlkit.parse(path.read_text(encoding="utf-8-sig") if path.exists() else "")


def _write(document: tomlkit.TOMLDocument) -> None:
    path = config_path()
    try:
        replace_file(path, tomlkit.dumps(document).encode())
    except OSError as error:
        raise BadRequest(f"{path} can't be written: {error}.", "Allow writing to it.") from error


def _broken_setting(error: ValidationError, changes: Collection[str] = ()) -> BadRequest:
    """Named by its title where it is one of `changes`, else by where it is written."""
    first = error.errors()[0]
    key = str(first["loc"][0])
    if key in changes and key in Settings.model_fields:
        return wrong_field(first, _titled(key))
    known = ", ".join(Settings.model_fields)
    if first["type"] == "extra_forbidden":
        return BadRequest(f"{config_path()}: there is no setting {key!r}.", f"There are: {known}.")
    variable = ENV_PREFIX + key.upper()
    where = variable if os.environ.get(variable) else f"{config_path()}: {key}"
    return wrong_field(first, where)


def _titled(name: str) -> str:
    return f'The setting "{Settings.model_fields[name].title or name}"'
