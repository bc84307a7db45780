"""Gallery: what is saved comes back exactly; nothing half-made ever carries a picture's name."""

import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from qwen_image_tool import __version__, gallery
from qwen_image_tool.errors import NotOurPicture, OutputNotWritable
from qwen_image_tool.gallery import (
    MAX_TEXT_BYTES,
    OUR_CHUNK,
    check_output,
    read_image_info,
    request_from,
    save_image,
)
from qwen_image_tool.types import PhaseNeed, Placement, Plan, Request, Size

REQUEST = Request(
    model="practice",
    prompt='Ein Fuchs, "schlau": im Schnee\nzweite Zeile',
    negative_prompt="blurry, text",
    size=Size(40, 24),
    steps=12,
    cfg=4.5,
    seed=2**63 - 1,
)
CHINESE = REQUEST.model_copy(update={"prompt": "一只戴帽子的猫 🐈"})
PLAN = Plan(
    device="cpu",
    dtype="float32",
    working_size=Size(48, 32),
    forwards=24,
    placement=Placement(blocks=6, resident=6),
    text_placement=Placement(blocks=2, resident=2),
    phases=(PhaseNeed(phase="denoise", ram_bytes=123),),
    disk_bytes=4000,
    reasons=("因为 it fits.",),
)
VERSIONS = {"qwen-image-tool": "0.1.0", "torch": "2.13.0"}


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def picture() -> Image.Image:
    return Image.effect_noise((40, 24), 80).convert("RGB")


def save(folder: Path, request: Request = REQUEST, image: Image.Image | None = None) -> Path:
    return save_image(image or picture(), folder, request, PLAN, VERSIONS, "Practice model")


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


# Round trip


@pytest.mark.parametrize("request_", [REQUEST, CHINESE], ids=["latin-1", "Chinese"])
def test_what_is_saved_comes_back_exactly(empty: Path, request_: Request) -> None:
    image = picture()
    path = save(empty / "new" / "图片", request_, image)
    assert re.fullmatch(rf"\d{{8}}-\d{{6}}-seed{request_.seed}\.png", path.name)
    assert names(path.parent) == [path.name]
    with Image.open(path) as read:
        assert read.tobytes() == image.tobytes()
    info = read_image_info(path)
    assert (info.request, info.plan, info.versions) == (request_, PLAN, VERSIONS)
    assert info.size == Size(40, 24)
    assert request_from(path) == request_


def test_transparency_is_kept(empty: Path) -> None:
    image = Image.new("RGBA", (3, 2), (10, 20, 30, 40))
    with Image.open(save(empty, image=image)) as read:
        assert read.getpixel((0, 0)) == (10, 20, 30, 40)


@pytest.mark.parametrize("request_", [REQUEST, CHINESE], ids=["latin-1", "Chinese"])
def test_other_tools_read_the_parameters(empty: Path, request_: Request) -> None:
    with Image.open(save(empty, request_)) as read:
        text = read.info["parameters"]
    assert text == read_image_info(next(empty.iterdir())).parameters
    *lines, details = text.split("\n")
    assert details.startswith("Steps: ")  # Civitai asks for that
    # AUTOMATIC1111, modules/infotext_utils.py
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', details)
    assert dict(pairs) == {
        "Steps": "12",
        "Sampler": "Euler",
        "Schedule type": "Simple",
        "CFG scale": "4.5",
        "Seed": str(2**63 - 1),
        "Size": "40x24",
        "Model": "Practice model",
        "Version": f"QwenImageTool {__version__}",
    }
    assert "\n".join(lines) == f"{request_.prompt}\nNegative prompt: {request_.negative_prompt}"


def test_parameters_leave_out_what_is_not_there() -> None:
    request = Request(model="m", prompt="a cat", negative_prompt=" ", seed=1)
    text = gallery.parameters(request, Size(8, 8), "a: b, c")
    assert text.startswith("a cat\nSampler: Euler")
    assert 'Model: "a: b, c"' in text


def test_latin_text_is_plain_and_chinese_is_itxt(empty: Path) -> None:
    assert b"tEXtparameters\0Ein Fuchs" in save(empty).read_bytes()
    assert b"iTXtparameters\0" in save(empty, CHINESE).read_bytes()


# Names


