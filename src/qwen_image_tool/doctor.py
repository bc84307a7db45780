"""Is this machine ready? `gather` reads it, `examine` judges what was read, nothing is printed."""

import importlib.metadata
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Literal

from qwen_image_tool.catalog import DEFAULT_MODEL, load_catalog
from qwen_image_tool.device import (
    ENLARGE_PAGE_FILE,
    Commit,
    NvidiaCard,
    TorchFacts,
    commit,
    memory,
    nvidia_card,
)
from qwen_image_tool.errors import ToolError
from qwen_image_tool.files import try_writing
from qwen_image_tool.settings import Settings
from qwen_image_tool.store import locate
from qwen_image_tool.types import Value

GIB = 1 << 30
LOW_RAM = 4 * GIB  # free; the program itself and the practice model need 1-2 GiB
LOW_VRAM = 2 * GIB  # free
LOW_DISK = 1 * GIB
LONG_PATH = 160  # characters; a model's longest file name adds 85, and Windows' limit is 259
OLDEST = {"torch": "2.11", "diffusers": "0.42.1", "transformers": "5.17"}  # as in pyproject.toml
OLDEST_PYTHON = (3, 11)
OLDEST_DRIVER = {"13": 580, "12": 525}  # NVIDIA's, by CUDA version (CUDA compatibility guide)
SAMPLE = "一只戴帽子的猫 Ünïcode"

Status = Literal["pass", "warn", "fail"]


class Check(Value):
    """One finding, with its figure; `next_step` is "" where all is well."""

    name: str
    status: Status
    finding: str
    next_step: str = ""


class Folder(Value):
    """A folder we write to. Where it is not there yet, the nearest one above it counts."""

    role: str
    path: str
    free_bytes: int = 0
    error: str = ""


class Machine(Value):
    """Everything that is judged."""

    system: str  # sys.platform
    python: tuple[int, int, int]
    packages: dict[str, str]  # "" is not installed
    torch: TorchFacts
    nvidia: NvidiaCard | None = None
    ram_bytes: int
    ram_free_bytes: int
    commit: Commit | None = None
    folders: tuple[Folder, ...]
    practice_error: str = ""
    stdout_encoding: str = "utf-8"
    file_name_error: str = ""
    long_paths: bool = True


def worst(checks: tuple[Check, ...]) -> Status:
    """The gravest status among the checks."""
    found = {check.status for check in checks}
    return "fail" if "fail" in found else "warn" if "warn" in found else "pass"


def gather(settings: Settings, torch: TorchFacts) -> Machine:
    """Read this machine. Writes and removes a temporary file in each folder; creates no folder."""
    ram_bytes, ram_free_bytes = memory()
    return Machine(
        system=sys.platform,
        python=sys.version_info[:3],
        packages={name: _version(name) for name in OLDEST},
        torch=torch,
        nvidia=nvidia_card(),
        ram_bytes=ram_bytes,
        ram_free_bytes=ram_free_bytes,
        commit=commit(),
        folders=(
            read_folder("output", settings.output),
            read_folder("models", settings.models),
            read_folder("logs", settings.logs),
        ),
        practice_error=_practice_error(settings),
        stdout_encoding=getattr(sys.stdout, "encoding", None) or "utf-8",
        file_name_error=_file_name_error(),
        long_paths=_long_paths(),
    )


def examine(machine: Machine) -> tuple[Check, ...]:
    """All checks that apply to this machine, in the order in which they should be mended."""
    return (
        _python(machine),
        *_packages(machine),
        _torch(machine),
        *_driver(machine),
        _ram(machine),
        *_vram(machine),
        *_commit(machine),
        *(_folder(folder) for folder in machine.folders),
        _practice(machine),
        _terminal(machine),
        *_file_names(machine),
    )


# Reading


