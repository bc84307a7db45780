"""Every test runs in a home of its own, and torch in few threads: its models are tiny."""

import functools
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_image_tool import device
from running import keep_bytecode

os.environ.setdefault("OMP_NUM_THREADS", "1")
keep_bytecode(Path(__file__).parent.parent / ".venv" / "bytecode")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private QIT_HOME and current folder; nothing of the user's is read or written."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("QIT_HOME", str(home))
    for name in ("QIT_OUTPUT", "QIT_MODELS", "QIT_CACHE", "QIT_LOGS", "QIT_DATA", "QIT_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return home


@pytest.fixture(scope="session")
def _ask_torch_once() -> Callable[[], device.TorchFacts]:
    return functools.cache(device.probe_in_child)


@pytest.fixture
def torch_asked_once(
    _ask_torch_once: Callable[[], device.TorchFacts], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch says of this machine takes seconds, and is the same in every test."""
    monkeypatch.setattr(device, "probe_in_child", _ask_torch_once)


@pytest.fixture(scope="session")
def repos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models in the layout of the hub's: `20b` and `21`. Made once, and only read."""
    import tiny

    root = tmp_path_factory.mktemp("repos")
    tiny.save(root / "20b")
    tiny.save_21(root / "21")
    return root
