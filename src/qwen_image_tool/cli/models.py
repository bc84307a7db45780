"""`qit models`: find, download, verify, repair."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer

from qwen_image_tool.app import Advice, App
from qwen_image_tool.catalog import Model
from qwen_image_tool.cli.screen import UNMEASURED, Screen, amount, gib, pace
from qwen_image_tool.errors import (
    BadRequest,
    DownloadFailed,
    LicenceNotAccepted,
    ToolError,
    sentences,
)
from qwen_image_tool.settings import load_settings
from qwen_image_tool.store.download import Control
from qwen_image_tool.store.formats import (
    WORDS,
    Checkpoint,
    Stranger,
    check_taken,
    models_for,
    recognise,
    survey,
)
from qwen_image_tool.store.verify import Fault
from qwen_image_tool.types import Device

models = typer.Typer()
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print events as lines of JSON.")]
Id = Annotated[str, typer.Argument(help="An id of `qit models list`.")]
VariantOption = Annotated[
    str, typer.Option("--variant", help="bf16, or one that `qit models show` lists.")
]


@models.callback(invoke_without_command=True)
def alone(context: typer.Context) -> None:
    """The models: what there is, what they need, how to get them. By itself it lists them."""
    if context.invoked_subcommand is None:
        list_models()


@models.command(name="list")
def list_models(as_json: Json = False) -> None:
    """List the models of the family: what they do, what they need on this computer, their licence.

    Memory and seconds are those of one picture with the model's own settings.
    """
    app, screen = App(load_settings()), Screen(as_json)
    here = _computer(app, screen)
    rows = [app.describe(model, here) for model in app.catalog.models]
    best = app.recommend(here)[0] if here else None
    if as_json:
        screen.json({"models": rows, "recommended": best and best.model_dump(mode="json")})
    else:
        screen.models(rows, best)


@models.command()
def show(model: Id, as_json: Json = False) -> None:
    """Show all that is known of one model.

    [bold]Example[/]

      qit models show qwen-image-2512
    """
    app, screen = App(load_settings()), Screen(as_json)
    entry = app.catalog.find(model)
    row = app.describe(entry, _computer(app, screen))
    row["usable"] = [] if row["state"] == "ready" else _usable(app, entry)
    if as_json:
        screen.json(entry.to_dict() | row)
    else:
        screen.model(entry, row, app.catalog.licence_of(entry))


def _computer(app: App, screen: Screen) -> Device | None:
    """As it was seen last; looked at where it was not. None where that fails, and why is said."""
    try:
        if here := app.seen():
            return here
        screen.note("Looking at this computer, once: what its GPU and memory are ...")
        return app.here()
    except ToolError as error:
        screen.note(f"What the models need here can't be told. {error}")
        return None


def _usable(app: App, model: Model) -> list[dict[str, str]]:
    """Files of other programs that may be parts of a model which is not here."""
    return [
        {"path": str(found.path), "is": WORDS[found.kind], "storage": found.storage}
        for found in app.library.usable(model)
    ]


@models.command()
def recommend(as_json: Json = False) -> None:
    """Say which model and variant suit this computer best, and why."""
    advice = App(load_settings()).recommend()
    screen = Screen(as_json)
    if as_json:
        screen.json({"models": [each.model_dump(mode="json") for each in advice]})
        return
    told = {each.model: _sentences(each) for each in advice}
    running = [told[each.model] for each in advice if each.runs]
    several = running if len(running) > 1 else [[]]
    common = [said for said in several[0] if all(said in one for one in several)]
    for each in advice:
        own = [said for said in told[each.model] if said not in common]
        screen.line(f"{each.model} ({each.variant}): {' '.join(own)}")
    if common:
        screen.line(f"For each that runs here: {' '.join(common)}")


def _sentences(advice: Advice) -> list[str]:
    """What a recommendation says of a model: what it takes, then why it is recommended."""
    takes = [f"{advice.to_fetch / 1e9:.1f} GB to fetch" if advice.to_fetch else "is here"]
    if advice.runs:
        takes.append(f"needs {gib(advice.ram_bytes)} of RAM")
        takes += [f"{gib(advice.vram_bytes)} of GPU memory"] if advice.vram_bytes else []
        takes += [f"{pace(advice.seconds)} a picture"] if advice.seconds is not None else []
    unmeasured = [UNMEASURED] if advice.runs and advice.seconds is None else []
    return [f"{', '.join(takes)}.", *sentences(advice.reason), *unmeasured]


@models.command()
def download(
    model: Id,
    variant: VariantOption = "",
    yes_license: Annotated[
        bool, typer.Option("--yes-license", help="I have read the licence and agree to it.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Delete what was fetched and fetch everything anew.")
    ] = False,
    update: Annotated[
        bool,
        typer.Option("--update", help="Go on to the newest revision; else the first one stays."),
    ] = False,
    as_json: JsonLines = False,
) -> None:
    """Fetch a model, or the rest of it. Ctrl-C pauses; the same command goes on.

    [bold]Examples[/]

      qit models download qwen-image

      qit models download qwen-image --variant Q4_K_M
    """
    app = App(load_settings())
    entry = app.catalog.find(model)
    screen = Screen(as_json)
    if later := _not_yet(entry, variant):
        screen.note(f"This version can't run it. {later}")
    try:
        with screen.transfer() as emit, _pause_on_ctrl_c(screen) as control:
            folder = app.library.download(entry, variant, emit, control, yes_license, again, update)
    except LicenceNotAccepted:
        with suppress(DownloadFailed):  # without a connection the address has to do
            screen.note(app.library.licence_text(entry))
        raise
    _done(screen, as_json, str(folder), folder=str(folder))


def _not_yet(model: Model, variant: str) -> str:
    """Why what is going to be fetched can't run yet, if so."""
    chosen = next((v for v in model.variants if v.id.lower() == variant.lower()), None)
    return model.unsupported or (chosen.unsupported if chosen else "")


