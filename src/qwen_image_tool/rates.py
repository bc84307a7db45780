"""What devices were measured to do, kept on disk: measured once, and known without torch."""

import contextlib
import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qwen_image_tool.files import replace_file
from qwen_image_tool.types import Device, Rates, Value


class Measured(Value):
    """The rates of a device under one driver, torch and diffusers."""

    name: str
    driver: str
    torch: str
    diffusers: str
    cores: int
    rates: Rates = Rates()


class RateBook:
    """One JSON file for each device that was measured, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, device: Device) -> Rates | None:
        """None where the device was not measured, or not with these versions."""
        try:
            text = self._path(_row(device)).read_text(encoding="utf-8")
            return Measured.from_json(text).rates
        except (OSError, ValidationError):
            return None

    def put(self, device: Device, rates: Rates) -> None:
        """A folder that can't be written is no error: the device is measured again."""
        row = _row(device)
        text = row.model_copy(update={"rates": rates}).to_json()
        with contextlib.suppress(OSError):
            replace_file(self._path(row), text.encode())

    def learn(self, device: Device, **rates: Any) -> None:
        """Change single rates to what a run has shown (the disk's, the seconds of compiling) of a
        device that was measured."""
        known = self.get(device)
        if known and rates:
            self.put(device, Rates.model_validate({**known.model_dump(), **rates}))

    def _path(self, row: Measured) -> Path:
        return self._folder / f"{hashlib.sha256(row.to_json().encode()).hexdigest()[:16]}.json"


def _row(device: Device) -> Measured:
    """The device's row, without its rates."""
    return Measured(
        name=device.name,
        driver=device.driver,
        torch=device.torch,
        diffusers=_version("diffusers"),
        cores=device.cores,
    )


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return ""
