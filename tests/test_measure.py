"""Measuring a device: real figures of this CPU, and GPUs whose kernels and compilers fail."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from qwen_image_tool.engine import attention, measure
from qwen_image_tool.types import Device, Rates

CPU = Device(kind="cpu", name="CPU", ram_bytes=1 << 30, ram_free_bytes=1 << 30)


def on(kind: str) -> Device:
    return CPU.model_copy(update={"kind": kind, "name": f"a {kind} device"})


def test_this_cpu(tmp_path: Path) -> None:
    rates = measure.measure(CPU, tmp_path)
    assert 1e8 < rates.matmul < 1e15
    assert 1e8 < rates.attention < 1e15
    assert 1e8 < rates.memory < 1e13
    assert rates.bus == rates.pageable == rates.disk == 0
    assert not rates.attention_backend
    assert not rates.compiler


# A GPU's children, for which a small program stands


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the children be a program; it finds its arguments in `sys.argv[1:]`."""
    start = subprocess.Popen

    def become(code: str) -> None:
        def replace(command: list[str], **kwargs: Any) -> Any:
            arguments = command[command.index("-m") + 2 :]
            return start([sys.executable, "-c", f"import os, sys\n{code}", *arguments], **kwargs)

        monkeypatch.setattr(subprocess, "Popen", replace)

    return become


SPEEDS = 'print(\'{"matmul": 1e14, "attention_backend": "_native_cudnn"}\')'
MEASURED = Rates(matmul=1e14, attention_backend="_native_cudnn")


def test_a_gpu_is_asked_in_children(child: Any, tmp_path: Path) -> None:
    child(
        f"assert os.environ['TORCHINDUCTOR_CACHE_DIR'] == {str(tmp_path)!r}\n"
        f"print('a library says hello')\n"
        f"print('works') if sys.argv[1:] == ['cuda', 'compiler'] else {SPEEDS}"
    )
    expected = MEASURED.model_copy(update={"compiler": True})
    assert measure.measure(on("cuda"), tmp_path) == expected
    assert measure.measure(on("rocm"), tmp_path) == expected


def test_the_compiler_for_metal_is_not_asked(child: Any, tmp_path: Path) -> None:
    child(f"print('works') if sys.argv[2:] else {SPEEDS}")
    assert measure.measure(on("mps"), tmp_path) == MEASURED


@pytest.mark.parametrize(
    "end", ["os.abort()", "raise RuntimeError('no C compiler')", "sys.exit(3)"]
)
def test_a_compiler_that_fails_costs_the_compiler(
    end: str, child: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    child(f"if sys.argv[2:]:\n    print('works', flush=True)\n    {end}\n{SPEEDS}")
    with caplog.at_level(logging.WARNING):
        assert measure.measure(on("cuda"), tmp_path) == MEASURED
    assert "ended with code" in caplog.text


def test_kernels_that_crash_leave_nothing_measured(child: Any, tmp_path: Path) -> None:
    child("print('works') if sys.argv[2:] else os.abort()")
    assert measure.measure(on("cuda"), tmp_path) == Rates(compiler=True)


def test_a_child_that_hangs_is_ended(
    child: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child("import time; time.sleep(600)")
    monkeypatch.setattr(measure, "CHILD_SECONDS", 0.5)
    assert measure.measure(on("cuda"), tmp_path) == Rates()


def test_the_child_answers(tmp_path: Path) -> None:
    """The real one, on the device there is."""
    found = measure._answer(measure._child(CPU, tmp_path))
    assert Rates.from_json(found).matmul > 0


# Attention


@pytest.mark.parametrize("change", [0.99, torch.nan])
def test_a_backend_must_agree(change: float, monkeypatch: pytest.MonkeyPatch) -> None:
    states = torch.randn(3, 1, 65, 2, 16, generator=torch.Generator().manual_seed(0)).unbind()
    assert attention.agrees("_native_math", states)
    real = attention.attend
    monkeypatch.setattr(
        attention, "attend", lambda name, *a: real(name, *a) * (change if name else 1)
    )
    assert not attention.agrees("_native_math", states)


def test_the_fastest_that_agrees_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention by backends of invented speeds: one is not there, one gives something else."""
    speed = {"": 1.0, "_native_cudnn": 1.02, "_native_flash": 1.3, "flash": 9.0, "_flash_3": 9.0}

    def attend(backend: str, *states: torch.Tensor) -> torch.Tensor:
        if backend == "_flash_3":
            raise TypeError("'NoneType' object is not callable")
        return states[0] * (2 if backend == "flash" else 1)

    def attention_of(_clock: object, backend: str) -> float:
        if not attention.agrees(backend, torch.ones(3, 1, 4, 1, 2).unbind()):
            raise ValueError("it gives something else")
        return speed[backend]

    monkeypatch.setattr(attention, "attend", attend)
    monkeypatch.setattr(measure, "_attention", attention_of)
    for name in ("_matmul", "_memory", "_bus", "_staging"):
        monkeypatch.setattr(measure, name, refuse)
    found = measure.speeds(torch.device("cuda"))
    assert found == Rates(attention=1.3, attention_backend="_native_flash")
    speed["_native_flash"] = 1.01
    assert measure.speeds(torch.device("cuda")) == Rates(attention=1.0), "a lead of 2 % is noise"


def refuse(_clock: object) -> float:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_backend_is_set_for_these_blocks_alone() -> None:
    blocks = list(tiny.pipeline(layers=3).transformer.transformer_blocks)
    attention.use(blocks[:2], "_native_math")
    names = [block.attn.processor._attention_backend for block in blocks]
    assert [getattr(name, "value", None) for name in names] == ["_native_math"] * 2 + [None]
    attention.use(blocks, "")
    assert all(block.attn.processor._attention_backend is None for block in blocks)


def test_no_backend_in_8_bits_is_asked() -> None:
    assert not [name for name in attention.CANDIDATES if "sage" in name or "fp8" in name]