def test_a_name_that_is_taken_gets_a_number(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stem = "20260101-000000-seed7"
    for number in range(3):
        gallery._write_new(empty, stem, bytes([number]))
    (empty / f".{stem}-4.png.part").write_text("another process is writing -4")
    gallery._write_new(empty, stem, b"3")
    made = {path.name: path.read_bytes() for path in empty.glob("*.png")}
    assert made == {
        f"{stem}.png": b"\0",
        f"{stem}-2.png": b"\1",
        f"{stem}-3.png": b"\2",
        f"{stem}-5.png": b"3",
    }


SAVER = """
import sys, os, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_gallery import REQUEST, save
folder, name = Path(sys.argv[2]), sys.argv[3]
"""


def child(code: str, folder: Path, name: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SAVER + code, str(Path(__file__).parent), str(folder), name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_never_take_the_same_name(empty: Path) -> None:
    code = "[save(folder, REQUEST.model_copy(update={'prompt': name + str(i)})) for i in range(40)]"
    children = [child(code, empty, name) for name in "ab"]
    for process in children:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    prompts = {request_from(path).prompt for path in empty.iterdir()}
    assert prompts == {f"{name}{i}" for name in "ab" for i in range(40)}


# Nothing half-made


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_a_killed_save_leaves_no_picture(empty: Path) -> None:
    code = "os.fsync = lambda _: print('written', flush=True) or time.sleep(60)\nsave(folder)"
    process = child(code, empty)
    assert process.stdout
    assert process.stdout.readline() == "written\n"
    process.kill()
    process.communicate(timeout=10)
    assert list(empty.glob("*.png")) == []
    save(empty)  # and what was left stops nobody


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_pictures_are_whole_whenever_the_kill_comes(empty: Path) -> None:
    process = child("while True: save(folder)", empty)
    while len(list(empty.glob("*.png"))) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=10)
    for path in empty.glob("*.png"):
        with Image.open(path) as image:
            image.load()


@pytest.fixture
def small_disk(empty: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    folder = empty / "disk"
    folder.mkdir()
    if sys.platform != "linux":
        pytest.skip("needs tmpfs")
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)])
    if mount.returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_nothing_behind(small_disk: Path) -> None:
    big = Image.effect_noise((400, 400), 90)
    with pytest.raises(OutputNotWritable, match="No space left") as caught:
        save(small_disk, image=big)
    assert caught.value.hint.startswith("Free some space")
    assert names(small_disk) == []
    save(small_disk)
    with pytest.raises(OutputNotWritable, match="the pictures may need 1 MB"):
        check_output(small_disk, 1_000_000)
    assert check_output(small_disk, 1000) == ""


def test_a_read_only_disk_is_named(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for attempt in (lambda: save(small_disk), lambda: check_output(small_disk, 0)):
        with pytest.raises(OutputNotWritable, match="read-only disk"):
            attempt()


def test_a_write_that_fails_half_way_leaves_nothing_behind(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sys.platform == "win32":
        pytest.skip("needs RLIMIT_FSIZE")
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OutputNotWritable, match="File too large"):
            save(empty)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert names(empty) == []


def test_a_stopped_save_leaves_nothing_behind(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(empty)
    assert names(empty) == []


def test_a_virus_scanner_that_holds_the_file_is_waited_for(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = [PermissionError(13, "in use"), PermissionError(13, "in use")]
    target = empty / "b"

    def replace(_: Path) -> None:
        if refusals:
            raise refusals.pop()
        target.write_text("moved")

    waits: list[float] = []
    monkeypatch.setattr(gallery, "os", SimpleNamespace(name="nt"))
    monkeypatch.setattr(time, "sleep", waits.append)
    gallery._rename(SimpleNamespace(replace=replace), target)  # type: ignore[arg-type]
    assert target.read_text() == "moved"
    assert waits == [0.1, 0.5]


# Before the work starts


def test_a_missing_folder_is_created_and_said(empty: Path) -> None:
    folder = empty / "a" / "b"
    assert check_output(folder, 0) == f"Created the output folder {folder}."
    assert check_output(folder, 0) == ""
    assert names(folder) == []


def test_home_is_expanded(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(empty))
    monkeypatch.setenv("USERPROFILE", str(empty))
    check_output(Path("~/pictures"), 0)
    assert save(Path("~/pictures")).parent == empty / "pictures"


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_in_place_of_the_folder(empty: Path, name: str) -> None:
    (empty / "file").write_text("")
    for attempt in (lambda: save(empty / name), lambda: check_output(empty / name, 0)):
        with pytest.raises(OutputNotWritable, match="not a folder") as caught:
            attempt()
        assert caught.value.hint == "Choose another output folder."


def test_a_folder_without_write_permission(empty: Path) -> None:
    """As root, who may write anywhere, it takes the immutable attribute."""
    if sys.platform != "linux":
        pytest.skip("needs POSIX permissions")
    root = os.geteuid() == 0
    lock, unlock = (
        (["chattr", "+i"], ["chattr", "-i"]) if root else (["chmod", "a-w"], ["chmod", "u+w"])
    )
    if subprocess.run([*lock, str(empty)]).returncode:
        pytest.skip("this file system has no such attribute")
    try:
        for attempt in (lambda: save(empty), lambda: check_output(empty, 0)):
            with pytest.raises(OutputNotWritable) as caught:
                attempt()
            assert caught.value.hint == "Allow writing to it, or choose another output folder."
    finally:
        subprocess.run([*unlock, str(empty)], check=True)
    assert names(empty) == []


def test_an_unknown_user(empty: Path) -> None:
    with pytest.raises(OutputNotWritable):
        check_output(Path("~nobody-of-this-name/x"), 0)


# Reading what others made


def write_png(path: Path, **texts: str) -> Path:
    chunks = PngInfo()
    for key, text in texts.items():
        chunks.add_itxt(key, text)
    picture().save(path, pnginfo=chunks)
    return path


def chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def raw_png(path: Path, *chunks: bytes, header: tuple[int, int] = (8, 8)) -> Path:
    start = chunk(b"IHDR", struct.pack(">IIBBBBB", *header, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + start + b"".join(chunks))
    return path


END = chunk(b"IEND", b"")


def test_another_tools_picture_has_parameters_but_no_request(empty: Path) -> None:
    path = write_png(empty / "other.png", parameters="猫\nSteps: 20", workflow="{}")
    info = read_image_info(path)
    assert (info.parameters, info.request, info.plan) == ("猫\nSteps: 20", None, None)
    with pytest.raises(NotOurPicture, match="carries no request"):
        request_from(path)


def test_packed_text_is_read(empty: Path) -> None:
    chunks = PngInfo()
    chunks.add_text("parameters", "packed", zip=True)
    chunks.add_itxt(OUR_CHUNK, json.dumps({"request": REQUEST.to_dict()}), zip=True)
    picture().save(empty / "a.png", pnginfo=chunks)
    info = read_image_info(empty / "a.png")
    assert (info.parameters, info.request, info.versions) == ("packed", REQUEST, {})


def test_a_picture_cut_short_in_its_pixels_still_gives_its_request(empty: Path) -> None:
    path = save(empty)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"IDAT") + 50])
    assert request_from(path) == REQUEST


def test_every_other_cut_is_an_error(empty: Path) -> None:
    data = save(empty).read_bytes()
    path = empty / "cut.png"
    for length in range(0, data.index(b"IDAT"), 7):
        path.write_bytes(data[:length])
        with pytest.raises(NotOurPicture) as caught:
            request_from(path)
        assert caught.value.hint


def test_a_damaged_text_is_an_error(empty: Path) -> None:
    path = save(empty)
    path.write_bytes(path.read_bytes().replace(b"Fuchs", b"Luchs", 1))
    with pytest.raises(NotOurPicture, match="is damaged"):
        read_image_info(path)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is not a PNG, JPEG or WebP"),
        (b"GIF89a", "is not a PNG, JPEG or WebP"),
        (b"\xff\xd8\xff\xe0JFIF", "is damaged"),
        (b"RIFF\0\0\0\0WEBP", "is damaged"),
    ],
)
def test_not_a_picture(empty: Path, content: bytes, why: str) -> None:
    (empty / "x").write_bytes(content)
    with pytest.raises(NotOurPicture, match=why):
        read_image_info(empty / "x")


