"""What devices were measured to do: kept for this device under these versions."""

from pathlib import Path

import pytest

from qwen_image_tool import rates
from qwen_image_tool.rates import RateBook
from qwen_image_tool.types import Device, Rates

CARD = Device(
    kind="cuda",
    name="NVIDIA GeForce RTX 4090",
    ram_bytes=64 << 30,
    ram_free_bytes=50 << 30,
    vram_bytes=24 << 30,
    vram_free_bytes=23 << 30,
    driver="580.65",
    torch="2.13.0+cu130",
)
MEASURED = Rates(matmul=1.5e14, attention=1.4e14, bus=2.5e10, compiler=True)


def test_rates_are_kept(tmp_path: Path) -> None:
    RateBook(tmp_path / "rates").put(CARD, MEASURED)
    busier = CARD.model_copy(update={"vram_free_bytes": 1 << 30, "ram_free_bytes": 1 << 30})
    assert RateBook(tmp_path / "rates").get(busier) == MEASURED


@pytest.mark.parametrize(
    "change", [{"name": "another"}, {"driver": "590.1"}, {"torch": "2.14.0"}, {"cores": 3}]
)
def test_another_device_or_version_is_not_known(change: dict[str, object], tmp_path: Path) -> None:
    book = RateBook(tmp_path)
    book.put(CARD, MEASURED)
    assert book.get(CARD.model_copy(update=change)) is None


def test_another_diffusers_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = RateBook(tmp_path)
    book.put(CARD, MEASURED)
    monkeypatch.setattr(rates, "_version", lambda _: "0.43.0")
    assert book.get(CARD) is None


def test_runs_teach_single_rates(tmp_path: Path) -> None:
    book = RateBook(tmp_path)
    book.learn(CARD, disk=3e9)
    assert book.get(CARD) is None, "the device was never measured"
    book.put(CARD, MEASURED)
    book.learn(CARD, disk=3e9)
    book.learn(CARD, compile_seconds=17.0)
    assert book.get(CARD) == MEASURED.model_copy(update={"disk": 3e9, "compile_seconds": 17.0})


@pytest.mark.parametrize("text", ["", "{", '{"name": 1}', '{"rates": {"matmul": "fast"}}', "\x00"])
def test_a_broken_file_is_measured_again(text: str, tmp_path: Path) -> None:
    book = RateBook(tmp_path / "rates")
    book.put(CARD, MEASURED)
    [file] = (tmp_path / "rates").iterdir()
    file.write_text(text)
    assert book.get(CARD) is None
    book.put(CARD, MEASURED)
    assert book.get(CARD) == MEASURED


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    book = RateBook(tmp_path / "file" / "rates")
    book.put(CARD, MEASURED)
    assert book.get(CARD) is None
