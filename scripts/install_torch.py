"""Choose the torch build for this machine's GPU, without torch, and install it with uv.

torch is not in uv.lock because one version has a build for each kind of GPU. QIT_TORCH_BACKEND
names the build instead of the choice made here: one of uv's backends (cpu, cu130, rocm7.2, xpu,
...), or `default` for what your package index offers.
"""

import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

TORCH = "2.13.0"
OLDEST = (2, 11)

# The builds of this torch and the GPUs each was compiled for (pytorch/RELEASE.md, 2.13):
# CUDA 13.0 from Turing on; CUDA 12.6 from Maxwell to Hopper.
CUDA_13_DRIVER = 580
CUDA_12_DRIVER = {"Linux": 525, "Windows": 528}
ROCM = "rocm7.2"
ROCM_GPUS = {
    *("gfx900", "gfx906", "gfx908", "gfx90a", "gfx942", "gfx950", "gfx1030", "gfx1100", "gfx1101"),
    *("gfx1102", "gfx1150", "gfx1151", "gfx1200", "gfx1201"),
}
# PCI device ids of the Arc GPUs: A-series, B-series, and Core Ultra's (Meteor, Arrow, Lunar and
# Panther Lake). Other Intel graphics have no torch build.
INTEL_ARC = ("0x56", "0xe2", "0x7d", "0x64", "0xb0")

GIGABYTES = {"cpu": "0.2", "cu126": "3", "cu130": "3"}  # to download
AGAIN = "then run `qit setup`"


class SetUpError(Exception):
    """The set-up cannot go on; the text says what to do next."""


@dataclass(frozen=True, slots=True)
class Gpu:
    vendor: Literal["nvidia", "amd", "intel"]
    name: str
    driver: int = 0  # NVIDIA's major version; 0: no driver answers
    compute: tuple[int, int] = (0, 0)  # NVIDIA's compute capability


