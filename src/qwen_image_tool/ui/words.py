"""The page's words. The English sentence is the key; other languages are tables of them in `zh/`,
one file for each module that speaks. A test holds that none is missing."""

import json
import re
from importlib.resources import files
from typing import Literal

Language = Literal["en", "zh"]
_SENTENCE_ENDS = re.compile(r"(?<=[.!?]) (?=[A-Z`])")


class Words:
    """Called with an English sentence, gives it in one language, with its {fields} filled in."""

    def __init__(self, language: Language, table: dict[str, str]) -> None:
        self.language = language
        self._table = table
        # The one with the most words of its own first: "Run {command}." takes nearly anything
        filled = sorted((text for text in table if "{" in text), key=_own_words, reverse=True)
        self._patterns = [(_pattern(text), table[text]) for text in filled]

    def __call__(self, text: str, **fields: object) -> str:
        return self._table.get(text, text).format(**fields)

    def known(self, text: str) -> str:
        """What the program said, in this language: each sentence that the table has, with what is
        filled into it. Others stay as they are."""
        return " ".join(map(self._sentence, _SENTENCE_ENDS.split(text)))

    def _sentence(self, text: str) -> str:
        if text in self._table:
            return self._table[text]
        found = ((pattern.fullmatch(text), said) for pattern, said in self._patterns)
        return next((said.format(**match.groupdict()) for match, said in found if match), text)


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
        return Words(language, {})
    table: dict[str, str] = {}
    for file in files(__package__).joinpath(language).iterdir():
        table |= json.loads(file.read_text(encoding="utf-8"))
    return Words(language, table)