@models.command()
def pause(model: Id) -> None:
    """Stop a download that another window runs; `download` goes on where it stopped."""
    app = App(load_settings())
    entry = app.catalog.find(model)
    app.library.pause(entry)
    Screen().line(f"The download of {entry.name} stops; `qit models download {entry.id}` goes on.")


@models.command()
def verify(
    model: Id,
    full: Annotated[bool, typer.Option("--full", help="Hash every byte.")] = False,
    as_json: JsonLines = False,
) -> None:
    """Check that a model is whole: sizes and headers, or with --full every byte.

    Ends with 1 where something is wrong.
    """
    app = App(load_settings())
    entry = app.catalog.find(model)
    screen = Screen(as_json)
    with screen.transfer() as show, _pause_on_ctrl_c(screen) as control:
        faults = app.library.verify(entry, full, show, control.stopped.is_set)
    _report(screen, faults)
    _done(screen, as_json, "" if faults else f"{entry.name} is whole.", faults=_plain(faults))
    if faults:
        absent = any(fault.path in entry.components for fault in faults)
        command, what = ("download", "missing") if absent else ("repair", "broken")
        screen.note(f"`qit models {command} {entry.id}` fetches what is {what}.")
        raise typer.Exit(1)


@models.command()
def repair(model: Id, as_json: JsonLines = False) -> None:
    """Hash every byte, and fetch again what is broken and nothing else."""
    app = App(load_settings())
    entry = app.catalog.find(model)
    screen = Screen(as_json)
    with screen.transfer() as show, _pause_on_ctrl_c(screen) as control:
        mended = app.library.repair(entry, show, control)
    _report(screen, mended)
    text = f"{entry.name} is whole; {len(mended)} file(s) were mended."
    _done(screen, as_json, text, mended=_plain(mended))


@models.command()
def remove(model: Id, variant: VariantOption = "", as_json: Json = False) -> None:
    """Delete a model, or one variant of its transformer alone.

    Files that other models share stay.
    """
    app, screen = App(load_settings()), Screen(as_json)
    entry = app.catalog.find(model)
    freed = app.library.remove(entry, variant)
    stays = sum(app.library.frees(entry)) if app.library.folder(entry).is_dir() else 0
    text = f"{amount(freed) if freed else '0 MB'} freed."
    if stays:
        here = ", ".join(app.library.variants(entry)) or "no transformer"
        text += f" The rest of {entry.name} stays ({amount(stays)}, {here});"
        text += f" `qit models remove {entry.id}` deletes that too."
    _done(screen, as_json, text, freed_bytes=freed, stays_bytes=stays)


