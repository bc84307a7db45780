"""The rules of the house: imports go downward, and only the engine loads torch and diffusers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qwen_image_tool

ROOT = Path(qwen_image_tool.__file__).parent
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "safetensors"}
SLOW = HEAVY | {"gradio"}  # for a face to start
# Lowest first; a module may import from its own line's left and from any line above.
LEVELS = [
    ["errors", "types"],
    ["files", "catalog", "settings", "logs", "decoding", "libraries", "rates"],
    ["device", "store", "database", "gallery", "jobs"],
    ["needs", "planner", "doctor", "gauges"],
    ["engine"],
    ["messages", "progress", "exits", "lifeline", "supervisor", "transfers", "feed"],
    ["diagnostics", "app", "service"],
    ["server", "ui", "worker", "cli"],
]
RANK = {name: (level, place) for level, row in enumerate(LEVELS) for place, name in enumerate(row)}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downward(path: Path) -> None:
    here = room(path)
    if here == "__init__":
        return
    assert here in RANK, f"{here} has no place in LEVELS"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "qwen_image_tool" or len(parts) < 2 or parts[1] not in RANK:
            continue
        other = parts[1]
        assert other == here or RANK[other] < RANK[here], f"{here} imports {other}, above it"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_engine_imports_torch(path: Path) -> None:
    heavy = {name.split(".")[0] for name in imports(path)} & HEAVY
    assert not heavy or room(path) == "engine", f"{path} imports {heavy}"


LIGHT = [
    *("cli", "app", "gallery", "planner", "doctor", "device", "service", "server.run", "worker"),
    "ui.host",
]


@pytest.mark.parametrize("module", LIGHT)
def test_importing_a_face_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, qwen_image_tool.{module}\nprint(sorted({SLOW!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
