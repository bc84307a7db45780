"""Pictures on disk: PNG files that carry the request they were made from.

Text chunks of a file, all before the pixels:
    parameters       AUTOMATIC1111's form, which other tools read
    qwen_image_tool  iTXt, JSON {"request": ..., "plan": ..., "versions": ..., "job": ...},
                     which we read
JPEG and WebP files that were exported carry the same in EXIF: the first as UserComment, the second
in ImageDescription.
"""

import contextlib
import errno
import io
import json
import os
import shutil
import struct
import time
import zlib
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pydantic import Field, ValidationError
from pydantic_core import from_json

from qwen_image_tool import __version__
from qwen_image_tool.errors import NotOurPicture, OutputNotWritable
from qwen_image_tool.files import try_writing
from qwen_image_tool.types import Plan, Request, Size, Value

if TYPE_CHECKING:
    from PIL.Image import Image

OUR_CHUNK = "qwen_image_tool"
MAX_TEXT_BYTES = 1 << 20  # of one text chunk, unpacked; longer ones are passed over
MAX_CHUNKS = 10_000  # before the pixels
EXIF_IFD, USER_COMMENT_TAG, DESCRIPTION_TAG = 0x8769, 0x9286, 0x010E
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class ImageInfo(Value):
    """What a picture file says of itself. Another tool's picture has no request, plan or versions.

    `plan` is also None where another version wrote one that this version can't read.
    """

    size: Size
    parameters: str = ""
    request: Request | None = None
    plan: Plan | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    job: str = Field(default="", description="The job that made it, in the queue of its time")


def check_output(folder: Path, need_bytes: int) -> str:
    """Make sure, before the work starts, that `folder` takes pictures of `need_bytes` in all.

    Creates the folder if it is missing and returns a sentence that says so, else "". Raises
    OutputNotWritable: not a folder, no permission, too little space.
    """
    with _output_errors(folder):
        folder = folder.expanduser()
        created = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        try_writing(folder)
        free = shutil.disk_usage(folder).free
    if free < need_bytes:
        raise OutputNotWritable(
            f"The disk of {folder} has {free / 1e6:,.0f} MB free, and the pictures may need "
            f"{need_bytes / 1e6:,.0f} MB.",
            "Free some space, or choose an output folder on another disk.",
            trouble="disk full",
        )
    return f"Created the output folder {folder}." if created else ""


def save_image(
    image: "Image",
    folder: Path,
    request: Request,
    plan: Plan,
    versions: dict[str, str],
    model_name: str,
    job: str = "",
) -> Path:
    """Save a picture as `YYYYmmdd-HHMMSS-seed<seed>.png` (local time; -2, -3 ... where taken).

    `request` is the resolved one of this picture alone. The file has its name only when it is whole
    and on disk, and replaces no other. Raises OutputNotWritable, and leaves nothing behind then.
    """
    own: dict[str, Any] = {
        "request": request.to_dict(),
        "plan": plan.to_dict(),
        "versions": versions,
    }
    if job:
        own["job"] = job
    texts = {
        "parameters": parameters(request, Size(*image.size), model_name),
        OUR_CHUNK: json.dumps(own, ensure_ascii=False),
    }
    data = png_of(image, texts)
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-seed{request.seeds[0]}"
    with _output_errors(folder):
        folder = folder.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        return _write_new(folder, stem, data)


def parameters(request: Request, size: Size, model_name: str) -> str:
    """The infotext of a picture, as Civitai and most galleries read it.

    Source: AUTOMATIC1111's modules/processing.py, create_infotext.
    """
    values = {
        "Steps": request.steps,
        "Sampler": "Euler",
        "Schedule type": "Simple",
        "CFG scale": None if request.cfg is None else f"{request.cfg:g}",
        "Seed": request.seeds[0],
        "Size": size,
        "Model": model_name,
        "Version": f"QwenImageTool {__version__}",
    }
    details = ", ".join(f"{key}: {_quoted(str(v))}" for key, v in values.items() if v is not None)
    negative = request.negative_prompt or ""
    negative = f"\nNegative prompt: {negative}" if negative.strip() else ""
    return f"{request.prompt}{negative}\n{details}".strip()


