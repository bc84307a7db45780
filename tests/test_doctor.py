"""Doctor: invented machines, and this one."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from qwen_image_tool import doctor
from qwen_image_tool.device import Commit, NvidiaCard, TorchFacts
from qwen_image_tool.doctor import (
    Check,
    Folder,
    Machine,
    examine,
    gather,
    read_folder,
    worst,
)
from qwen_image_tool.settings import load_settings

GIB = 1 << 30
CARD = NvidiaCard(name="RTX 4090", driver="580.65.06")
GOOD = Machine(
    system="linux",
    python=(3, 12, 4),
    packages={"torch": "2.13.0+cu130", "diffusers": "0.42.1", "transformers": "5.23.0"},
    torch=TorchFacts(
        version="2.13.0+cu130",
        built_for="CUDA 13.0",
        kind="cuda",
        gpu="RTX 4090",
        vram_bytes=24 * GIB,
        vram_free_bytes=23 * GIB,
    ),
    nvidia=CARD,
    ram_bytes=64 * GIB,
    ram_free_bytes=50 * GIB,
    folders=(
        Folder(role="output", path="/home/x/output", free_bytes=100 * GIB),
        Folder(role="models", path="/home/x/models", free_bytes=100 * GIB),
    ),
)
CPU = TorchFacts(version="2.13.0+cpu")


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def findings(**changes: Any) -> dict[str, Check]:
    """What is not well, by name."""
    checks = examine(GOOD.model_copy(update=changes))
    assert all(bool(check.next_step) == (check.status != "pass") for check in checks)
    return {check.name: check for check in checks if check.status != "pass"}


def test_a_good_machine() -> None:
    assert findings() == {}
    checks = examine(GOOD)
    assert worst(checks) == "pass"
    assert "23.0 GiB free of 24.0 GiB." in [check.finding for check in checks]


def test_worst() -> None:
    checks = [Check(name="a", status=s, finding="x") for s in ("pass", "warn", "fail")]
    assert [worst(tuple(checks[:n])) for n in range(4)] == ["pass", "pass", "warn", "fail"]


def test_old_python() -> None:
    check = findings(python=(3, 10, 9))["Python"]
    assert check.status == "fail"
    assert "3.10.9" in check.finding


@pytest.mark.parametrize(
    ("version", "words"),
    [("2.9.1", "torch 2.9.1 is older than 2.11."), ("", "torch is not installed.")],
)
def test_old_and_missing_packages(version: str, words: str) -> None:
    check = findings(packages={**GOOD.packages, "torch": version})["torch"]
    assert (check.status, check.finding) == ("fail", words)


def test_torch_that_cannot_be_used() -> None:
    check = findings(torch=TorchFacts(error="it is not installed."))["GPU"]
    assert check.status == "fail"
    assert "./qit setup" in check.next_step


def test_an_nvidia_card_and_torch_for_the_cpu_alone() -> None:
    check = findings(torch=CPU)["GPU"]
    assert (check.status, "RTX 4090" in check.finding) == ("warn", True)
    assert "`QIT_TORCH_BACKEND=cu126 ./qit setup`" in check.next_step
    check = findings(torch=CPU, system="win32")["GPU"]
    assert "`set QIT_TORCH_BACKEND=cu126& qit setup`" in check.next_step


def test_a_driver_that_is_too_old() -> None:
    torch = TorchFacts(version="2.13.0+cu130", built_for="CUDA 13.0", gpu_error="it is too old.")
    found = findings(torch=torch, nvidia=NvidiaCard(name="RTX 4090", driver="570.86"))
    assert found["GPU"].finding.endswith("can't use the RTX 4090: it is too old.")
    assert found["Driver"].finding.startswith("NVIDIA driver 570.86 is older than 580")
    torch12 = torch.model_copy(update={"built_for": "CUDA 12.6"})
    assert "Driver" not in findings(torch=torch12, nvidia=CARD)


def test_an_old_driver_that_works_is_left_alone() -> None:
    assert findings(nvidia=NvidiaCard(name="RTX 4090", driver="535.1")) == {}


def test_no_gpu_at_all() -> None:
    found = findings(torch=CPU, nvidia=None)
    assert list(found) == ["GPU"]
    assert found["GPU"].status == "warn"
    amd = TorchFacts(version="2.13.0", built_for="ROCm 7.2", gpu_error="HIP error: no device.")
    assert findings(torch=amd, nvidia=None)["GPU"].finding.endswith("HIP error: no device.")


def test_little_memory() -> None:
    torch = GOOD.torch.model_copy(update={"vram_free_bytes": GIB})
    found = findings(ram_free_bytes=3 * GIB, torch=torch)
    assert found["RAM"].finding == "3.0 GiB free of 64.0 GiB."
    assert found["VRAM"].finding == "1.0 GiB free of 24.0 GiB."


def test_shared_memory_is_counted_once() -> None:
    torch = GOOD.torch.model_copy(update={"shared_memory": True, "vram_free_bytes": 0})
    assert findings(torch=torch) == {}


def test_windows_page_file() -> None:
    low = Commit(limit_bytes=66 * GIB, free_bytes=20 * GIB)
    check = findings(system="win32", commit=low)["Page file"]
    assert "20.0 GiB more of 66.0 GiB (2.0 GiB of them are page file)" in check.finding
    assert findings(system="win32", commit=Commit(limit_bytes=96 * GIB, free_bytes=40 * GIB)) == {}


def test_folders() -> None:
    broken = Folder(role="output", path="/x", error="Permission denied")
    full = Folder(role="logs", path="/y", free_bytes=1000)
    found = findings(folders=(broken, full))
    assert found["Folder for output"].status == "fail"
    assert found["Folder for output"].next_step.endswith("QIT_OUTPUT.")
    assert found["Folder for logs"].status == "warn"


def test_the_practice_model() -> None:
    check = findings(practice_error="The file model.safetensors is missing.")["Practice model"]
    assert (check.status, check.finding) == ("fail", "The file model.safetensors is missing.")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437", "no-such-encoding"])
def test_a_terminal_that_cannot_write_chinese(encoding: str) -> None:
    assert "LANG" in findings(stdout_encoding=encoding)["Terminal"].next_step
    windows = findings(stdout_encoding=encoding, system="win32")["Terminal"]
    assert "chcp 65001" in windows.next_step


def test_file_names() -> None:
    assert findings(file_name_error="Invalid argument")["File names"].status == "warn"
    deep = (Folder(role="models", path="C:\\" + "x" * 200, free_bytes=9 * GIB),)
    found = findings(system="win32", folders=deep, long_paths=False)
    assert "203 characters" in found["File names"].finding
    assert findings(system="win32", folders=deep, long_paths=True) == {}


# Reading


def test_folders_are_really_written_to(empty: Path) -> None:
    found = read_folder("output", empty / "not" / "there")
    assert (found.error, found.free_bytes > 0) == ("", True)
    assert list(empty.iterdir()) == []
    (empty / "file").write_text("")
    assert read_folder("output", empty / "file" / "x").error.endswith("file is not a folder")
    assert read_folder("output", Path("~nobody-of-this-name/x")).error


def test_this_machine(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QIT_HOME", str(empty))
    monkeypatch.chdir(empty)
    machine = gather(load_settings(), CPU)
    assert machine.ram_bytes > 0
    assert machine.packages["diffusers"]
    assert machine.file_name_error == ""
    assert list(empty.iterdir()) == []
    assert {"Python", "GPU", "RAM", "Folder for output"} <= {c.name for c in examine(machine)}
    assert Machine.from_json(machine.to_json()) == machine


def test_the_oldest_versions_are_those_of_the_project_file() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())[
        "project"
    ]
    for name, oldest in doctor.OLDEST.items():
        wanted = f"{name}>={oldest}"
        assert any(d.split(",")[0] == wanted for d in project["dependencies"]), wanted
    assert project["requires-python"] == ">=" + ".".join(map(str, doctor.OLDEST_PYTHON))
