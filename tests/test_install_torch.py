"""Which torch build a machine gets, and what happens where that build cannot be had."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import install_torch
from install_torch import Choice, Gpu, Machine, SetUpError, choose, install, linux_gpus


def linux(*gpus: Gpu) -> Machine:
    return Machine("Linux", "x86_64", gpus)


def windows(*gpus: Gpu) -> Machine:
    return Machine("Windows", "AMD64", gpus)


RTX_4060 = Gpu("nvidia", "NVIDIA GeForce RTX 4060", 580, (8, 9))
ARC = Gpu("intel", "Intel Arc (0x56a0)")


@pytest.mark.parametrize(
    ("machine", "backend", "says"),
    [
        (linux(), "cpu", "no GPU"),
        (linux(RTX_4060), "cu130", "RTX 4060, driver 580"),
        (windows(RTX_4060), "cu130", "RTX 4060"),
        (linux(Gpu("nvidia", "RTX 3090", 550, (8, 6))), "cu126", "driver 550"),
        (linux(Gpu("nvidia", "GTX 1080 Ti", 580, (6, 1))), "cu126", "GTX 1080 Ti"),
        (linux(Gpu("nvidia", "RTX 3090", 470, (8, 6))), "cpu", "update it to 580"),
        (windows(Gpu("nvidia", "RTX 3090", 527, (8, 6))), "cpu", "update it to 580"),
        (linux(Gpu("nvidia", "RTX 5090", 570, (12, 0))), "cpu", "update it to 580"),
        (linux(Gpu("nvidia", "Tesla K80", 470, (3, 7))), "cpu", "too old"),
        (linux(Gpu("nvidia", "an NVIDIA GPU")), "cpu", "install NVIDIA's driver 580"),
        (linux(Gpu("nvidia", "GT 710", 580, (3, 5)), RTX_4060), "cu130", "RTX 4060"),
        (linux(Gpu("amd", "gfx1100")), "rocm7.2", "gfx1100"),
        (linux(Gpu("amd", "gfx1036")), "cpu", "gfx1036 is not among"),
        (linux(Gpu("amd", "gfx1036"), RTX_4060), "cu130", "RTX 4060"),
        (windows(Gpu("amd", "AMD Radeon RX 7900 XTX")), "cpu", "on Linux only"),
        (linux(ARC), "xpu", "Arc"),
        (linux(Gpu("nvidia", "an NVIDIA GPU"), ARC), "xpu", "Arc"),
        (Machine("Darwin", "arm64"), "default", "Apple silicon"),
    ],
)
def test_the_build_follows_the_gpu_and_its_driver(
    machine: Machine, backend: str, says: str
) -> None:
    choice = choose(machine)
    assert choice.backend == backend
    assert says in choice.reason


def test_an_intel_mac_is_told_that_torch_is_gone() -> None:
    with pytest.raises(SetUpError, match="Intel"):
        choose(Machine("Darwin", "x86_64"))


def test_linux_gpus_are_read_from_sys(tmp_path: Path) -> None:
    for name, kind, vendor, model in [
        ("0000:00:02.0", "0x030000", "0x8086", "0x46a6"),  # Iris Xe: no torch for it
        ("0000:01:00.0", "0x030200", "0x10de", "0x2330"),
        ("0000:02:00.0", "0x030000", "0x8086", "0x56a0"),
        ("0000:03:00.0", "0x020000", "0x10de", "0x0001"),  # not a GPU
    ]:
        device = tmp_path / "sys/bus/pci/devices" / name
        device.mkdir(parents=True)
        for file, content in (("class", kind), ("vendor", vendor), ("device", model)):
            (device / file).write_text(content + "\n")
    for node, version in (("0", "0"), ("1", "90010"), ("2", "110001")):
        folder = tmp_path / "sys/class/kfd/kfd/topology/nodes" / node
        folder.mkdir(parents=True)
        (folder / "properties").write_text(f"simd_count 1\ngfx_target_version {version}\n")
    assert [(gpu.vendor, gpu.name) for gpu in linux_gpus(tmp_path)] == [
        ("amd", "gfx90a"),
        ("amd", "gfx1101"),
        ("nvidia", "an NVIDIA GPU"),
        ("intel", "Intel Arc (0x56a0)"),
    ]


def test_nvidia_smi_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "NVIDIA H100 80GB HBM3, 580.95.05, 9.0\nTesla T4, 581.29, 7.5\nodd line\n"
    monkeypatch.setattr(install_torch, "output", lambda command: lines)
    assert install_torch.nvidia_gpus() == [
        Gpu("nvidia", "NVIDIA H100 80GB HBM3", 580, (9, 0)),
        Gpu("nvidia", "Tesla T4", 581, (7, 5)),
    ]


def test_windows_gpus_are_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "Intel(R) UHD Graphics\r\nIntel(R) Arc(TM) A770 Graphics\r\nAMD Radeon RX 7600\r\n"
    monkeypatch.setattr(install_torch, "output", lambda command: lines)
    assert [gpu.vendor for gpu in install_torch.windows_gpus()] == ["intel", "amd"]


Installed = Callable[..., list[str]]


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installed:
    """Install on a machine, with a uv and a Python that only answer; returns uv's commands."""
    if os.name == "nt":
        pytest.skip("the fakes are shell scripts")

    def installed(
        choice: Choice, *, present: str = "", index: bool = True, **environ: str
    ) -> list[str]:
        log = tmp_path / "log"
        uv = program(
            tmp_path / "uv",
            f'case "$*" in *--torch-backend*) {"" if index else "exit 2"} ;; esac',
            f'case "$*" in *--dry-run*) ;; *) echo "$*" >> {log} ;; esac',
        )
        python = program(tmp_path / "python", f"echo {present}" if present else "exit 1")
        monkeypatch.setattr(install_torch, "detect", linux)
        monkeypatch.setattr(install_torch, "choose", lambda machine: choice)
        environ["PATH"] = os.environ["PATH"]
        assert install(str(uv), python, environ) == environ.get("QIT_TORCH_BACKEND", choice.backend)
        text = log.read_text() if log.exists() else ""
        return text.replace(str(tmp_path), "").splitlines()

    return installed


