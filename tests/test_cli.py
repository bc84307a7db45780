"""The command line, from words to files; the model is a tiny random one."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tiny
from qwen_image_tool import logs
from qwen_image_tool.cli.commands import run
from qwen_image_tool.engine import text
from qwen_image_tool.errors import ModelMissing
from qwen_image_tool.planner import USABLE_RAM

pytestmark = pytest.mark.usefixtures("torch_asked_once")
QUICK = ["--size", "64x64", "--steps", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(autouse=True)
def _quiet_logs() -> Iterator[None]:
    yield
    logs.tear_down()


class Said:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        assert self.out.count("\n") == 1, "one JSON object and nothing else"
        return json.loads(self.out)


@pytest.fixture
def qit(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str) -> Said:
        code = run(list(arguments))
        out, err = capsys.readouterr()
        return Said(code, out, err)

    return call


def pictures(folder: Path = Path("output")) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


def pixels(path: str | Path) -> Any:
    return np.asarray(Image.open(path))


def test_a_picture_from_a_sentence(qit: Any, model: str) -> None:
    said = qit("generate", "a cat, 猫", "--model", model, *QUICK, "--seed", "7")
    assert said.code == 0
    [path] = pictures()
    assert said.out == f"{path.absolute()}\n"
    assert re.fullmatch(r"\d{8}-\d{6}-seed7\.png", path.name)
    assert pixels(path).shape == (64, 64, 3)
    for line in ("Loading the model", "Drawing", "step 2/2", "Saving"):
        assert line in said.err


def test_json_is_one_object(qit: Any, model: str) -> None:
    result = qit("generate", "a cat", "-m", model, *QUICK, "--n", "2", "--json").json
    assert [image["path"] for image in result["images"]] == [str(p.absolute()) for p in pictures()]
    assert result["request"]["steps"] == 2
    assert result["request"]["negative_prompt"] == " "
    assert set(result["seconds"]) == {"load", "encode", "denoise", "decode", "save"}
    assert result["versions"]["torch"]


def test_a_picture_is_made_again_from_its_file(qit: Any, model: str) -> None:
    qit("generate", "two cats", "-m", model, *QUICK, "--n", "2", "--cfg", "3", "--out", "first")
    again = qit("generate", "--from", str(pictures(Path("first"))[1]), "--out", "again")
    assert again.code == 0
    assert "may differ" not in again.err
    [copy] = pictures(Path("again"))
    first = [pixels(path) for path in pictures(Path("first"))]
    assert np.array_equal(pixels(copy), first[1])
    assert not np.array_equal(first[0], first[1])


def test_a_picture_is_made_again_with_a_change(qit: Any, model: str) -> None:
    qit("generate", "a cat", "-m", model, *QUICK, "--seed", "3")
    [path] = pictures()
    result = qit("generate", "--from", str(path), "--seed", "4", "--out", "other", "--json").json
    assert result["request"]["seed"] == 4
    assert result["request"]["prompt"] == "a cat"
    assert not np.array_equal(pixels(path), pixels(result["images"][0]["path"]))


def test_a_menu_size_is_kept_to_the_pixel(qit: Any, model: str) -> None:
    said = qit(
        "generate", "x", "-m", model, "--ratio", "3:2", "--resolution", "small", "--steps", "2",
        "--cfg", "1", "--json",
    )  # fmt: skip
    assert said.json["images"][0]["size"] == "512x342"
    assert said.json["plan"]["working_size"] == "512x352"
    assert pixels(pictures()[0]).shape == (342, 512, 3)


def test_info(qit: Any, model: str) -> None:
    qit("generate", "a cat", "-m", model, *QUICK, "--seed", "3")
    [path] = pictures()
    said = qit("info", str(path))
    assert said.code == 0
    assert "a cat\nSteps: 2, Sampler: Euler" in said.out
    assert "float32" in said.out
    assert qit("info", str(path), "--json").json["request"]["seed"] == 3


def test_the_mode_stands_in_the_picture(qit: Any, model: str) -> None:
    for number, mode in enumerate(("default", "exact")):
        qit("generate", "a cat", "-m", model, *QUICK, "--mode", mode, "--out", mode)
        told = qit("info", str(pictures(Path(mode))[0]), "--json").json
        assert told["request"].get("mode", "default") == mode
        assert told["plan"].get("mode", "default") == mode
        assert told["plan"].get("single_frame", True) == (not number), "diffusers' own decoder"


def test_plan_reads_no_weights_and_writes_nothing(qit: Any, model: str) -> None:
    said = qit("plan", model, "--size", "121x90")
    assert said.code == 0
    assert "Drawn at 128x96" in said.out
    assert "GiB" in said.out
    assert qit("plan", model, "--size", "121x90", "--json").json["plan"]["working_size"] == "128x96"
    assert not Path("output").exists()


def test_plan_for_a_machine_and_a_model_that_are_not_here(qit: Any) -> None:
    small = qit("plan", "qwen-image", "--ram", "12GiB", "--vram", "0", "--size", "256x256")
    assert small.code == 0
    assert "are read from disk" in small.out
    assert "A step reads: " in small.out
    assert "? Seconds are not known of this machine" in small.out
    large = qit("plan", "qwen-image", "--ram", "64GiB", "--vram", "80GiB", "--json").json
    assert large["plan"]["device"] == "cuda"
    assert large["plan"]["placement"] == {"blocks": 60, "resident": 60}
    card = qit("plan", "qwen-image", "--ram", "32GiB", "--card", "4060ti")
    assert "4060TI (assumed rates)" in card.out
    assert re.search(r"Takes: +about \d+ min( \d+ s)?, loading", card.out)
    assert re.search(r"Drawing .* \d+ min( \d+ s)? *\n", card.out)
    assert "?" not in card.out
    assert "A step copies: " in card.out
    assert "If memory runs out, in this order" in card.out
    anyway = ("plan", "qwen-image", "--ram", "2GiB", "--vram", "3GiB", "--anyway", "--json")
    assert qit(*anyway).json["plan"]["reasons"][0].startswith("It may not fit")
    tiny_machine = qit("plan", "qwen-image", "--ram", "2GiB", "--vram", "0")
    assert tiny_machine.code == 2
    assert "needs" in tiny_machine.err


def test_plan_for_another_system(qit: Any) -> None:
    machine = ("plan", "qwen-image", "--ram", "32GiB")
    linux = qit(*machine, "--vram", "8GiB", "--system", "linux")
    assert "from page-locked RAM" in linux.out
    assert "- Planned as on Linux with an NVIDIA card." in linux.out
    windows = qit(*machine, "--vram", "8GiB", "--system", "Windows", "--json").json
    assert windows["plan"]["placement"]["pageable"] > 0
    assert "Planned as on Windows with an NVIDIA card." in windows["plan"]["reasons"]
    mac = qit(*machine, "--system", "macos", "--json").json["plan"]
    assert mac["device"] == "mps"
    assert max(phase["ram_bytes"] + phase["vram_bytes"] for phase in mac["phases"]) < 32 << 30


def test_a_wrong_size_is_refused_before_anything_is_made(qit: Any, home: Path, model: str) -> None:
    said = qit("generate", "x", "-m", model, *QUICK, "--ram", "8")
    assert said.code == 2
    assert not Path("output").exists()
    assert not (home / "cache").exists()


def test_a_run_with_little_ram_reads_from_disk_and_draws_the_same(qit: Any, tmp_path: Path) -> None:
    model = str(tiny.save(tmp_path / "six", layers=6))
    common = ["generate", "a cat", "-m", model, *QUICK, "--seed", "3", "--json"]
    whole = qit(*common).json
    assert whole["plan"]["placement"] == {"blocks": 6, "resident": 6}
    need = max(phase["ram_bytes"] for phase in whole["plan"]["phases"])
    little = qit(*common, "--ram", f"{int((need - 1) / USABLE_RAM)}B").json
    assert little["plan"]["placement"]["source"] == "disk"
    files = [result["images"][0]["path"] for result in (whole, little)]
    assert np.array_equal(*map(pixels, files))
    assert qit(*common, "--ram", f"{need // 2}B").json["error"]["kind"] == "CannotRun"


def test_a_known_prompt_needs_no_text_encoder(
    qit: Any, model: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["generate", "a cat", "-m", model, *QUICK, "--seed", "3"]
    qit(*common)
    assert len(list((home / "cache" / "embeddings").iterdir())) == 2

    def refuse(*_: object) -> None:
        raise ModelMissing("The text encoder was loaded.")

    monkeypatch.setattr(text, "TextEncoder", refuse)
    assert qit(*common, "--out", "again").code == 0
    assert "was loaded" in qit("generate", "a dog", "-m", model, *QUICK).err
    assert np.array_equal(pixels(pictures()[0]), pixels(pictures(Path("again"))[0]))
    kept = [home / "cache" / name for name in ("embeddings", "modulation", "rates")]
    assert all(any(folder.iterdir()) for folder in kept)
    assert qit("clear-cache").code == 0
    assert not any(folder.exists() for folder in kept)
    assert "was loaded" in qit(*common).err


def test_models(qit: Any) -> None:
    said = qit("models", "list")
    assert "qwen-image-2512" in said.out
    rows = {row["id"]: row for row in qit("models", "list", "--json").json["models"]}
    assert rows["qwen-image"]["state"] == "not here"
    assert rows["qwen-image-edit"]["state"] == "not yet"
    assert rows["qwen-image-2.1"]["commercial"] is False
    shown = qit("models", "show", "qwen-image-2.1-turbo")
    assert "NOT for commercial use" in shown.out
    assert "Editing is not in this version yet" in " ".join(shown.out.split())
    assert qit("models", "show", "qwen-image", "--json").json["sampling"]["steps"] == 50


def test_doctor(qit: Any) -> None:
    said = qit("doctor", "--json")
    names = [check["name"] for check in said.json["checks"]]
    assert len(names) == len(set(names)) > 6
    failed = any(check["status"] == "fail" for check in said.json["checks"])
    assert said.code == (1 if failed else 0)
    assert "PASS" in qit("doctor").out


BAD = [
    (["generate"], "The prompt is empty"),
    (["generate", "  "], "The prompt is empty"),
    (["generate", "x", "--model", "qwen-imgae"], "Did you mean 'qwen-image'?"),
    (["generate", "x", "--model", "qwen-image"], "is not on this computer"),
    (["generate", "x", "--model", "qwen-image-edit"], "can't run yet"),
    (["generate", "x", "--model", "qwen-image-2.1"], "is not on this computer"),
    (["generate", "x", "--model", "/no/folder"], "does not exist"),
    (["generate", "x", "--ratio", "16:10"], "The nearest is 3:2"),
    (["generate", "x", "--resolution", "Huge"], "Choose one of Small"),
    (["generate", "x", "--size", "0x64"], "has no pixels"),
    (["generate", "x", "--size", "big"], "WIDTHxHEIGHT"),
    (["generate", "x", "--size", "64x64", "--ratio", "1:1"], "already says both"),
    (["generate", "x", "MODEL", "--size", "9000x9000"], "Nearest: --size 2048x2048"),
    (["generate", "x", "--steps", "0"], "The number of steps is 0"),
    (["generate", "x", "--steps", "many"], "'--steps': it is no integer"),
    (["generate", "x", "--cfg", "much"], "'--cfg': it is no number"),
    (["serve", "--port", "99999"], "'--port': it has to be less than or equal to 65535"),
    (["generate", "a", "red", "circle"], "Put it in quotes"),
    (["generate", "x", "--cfg", "0.5"], "The CFG scale is 0.5"),
    (["generate", "x", "--seed", "-1"], "The seed is -1"),
    (["generate", "x", "--seed", str(2**63)], f"Use {2**63 - 1} or less"),
    (["generate", "x", "--n", "0"], "The number of pictures is 0"),
    (["generate", "x", "--mode", "magic"], "mode is 'magic'. Choose default or exact."),
    (["generate", "x", "--ram", "much"], "Write it like 8GiB"),
    (["generate", "x", "--ram", "8"], "--ram 8 is 8 bytes. Write 8GiB."),
    (["generate", "x", "--vram", "8192"], "--vram 8192 is 8192 bytes. Write 8192MiB."),
    (["generate", "x", "--vram", ""], "--vram is empty. Write it like 8GiB."),
    (["generate", "x", "--ram", "8,5GiB"], "--ram '8,5GiB' is not a size."),
    (["plan", "--ram", "32", "--vram", "8"], "--ram 32 is 32 bytes. Write 32GiB."),
    (["plan", "--ram", "32GiB", "--vram", ""], "--vram is empty"),
    (["plan", "--ram", "32GiB", "--card", ""], "Choose one of 3060"),
    (["plan", "--ram", "8GiB", "--system", "linux"], "only the RAM is given"),
    (["plan", "--system", "windows"], "only the system is given"),
    (["plan", "--ram", "8GiB", "--system", "BeOS"], "Choose one of linux, windows, wsl, macos."),
    (["plan", "--ram", "8GiB", "--card", "4090", "--system", "macos"], "No Mac has such a card."),
    (["plan", "--vram", "8GiB"], "only the card is given"),
    (["plan", "--vram", "8GiB", "--card", "4090", "--ram", "8GiB"], "Leave --vram out"),
    (["generate", "x", "MODEL", "--cfg", "1", "--negative", "dark"], "does nothing at CFG 1"),
    (["generate", "word " * 300, "MODEL", "--cfg", "1"], "the model reads 1024"),
    (["generate", "--from", "no.png"], "no.png"),
    (["generate", "--from", "plain.png"], "carries no request"),
    (["generate", "x", "MODEL", "--out", "plain.png"], "plain.png"),
    (["generate", "x", "--colour", "red"], "--colour"),
    (["info", "no.png"], "There is no picture no.png. Check the path."),
    (["info", "."], ". can't be read"),
    (["models", "show", "qwen"], "There is no model 'qwen'"),
    (["draw", "x"], "draw"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda value: str(value)[:50])
def test_bad_input_is_refused_in_one_sentence(
    qit: Any, model: str, arguments: list[str], message: str
) -> None:
    Image.new("RGB", (8, 8)).save("plain.png")
    words = [w for a in arguments for w in (["-m", model, *QUICK[2:]] if a == "MODEL" else [a])]
    before = sorted(Path().rglob("*.png"))
    said = qit(*words)
    assert said.code == 2
    assert message in said.err
    assert said.out == ""
    assert len([line for line in said.err.splitlines() if line.startswith("qit: ")]) == 1
    assert sorted(Path().rglob("*.png")) == before


def test_an_error_as_json(qit: Any) -> None:
    said = qit("generate", "x", "--model", "qwen-imgae", "--json")
    assert said.code == 2
    assert said.json["error"]["kind"] == "BadRequest"
    assert said.json["error"]["hint"] == "Did you mean 'qwen-image'?"


def test_a_long_prompt_can_be_cut(qit: Any, model: str) -> None:
    said = qit("generate", "word " * 300, "-m", model, *QUICK, "--cfg", "1", "--truncate")
    assert said.code == 0
    assert len(pictures()) == 1


def test_a_broken_weight_file_is_said_and_its_traceback_kept(
    qit: Any, model: str, home: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    subprocess.run(["cp", "-r", model, broken], check=True)
    weights = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    said = qit("generate", "x", "-m", str(broken), *QUICK)
    assert said.code == 2
    assert "ends after 5000 bytes" in said.err
    assert "Traceback" not in said.err
    assert "Traceback" in (home / "logs" / "qit.log").read_text(encoding="utf-8")
    assert pictures() == []


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from qwen_image_tool.cli import main; main()", *arguments]


def test_ctrl_c_stops_within_a_step_and_leaves_nothing(model: str) -> None:
    many = command("generate", "x", "-m", model, "--size", "256x256", "--steps", "1000")
    with subprocess.Popen(
        many, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    ) as child:
        assert child.stderr
        for line in child.stderr:
            if "step " in line:
                break
        os.kill(child.pid, signal.SIGINT)
        started = time.monotonic()
        out, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert time.monotonic() - started < 30
    assert "Stopped." in err
    assert "Traceback" not in err
    assert out == ""
    assert pictures() == []