@models.command(name="import")
def import_file(
    path: Annotated[Path, typer.Argument(help="A safetensors or GGUF file.")],
    model: Annotated[
        str | None, typer.Option("--as", help="The model that it belongs to, where several fit.")
    ] = None,
    as_json: JsonLines = False,
) -> None:
    """Use another program's transformer or text encoder where it lies, without a copy.

    What the file is, its keys and shapes say, whatever its name. It is read once, for its hash.

    [bold]Example[/]

      qit models import ComfyUI/models/diffusion_models/qwen_image_bf16.safetensors --as qwen-image
    """
    app, screen = App(load_settings()), Screen(as_json)
    found = recognise(path)
    check_taken(found)
    entry = app.catalog.find(model) if model else _only_one(found, models_for(found, app.catalog))
    with screen.transfer() as show, _pause_on_ctrl_c(screen) as control:
        target = app.library.import_file(path, entry, show, control.stopped.is_set)
    _done(screen, as_json, str(target), path=str(target), checkpoint=found.to_dict())
    if later := found.unsupported or entry.unsupported:
        screen.note(f"This version can't run it. {later}")
    else:
        screen.note(f"`qit models download {entry.id}` fetches what the model needs beside it.")


def _only_one(found: Checkpoint, fitting: tuple[Model, ...]) -> Model:
    if len(fitting) == 1:
        return fitting[0]
    raise BadRequest(
        f"{found.path} is a {WORDS[found.kind]} in {found.storage}, and its keys and shapes fit"
        f" {len(fitting)} models.",
        f"Say which it was made for with --as, one of: {', '.join(m.id for m in fitting)}. Where it"
        " came from says so.",
    )


@models.command()
def where(as_json: Json = False) -> None:
    """Show the folders that are looked in, and the weight files of other programs there."""
    app = App(load_settings())
    screen = Screen(as_json)
    cache = app.elsewhere.cache
    strangers = survey(app.elsewhere.weight_files(), app.catalog)
    rows: list[tuple[str, ...]] = [(str(each.path), *_described(each)) for each in strangers]
    if as_json:
        found = [{"path": path, "is": what, "why": why} for path, what, why in rows]
        folders = [str(folder) for folder in app.elsewhere.folders]
        screen.json(
            {
                "models": str(app.settings.models),
                "cache": str(cache),
                "folders": folders,
                "files": found,
            }
        )
        return
    screen.facts({"Models": app.settings.models, "Hugging Face cache, read-only": cache})
    for folder in app.elsewhere.folders:
        screen.facts({"Also, read-only": folder})
    if rows:
        screen.line("")
        for path, what, note in rows:
            screen.line(f"{path}\n  {what}{note and ': ' + note}")
        screen.line("")
        screen.line("`qit models import FILE` uses a transformer or text encoder where it lies.")


def _described(found: Stranger) -> tuple[str, str]:
    if found.checkpoint is None:
        return "not ours", found.why
    read = found.checkpoint
    what = f"{read.family} {WORDS[read.kind]}, {read.storage}"
    return what, found.why or f"fits {', '.join(model.id for model in found.models)}"


def _report(screen: Screen, faults: tuple[Fault, ...]) -> None:
    for fault in faults:
        if not screen.as_json:
            screen.line(f"{fault.kind}: {fault.message}")


def _plain(faults: tuple[Fault, ...]) -> list[dict[str, object]]:
    return [fault.to_dict() for fault in faults]


def _done(screen: Screen, as_json: bool, text: str, **fields: object) -> None:
    if as_json:
        screen.json({"kind": "done", **fields})
    elif text:
        screen.line(text)


@contextmanager
def _pause_on_ctrl_c(screen: Screen) -> Iterator[Control]:
    """Ctrl-C stops in order: what came is kept, and the message says how to go on. A second Ctrl-C
    does not wait for that."""
    control = Control()

    def stop(*_: object) -> None:
        if control.stopped.is_set():
            raise KeyboardInterrupt
        control.pause()
        # In a thread: what was interrupted may be in the middle of writing a line
        threading.Thread(target=screen.note, args=("Stopping ...",)).start()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield control
    finally:
        signal.signal(signal.SIGINT, before)