def test_no_file_and_a_folder(empty: Path) -> None:
    for path in (empty / "none.png", empty, Path("~nobody-of-this-name/x.png")):
        with pytest.raises(NotOurPicture, match=r"can't be read|There is no picture"):
            read_image_info(path)


def test_parts_without_end_are_refused(empty: Path) -> None:
    path = raw_png(empty / "many.png", chunk(b"zTXt", b"a") * 20_000, END)
    with pytest.raises(NotOurPicture, match="too many parts"):
        read_image_info(path)


def test_memory_is_bounded_whatever_the_file_claims(empty: Path) -> None:
    import tracemalloc

    bomb = b"parameters\0\0" + zlib.compress(bytes(64 << 20))
    huge = struct.pack(">I", 2**31 - 1) + b"tEXt" + b"parameters\0"
    assert len(bomb) < MAX_TEXT_BYTES
    paths = [
        raw_png(empty / "bomb.png", chunk(b"zTXt", bomb), END),
        raw_png(empty / "huge.png", huge),
        raw_png(empty / "sizes.png", END, header=(2**31 - 1, 1)),
    ]
    with paths[1].open("r+b") as file:
        file.truncate(1 << 31)
    tracemalloc.start()
    for path in paths:
        with pytest.raises(NotOurPicture):
            request_from(path)
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "7",
        "{}",
        '{"request": null}',
        '{"request": {"model": "m", "later": 1}}',
        '{"request": {"model": "m", "steps": -1}}',
        '{"request": {"model": "m"}, "versions": []}',
        "[" * 200_000,
        '{"request": {"model": "\\ud800"}}',
    ],
)
def test_a_request_of_another_version_is_an_error(empty: Path, text: str) -> None:
    path = write_png(empty / "x.png", **{OUR_CHUNK: text})
    with pytest.raises(NotOurPicture, match="is not one that QwenImageTool") as caught:
        request_from(path)
    assert "update QwenImageTool" in caught.value.hint


def test_a_plan_of_another_version_does_not_hide_the_request(empty: Path) -> None:
    own = {"request": REQUEST.to_dict(), "plan": {"later": 1}, "versions": {"torch": "9"}}
    info = read_image_info(write_png(empty / "x.png", **{OUR_CHUNK: json.dumps(own)}))
    assert (info.request, info.plan, info.versions) == (REQUEST, None, {"torch": "9"})


def test_importing_loads_no_torch() -> None:
    code = (
        "import sys, qwen_image_tool.gallery, qwen_image_tool.device, qwen_image_tool.doctor,"
        " qwen_image_tool.logs, qwen_image_tool.settings;"
        "sys.exit(bool({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
