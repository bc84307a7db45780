"""A picture in another form: PNG, JPEG or WebP, with what it was made from or without."""

import contextlib
import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, get_args

from qwen_image_tool.errors import BadRequest, NotOurPicture
from qwen_image_tool.files import replace_file
from qwen_image_tool.gallery import (
    DESCRIPTION_TAG,
    EXIF_IFD,
    OUR_CHUNK,
    USER_COMMENT_TAG,
    png_of,
    read_texts,
)

if TYPE_CHECKING:
    from PIL.Image import Exif, Image

Format = Literal["png", "jpeg", "webp"]
FORMATS: tuple[Format, ...] = get_args(Format)
MEDIA_TYPES: dict[Format, str] = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
}
QUALITY = 92
NO_TEXTS: Mapping[str, str] = MappingProxyType({})
MAX_PIXELS = 64_000_000  # of an upload, decoded
MAX_EXIF_BYTES = 65_000  # of a JPEG's segment


def export(
    path: Path, form: Format = "png", quality: int = QUALITY, metadata: bool = True
) -> bytes:
    """The picture file at `path` as a file of `form`. JPEG has no transparency: it is put on white.

    Raises NotOurPicture where the file can't be read, BadRequest where its request is too long for
    a JPEG.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            if metadata and form == "png" and image.format == "PNG":
                return path.read_bytes()
            return encode(image, form, quality, read_texts(path) if metadata else {})
    except (OSError, SyntaxError, ValueError) as error:
        raise NotOurPicture(f"{path.name} can't be read: {error}.", "Is it still there?") from error


def thumbnail(path: Path, side: int, cache: Path) -> bytes:
    """The picture at `path` as a WebP of at most `side` pixels a side, kept in the folder `cache`.
    Raises NotOurPicture."""
    from PIL import Image

    try:
        stat = path.stat()
        identity = f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0{side}"
        kept = cache / f"{hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()}.webp"
        with contextlib.suppress(OSError):
            return kept.read_bytes()
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            image.thumbnail((side, side), Image.Resampling.BOX, reducing_gap=2.0)
            data = encode(image, "webp", quality=80)
    except (OSError, SyntaxError, ValueError) as error:
        raise NotOurPicture(f"{path.name} can't be read: {error}.", "Is it still there?") from error
    with contextlib.suppress(OSError):  # it is made again
        replace_file(kept, data)
    return data


def encode(
    image: "Image",
    form: Format,
    quality: int = QUALITY,
    texts: Mapping[str, str] = NO_TEXTS,
) -> bytes:
    """A picture's file, with no metadata but `texts`. Raises BadRequest where they are too long for
    this kind of file."""
    if form == "png":
        return png_of(_bare(image), texts)
    buffer = io.BytesIO()
    exif = _exif(texts) if texts else b""
    if form == "jpeg":
        on_white(image).save(buffer, "JPEG", quality=quality, exif=exif)
    else:
        _bare(image).save(buffer, "WEBP", quality=quality, exif=exif)
    return buffer.getvalue()


def on_white(image: "Image") -> "Image":
    """Without transparency."""
    from PIL import Image

    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def decode_upload(data: bytes, max_pixels: int = MAX_PIXELS) -> "Image":
    """A picture that a client sent, decoded. Raises BadRequest: not a PNG, JPEG or WebP, damaged,
    or of more pixels than `max_pixels`, which are counted before any is decoded."""
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
        if image.width * image.height > max_pixels:
            raise BadRequest(
                f"The picture has {image.width}x{image.height} pixels.",
                f"Send one of at most {max_pixels / 1e6:.0f} megapixels.",
            )
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadRequest(
            "The picture can't be read.", "Send a whole PNG, JPEG or WebP file."
        ) from error
    return image


def _bare(image: "Image") -> "Image":
    bare = image.convert("RGBA" if image.has_transparency_data else "RGB")
    bare.info.clear()
    return bare


def _exif(texts: Mapping[str, str]) -> "Exif":
    """`parameters` as Civitai reads it, and our JSON."""
    from PIL import Image

    exif = Image.Exif()
    if text := texts.get("parameters"):
        comment = b"UNICODE\0" + text.encode("utf-16-be")
        exif.get_ifd(EXIF_IFD)[USER_COMMENT_TAG] = comment
    if own := texts.get(OUR_CHUNK):
        exif[DESCRIPTION_TAG] = json.dumps({OUR_CHUNK: json.loads(own)})
    if len(exif.tobytes()) > MAX_EXIF_BYTES:
        raise BadRequest(
            "The prompt is too long to be written into this kind of file.",
            "Export a PNG, or export without metadata.",
        )
    return exif
