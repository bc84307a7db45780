"""A request read back from another program's text: AUTOMATIC1111's form, or SwarmUI's JSON."""

import contextlib
import json
import re
from typing import Any

from pydantic_core import from_json

from qwen_image_tool.types import MAX_SEED, Size

# One "key: value" of the last line. Source: AUTOMATIC1111's modules/infotext_utils.py, re_param.
_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_NEGATIVE = "Negative prompt:"


def recalled(text: str) -> dict[str, Any]:
    """Fields of a Request that a picture's text tells of, without those that it can't have: prompt,
    negative_prompt, steps, cfg, seed, size, and `model` as the text names it."""
    fields = _swarm(text) if text.lstrip().startswith("{") else _automatic1111(text)
    return {name: value for name, value in fields.items() if value not in (None, "")}


def _automatic1111(text: str) -> dict[str, Any]:
    *lines, last = text.strip().split("\n")
    pairs = dict(_PAIR.findall(last))
    if len(_PAIR.findall(last)) < 3:
        lines, pairs = [*lines, last], {}
    prompt: list[str] = []
    negative: list[str] = []
    part = prompt
    for line in lines:
        if line.strip().startswith(_NEGATIVE):
            part = negative
        part.append(line.strip().removeprefix(_NEGATIVE).strip())
    return {
        "prompt": "\n".join(prompt).strip(),
        "negative_prompt": "\n".join(negative).strip(),
        "steps": _number(pairs.get("Steps"), 1, 1000, int),
        "cfg": _number(pairs.get("CFG scale"), 1, 50, float),
        "seed": _number(pairs.get("Seed"), 0, MAX_SEED, int),
        "size": _size(pairs.get("Size")),
        "model": _unquoted(pairs.get("Model", "")),
    }


def _swarm(text: str) -> dict[str, Any]:
    try:
        said = from_json(text)["sui_image_params"]
        return {
            "prompt": str(said.get("prompt", "")),
            "negative_prompt": str(said.get("negativeprompt", "")),
            "steps": _number(said.get("steps"), 1, 1000, int),
            "cfg": _number(said.get("cfgscale"), 1, 50, float),
            "seed": _number(said.get("seed"), 0, MAX_SEED, int),
            "size": _size(f"{said.get('width')}x{said.get('height')}"),
            "model": str(said.get("model", "")),
        }
    except (ValueError, KeyError, AttributeError, TypeError):
        return {}


def _number(text: Any, low: int, high: int, kind: type[int] | type[float]) -> int | float | None:
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        value = kind(text)
        return value if low <= value <= high else None
    return None


def _size(text: str | None) -> Size | None:
    with contextlib.suppress(ValueError):
        return Size.parse(text or "")
    return None


def _unquoted(value: str) -> str:
    if value.startswith('"'):
        with contextlib.suppress(ValueError):
            return str(json.loads(value))
    return value
