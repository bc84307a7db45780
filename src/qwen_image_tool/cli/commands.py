"""`qit`: the commands."""

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from qwen_image_tool import __version__, device, gallery, logs
from qwen_image_tool.app import App, made_otherwise
from qwen_image_tool.catalog import DEFAULT_MODEL
from qwen_image_tool.catalog.costs import card as find_card
from qwen_image_tool.catalog.sizes import menu_size, native_size
from qwen_image_tool.cli import serve as server
from qwen_image_tool.cli.models import models
from qwen_image_tool.cli.screen import Screen
from qwen_image_tool.doctor import worst
from qwen_image_tool.errors import BadRequest, Cancelled, ToolError
from qwen_image_tool.settings import load_settings
from qwen_image_tool.types import Device, Request, Size

cli = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make pictures with Alibaba's open Qwen-Image models on this computer.",
)
cli.add_typer(models, name="models")
for command in (server.ui, server.serve, server.token, server.password, server.mcp):
    cli.command()(command)

PLAINLY = {  # what Typer says, in plain words
    "Input should be a valid integer, unable to parse string as an integer": "it is no integer",
    "Input should be a valid number, unable to parse string as a number": "it is no number",
    "Input should be": "it has to be",
}

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="A model of `qit models list`, or a model folder."),
]
SizeOption = Annotated[
    str | None, typer.Option("--size", help="Pixels, WIDTHxHEIGHT, such as 1328x1328.")
]
Ratio = Annotated[
    str | None, typer.Option(help="1:1, 16:9, 9:16, 4:3, 3:4, 3:2 or 2:3, at the model's own size.")
]
Resolution = Annotated[
    str | None, typer.Option(help="Small, Medium, Large or Max, for the ratio (1:1 if none).")
]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.")]
Cfg = Annotated[float | None, typer.Option(help="True CFG scale; 1 is off.")]
Negative = Annotated[str | None, typer.Option(help="What the picture should not show.")]
Ram = Annotated[str | None, typer.Option(help="Use no more memory than this, such as 8GiB.")]
Vram = Annotated[str | None, typer.Option(help="Use no more GPU memory than this, such as 6GiB.")]
ModeOption = Annotated[
    str | None, typer.Option("--mode", help="exact: to the bit as diffusers; default: faster.")
]
Anyway = Annotated[
    bool, typer.Option("--anyway", help="Run even where the memory is not expected to be enough.")
]
Count = Annotated[int | None, typer.Option("--n", help="How many pictures.")]


def main() -> None:
    """The installed command. Exit codes: 0 done, 1 failed, 2 can't be asked for, 130 stopped."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line; returns its exit code."""
    screen = Screen(as_json="--json" in arguments)
    try:
        logs.set_up(load_settings().logs)
        code = cli(args=arguments, prog_name="qit", standalone_mode=False)
    except ToolError as error:
        logs.record_failure(error)
        screen.failure(error)
        return error.exit_code
    except typer.TyperException as error:
        screen.failure(_usage(error))
        return BadRequest.exit_code
    if code == Cancelled.exit_code:  # Typer's answer to Ctrl-C
        screen.failure(Cancelled("Stopped.", "Nothing unfinished was kept."))
    return code or 0


