"""The page says everything in both languages."""

import ast
import json
import string
from collections.abc import Iterator
from pathlib import Path

import qwen_image_tool.ui
from qwen_image_tool.catalog.sizes import RESOLUTIONS
from qwen_image_tool.errors import TROUBLES
from qwen_image_tool.ui.words import load_words

UI = Path(qwen_image_tool.ui.__file__).parent


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


def tables() -> dict[str, dict[str, str]]:
    return {path.name: json.loads(path.read_text("utf-8")) for path in (UI / "zh").glob("*.json")}


def test_every_sentence_is_said_in_chinese() -> None:
    known = {text for table in tables().values() for text in table}
    assert said() - known == set()
    from_the_program = {text for trouble in TROUBLES.values() for text in trouble if text}
    assert from_the_program - known == set()
    assert known - said() - from_the_program == set(), "nobody says these any more"


def test_no_sentence_has_two_translations() -> None:
    seen: dict[str, str] = {}
    for table in tables().values():
        for text, translated in table.items():
            assert seen.setdefault(text, translated) == translated


def test_translations_have_the_fields_of_their_sentence() -> None:
    for table in tables().values():
        for text, translated in table.items():
            if text in said():
                assert fields(text) == fields(translated), text


def test_a_sentence_is_filled_in() -> None:
    assert load_words("en")("{s} s", s=3) == "3 s"
    assert load_words("zh")("{s} s", s=3) == "3 秒"
    assert load_words("zh").known("no {such} sentence") == "no {such} sentence"


def fields(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}
