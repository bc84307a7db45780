"""Device: the host's limits as a container sees them, and a torch that may fail in any way."""

import contextlib
import ctypes
import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from qwen_image_tool import device
from qwen_image_tool.catalog.costs import load_costs
from qwen_image_tool.device import (
    Commit,
    NvidiaCard,
    TorchFacts,
    commit,
    cores,
    cpu_name,
    last_look,
    look,
    memory,
    nvidia_card,
    probe,
    probe_in_child,
)
from qwen_image_tool.engine.probe import torch_facts
from qwen_image_tool.errors import ToolError

GIB = 1 << 30
CUDA = TorchFacts(
    version="2.13.0+cu130",
    built_for="CUDA 13.0",
    kind="cuda",
    gpu="NVIDIA GeForce RTX 4090",
    gpus=1,
    vram_bytes=24 * GIB,
    vram_free_bytes=22 * GIB,
    bf16=True,
    capability="8.9",
    driver="580.65",
)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# Containers


@pytest.fixture
def ram(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with 64 GiB of RAM, 40 of them free, and 8 cores."""
    host = SimpleNamespace(total=64 * GIB, available=40 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: host)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def test_without_limits_the_host_counts(ram: None, tmp_path: Path) -> None:
    assert memory(tmp_path) == (64 * GIB, 40 * GIB)
    assert cores(tmp_path) == 8


def test_cgroup_2(ram: None, tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/user.slice/run.scope\n")
    group = tmp_path / "sys/fs/cgroup/user.slice"
    write(group / "memory.max", f"{16 * GIB}\n")
    write(group / "memory.current", f"{10 * GIB}\n")
    write(group / "memory.stat", f"anon {3 * GIB}\ninactive_file {6 * GIB}\n")
    write(group / "run.scope/memory.max", "max\n")
    write(group / "run.scope/cpu.max", "250000 100000\n")
    assert memory(tmp_path) == (16 * GIB, 12 * GIB)
    assert cores(tmp_path) == 3


def test_cgroup_1_inside_a_container(ram: None, tmp_path: Path) -> None:
    """The path is the host's, and only the root of the mount is there."""
    lines = "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n1:name=systemd:/docker/abc\n"
    write(tmp_path / "proc/self/cgroup", lines)
    group = tmp_path / "sys/fs/cgroup"
    write(group / "memory/memory.limit_in_bytes", f"{8 * GIB}\n")
    write(group / "memory/memory.usage_in_bytes", f"{9 * GIB}\n")
    write(group / "memory/memory.stat", "cache 1\ntotal_inactive_file 0\n")
    write(group / "cpu/cpu.cfs_quota_us", "50000\n")
    write(group / "cpu/cpu.cfs_period_us", "100000\n")
    assert memory(tmp_path) == (8 * GIB, 0)
    assert cores(tmp_path) == 1


def test_cgroup_1_without_a_limit(ram: None, tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "5:cpu:/\n4:memory:/\n")
    group = tmp_path / "sys/fs/cgroup"
    write(group / "memory/memory.limit_in_bytes", "9223372036854771712\n")
    write(group / "memory/memory.usage_in_bytes", f"{9 * GIB}\n")
    write(group / "cpu/cpu.cfs_quota_us", "-1\n")
    write(group / "cpu/cpu.cfs_period_us", "100000\n")
    assert memory(tmp_path) == (64 * GIB, 40 * GIB)
    assert cores(tmp_path) == 8


def test_this_machine() -> None:
    total, free = memory()
    assert 0 < free < total <= psutil.virtual_memory().total
    assert 1 <= cores() <= (os.cpu_count() or 1)
    assert cpu_name()


# Windows


class Registry:
    """winreg, with one value."""

    HKEY_LOCAL_MACHINE = "HKLM"

    def __init__(self, page_files: list[str] | None) -> None:
        self._page_files = page_files

    @contextlib.contextmanager
    def OpenKey(self, root: str, path: str) -> Iterator[str]:  # noqa: N802
        assert (root, path) == ("HKLM", device.PAGE_FILES)
        yield path

    def QueryValueEx(self, _key: str, name: str) -> tuple[list[str], int]:  # noqa: N802
        if self._page_files is None:
            raise FileNotFoundError(name)
        return self._page_files, 7


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A Windows with 16 GiB of RAM and 4 GiB of page files, which has 9 GiB left to promise."""

    def answer(reference: Any) -> int:
        status = reference._obj
        assert status.length == ctypes.sizeof(status) == 64
        status.ram, status.commit_limit, status.commit_free = 16 * GIB, 20 * GIB, 9 * GIB
        return 1

    def set_up(page_files: list[str] | None, disk: int = 1 << 40, free: int = 1 << 39) -> None:
        kernel32 = SimpleNamespace(GlobalMemoryStatusEx=answer)
        monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel32), raising=False)
        monkeypatch.setitem(sys.modules, "winreg", Registry(page_files))
        monkeypatch.setenv("SYSTEMDRIVE", "C:")

        def usage(path: str) -> SimpleNamespace:
            if path == "X:\\":
                raise FileNotFoundError(path)
            assert path in ("C:\\", "D:\\")
            return SimpleNamespace(total=disk, free=free)

        monkeypatch.setattr(shutil, "disk_usage", usage)

    return set_up


@pytest.mark.parametrize(
    "page_files",
    [
        None,
        [],
        [r"C:\pagefile.sys 4096 4096"],
        [r"C:\pagefile.sys 1024 1024", r"D:\pagefile.sys 3072 3072"],
        [r"X:\pagefile.sys 0 0"],
        ["nonsense"],
    ],
)
def test_what_windows_can_promise(windows: Callable[..., None], page_files: list[str]) -> None:
    windows(page_files)
    assert commit() == Commit(limit_bytes=20 * GIB, free_bytes=9 * GIB)


MANAGED = [[r"?:\pagefile.sys"], [r"C:\pagefile.sys 0 0"], [r"C:\pagefile.sys"]]


@pytest.mark.parametrize("page_files", MANAGED)
def test_a_page_file_that_windows_manages_grows(
    windows: Callable[..., None], page_files: list[str]
) -> None:
    """To three times the RAM, to an eighth of its disk, or until that is full."""
    for disk, free, growth in ((1024, 500, 44), (128, 100, 12), (1024, 5, 5), (8, 5, 0)):
        windows(page_files, disk * GIB, free * GIB)
        assert commit() == Commit(limit_bytes=(20 + growth) * GIB, free_bytes=(9 + growth) * GIB)


def test_a_page_file_grows_to_what_a_person_allowed(windows: Callable[..., None]) -> None:
    windows([r"D:\pagefile.sys 4096 8192"])
    assert commit() == Commit(limit_bytes=24 * GIB, free_bytes=13 * GIB)


def test_a_device_has_what_windows_can_promise(windows: Callable[..., None], ram: None) -> None:
    windows(None)
    assert probe(CUDA).commit_free_bytes == 9 * GIB


def test_other_systems_promise_without_a_limit(
    monkeypatch: pytest.MonkeyPatch, windows: Callable[..., None]
) -> None:
    windows(None)
    silent = SimpleNamespace(GlobalMemoryStatusEx=lambda _: 0)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=silent))
    assert commit() is None
    monkeypatch.delattr(ctypes, "windll")
    assert commit() is None
    assert probe(CUDA).commit_free_bytes is None


# NVIDIA


def test_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    out = b"NVIDIA GeForce RTX 4090, 580.65.06\nNVIDIA GeForce GTX 1080, 580.65.06\n"
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: SimpleNamespace(stdout=out))
    assert nvidia_card() == NvidiaCard(name="NVIDIA GeForce RTX 4090", driver="580.65.06")


@pytest.mark.parametrize(
    "failure",
    [
        FileNotFoundError("nvidia-smi"),
        subprocess.TimeoutExpired("nvidia-smi", 20),
        subprocess.CalledProcessError(9, "nvidia-smi"),
    ],
)
def test_nvidia_smi_fails(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise failure

    monkeypatch.setattr(subprocess, "run", fail)
    monkeypatch.setattr(device, "_nvidia_from_proc", lambda _: None)
    assert nvidia_card() is None


def test_nvidia_in_proc(tmp_path: Path) -> None:
    assert device._nvidia_from_proc(tmp_path) is None
    write(tmp_path / "gpus/0000:01:00.0/information", "Model: \t\t NVIDIA A10G\nIRQ:   \t 35\n")
    write(
        tmp_path / "version",
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 16 2025\nGCC 12\n",
    )
    assert device._nvidia_from_proc(tmp_path) == NvidiaCard(name="NVIDIA A10G", driver="570.86.15")


# Device


def test_a_device_from_facts(ram: None) -> None:
    found = probe(CUDA)
    assert (found.kind, found.name, found.torch_name) == ("cuda", CUDA.gpu, "cuda")
    context = load_costs().context_bytes  # torch's free memory is beside the probe's own
    assert (found.vram_bytes, found.vram_free_bytes) == (24 * GIB, 22 * GIB + context)
    full = CUDA.model_copy(update={"vram_free_bytes": CUDA.vram_bytes})
    assert probe(full).vram_free_bytes == CUDA.vram_bytes
    assert (found.driver, found.torch, found.notes) == ("580.65", "2.13.0+cu130", ())


def test_what_the_user_should_know_is_noted() -> None:
    facts = CUDA.model_copy(update={"gpus": 2})
    assert probe(facts).notes == ("There are 2 GPUs; the first is used.",)
    broken = TorchFacts(version="2", built_for="CUDA 13.0", gpu_error="no driver.")
    found = probe(broken)
    assert found.kind == "cpu"
    assert found.notes == ("The GPU is not used: no driver.",)


def test_without_torch_there_is_no_device() -> None:
    with pytest.raises(ToolError, match="torch can't be used: it is not installed") as caught:
        probe(TorchFacts(error="it is not installed."))
    assert "qit setup" in caught.value.hint


# torch: the real one, and invented ones


def test_the_real_torch_in_a_child() -> None:
    facts = probe_in_child()
    assert facts.error == ""
    assert facts.version
    found = probe(facts)
    assert found.ram_bytes > 0
    assert TorchFacts.from_json(facts.to_json()) == facts


def test_torch_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert torch_facts() == TorchFacts(error="it is not installed.")


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("raise OSError('libcudart.so.13: cannot open\\nmore')", "libcudart.so.13: cannot open."),
        ("import a_missing_part", "No module named 'a_missing_part'."),
        ("raise RuntimeError", "RuntimeError."),
    ],
)
def test_torch_that_breaks_at_import(
    source: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name == "torch" or name.startswith("torch.")]:
        monkeypatch.delitem(sys.modules, name)
    write(tmp_path / "torch.py", source)
    monkeypatch.syspath_prepend(tmp_path)
    assert torch_facts() == TorchFacts(error=error)


def child_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> str:
    write(tmp_path / "invented_probe.py", source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "invented_probe"


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_child_that_dies_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "import os, sys; sys.stderr.write('one\\ntwo\\nthree\\nfour\\n'); os.abort()"
    facts = probe_in_child(module=child_of(tmp_path, monkeypatch, source.replace("; ", "\n")))
    assert facts.error == "its process ended with code -6. two three four"


def test_a_child_that_hangs_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = child_of(tmp_path, monkeypatch, "import time\ntime.sleep(60)\n")
    assert probe_in_child(0.5, module).error == "it did not answer within 0.5 seconds."


def test_a_child_that_babbles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "print('a driver says hello')\nprint('{\"version\": \"2.13.0\"}')"
    assert probe_in_child(module=child_of(tmp_path, monkeypatch, source)).version == "2.13.0"
    source = "print('nonsense')"
    facts = probe_in_child(module=child_of(tmp_path, monkeypatch, source))
    assert facts.error == "its process ended with code 0."


def invented(**changes: Any) -> SimpleNamespace:
    """A torch build for CUDA on a machine with an RTX 4090."""
    properties = SimpleNamespace(name="RTX 4090", major=8, minor=9, is_integrated=0)
    cuda = SimpleNamespace(
        is_available=lambda: True,
        get_device_properties=lambda _: properties,
        mem_get_info=lambda _: (20 * GIB, 24 * GIB),
        device_count=lambda: 1,
        is_bf16_supported=lambda including_emulation: True,
    )
    total = SimpleNamespace(item=lambda: 4)
    tensor = SimpleNamespace(sum=lambda: total)
    ones = type("Ones", (), {"__add__": lambda self, other: tensor})()
    torch = SimpleNamespace(
        __version__="2.13.0+cu130",
        version=SimpleNamespace(cuda="13.0", hip=None, xpu=None),
        cuda=cuda,
        ones=lambda size, device: ones,
        cpu=SimpleNamespace(get_capabilities=lambda: {"avx512_bf16": True}),
        backends=SimpleNamespace(mps=SimpleNamespace(is_built=lambda: False)),
    )
    for path, value in changes.items():
        *parents, last = path.split("__")
        place: Any = torch
        for parent in parents:
            place = getattr(place, parent)
        setattr(place, last, value)
    return torch


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., TorchFacts]:
    def facts(**changes: Any) -> TorchFacts:
        monkeypatch.setitem(sys.modules, "torch", invented(**changes))
        return torch_facts()

    monkeypatch.setattr(
        "qwen_image_tool.engine.probe.nvidia_card", lambda: NvidiaCard(name="x", driver="580.65")
    )
    return facts


def test_a_cuda_card(pretend: Callable[..., TorchFacts]) -> None:
    facts = pretend()
    assert facts == CUDA.model_copy(update={"gpu": "RTX 4090", "vram_free_bytes": 20 * GIB})
    assert probe(facts).kind == "cuda"


def test_a_cuda_build_without_a_driver(pretend: Callable[..., TorchFacts]) -> None:
    facts = pretend(cuda__is_available=lambda: False)
    assert (facts.kind, facts.bf16) == ("cpu", True)
    assert facts.gpu_error == "torch is built for CUDA 13.0 and finds no GPU with a driver."


def test_a_driver_that_is_too_old(pretend: Callable[..., TorchFacts]) -> None:
    def available() -> bool:
        import warnings

        warnings.warn("The NVIDIA driver on your system is too old\nsee", stacklevel=1)
        return False

    facts = pretend(cuda__is_available=available)
    assert facts.gpu_error == "The NVIDIA driver on your system is too old"


def test_a_card_that_the_build_has_no_kernels_for(pretend: Callable[..., TorchFacts]) -> None:
    def ones(size: int, device: str) -> None:
        raise RuntimeError("CUDA error: no kernel image is available\nmore")

    facts = pretend(ones=ones)
    assert (facts.kind, facts.gpu) == ("cpu", "")
    assert facts.gpu_error == "CUDA error: no kernel image is available."


def test_an_amd_card(pretend: Callable[..., TorchFacts]) -> None:
    properties = SimpleNamespace(name="Strix Halo", gcnArchName="gfx1151", is_integrated=1)
    facts = pretend(
        version__cuda=None,
        version__hip="7.2.26015",
        cuda__get_device_properties=lambda _: properties,
    )
    assert (facts.kind, facts.built_for, facts.capability) == ("rocm", "ROCm 7.2", "gfx1151")
    found = probe(facts)
    assert (found.torch_name, found.shared_memory) == ("cuda", True)


def test_an_intel_card(pretend: Callable[..., TorchFacts]) -> None:
    properties = SimpleNamespace(
        name="Arc B580",
        has_subgroup_matrix_multiply_accumulate=True,
        is_integrated_gpu=False,
        driver_version="1.6",
    )
    xpu = SimpleNamespace(
        is_available=lambda: True,
        get_device_properties=lambda _: properties,
        mem_get_info=lambda _: (10 * GIB, 12 * GIB),
        device_count=lambda: 1,
    )
    facts = pretend(version__cuda=None, version__xpu="20250302", xpu=xpu)
    assert (facts.kind, facts.vram_bytes, facts.driver) == ("xpu", 12 * GIB, "1.6")


def test_an_apple_chip(pretend: Callable[..., TorchFacts]) -> None:
    facts = pretend(
        version__cuda=None,
        backends__mps=SimpleNamespace(is_built=lambda: True, is_available=lambda: True),
        mps=SimpleNamespace(
            recommended_max_memory=lambda: 20 * GIB, driver_allocated_memory=lambda: GIB
        ),
    )
    assert (facts.kind, facts.built_for, facts.vram_free_bytes) == ("mps", "MPS", 19 * GIB)
    assert probe(facts).shared_memory


def test_a_build_for_the_cpu_alone(
    pretend: Callable[..., TorchFacts], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is a card, it is said why that is not used."""
    build = {"version__cuda": None, "cpu__get_capabilities": lambda: {"avx2": True}}
    said = "this torch was built without support for the x."
    assert pretend(**build) == TorchFacts(version="2.13.0+cu130", bf16=False, gpu_error=said)
    monkeypatch.setattr("qwen_image_tool.engine.probe.nvidia_card", lambda: None)
    assert pretend(**build) == TorchFacts(version="2.13.0+cu130", bf16=False)


def test_what_was_seen_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until torch is another one, or the machine is started again."""
    kept = tmp_path / "new" / "device.json"
    assert last_look(kept) is None
    facts = TorchFacts(kind="cuda", gpu="a card", version="2.13.0")
    monkeypatch.setattr(device, "probe_in_child", lambda: facts)
    assert look(kept) == last_look(kept) == facts
    with monkeypatch.context() as patch:
        patch.setattr(psutil, "boot_time", lambda: 12345.0)
        assert last_look(kept) is None
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda _: "9.9")
        assert last_look(kept) is None
    kept.write_text("{", encoding="utf-8")
    assert last_look(kept) is None


@pytest.mark.parametrize("trouble", ["error", "gpu_error"])
def test_what_went_wrong_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    facts = TorchFacts().model_copy(update={trouble: "the driver is too old."})
    monkeypatch.setattr(device, "probe_in_child", lambda: facts)
    assert look(tmp_path / "device.json") == facts
    assert last_look(tmp_path / "device.json") is None


def test_a_cache_that_can_not_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(device, "probe_in_child", TorchFacts)
    assert look(tmp_path / "file" / "device.json") == TorchFacts()
