"""The licences that the user agreed to, with their texts."""

import hashlib
from datetime import UTC, datetime
from pathlib import Path

from qwen_image_tool.catalog import Licence
from qwen_image_tool.store.record import settle
from qwen_image_tool.types import Value


class Accepted(Value):
    """A licence the user agreed to, as it stood then."""

    licence: str
    url: str
    at: datetime
    text: str


class Licences:
    """One file in `folder` for each wording that was agreed to."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def accepted(self, key: str) -> tuple[Accepted, ...]:
        """Every wording of the catalogue's licence `key`, the oldest first."""
        found = []
        for path in self._folder.glob(f"{key}-*.json"):
            try:
                found.append(Accepted.from_json(path.read_bytes()))
            except (OSError, ValueError):  # not there for us: it is asked again
                continue
        return tuple(sorted(found, key=lambda each: each.at))

    def remember(self, key: str, licence: Licence, text: str) -> None:
        """Raises OSError."""
        name = f"{key}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        self._folder.mkdir(parents=True, exist_ok=True)
        agreed = Accepted(licence=licence.name, url=licence.url, at=datetime.now(UTC), text=text)
        temporary = self._folder / f"{name}.tmp"
        temporary.write_text(agreed.to_json(), encoding="utf-8")
        settle(temporary, self._folder / f"{name}.json")