def program(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


CUDA, CPU = Choice("cu130", "a GPU"), Choice("cpu", "no GPU")
DEFAULT = "pip install --python /python torch==2.13.0"


def test_the_build_comes_from_its_own_index(commands: Installed) -> None:
    [command] = commands(CUDA)
    assert command.startswith(f"{DEFAULT} --reinstall-package torch --torch-backend=cu130")


def test_apple_silicon_takes_the_default_build(commands: Installed) -> None:
    [command] = commands(Choice("default", "Apple"))
    assert command.removesuffix(" --quiet") == DEFAULT


@pytest.mark.parametrize("present", ["2.13.0+cu130", "2.11.0+cu130"])
def test_the_right_torch_is_kept(commands: Installed, present: str) -> None:
    assert commands(CUDA, present=present) == []


@pytest.mark.parametrize("present", ["2.13.0+cpu", "2.10.1+cu130", "2.13.0+cu126"])
def test_another_torch_is_replaced(commands: Installed, present: str) -> None:
    assert len(commands(CUDA, present=present)) == 1


def test_any_build_will_do_for_the_cpu(commands: Installed) -> None:
    assert commands(CPU, present="2.13.0+cu130") == []


def test_without_the_index_the_default_build_comes_from_pypi(
    commands: Installed, capfd: pytest.CaptureFixture[str]
) -> None:
    [command] = commands(CPU, index=False)
    assert command.startswith(DEFAULT)
    assert "--torch-backend" not in command
    said = capfd.readouterr().err
    assert "download.pytorch.org cannot be reached" in said
    assert "PyPI" in said


def test_without_the_index_a_torch_that_works_is_kept(commands: Installed) -> None:
    assert commands(CUDA, present="2.13.0+cpu", index=False) == []
    assert len(commands(CUDA, present="2.9.0+cpu", index=False)) == 1


def test_the_user_may_name_the_build(commands: Installed) -> None:
    [command] = commands(CUDA, present="2.13.0+cu130", QIT_TORCH_BACKEND="cpu")
    assert "--torch-backend=cpu" in command
    with pytest.raises(SetUpError, match="for rocm7"):
        commands(CUDA, index=False, QIT_TORCH_BACKEND="rocm7.2")
