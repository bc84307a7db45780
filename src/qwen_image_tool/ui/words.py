"""The page's words. The English sentence is the key; other languages are tables of them in `zh/`,
one file for each module that speaks. A test holds that none is missing."""

import json
from importlib.resources import files
from typing import Literal

Language = Literal["en", "zh"]


class Words:
    """Called with an English sentence, gives it in one language, with its {fields} filled in."""

    def __init__(self, language: Language, table: dict[str, str]) -> None:
        self.language = language
        self._table = table

    def __call__(self, text: str, **fields: object) -> str:
        return self._table.get(text, text).format(**fields)

    def known(self, text: str) -> str:
        """A sentence of the program in this language, where the table has it; braces are text."""
        return self._table.get(text, text)


def load_words(language: Language) -> Words:
    if language == "en":
        return Words(language, {})
    table: dict[str, str] = {}
    for file in files(__package__).joinpath(language).iterdir():
        table |= json.loads(file.read_text(encoding="utf-8"))
    return Words(language, table)
