"""The page's words. The English sentence is the key; other languages are tables of them in `zh/`,
one file for each module of the page that speaks, and `zh/heard/` with what the program says. A test
holds that none is missing."""

import json
import re
from importlib.resources import files
from importlib.resources.abc import Traversable

from qwen_image_tool.errors import sentences
from qwen_image_tool.server.plain import Language


class Words:
    """Called with an English sentence, gives it in one language, with its {fields} filled in."""

    def __init__(self, language: Language, said: dict[str, str], heard: dict[str, str]) -> None:
        """`said` by the page itself; `heard` from the program."""
        self.language = language
        self._said, self._heard = said, heard
        # The one with the most words of its own first: "Run {command}." takes nearly anything
        filled = sorted((text for text in heard if "{" in text), key=_own_words, reverse=True)
        self._patterns = [(_pattern(text), heard[text]) for text in filled]

    def __call__(self, text: str, **fields: object) -> str:
        return self._said.get(text, text).format(**fields)

    def known(self, text: str) -> str:
        """What the program said, in this language: each sentence that was heard of, with what is
        filled into it. Others stay as they are."""
        told = " ".join(map(self._sentence, sentences(text)))
        return told.replace("。 ", "。")

    def _sentence(self, text: str) -> str:
        if text in self._said:
            return self._said[text]
        for pattern, said in self._patterns:
            if match := pattern.fullmatch(text):
                filled = match.groupdict().items()
                return said.format(**{name: self._heard.get(one, one) for name, one in filled})
        return text


def _own_words(text: str) -> int:
    """Characters of a sentence that are not in its {fields}."""
    return len(re.sub(r"\{\w+\}", "", text))


def _pattern(text: str) -> re.Pattern[str]:
    """Matches a sentence with its {fields} filled in."""
    parts = re.split(r"\{(\w+)\}", text)
    kept = [re.escape(part) if i % 2 == 0 else f"(?P<{part}>.+?)" for i, part in enumerate(parts)]
    return re.compile("".join(kept))


def load_words(language: Language) -> Words:
    if language == "en":
        return Words(language, {}, {})
    folder = files(__package__).joinpath(language)
    heard = _tables(folder / "heard")
    return Words(language, heard | _tables(folder), heard)


def _tables(folder: Traversable) -> dict[str, str]:
    table: dict[str, str] = {}
    for file in folder.iterdir():
        if file.name.endswith(".json"):
            table |= json.loads(file.read_text(encoding="utf-8"))
    return table
