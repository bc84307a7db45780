"""Where else on this computer model files may lie: other programs' folders, used read-only."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qwen_image_tool.store.headers import SUFFIXES

SMALLEST = 1 << 20  # bytes; smaller files are fetched sooner than they are looked for
MAX_FILES = 20_000  # looked at in one folder: a folder given by mistake must not take minutes


def hugging_face_cache() -> Path:
    """The cache of huggingface_hub, as its environment variables place it."""
    if own := os.environ.get("HF_HUB_CACHE"):
        return Path(own).expanduser()
    home = os.environ.get("HF_HOME")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(home).expanduser() if home else Path(cache) / "huggingface") / "hub"


def other_programs() -> tuple[Path, ...]:
    """The model folders of ComfyUI and StabilityMatrix that exist here."""
    home = Path.home()
    roaming = Path(os.environ.get("APPDATA") or home / "AppData" / "Roaming")
    usual = (
        home / "ComfyUI" / "models",
        home / "Documents" / "ComfyUI" / "models",
        home / "comfy" / "ComfyUI" / "models",
        home / "ComfyUI_windows_portable" / "ComfyUI" / "models",
        home / "StabilityMatrix" / "Models",
        home / "StabilityMatrix" / "Data" / "Models",
        home / ".config" / "StabilityMatrix" / "Models",
        roaming / "StabilityMatrix" / "Models",
    )
    return tuple(folder for folder in usual if folder.is_dir())


@dataclass(frozen=True)
class Elsewhere:
    """Folders to look in before fetching: a Hugging Face cache, and others full of weight files."""

    cache: Path | None = None
    folders: tuple[Path, ...] = field(default=())

    def snapshots(self, repo: str, revision: str = "") -> tuple[Path, ...]:
        """Folders of the cache that hold `repo`, at `revision` alone where it is given."""
        if self.cache is None or not repo:
            return ()
        parent = self.cache / ("models--" + repo.replace("/", "--")) / "snapshots"
        found = sorted(parent.glob("*"), key=lambda path: path.stat().st_mtime, reverse=True)
        return tuple(path for path in found if revision in ("", path.name))

    def weight_files(self) -> Iterator[Path]:
        """Weight files of the other programs. Nothing is opened."""
        for folder in self.folders:
            for _, path in zip(range(MAX_FILES), sorted(folder.rglob("*")), strict=False):
                if path.suffix in SUFFIXES and path.is_file():
                    yield path

    def by_size(self) -> dict[int, list[Path]]:
        """All files that may be worth not fetching, by their bytes; the content is not proven."""
        blobs = self.cache.glob("models--*/blobs/*") if self.cache else ()
        found: dict[int, list[Path]] = {}
        for path in (*blobs, *self.weight_files()):
            try:
                size = path.stat().st_size
            except OSError:  # deleted meanwhile, or a link to nowhere
                continue
            if size >= SMALLEST and not path.name.endswith(".incomplete"):
                found.setdefault(size, []).append(path)
        return found