@cli.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What the picture shows.")] = None,
    model: ModelOption = None,
    size: SizeOption = None,
    ratio: Ratio = None,
    resolution: Resolution = None,
    steps: Steps = None,
    cfg: Cfg = None,
    negative: Negative = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the first picture.")] = None,
    n: Count = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures.")] = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="A picture of ours: make it again.")
    ] = None,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut off the end of a prompt that is too long.")
    ] = False,
    mode: ModeOption = None,
    ram: Ram = None,
    vram: Vram = None,
    anyway: Anyway = False,
    as_json: Json = False,
) -> None:
    """Make a picture from a sentence, and print its path.

    [bold]Examples[/]

      qit generate "a red circle left of a blue square on a yellow background"

      qit generate "a large green star" --ratio 16:9 --n 4 --seed 7

      qit generate --from output/20261123-101500-seed7.png --steps 30
    """
    ram_bytes, vram_bytes = _bytes("--ram", ram), _bytes("--vram", vram)
    app = App(load_settings())
    fields = gallery.request_from(source).to_dict() if source else {"model": DEFAULT_MODEL}
    fields |= _given(model=model, prompt=prompt, steps=steps, cfg=cfg, negative_prompt=negative)
    fields |= _given(seed=seed, images=n, mode=mode, truncate=truncate or None)
    fields |= _given(size=_size(app, fields["model"], size, ratio, resolution))
    screen = Screen(as_json)
    with screen.progress() as show:
        result = app.generate(
            Request.from_user(**fields),
            show,
            output=out,
            ram_bytes=ram_bytes,
            vram_bytes=vram_bytes,
            anyway=anyway,
        )
    if source and (change := made_otherwise(gallery.read_image_info(source), result)):
        screen.note(f"The original was made with {change}: pixels may differ.")
    if as_json:
        screen.json(result.to_dict())
    else:
        for image in result.images:
            screen.line(image.path)


@cli.command()
def plan(
    model: Annotated[
        str, typer.Argument(help="A model of `qit models list`, or a model folder.")
    ] = DEFAULT_MODEL,
    size: SizeOption = None,
    ratio: Ratio = None,
    resolution: Resolution = None,
    steps: Steps = None,
    cfg: Cfg = None,
    n: Count = None,
    mode: ModeOption = None,
    ram: Annotated[str | None, typer.Option(help="Plan for a machine with this much RAM.")] = None,
    vram: Annotated[
        str | None, typer.Option(help="Plan for a card with this much memory; 0 for none.")
    ] = None,
    card: Annotated[
        str | None, typer.Option(help="Plan for this card, such as 4090, at rates we assume.")
    ] = None,
    on: Annotated[
        str | None,
        typer.Option("--system", help="Plan for linux, windows, wsl or macos; else as here."),
    ] = None,
    anyway: Anyway = False,
    as_json: Json = False,
) -> None:
    """Show what a picture will need, without making it: here, or on a machine you don't have.

    [bold]Examples[/]

      qit plan

      qit plan qwen-image --ratio 16:9 --resolution Large --json

      qit plan qwen-image --vram 8GiB --ram 32GiB

      qit plan qwen-image --card 3060 --ram 32GiB --system windows

      qit plan qwen-image --ram 64GiB --system macos
    """
    machine = _machine(ram, vram, card, on)
    app = App(load_settings())
    fields = {"model": model, "prompt": "a prompt"}
    fields |= _given(steps=steps, cfg=cfg, images=n, mode=mode)
    fields |= _given(size=_size(app, model, size, ratio, resolution))
    request, found = app.plans(Request.from_user(**fields), machine, anyway)
    screen = Screen(as_json)
    if as_json:
        first, *others = (each.to_dict() for each in found)
        screen.json({"request": request.to_dict(), "plan": first, "fallbacks": others})
    else:
        screen.plan(request, found, here=machine is None)


@cli.command()
def info(
    image: Annotated[Path, typer.Argument(help="A PNG picture.")], as_json: Json = False
) -> None:
    """Show what a picture was made from.

    [bold]Example[/]

      qit info output/20261123-101500-seed7.png
    """
    found = gallery.read_image_info(image)
    screen = Screen(as_json)
    if as_json:
        screen.json(found.to_dict())
    else:
        screen.image(found)


@cli.command(name="doctor")
def doctor_command(as_json: Json = False) -> None:
    """Check that this computer is ready: Python, torch and the GPU, memory, disk, folders.

    Ends with 1 where something fails.
    """
    checks = App(load_settings()).examine()
    screen = Screen(as_json)
    if as_json:
        screen.json({"checks": [check.to_dict() for check in checks]})
    else:
        screen.checks(checks)
    raise typer.Exit(1 if worst(checks) == "fail" else 0)


