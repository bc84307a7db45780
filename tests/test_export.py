"""Pictures in other forms: with their request or without a trace of it."""

import io
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from fake_worker import plan_for
from qwen_image_tool import gallery
from qwen_image_tool.errors import BadRequest, NotOurPicture
from qwen_image_tool.gallery.export import FORMATS, Format, decode_upload, export, thumbnail
from qwen_image_tool.types import Request, Size

REQUEST = Request(model="practice", prompt="一只猫, a cat", size=Size(32, 16), steps=2, seed=5)


def save(folder: Path, image: Image.Image | None = None, request: Request = REQUEST) -> Path:
    image = image or Image.effect_noise((32, 16), 80).convert("RGB")
    return gallery.save_image(image, folder, request, plan_for(request), {"torch": "2"}, "M", "job")


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


@pytest.mark.parametrize("form", FORMATS)
def test_with_metadata_the_request_comes_back(tmp_path: Path, form: Format) -> None:
    path = save(tmp_path)
    copy = tmp_path / f"copy.{form}"
    copy.write_bytes(export(path, form))
    original, exported = gallery.read_image_info(path), gallery.read_image_info(copy)
    assert exported == original
    assert gallery.request_from(copy) == REQUEST
    assert opened(copy.read_bytes()).format == form.upper()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("source", ["jpeg", "webp"])
def test_a_picture_that_is_no_png_becomes_one(tmp_path: Path, source: Format, form: Format) -> None:
    first = save(tmp_path)
    kept = tmp_path / f"kept.{source}"
    kept.write_bytes(export(first, source))
    copy = tmp_path / f"copy.{form}"
    copy.write_bytes(export(kept, form))
    assert opened(copy.read_bytes()).format == form.upper()
    assert gallery.read_image_info(copy) == gallery.read_image_info(first)


@pytest.mark.parametrize("form", FORMATS)
def test_without_metadata_no_trace_is_left(tmp_path: Path, form: Format) -> None:
    path = save(tmp_path)
    data = export(path, form, metadata=False)
    image = opened(data)
    assert (
        not image.info.keys()
        - {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
        - {
            "loop",
            "background",
            "timestamp",
            "duration",
        }
    )
    assert not image.getexif()
    assert b"cat" not in data
    if form == "png":
        assert image.tobytes() == Image.open(path).tobytes()


def test_an_export_is_read_by_others(tmp_path: Path) -> None:
    """Civitai decodes an EXIF UserComment as UTF-16, big-endian."""
    exif = opened(export(save(tmp_path), "jpeg")).getexif()
    comment = exif.get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    assert "Steps: 2, " in comment[8:].decode("utf-16-be")


@pytest.mark.parametrize("form", FORMATS)
def test_transparency(tmp_path: Path, form: Format) -> None:
    path = save(tmp_path, Image.new("RGBA", (32, 16), (255, 0, 0, 0)))
    image = opened(export(path, form, metadata=False))
    if form == "jpeg":
        assert min(image.convert("L").getextrema()) > 250  # type: ignore[operator]
    else:
        assert image.convert("RGBA").getpixel((3, 3))[3] == 0  # type: ignore[index]


def test_a_prompt_too_long_for_a_jpeg_is_said(tmp_path: Path) -> None:
    path = save(tmp_path, request=REQUEST.model_copy(update={"prompt": "cat " * 20_000}))
    with pytest.raises(BadRequest, match="too long"):
        export(path, "jpeg")
    assert export(path, "jpeg", metadata=False)


def test_what_is_gone_or_broken(tmp_path: Path) -> None:
    path = save(tmp_path)
    path.write_bytes(path.read_bytes()[:300])
    forms: tuple[Format, ...] = ("jpeg", "webp")
    for form in forms:
        with pytest.raises(NotOurPicture):
            export(path, form)
    with pytest.raises(NotOurPicture):
        thumbnail(path, 8, tmp_path / "cache")
    path.unlink()
    with pytest.raises(NotOurPicture):
        export(path)


def test_thumbnails_are_kept_and_made_again_when_the_picture_changes(tmp_path: Path) -> None:
    path, cache = save(tmp_path), tmp_path / "cache"
    first = thumbnail(path, 8, cache)
    assert opened(first).size == (8, 4)
    assert thumbnail(path, 8, cache) == first
    assert len(list(cache.iterdir())) == 1
    Image.new("RGB", (32, 16), "red").save(path)
    assert thumbnail(path, 8, cache) != first
    file = tmp_path / "file"
    file.touch()
    assert thumbnail(path, 8, file)


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)


def test_uploads(tmp_path: Path) -> None:
    assert decode_upload(save(tmp_path).read_bytes()).size == (32, 16)
    with pytest.raises(BadRequest, match="megapixels"):
        decode_upload(save(tmp_path).read_bytes(), max_pixels=100)
    for data in (b"", b"GIF89a" + bytes(50), b"%!PS-Adobe", png_claiming(30, 30)):
        with pytest.raises(BadRequest, match="can't be read"):
            decode_upload(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_000, 12_000, 60_000])
def test_bombs_are_refused_before_they_are_unpacked(side: int) -> None:
    with pytest.raises(BadRequest):
        decode_upload(png_claiming(side, side))
