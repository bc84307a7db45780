"""Tables that the benchmarks write into a page, each between two marks of its own."""

import re
from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"


def write_section(page: Path, name: str, text: str, add: bool = False) -> None:
    """Put `text` between the marks of `name`; `add`: at the page's end where there are none. Raises
    SystemExit where marks are missing."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    old = page.read_text(encoding="utf-8")
    if add and begin not in old:
        old = f"{old.rstrip()}\n\n{begin}\n{end}\n"
    before, _, rest = old.partition(begin)
    _, mark, after = rest.partition(end)
    if not mark:
        raise SystemExit(f"{page} has no lines {begin} and {end}")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def what_was_asked(arguments: Sequence[str]) -> str:
    """Those of a command's arguments that change what is measured."""
    text = " ".join(["", *arguments])
    return re.sub(r" --write| --(json|docs|timeout) \S+", "", text).strip()
