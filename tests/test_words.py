"""The page says everything in both languages."""

import ast
import json
import re
import string
from collections.abc import Iterator
from pathlib import Path

import pytest

import qwen_image_tool.ui
from qwen_image_tool.app import BF16_ALONE
from qwen_image_tool.catalog import load_catalog
from qwen_image_tool.catalog.sizes import RESOLUTIONS
from qwen_image_tool.device import ENLARGE_PAGE_FILE, Commit, NvidiaCard, TorchFacts, invented
from qwen_image_tool.doctor import Folder, Machine, examine
from qwen_image_tool.errors import TROUBLES, CannotRun, ToolError
from qwen_image_tool.planner import plans
from qwen_image_tool.settings import Settings
from qwen_image_tool.store import as_published
from qwen_image_tool.types import KINDS, LIMITS, Device, Rates, Request, Size
from qwen_image_tool.ui.kit import sentence
from qwen_image_tool.ui.words import load_words

UI = Path(qwen_image_tool.ui.__file__).parent
PROGRAM = UI.parent
# Their errors reach no page: faces, and what starts the server
ELSEWHERE = ("cli", "server", "practice", "rates.py", "measure.py")


def said() -> set[str]:
    """Every sentence that a module of the page says through its words."""
    return {text for path in UI.glob("*.py") for text in _said(path)} | set(RESOLUTIONS)


def _said(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and _is_words(node.func) and node.args:
            assert isinstance(node.args[0], ast.Constant | ast.Name), ast.unparse(node)
            if isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)


