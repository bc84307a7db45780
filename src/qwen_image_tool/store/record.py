"""What belongs into a model's folder: written before the first byte is fetched, and kept beside the
files. A file under its final name has been proven against it."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError

from qwen_image_tool.errors import ModelBroken
from qwen_image_tool.types import Value

PRIVATE = ".qit"  # the sub-folder of a model's folder that is ours
OWN = "bf16"  # the transformer that a model is published with
VARIANTS = "variants"  # the sub-folder with one folder a variant of the transformer
IMPORTED = "imported-"  # how variants begin that another program's file was taken for
BLOCK = 1 << 20  # bytes hashed at once
HASH = r"^([0-9a-f]{40,64})?$"  # it names a file on disk
_ZEROS = bytes(BLOCK)


HubKind = Literal["huggingface", "modelscope"]


def _inside(path: str) -> str:
    """`path`, which stays in its folder on every system. Raises ValueError."""
    found = PureWindowsPath(path)
    if found.anchor or not found.parts or ".." in found.parts:
        raise ValueError("it leads out of the model's folder")
    return path


class Kept(Value):
    """One file: `path` in the model's folder, `source` in `repo` at `revision` of a `hub`. One of
    another program has no `repo`, and in `source` its path."""

    path: Annotated[str, AfterValidator(_inside)]
    repo: str
    revision: str
    source: str
    size: int
    sha256: str = Field(default="", pattern=HASH)
    git_sha1: str = Field(default="", pattern=HASH)
    hub: HubKind = "huggingface"

    @property
    def identity(self) -> str:
        """Names the content: the same on every hub and in every folder."""
        return self.sha256 or self.git_sha1

    @property
    def is_weights(self) -> bool:
        return self.path.endswith((".safetensors", ".gguf"))


class Record(Value):
    """The files of one installed model, by path."""

    model: str
    variants: tuple[str, ...] = ()
    files: tuple[Kept, ...] = ()

    @property
    def imported(self) -> tuple[str, ...]:
        """Variants that another program's files were taken for; what belongs to them may be
        missing still."""
        start = f"{VARIANTS}/{IMPORTED}"
        found = {file.path.split("/")[1] for file in self.files if file.path.startswith(start)}
        return tuple(sorted(found))

    @property
    def taken(self) -> tuple[str, ...]:
        """All names of what other programs' files were taken for."""
        return *self.imported, *(IMPORTED + name for name in self.parts)

    @staticmethod
    def taken_as(file: Kept) -> str:
        """The one of `taken` that a file belongs to."""
        top, name, *_ = file.path.split("/")
        return name if top == VARIANTS else IMPORTED + top

    @property
    def parts(self) -> tuple[str, ...]:
        """Components but the transformer that another program's file is taken for."""
        mine = [f.path.split("/")[0] for f in self.files if not f.repo and f.is_weights]
        return tuple(dict.fromkeys(name for name in mine if name != VARIANTS))

    def revision(self, repo: str) -> str:
        """The commit that the files of `repo` are of; "" where none is here."""
        return next((file.revision for file in self.files if file.repo == repo), "")

    def weights(self, place: str) -> tuple[Kept, ...]:
        """The weight files of a sub-folder."""
        return tuple(file for file in self.within(place) if file.is_weights)

    def within(self, place: str) -> tuple[Kept, ...]:
        """The files of a sub-folder."""
        return tuple(file for file in self.files if file.path.startswith(f"{place}/"))


def transformer_folder(variant: str) -> str:
    """Of a variant, in the model's folder."""
    return "transformer" if variant == OWN else f"{VARIANTS}/{variant}"


def record_path(folder: Path) -> Path:
    return folder / PRIVATE / "record.json"


def partial_path(folder: Path, file: Kept) -> Path:
    """Where the bytes of an unfinished file wait. Named by content: another version of the file
    can't be continued with them."""
    return folder / PRIVATE / "partial" / (file.identity or file.path.replace("/", "__"))


def read_record(folder: Path) -> Record | None:
    """None where the folder has none. Raises ModelBroken where it can't be read, or is that of
    another model: its folder was renamed or copied."""
    path = record_path(folder)
    try:
        record = Record.from_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise ModelBroken(
            "unreadable", f"{path} can't be read.", "Delete that file and download again."
        ) from error
    if record.model != folder.name:
        raise ModelBroken(
            "swapped",
            f"{folder} holds the files of {record.model}.",
            f"Rename it to {record.model}, or delete it with `qit models remove {folder.name}`.",
        )
    return record


def write_record(folder: Path, record: Record) -> None:
    path = record_path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(record.to_json(), encoding="utf-8")
    settle(path.with_suffix(".tmp"), path)


def settle(temporary: Path, final: Path) -> None:
    """Give a file that is on disk in full its final name; after a power cut it has one or the
    other, never half."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(final)
    sync_folder(final.parent)


def sync_folder(folder: Path) -> None:
    """The names in it are on disk. Windows does that by itself."""
    if os.name == "posix":
        directory = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


class Digest:
    """A running hash of a file's content: SHA-256, or git's SHA-1 where that is all the hub has."""

    def __init__(self, file: Kept) -> None:
        self._wanted, self._is_weights = file.identity, file.is_weights
        if file.sha256 or not file.git_sha1:
            self._hash = hashlib.sha256()
        else:
            self._hash = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)

    def update(self, data: bytes | memoryview) -> None:
        self._hash.update(data)

    @property
    def hex(self) -> str:
        return self._hash.hexdigest()

    @property
    def agrees(self) -> bool:
        """Where no hash was published, true for small texts alone: their size has to do."""
        return self.hex == self._wanted if self._wanted else not self._is_weights


def digest_file(
    path: Path, file: Kept, progress: Callable[[int], None] = lambda _: None
) -> tuple[Digest, bool]:
    """The hash of all that is at `path`, and whether a whole block of it is zeros.

    `progress` gets the bytes of each block. Raises OSError.
    """
    digest, zeros = Digest(file), False
    buffer = bytearray(BLOCK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(view):
            digest.update(view[:count])
            zeros = zeros or (count == BLOCK and buffer == _ZEROS)
            progress(count)
    return digest, zeros