def read_folder(role: str, path: Path) -> Folder:
    """Whether pictures, models or logs can be written to `path`, and the free bytes there."""
    try:
        path = path.expanduser().absolute()
        there = next(p for p in (path, *path.parents) if p.exists())
        if not there.is_dir():
            return Folder(role=role, path=str(path), error=f"{there} is not a folder")
        try_writing(there)
        return Folder(role=role, path=str(path), free_bytes=shutil.disk_usage(there).free)
    except (OSError, RuntimeError, StopIteration) as error:  # an unknown ~name, a missing drive
        reason = getattr(error, "strerror", None) or str(error) or "the drive is not there"
        return Folder(role=role, path=str(path), error=reason)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _practice_error(settings: Settings) -> str:
    try:
        locate(DEFAULT_MODEL, load_catalog(), settings.models)
    except ToolError as error:
        return error.message
    return ""


def _file_name_error() -> str:
    try:
        with tempfile.NamedTemporaryFile(prefix=SAMPLE):
            return ""
    except (OSError, UnicodeError) as error:
        return str(error)


def _long_paths() -> bool:
    if sys.platform != "win32":
        return True
    import winreg

    key = r"SYSTEM\CurrentControlSet\Control\FileSystem"
    try:
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, key) as opened:
            return bool(winreg.QueryValueEx(opened, "LongPathsEnabled")[0])
    except OSError:
        return False


# Judging


def _python(machine: Machine) -> Check:
    version = ".".join(map(str, machine.python))
    if machine.python >= OLDEST_PYTHON:
        return Check(name="Python", status="pass", finding=f"Python {version}.")
    oldest = ".".join(map(str, OLDEST_PYTHON))
    return Check(
        name="Python",
        status="fail",
        finding=f"Python {version} is older than {oldest}.",
        next_step=f"Install Python {oldest} or newer, then run {_setup(machine)}.",
    )


def _packages(machine: Machine) -> list[Check]:
    checks = []
    for name, oldest in OLDEST.items():
        version = machine.packages.get(name, "")
        good = bool(version) and _numbers(version) >= _numbers(oldest)
        found = f"{name} {version}" if version else f"{name} is not installed"
        checks.append(
            Check(
                name=name,
                status="pass" if good else "fail",
                finding=f"{found}." if good or not version else f"{found} is older than {oldest}.",
                next_step="" if good else f"Run {_setup(machine)}.",
            )
        )
    return checks


def _torch(machine: Machine) -> Check:
    torch, card = machine.torch, machine.nvidia
    build = f"torch {torch.version} ({torch.built_for or 'a build for the CPU alone'})"
    again = f"Run {_setup(machine)} to choose the torch build for this machine again."
    status: Status
    if torch.error:
        status, finding, step = "fail", f"torch can't be used: {torch.error}", again
    elif torch.gpu:
        status, finding, step = "pass", f"{build} uses the {torch.gpu}.", ""
    elif card and not torch.built_for:
        status, finding = "warn", f"{build} can't use the {card.name} of this machine."
        step = f"{again} {_setup(machine, 'cu126')} names a build yourself."
    elif card:
        status, finding = "warn", f"{build} can't use the {card.name}: {torch.gpu_error}"
        step = f"Update the NVIDIA driver and restart, or: {again}"
    else:
        status = "warn"
        finding = f"{build} uses the CPU: {torch.gpu_error or 'it sees no GPU.'}"
        step = (
            "The practice model needs none. With one the large models take minutes, not hours;"
            f" if there is one, install its driver and run {_setup(machine)}."
        )
    return Check(name="GPU", status=status, finding=finding, next_step=step)


def _driver(machine: Machine) -> list[Check]:
    card = machine.nvidia
    if not card or not card.driver:
        return []
    cuda = re.match(r"CUDA (\d+)", machine.torch.built_for)
    oldest = OLDEST_DRIVER.get(cuda[1], 0) if cuda else 0
    if machine.torch.gpu or _numbers(card.driver) >= (oldest,):
        return [Check(name="Driver", status="pass", finding=f"NVIDIA driver {card.driver}.")]
    return [
        Check(
            name="Driver",
            status="fail",
            finding=f"NVIDIA driver {card.driver} is older than {oldest}, which this torch needs.",
            next_step=f"Update the driver and restart; or run {_setup(machine)}.",
        )
    ]