def _is_words(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name == "t"


def tables(folder: str = "zh") -> dict[str, dict[str, str]]:
    return {path.name: json.loads(path.read_text("utf-8")) for path in UI.glob(f"{folder}/*.json")}


def test_every_sentence_is_said_in_chinese() -> None:
    known = {text for table in tables().values() for text in table}
    heard = {text for table in tables("zh/heard").values() for text in table}
    assert said() - known - heard == set()
    assert known - said() == set(), "nobody says these any more"


def test_what_the_program_says_is_said_in_chinese() -> None:
    zh = load_words("zh")
    for trouble in TROUBLES.values():
        for text in filter(None, trouble):
            assert chinese(zh.known(text)), text


def test_errors_are_said_in_chinese() -> None:
    zh = load_words("zh")
    for text in sorted(set(refusals()) - MADE_OF_PARTS):
        told = re.sub("`[^`]*`", "", zh.known(sentence(zh, text)))
        assert re.search("[\u4e00-\u9fff]", told), text
        assert chinese(told), text


FILLED = "X1"
MADE_OF_PARTS = {
    "X1.",
    "X1 X1.",
    "X1 is X1.",
    "X1: X1",
    "The file X1 X1.",
    "`qit models download X1` X1",
}


def refusals() -> Iterator[str]:
    """What errors of the program say, by its source: their sentences, filled in."""
    errors = error_names()
    for path in PROGRAM.rglob("*.py"):
        if path.relative_to(PROGRAM).parts[0] not in ELSEWHERE:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") in errors:
                    texts = (filled(one) for one in node.args)
                    yield from (text for text in texts if text.endswith((".", ":", "`")))


def error_names() -> set[str]:
    """ToolError and the classes made from it."""
    found = [ToolError]
    for one in found:
        found.extend(one.__subclasses__())
    return {one.__name__ for one in found}


def filled(node: ast.expr) -> str:
    """A text of the source with something in its fields; empty where it is none."""
    match node:
        case ast.Constant(str(text)):
            return text
        case ast.JoinedStr(parts):
            return "".join(filled(part) or FILLED for part in parts)
        case ast.BinOp(left, ast.Add(), right):
            return filled(left) + filled(right)
    return ""


def test_what_a_field_may_be_is_said_in_chinese() -> None:
    zh = load_words("zh")
    for text in (*KINDS.values(), *LIMITS.values()):
        assert chinese(zh.known(text.format(7))), text


@pytest.mark.parametrize("why", ["std::bad_alloc", "[Errno 12] Cannot", "MemoryError", "A b. C d"])
def test_why_memory_ran_out_is_told_as_it_is(why: str) -> None:
    assert load_words("zh").known(f"The memory ran out. {why}.").startswith("内存或显存不足")


def test_what_is_declared_is_said_in_chinese() -> None:
    zh = load_words("zh")
    fields = [field for field in Settings.model_fields.values() if field.title]
    later = [model.unsupported for model in load_catalog().models if model.unsupported]
    for text in [*later, *(said for field in fields for said in (field.title, field.description))]:
        assert text
        assert re.search("[\u4e00-\u9fff]", zh.known(text)), text


@pytest.mark.parametrize("name", ["pass", "warn", "fail"])
def test_what_the_doctor_finds_is_said_in_chinese(name: str) -> None:
    """On machines that have everything, and on one that has nothing."""
    zh = load_words("zh")
    for checked in machines()[name]:
        for check in examine(checked):
            for text in (check.name, check.finding, check.next_step):
                assert chinese(zh.known(sentence(zh, text))), text


def machines() -> dict[str, list[Machine]]:
    """Invented ones for the doctor."""
    folder = Folder(role="models", path="/models", free_bytes=2**40)
    card = NvidiaCard(name="RTX 4090", driver="580.1")
    gpu = TorchFacts(version="2.13", built_for="CUDA 13.0", kind="cuda", gpu="RTX 4090")
    packages = {"torch": "2.13", "diffusers": "0.43", "transformers": "6.0"}
    full = Machine(
        system="win32",
        python=(3, 13, 1),
        packages=packages,
        torch=gpu.model_copy(update={"vram_bytes": 2**34, "vram_free_bytes": 2**34}),
        nvidia=card,
        ram_bytes=2**36,
        ram_free_bytes=2**36,
        commit=Commit(limit_bytes=2**37, free_bytes=2**37),
        folders=(folder,),
    )
    no_gpu = TorchFacts(version="2.13")
    low = full.model_copy(
        update={
            "ram_free_bytes": 1,
            "torch": gpu.model_copy(update={"vram_bytes": 2**34}),
            "commit": Commit(limit_bytes=2**37, free_bytes=1),
            "folders": (folder.model_copy(update={"free_bytes": 1, "path": "/" * 200}),),
            "long_paths": False,
            "stdout_encoding": "ascii",
        }
    )
    warned = [
        low,
        low.model_copy(update={"torch": no_gpu}),
        low.model_copy(update={"torch": no_gpu, "nvidia": None, "system": "linux"}),
        low.model_copy(
            update={"torch": gpu.model_copy(update={"gpu": "", "gpu_error": "no kernel."})}
        ),
    ]
    broken = full.model_copy(
        update={
            "python": (3, 9, 0),
            "packages": {"torch": "1.0"},
            "torch": TorchFacts(built_for="CUDA 13.0", error="broken."),
            "nvidia": card.model_copy(update={"driver": "470.1"}),
            "folders": (folder.model_copy(update={"error": "denied"}),),
            "practice_error": "The file x is missing.",
            "file_name_error": "denied",
        }
    )
    return {"pass": [full], "warn": warned, "fail": [broken]}


@pytest.mark.parametrize("model", ["qwen-image-2512", "qwen-image-2.1"])
def test_reasons_of_plans_are_said_in_chinese(model: str) -> None:
    """On cards and memories of many sizes, with everything that planner says of them."""
    zh, installed = load_words("zh"), as_published(load_catalog().find(model))
    request = installed.model.resolve(Request(model=model, prompt="x", size=Size(1600, 900)), 0)
    for vram in (None, 4, 24, 90):
        for ram in (8, 24, 64):
            for mode in ("default", "exact"):
                asked = request.model_copy(update={"mode": mode})
                for plan in plans(asked, installed, machine(ram, vram), anyway=True):
                    for reason in plan.reasons:
                        assert chinese(zh.known(reason)), reason


@pytest.mark.parametrize("gib", [2, 6, 24])
def test_a_small_page_file_is_said_in_chinese(gib: int) -> None:
    zh, installed = load_words("zh"), as_published(load_catalog().find("qwen-image"))
    request = installed.model.resolve(Request(model="qwen-image", prompt="x"), 0)
    for vram in (None, 24):
        on = machine(64, vram).model_copy(update={"commit_free_bytes": gib * 2**30})
        try:
            texts = [reason for plan in plans(request, installed, on) for reason in plan.reasons]
        except CannotRun as error:
            texts = [str(error)]
        assert ENLARGE_PAGE_FILE in " ".join(texts)
        for text in texts:
            assert chinese(zh.known(sentence(zh, text))), text


@pytest.mark.parametrize(("vram", "system"), [(8, "win32"), (0, "wsl"), (None, "darwin")])
def test_what_it_was_planned_as_is_said_in_chinese(vram: int | None, system: str) -> None:
    [said] = invented(32 << 30, vram and vram << 30, on=system).notes
    assert chinese(load_words("zh").known(said)), said


def test_limits_of_a_recommendation_are_said_in_chinese() -> None:
    full = "33.1 GB are to be fetched, and 1.0 GB of the disk are free: free some space first, or"
    for text in (BF16_ALONE, f"{full} move the models."):
        assert chinese(load_words("zh").known(text)), text


def machine(ram: int, vram: int | None) -> Device:
    memory = {"ram_bytes": ram * 2**30, "ram_free_bytes": ram * 2**30}
    if vram is None:
        return Device(kind="cpu", name="CPU", **memory)
    rates = Rates(matmul=1e14, attention=1e14, memory=1e12, bus=2e10, pageable=1e10, disk=2e9)
    return Device(
        kind="cuda",
        name="GeForce RTX 4090",
        vram_bytes=vram * 2**30,
        vram_free_bytes=vram * 2**30,
        system="win32" if ram == 24 else "linux",
        bf16=ram != 8,
        rates=rates.model_copy(update={"compiler": True, "compile_seconds": 40.0}),
        **memory,
    )


def chinese(text: str) -> bool:
    """No English sentence is left in it."""
    return not re.search(r"[a-z]+ [a-z]+ [a-z]+", text)


def test_no_sentence_has_two_translations() -> None:
    seen: dict[str, str] = {}
    for table in [*tables().values(), *tables("zh/heard").values()]:
        for text, translated in table.items():
            assert seen.setdefault(text, translated) == translated


def test_translations_have_the_fields_of_their_sentence() -> None:
    for table in [*tables().values(), *tables("zh/heard").values()]:
        for text, translated in table.items():
            assert fields(translated) <= fields(text), text


def test_a_sentence_is_filled_in() -> None:
    assert load_words("en")("{s} s", s=3) == "3 s"
    assert load_words("zh")("{s} s", s=3) == "3 秒"
    assert load_words("zh").known("no {such} sentence") == "no {such} sentence"
    assert (
        load_words("zh").known("The seed is x. Nobody said this.") == "种子为 x。Nobody said this."
    )


def fields(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}