@dataclass(frozen=True, slots=True)
class Machine:
    system: str  # platform.system()
    arch: str  # platform.machine()
    gpus: tuple[Gpu, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    backend: str
    reason: str


def install(uv: str, python: Path, environ: Mapping[str, str]) -> str:
    """Give `python` the right torch.

    Returns the backend it was chosen for; raises SetUpError if none can be had.
    """
    forced = environ.get("QIT_TORCH_BACKEND", "")
    choice = Choice(forced, "QIT_TORCH_BACKEND") if forced else choose(detect())
    present = installed_version(python)
    if present and suits(present, choice, exactly=bool(forced)):
        say(f"keeping torch {present}: {choice.reason}")
        return choice.backend
    pip = [uv, "pip", "install", "--python", str(python), f"torch=={TORCH}"]
    # Another build of the same version would count as installed.
    again = [*pip, "--reinstall-package", "torch"]
    from_index = [*again, f"--torch-backend={choice.backend}"]
    if choice.backend == "default":
        say(f"installing torch {TORCH} from your package index: {choice.reason}")
        install_with(pip, environ)
    elif is_available(from_index, environ):
        size = GIGABYTES.get(choice.backend)
        about = f", about {size} GB" if size else ""
        say(f"installing torch {TORCH} for {choice.backend}{about}: {choice.reason}")
        install_with(from_index, environ)
    elif forced:
        raise SetUpError(
            f"torch {TORCH} for {forced} cannot be had from download.pytorch.org: check the name"
            " and the connection, or unset QIT_TORCH_BACKEND."
        )
    elif present and is_recent(present):
        say(f"{choice.reason}; keeping torch {present}: download.pytorch.org cannot be reached")
    else:
        say(fall_back_sentence(choice, environ))
        install_with(pip if present else again, environ)
    return choice.backend


# The choice


def choose(machine: Machine) -> Choice:
    """Raises SetUpError on a machine that torch no longer supports."""
    if machine.system == "Darwin":
        if machine.arch != "arm64":
            raise SetUpError("there is no torch for Macs with Intel processors any more.")
        return Choice("default", "Apple silicon, the GPU is used through Metal")
    by_vendor = {"nvidia": choose_nvidia, "amd": choose_amd, "intel": choose_intel}
    choices = [
        by_vendor[vendor](gpus, machine.system)
        for vendor in by_vendor
        if (gpus := [gpu for gpu in machine.gpus if gpu.vendor == vendor])
    ]
    usable = [choice for choice in choices if choice.backend != "cpu"]
    return next(iter(usable + choices), Choice("cpu", "no GPU that torch can use was found"))


def choose_nvidia(gpus: Sequence[Gpu], system: str) -> Choice:
    best = max(gpus, key=lambda gpu: gpu.compute)
    if not best.driver:
        driver = f"install NVIDIA's driver {CUDA_13_DRIVER} or newer, {AGAIN}"
        return Choice("cpu", f"{best.name} has no working driver: {driver}")
    found = f"{best.name}, driver {best.driver}"
    if best.compute >= (7, 5) and best.driver >= CUDA_13_DRIVER:
        return Choice("cu130", found)
    if (5, 0) <= best.compute < (10, 0) and best.driver >= CUDA_12_DRIVER[system]:
        return Choice("cu126", found)
    if best.compute < (5, 0):
        return Choice("cpu", f"{found}: the GPU is too old for torch {TORCH}")
    return Choice("cpu", f"{found}: update it to {CUDA_13_DRIVER} or newer, {AGAIN}")


def choose_amd(gpus: Sequence[Gpu], system: str) -> Choice:
    if system != "Linux":
        return Choice("cpu", f"{gpus[0].name}: torch uses AMD GPUs on Linux only")
    usable = [gpu.name for gpu in gpus if gpu.name in ROCM_GPUS]
    if usable:
        return Choice(ROCM, f"AMD {usable[0]}")
    return Choice("cpu", f"AMD {gpus[0].name} is not among the GPUs torch's ROCm build supports")


def choose_intel(gpus: Sequence[Gpu], system: str) -> Choice:
    del system  # the same on Linux and Windows
    return Choice("xpu", gpus[0].name)


# What is in the machine


def detect(root: Path = Path("/")) -> Machine:
    system, arch = platform.system(), platform.machine()
    if system == "Darwin":
        return Machine(system, arch)
    shown = windows_gpus() if system == "Windows" else linux_gpus(root)
    nvidia = nvidia_gpus()
    silent = [gpu for gpu in shown if gpu.vendor != "nvidia" or not nvidia]
    return Machine(system, arch, (*nvidia, *silent))


def nvidia_gpus() -> list[Gpu]:
    fields = "--query-gpu=name,driver_version,compute_cap"
    gpus = []
    for line in output(["nvidia-smi", fields, "--format=csv,noheader"]).splitlines():
        match = re.fullmatch(r"(.+), (\d+)[.\d]*, (\d+)\.(\d+)", line.strip())
        if match:
            name, driver, major, minor = match.groups()
            gpus.append(Gpu("nvidia", name, int(driver), (int(major), int(minor))))
    return gpus


def linux_gpus(root: Path) -> list[Gpu]:
    gpus = amd_gpus(root)
    for device in sorted(root.glob("sys/bus/pci/devices/*")):
        kind, vendor, model = (read(device / name) for name in ("class", "vendor", "device"))
        if not kind.startswith("0x03"):  # not a display controller
            continue
        if vendor == "0x10de":
            gpus.append(Gpu("nvidia", "an NVIDIA GPU"))
        elif vendor == "0x8086" and model.startswith(INTEL_ARC):
            gpus.append(Gpu("intel", f"Intel Arc ({model})"))
    return gpus


def amd_gpus(root: Path) -> list[Gpu]:
    """Those that the kernel's compute driver knows, named as ROCm does."""
    gpus = []
    for node in sorted(root.glob("sys/class/kfd/kfd/topology/nodes/*/properties")):
        match = re.search(r"^gfx_target_version (\d+)$", read(node), re.MULTILINE)
        version = int(match[1]) if match else 0
        if version:  # 0: a processor
            major, minor, step = version // 10000, version // 100 % 100, version % 100
            gpus.append(Gpu("amd", f"gfx{major}{minor:x}{step:x}"))
    return gpus


def windows_gpus() -> list[Gpu]:
    query = "(Get-CimInstance Win32_VideoController).Name"
    gpus = []
    for name in output(["powershell", "-NoProfile", "-Command", query]).splitlines():
        if "NVIDIA" in name:
            gpus.append(Gpu("nvidia", name))
        elif "AMD" in name or "Radeon" in name:
            gpus.append(Gpu("amd", name))
        elif "Intel" in name and "Arc" in name:
            gpus.append(Gpu("intel", name))
    return gpus


def read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def output(command: Sequence[str]) -> str:
    """What a program prints, or nothing if it is not there, fails or hangs."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


# What is in the environment, and what can be had


def installed_version(python: Path) -> str:
    """As torch itself says, for example 2.13.0+cu130; nothing if it cannot be imported."""
    return output([str(python), "-c", "import torch; print(torch.__version__)"]).strip()


def suits(version: str, choice: Choice, *, exactly: bool) -> bool:
    build = version.partition("+")[2]
    if not is_recent(version):
        return False
    # Every build can compute on the CPU.
    return choice.backend in (build, "default") or (choice.backend == "cpu" and not exactly)


def is_recent(version: str) -> bool:
    return tuple(int(part) for part in version.split(".")[:2]) >= OLDEST


def is_available(command: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Would uv find it? Asked with little patience: behind some walls nothing ever answers."""
    impatient = {
        **environ,
        "UV_HTTP_CONNECT_TIMEOUT": "5",
        "UV_HTTP_TIMEOUT": "20",
        "UV_HTTP_RETRIES": "0",
    }
    try:
        done = subprocess.run(
            [*command, "--dry-run", "--no-deps", "--quiet"],
            env=impatient,
            cwd=tempfile.gettempdir(),
            capture_output=True,
            timeout=60,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def fall_back_sentence(choice: Choice, environ: Mapping[str, str]) -> str:
    comes = f"{choice.reason}; download.pytorch.org cannot be reached, so torch {TORCH} comes from"
    if any(name in environ for name in ("UV_FIND_LINKS", "UV_INDEX", "UV_DEFAULT_INDEX")):
        return f"{comes} the package index in your settings"
    if platform.system() != "Windows":
        return f"{comes} PyPI: the CUDA 13.0 build, about 3 GB"
    lost = "" if choice.backend == "cpu" else ", which cannot use your GPU: later, `qit setup`"
    return f"{comes} PyPI: the CPU build, about 0.2 GB{lost}"


def install_with(command: Sequence[str], environ: Mapping[str, str]) -> None:
    # Not from the project's folder: its settings tell uv to leave torch out.
    run(command, environ, Path(tempfile.gettempdir()), f"torch {TORCH} could not be installed")


def run(command: Sequence[str], environ: Mapping[str, str], folder: Path, failed: str) -> None:
    """Show uv's progress to a person, and only its errors to a log."""
    quiet = [] if sys.stderr.isatty() or "--quiet" in command else ["--quiet"]
    if subprocess.run([*command, *quiet], env=environ, cwd=folder, check=False).returncode:
        raise SetUpError(f"{failed}; the lines above say why. Run this again to go on from here.")


def say(text: str) -> None:
    sys.stderr.write(f"qit: {text}\n")
    sys.stderr.flush()