def _ram(machine: Machine) -> Check:
    low = machine.ram_free_bytes < LOW_RAM
    return Check(
        name="RAM",
        status="warn" if low else "pass",
        finding=f"{_gib(machine.ram_free_bytes)} free of {_gib(machine.ram_bytes)}.",
        next_step="Close other programs before a run." if low else "",
    )


def _vram(machine: Machine) -> list[Check]:
    torch = machine.torch
    if not torch.gpu or torch.shared_memory:
        return []
    low = torch.vram_free_bytes < LOW_VRAM
    return [
        Check(
            name="VRAM",
            status="warn" if low else "pass",
            finding=f"{_gib(torch.vram_free_bytes)} free of {_gib(torch.vram_bytes)}.",
            next_step="Close other programs that use the GPU before a run." if low else "",
        )
    ]


def _commit(machine: Machine) -> list[Check]:
    """Windows backs VRAM with its commit limit too, and ends a program that passes it."""
    promised = machine.commit
    if promised is None:
        return []
    low = promised.free_bytes < LOW_RAM + machine.torch.vram_bytes
    page_file = max(0, promised.limit_bytes - machine.ram_bytes)
    return [
        Check(
            name="Page file",
            status="warn" if low else "pass",
            finding=f"Windows can give programs {_gib(promised.free_bytes)} more"
            f" of {_gib(promised.limit_bytes)} ({_gib(page_file)} of them are page file).",
            next_step=ENLARGE_PAGE_FILE if low else "",
        )
    ]


def _folder(folder: Folder) -> Check:
    name = f"Folder for {folder.role}"
    if folder.error:
        return Check(
            name=name,
            status="fail",
            finding=f"Can't write to {folder.path}: {folder.error}.",
            next_step=f"Allow writing to it, or name another in QIT_{folder.role.upper()}.",
        )
    low = folder.free_bytes < LOW_DISK
    return Check(
        name=name,
        status="warn" if low else "pass",
        finding=f"{folder.path} has {folder.free_bytes / 1e9:.1f} GB free.",
        next_step="Free some space." if low else "",
    )


def _practice(machine: Machine) -> Check:
    error = machine.practice_error
    return Check(
        name="Practice model",
        status="fail" if error else "pass",
        finding=error or "The practice model is complete.",
        next_step="Download QwenImageTool again: the practice model is part of it."
        if error
        else "",
    )


def _terminal(machine: Machine) -> Check:
    encoding = machine.stdout_encoding
    try:
        good = SAMPLE.encode(encoding).decode(encoding) == SAMPLE
    except (LookupError, UnicodeError):
        good = False
    windows = "Run `chcp 65001` and set PYTHONUTF8=1."
    step = windows if machine.system == "win32" else "Set LANG=C.UTF-8."
    return Check(
        name="Terminal",
        status="pass" if good else "warn",
        finding=f"The terminal's encoding, {encoding}, "
        + ("writes every prompt." if good else "can't write Chinese."),
        next_step="" if good else step,
    )


def _file_names(machine: Machine) -> list[Check]:
    if machine.file_name_error:
        step = "Choose folders on a disk that takes Unicode names."
        finding = f"Chinese file names can't be used: {machine.file_name_error}."
        return [Check(name="File names", status="warn", finding=finding, next_step=step)]
    longest = max(len(folder.path) for folder in machine.folders)
    if machine.system != "win32" or machine.long_paths or longest <= LONG_PATH:
        return [Check(name="File names", status="pass", finding="Chinese and long names work.")]
    return [
        Check(
            name="File names",
            status="warn",
            finding=f"A folder's path has {longest} characters, and Windows allows 259 in all.",
            next_step="Choose a shorter folder, or turn LongPathsEnabled on in the registry.",
        )
    ]


def _setup(machine: Machine, backend: str = "") -> str:
    """The command that chooses and installs the torch build again."""
    if machine.system == "win32":
        return f"`set QIT_TORCH_BACKEND={backend}& qit setup`" if backend else "`qit setup`"
    return f"`QIT_TORCH_BACKEND={backend} ./qit setup`" if backend else "`./qit setup`"


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