def read_image_info(path: Path) -> ImageInfo:
    """What the picture at `path` says of itself; only its text is read, and only up to the pixels,
    so a picture that was cut short later still gives its request.

    Raises NotOurPicture with the next step: not a file, not a picture, damaged, or a request that
    this version can't read.
    """
    return _info(str(path), *_read(path))


def read_info(data: bytes) -> ImageInfo:
    """The same of a picture file's bytes."""
    name = "The picture"
    return _info(name, *_read_file(io.BytesIO(data), name))


def read_texts(path: Path) -> dict[str, str]:
    """The texts that a picture carries, by their keys in a PNG. Raises NotOurPicture."""
    return _read(path)[1]


def _read(path: Path) -> tuple[Size, dict[str, str]]:
    try:
        with path.expanduser().open("rb") as file:
            return _read_file(file, str(path))
    except FileNotFoundError as error:
        raise NotOurPicture(f"There is no picture {path}.", "Check the path.") from error
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        raise NotOurPicture(f"{path} can't be read: {why}.", "Check the path.") from error


def _read_file(file: BinaryIO, name: str) -> tuple[Size, dict[str, str]]:
    start = file.read(12)
    file.seek(0)
    try:
        if start[:3] == b"\xff\xd8\xff" or (start[:4], start[8:]) == (b"RIFF", b"WEBP"):
            return _read_exif(file)
        return _read_png(file)
    except _Unreadable as error:
        raise NotOurPicture(
            f"{name} {error}.",
            "Give the file as it was saved: a converted copy has no request.",
        ) from error


def _info(name: str, size: Size, texts: dict[str, str]) -> ImageInfo:
    return ImageInfo(size=size, parameters=texts.get("parameters", ""), **_own(name, texts))


def request_from(path: Path) -> Request:
    """The request that made the picture at `path`. Raises NotOurPicture."""
    request = read_image_info(path).request
    if request is None:
        raise NotOurPicture(
            f"{path} carries no request of QwenImageTool.",
            "Other tools' pictures, and copies that a chat or a website made, have lost it.",
        )
    return request


# Writing


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(c in value for c in ",\n:") else value