@cli.command()
def clear_cache() -> None:
    """Forget what can be made again: prompts that were read, what was measured and compiled."""
    App(load_settings()).clear_cache()


@cli.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        Screen().line(f"qit {__version__}")
        raise typer.Exit


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _size(
    app: App, model: str, size: str | None, ratio: str | None, resolution: str | None
) -> Size | None:
    """The size that the three options name; None where none of them is given."""
    if size and (ratio or resolution):
        raise BadRequest("--size already says both.", "Leave --ratio and --resolution out.")
    if size:
        try:
            return Size.parse(size)
        except ValueError as error:
            raise BadRequest(f"--size {error}.", "Write it as WIDTHxHEIGHT: 1024x768.") from error
    if resolution:
        return menu_size(ratio or "1:1", resolution)
    return native_size(app.model(model).sizes.native, ratio) if ratio else None


def _machine(ram: str | None, vram: str | None, card: str | None, on: str | None) -> Device | None:
    """The machine that the options name; None is this one."""
    if ram is None and vram is None and card is None and on is None:
        return None
    system = device.system() if on is None else _system(on)
    mac = system == "darwin"
    known = None if card is None else find_card(card)
    ram_bytes, vram_bytes = _bytes("--ram", ram), _bytes("--vram", vram)
    if known and mac:
        raise BadRequest(
            "No Mac has such a card.", "Leave --card out, or add --system windows or linux."
        )
    if known and vram is not None:
        raise BadRequest("--card already says how much memory it has.", "Leave --vram out.")
    gpu = vram if card is None else card
    if ram_bytes is None or (gpu is None and not mac):
        given = "RAM" if ram else "card" if gpu else "system"
        raise BadRequest(
            f"A machine has RAM and a card, and only the {given} is given.",
            "Give --ram with --vram or --card; --vram 0 is no card.",
        )
    return device.invented(ram_bytes, known.vram_bytes if known else vram_bytes, known, system)


def _system(name: str) -> str:
    """Of device.SYSTEMS, the one that a person calls so."""
    names = {known.lower(): system for system, known in device.SYSTEMS.items()}
    if name.lower() not in names:
        raise BadRequest(f"--system {name!r} is not known.", f"Choose one of {', '.join(names)}.")
    return names[name.lower()]


def _bytes(option: str, text: str | None) -> int | None:
    """Raises BadRequest where it is no size, or one that leaves open what it counts."""
    if text is None:
        return None
    if not text.strip():
        raise BadRequest(f"{option} is empty.", "Write it like 8GiB.")
    found = re.fullmatch(r"\s*(\d*\.?\d+)\s*([a-z]*)\s*", text, re.IGNORECASE)
    if found and not found[2] and float(found[1]):
        raise BadRequest(f"{option} {found[1]} is {found[1]} bytes.", f"Write {_likely(found[1])}.")
    try:
        return TypeAdapter(ByteSize).validate_python(text if found else "")
    except ValidationError as error:
        raise BadRequest(f"{option} {text!r} is not a size.", "Write it like 8GiB.") from error


def _likely(number: str) -> str:
    """With the unit that is most likely meant."""
    size = float(number)
    return number + ("GiB" if size < 1 << 10 else "MiB" if size < 1 << 20 else "B")


def _usage(error: typer.TyperException) -> BadRequest:
    command = getattr(getattr(error, "ctx", None), "command_path", "qit")
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    if command == "qit generate" and "unexpected extra argument" in text:
        return BadRequest(
            "The sentence has to be one argument.", 'Put it in quotes: qit generate "a red circle".'
        )
    for theirs, ours in PLAINLY.items():
        text = text.replace(theirs, ours)
    said = text.rstrip(".") or "No command was given"
    return BadRequest(f"{said}.", f"`{command} --help` shows what there is.")
