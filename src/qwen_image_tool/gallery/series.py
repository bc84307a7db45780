"""Requests that differ in one setting or two: what a table of pictures is made of."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qwen_image_tool.errors import BadRequest
from qwen_image_tool.types import MAX_SEED, Request

MAX_SERIES = 100  # requests
SEEDS_OF_A_SERIES = 4
# Settings that a series can go over, in the order in which they are offered
VARIED = ("seed", "steps", "cfg", "size", "model", "mode", "prompt", "negative_prompt")
_NOT_OF_ONE_PICTURE = ("images", "truncate")


def settings(request: Request) -> dict[str, Any]:
    """What decides how a picture looks, as JSON; what was left at its default is not there."""
    said = request.to_dict()
    return {name: value for name, value in said.items() if name not in _NOT_OF_ONE_PICTURE}


def differing(requests: Iterable[Request]) -> dict[str, list[Any]]:
    """The settings in which some of them differ, each with its values in order."""
    every = [settings(request) for request in requests]
    found = {}
    for name in sorted({name for one in every for name in one}, key=_place):
        values = list({str(one.get(name)): one.get(name) for one in every}.values())
        if len(values) > 1:
            found[name] = in_order(values)
    return found


def alone(request: Request, others: Mapping[str, Request]) -> dict[str, list[str]]:
    """By setting: the names of those `others` that differ from `request` in that one alone."""
    found: dict[str, list[str]] = {}
    for name, other in others.items():
        match list(differing([request, other])):
            case [setting]:
                found.setdefault(setting, []).append(name)
    return {setting: found[setting] for setting in sorted(found, key=_place)}


def series(request: Request, over: Mapping[str, str]) -> list[Request]:
    """A request for each value that is written in `over`, by setting; with two settings, for each
    pair of them. Raises BadRequest that names what can't be read, or where they are too many."""
    names = list(over)
    lines = list(itertools.product(*(_values(request, name, over[name]) for name in names)))
    if len(lines) > MAX_SERIES:
        raise BadRequest(
            f"The series has {len(lines)} pictures.", f"Give values for at most {MAX_SERIES}."
        )
    one = request.model_dump(mode="json") | {"images": 1}
    return [Request.from_user(**one | dict(zip(names, line, strict=True))) for line in lines]


def _values(request: Request, name: str, text: str) -> Sequence[Any]:
    """Separated by commas; prompts, which have commas, by |. Without any, seeds follow the
    request's own."""
    parts = text.split("|" if name in ("prompt", "negative_prompt") else ",")
    values = [part.strip() for part in parts if part.strip()]
    if values or name != "seed":
        if not values:
            raise BadRequest(
                f"There is no value for {name}.", "Give some, with commas between them."
            )
        return list(dict.fromkeys(values))
    first = (request.seed or 0) + 1
    return [(first + number) % (MAX_SEED + 1) for number in range(SEEDS_OF_A_SERIES)]


def in_order(values: Sequence[Any]) -> list[Any]:
    """Numbers by their size; what is not there first."""
    if all(value is None or isinstance(value, int | float) for value in values):
        return sorted(values, key=lambda value: (value is not None, value or 0))
    return list(values)


def _place(name: str) -> tuple[int, str]:
    return (VARIED.index(name) if name in VARIED else len(VARIED), name)