def png_of(image: "Image", texts: Mapping[str, str]) -> bytes:
    """A PNG file of the picture with these texts."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for key, text in texts.items():
        if key == OUR_CHUNK:
            chunks.add_itxt(key, text)
        else:
            chunks.add_text(key, text)  # tEXt where latin-1 holds it, else iTXt
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


def _write_new(folder: Path, stem: str, data: bytes) -> Path:
    number = 1
    while True:
        path = folder / (f"{stem}.png" if number == 1 else f"{stem}-{number}.png")
        with contextlib.suppress(FileExistsError):
            _write(path, data)
            return path
        number += 1


def _write(path: Path, data: bytes) -> None:
    """Raises FileExistsError where `path` is there, or another process is writing it.

    Creating the temporary file claims the name, which is looked at only while the claim is held.
    """
    part = path.with_name(f".{path.name}.part")
    file = part.open("xb")
    try:
        with file:
            if path.exists():
                raise FileExistsError(path)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _rename(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _rename(source: Path, target: Path) -> None:
    """On Windows a virus scanner may hold a new file for a moment."""
    for seconds in (0.1, 0.5, 2) if os.name == "nt" else ():
        try:
            source.replace(target)
        except PermissionError:
            time.sleep(seconds)
        else:
            return
    source.replace(target)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):  # some network file systems can't: the picture is there
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _output_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        raise OutputNotWritable(
            f"{folder} is not a folder, or lies below a file.", "Choose another output folder."
        ) from error
    except OSError as error:
        hint = {
            errno.ENOSPC: "Free some space, or choose an output folder on another disk.",
            errno.EDQUOT: "Free some space, or choose an output folder on another disk.",
            errno.EROFS: "It lies on a read-only disk: choose another output folder.",
            errno.EACCES: "Allow writing to it, or choose another output folder.",
            errno.EPERM: "Allow writing to it, or choose another output folder.",
        }.get(error.errno or 0, "Choose another output folder.")
        reason = error.strerror or str(error)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise OutputNotWritable(
            f"Can't write to {folder}: {reason}.", hint, "disk full" if full else None
        ) from error
    except RuntimeError as error:  # ~name of an unknown user
        raise OutputNotWritable(f"{folder}: {error}", "Choose another output folder.") from error


# Reading


class _Unreadable(Exception):
    pass


def _read_exif(file: BinaryIO) -> tuple[Size, dict[str, str]]:
    """Size and texts of a JPEG or WebP; no pixel is decoded."""
    from PIL import Image

    texts = {}
    try:
        with Image.open(file, formats=("JPEG", "WEBP")) as image:
            exif = image.getexif()
            size = Size(*image.size)
        comment = exif.get_ifd(EXIF_IFD).get(USER_COMMENT_TAG, b"")
        own = exif.get(DESCRIPTION_TAG, "")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _Unreadable("is damaged") from error
    if isinstance(comment, bytes) and comment.startswith(b"UNICODE\0"):
        texts["parameters"] = comment[8:].decode("utf-16-be", errors="replace")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        texts[OUR_CHUNK] = json.dumps(from_json(own)[OUR_CHUNK])
    return size, texts


def _read_png(file: BinaryIO) -> tuple[Size, dict[str, str]]:
    """Size and text chunks of a PNG (www.w3.org/TR/png-3), within fixed bounds of memory."""
    if file.read(len(_SIGNATURE)) != _SIGNATURE:
        raise _Unreadable("is not a PNG, JPEG or WebP file")
    chunks = _chunks(file)
    kind, header = next(chunks, (b"", b""))
    if kind != b"IHDR" or len(header) != 13:
        raise _Unreadable("is damaged")
    width, height = struct.unpack(">II", header[:8])
    if not (0 < width < 1_000_000 and 0 < height < 1_000_000):
        raise _Unreadable("has an impossible size")
    texts: dict[str, str] = {}
    for kind, data in chunks:
        key, text = _text(kind, data)
        texts.setdefault(key, text)
    return Size(width, height), texts


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """The header and the text chunks before the pixels that have a bearable length."""
    for _ in range(MAX_CHUNKS):
        head = file.read(8)
        if len(head) < 8:
            raise _Unreadable("is cut short")
        length, kind = struct.unpack(">I4s", head)
        if kind in (b"IDAT", b"IEND"):
            return
        if kind not in (b"IHDR", b"tEXt", b"zTXt", b"iTXt") or length > MAX_TEXT_BYTES:
            file.seek(length + 4, os.SEEK_CUR)
            continue
        data, checksum = file.read(length), file.read(4)
        if len(checksum) < 4:
            raise _Unreadable("is cut short")
        if zlib.crc32(kind + data) != int.from_bytes(checksum):
            raise _Unreadable("is damaged")
        yield kind, data
    raise _Unreadable("has too many parts before its pixels")


def _text(kind: bytes, data: bytes) -> tuple[str, str]:
    """Keyword and text of a text chunk; the text is "" where it is broken or too long."""
    key, _, rest = data.partition(b"\0")
    packed, encoding = kind == b"zTXt", "latin-1"
    if packed:
        rest = rest[1:]
    elif kind == b"iTXt":
        packed, encoding = rest[:1] == b"\1", "utf-8"
        rest = rest[2:].partition(b"\0")[2].partition(b"\0")[2]  # language, translated keyword
    if packed:
        rest = _unpacked(rest)
    return key.decode("latin-1"), rest.decode(encoding, errors="replace")


def _unpacked(data: bytes) -> bytes:
    unpacker = zlib.decompressobj()
    try:
        plain = unpacker.decompress(data, MAX_TEXT_BYTES)
    except zlib.error:
        return b""
    return plain if unpacker.eof else b""


def _own(name: str, texts: dict[str, str]) -> dict[str, Any]:
    """Request, plan and versions from our chunk; nothing where there is none."""
    if OUR_CHUNK not in texts:
        return {}
    try:
        own = from_json(texts[OUR_CHUNK])
        versions = {str(k): str(v) for k, v in own.get("versions", {}).items()}
        request, job = Request.model_validate(own["request"]), str(own.get("job", ""))
    except (ValueError, KeyError, AttributeError) as error:
        raise NotOurPicture(
            f"The request in {name} is not one that QwenImageTool {__version__} can read.",
            "It may come from a newer version: update QwenImageTool, or type the request again.",
        ) from error
    plan = None
    with contextlib.suppress(ValidationError):  # a plan is for reading; another is made for a run
        plan = Plan.model_validate(own.get("plan"))
    return {"request": request, "plan": plan, "versions": versions, "job": job}
