# /// script
# requires-python = ">=3.11,<3.15"
# ///
"""Build `.venv`: the packages of uv.lock, then the torch build for this machine.

The launchers `qit` and `qit.cmd` run it with uv, which sets $UV; it needs the standard library
only. It ends with 1 and one sentence if the installation fails, and writes its stamp last, so
that an interrupted set-up is simply repeated.
"""

import argparse
import configparser
import os
import shutil
import ssl
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import install_torch
from install_torch import SetUpError, run, say

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ">=3.11,<3.15"  # the Pythons that have wheels of the pinned torch

# The launchers compare these files with the copies in the stamp.
SOURCES = ("uv.lock", "pyproject.toml", "scripts/set_up.py", "scripts/install_torch.py")

# uv does not read pip's settings, and many people reach PyPI only through a mirror set there.
PIP_SETTINGS = {
    "index-url": ("UV_DEFAULT_INDEX", "UV_INDEX_URL"),
    "extra-index-url": ("UV_INDEX", "UV_EXTRA_INDEX_URL"),
    "find-links": ("UV_FIND_LINKS",),
    "cert": ("SSL_CERT_FILE",),
}
NOT_FOR_UV = ("VIRTUAL_ENV", "PYTHONHOME", "PYTHONPATH", "UV_TORCH_BACKEND")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dev", action="store_true", help="with what the tests need")
    parser.add_argument("--again", action="store_true", help="even if nothing has changed")
    options = parser.parse_args(arguments)
    venv = ROOT / ".venv"
    try:
        with only_one(ROOT / ".uv" / "lock"):
            set_up(venv, uv_environment(os.environ, pip_config_files()), options)
    except SetUpError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("stopped; the next run goes on from here.")
        return 130
    return 0


def set_up(venv: Path, environ: Mapping[str, str], options: argparse.Namespace) -> None:
    sources = {Path(name).name: (ROOT / name).read_bytes() for name in SOURCES}
    sources["folder"] = os.fsencode(ROOT)  # the programs in .venv hold its name
    stamps = [venv / "ready", *([venv / "ready-dev"] if options.dev else [])]
    wanted = environ.get("QIT_TORCH_BACKEND", "")
    if not options.again and is_current(stamps[-1], sources, wanted):
        return  # another start did it while this one waited
    for stamp in stamps:
        shutil.rmtree(stamp, ignore_errors=True)
    uv = environ.get("UV", "uv")
    install_packages(uv, venv, environ, dev=options.dev)
    backend = install_torch.install(uv, venv_python(venv), environ)
    for stamp in stamps:
        write_stamp(stamp, {**sources, "torch-backend": backend.encode()})


def install_packages(uv: str, venv: Path, environ: Mapping[str, str], *, dev: bool) -> None:
    say(f"installing the packages into {venv}")
    groups = ["--group", "dev"] if dev else ["--no-dev"]
    sync = [uv, "sync", "--frozen", "--inexact", "--compile-bytecode", "--python", PYTHONS, *groups]
    environ = {**environ, "UV_PROJECT_ENVIRONMENT": str(venv)}
    if any(name in environ for name in PIP_SETTINGS["index-url"]):
        install_through_mirror(uv, venv, environ, groups)
    run(sync, environ, ROOT, "the packages could not be installed")


def install_through_mirror(
    uv: str, venv: Path, environ: Mapping[str, str], groups: Sequence[str]
) -> None:
    """uv.lock holds pypi.org's addresses and a frozen sync goes there: ask by name and hash.

    Without dependencies: the list is complete, and torch is not in it.
    """
    failed = "the packages could not be installed from the index in your settings"
    with tempfile.TemporaryDirectory() as folder:
        locked = Path(folder) / "requirements.txt"
        export = [uv, "export", "--quiet", "--frozen", "--no-emit-project", *groups]
        run([*export, "--output-file", str(locked)], environ, ROOT, failed)
        create = [uv, "venv", "--quiet", "--allow-existing", "--python", PYTHONS, str(venv)]
        run(create, environ, ROOT, failed)
        install = [uv, "pip", "install", "--no-deps", "--python", str(venv_python(venv))]
        run([*install, "--requirement", str(locked)], environ, Path(folder), failed)


def venv_python(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


# The stamp


def is_current(stamp: Path, sources: Mapping[str, bytes], wanted: str) -> bool:
    try:
        same = all((stamp / name).read_bytes() == content for name, content in sources.items())
        return same and wanted in ("", (stamp / "torch-backend").read_text())
    except FileNotFoundError:
        return False


def write_stamp(stamp: Path, contents: Mapping[str, bytes]) -> None:
    new = stamp.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    for name, content in contents.items():
        (new / name).write_bytes(content)
    new.rename(stamp)


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as file:
        if not try_lock(file):
            say("waiting for another start to finish the set-up")
            while not try_lock(file):
                time.sleep(0.5)
        yield


def try_lock(file: IO[str]) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


# pip's settings


def uv_environment(environ: Mapping[str, str], files: Sequence[Path]) -> dict[str, str]:
    """`environ` for uv: pip's settings where uv's own are not set, and patience."""
    settings = pip_config(files)
    for key in PIP_SETTINGS:
        settings[key] = environ.get("PIP_" + key.upper().replace("-", "_"), settings.get(key, ""))
    result = {name: value for name, value in environ.items() if name not in NOT_FOR_UV}
    for key, names in PIP_SETTINGS.items():
        if settings[key] and not any(name in environ for name in names):
            separator = "," if key == "find-links" else " "
            result[names[0]] = separator.join(settings[key].split())
    if "UV_INDEX" in result and "UV_INDEX" not in environ:
        result.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")  # as pip does
    if has_certificates():
        result.setdefault("UV_SYSTEM_CERTS", "1")  # uv's own do not know a company's proxy
    result.setdefault("UV_HTTP_TIMEOUT", "180")
    result.setdefault("UV_HTTP_RETRIES", "5")
    return result


def has_certificates() -> bool:
    """Whether the system has certificates at all; small containers do not."""
    if sys.platform in ("win32", "darwin"):
        return True
    paths = ssl.get_default_verify_paths()
    return bool(paths.cafile or (paths.capath and any(Path(paths.capath).iterdir())))


def pip_config(files: Sequence[Path]) -> dict[str, str]:
    config = configparser.RawConfigParser(strict=False)
    try:
        config.read(files, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError) as error:
        say(f"pip's settings are not used, they cannot be read: {error}")
    sections = [dict(config[name]) for name in ("global", "install") if name in config]
    return {key: value for section in sections for key, value in section.items()}


def pip_config_files() -> list[Path]:
    """Where pip looks for its settings, the weakest first."""
    home, extra = Path.home(), os.environ.get("PIP_CONFIG_FILE")
    if os.name == "nt":
        shared = Path(os.environ.get("PROGRAMDATA", "C:/ProgramData"))
        mine = Path(os.environ.get("APPDATA", home / "AppData" / "Roaming"))
        files = [folder / "pip" / "pip.ini" for folder in (shared, home, mine)]
    else:
        mine = Path(os.environ.get("XDG_CONFIG_HOME", home / ".config"))
        mac = [base / "Library/Application Support/pip" for base in (Path("/"), home)]
        folders = [Path("/etc/xdg/pip"), Path("/etc"), home / ".pip", mine / "pip"]
        files = [folder / "pip.conf" for folder in (mac[0], *folders, mac[1])]
    if extra == os.devnull:
        return []
    return [*files, Path(extra)] if extra else files


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
