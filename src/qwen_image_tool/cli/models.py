"""`qit models`: find, download, verify, repair."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer

from qwen_image_tool.app import App
from qwen_image_tool.catalog import Model
from qwen_image_tool.cli.screen import Screen, duration, gib
from qwen_image_tool.errors import BadRequest, DownloadFailed, LicenceNotAccepted, ToolError
from qwen_image_tool.settings import load_settings
from qwen_image_tool.store.download import Control
from qwen_image_tool.store.formats import models_for, recognise
from qwen_image_tool.store.verify import Fault

models = typer.Typer(
    no_args_is_help=True, help="The models: what there is, what they need, how to get them."
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print events as lines of JSON.")]
Id = Annotated[str, typer.Argument(help="An id of `qit models list`.")]
VariantOption = Annotated[
    str, typer.Option("--variant", help="bf16, or one that `qit models show` lists.")
]


@models.command(name="list")
def list_models(as_json: Json = False) -> None:
    """List the models of the family: what they do, their size and licence."""
    app = App(load_settings())
    rows = [app.describe(model) for model in app.catalog.models]
    screen = Screen(as_json)
    if as_json:
        screen.json({"models": rows})
    else:
        screen.models(rows)


@models.command()
def show(model: Id, as_json: Json = False) -> None:
    """Show all that is known of one model.

    [bold]Example[/]

      qit models show qwen-image-2512
    """
    app = App(load_settings())
    entry = app.catalog.find(model)
    screen = Screen(as_json)
    if as_json:
        screen.json(entry.to_dict() | app.describe(entry))
    else:
        screen.model(entry, app.describe(entry), app.catalog.licence_of(entry))


@models.command()
def recommend(as_json: Json = False) -> None:
    """Say which model and variant suit this computer best, and why."""
    advice = App(load_settings()).recommend()
    screen = Screen(as_json)
    if as_json:
        screen.json({"models": [each.model_dump(mode="json") for each in advice]})
        return
    for each in advice:
        says = [f"{each.to_fetch / 1e9:.1f} GB to fetch" if each.to_fetch else "is here"]
        if each.runs:
            says.append(f"needs {gib(each.ram_bytes)} of RAM")
        if each.vram_bytes:
            says.append(f"{gib(each.vram_bytes)} of GPU memory")
        if each.seconds:
            says.append(f"about {duration(each.seconds)} a picture")
        screen.line(f"{each.model} ({each.variant}): {', '.join(says)}. {each.reason}")


@models.command()
def download(
    model: Id,
    variant: VariantOption = "",
    yes_license: Annotated[
        bool, typer.Option("--yes-license", help="I have read the licence and agree to it.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Delete what is here and fetch everything.")
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
    try:
        folder = _download(app, entry, variant, yes_license, again, screen)
    except LicenceNotAccepted:
        with suppress(DownloadFailed):  # without a connection the address has to do
            screen.note(app.library.licence_text(entry))
        raise
    _done(screen, as_json, str(folder), folder=str(folder))


def _download(
    app: App, entry: Model, variant: str, accept: bool, again: bool, screen: Screen
) -> Path:
    with screen.transfer() as show, _pause_on_ctrl_c() as control:
        return app.library.download(entry, variant, show, control, accept, again)


@models.command()
def pause(model: Id) -> None:
    """Stop a download that another window runs; `download` goes on where it stopped."""
    app = App(load_settings())
    app.library.pause(app.catalog.find(model))


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
    with screen.transfer() as show, _pause_on_ctrl_c() as control:
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
    with screen.transfer() as show, _pause_on_ctrl_c() as control:
        mended = app.library.repair(entry, show, control)
    _report(screen, mended)
    text = f"{entry.name} is whole; {len(mended)} file(s) were mended."
    _done(screen, as_json, text, mended=_plain(mended))


@models.command()
def remove(model: Id, variant: VariantOption = "", as_json: Json = False) -> None:
    """Delete a model, or one variant of it. Files that other models share stay."""
    app = App(load_settings())
    freed = app.library.remove(app.catalog.find(model), variant)
    _done(Screen(as_json), as_json, f"{freed / 1e9:.2f} GB freed.", freed_bytes=freed)


@models.command(name="import")
def import_file(
    path: Annotated[Path, typer.Argument(help="A safetensors or GGUF file.")],
    model: Annotated[
        str | None, typer.Option("--as", help="The model that it belongs to, where several fit.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Take a weight file of another program, after looking at its keys and shapes."""
    app = App(load_settings())
    found = recognise(path)
    fitting = models_for(found, app.catalog)
    if model is None and len(fitting) != 1:
        names = ", ".join(entry.id for entry in fitting)
        raise BadRequest(
            f"{path} is a {found.kind} of {found.family} in {found.storage}, and fits several"
            " models.",
            f"Say which with --as: {names}.",
        )
    entry = app.catalog.find(model) if model else fitting[0]
    target = app.library.import_file(path, entry)
    screen = Screen(as_json)
    _done(screen, as_json, str(target), path=str(target), checkpoint=found.to_dict())
    if found.unsupported:
        screen.note(f"It can't run yet. {found.unsupported}")
    else:
        screen.note(f"`qit models download {entry.id}` fetches what the model needs beside it.")


@models.command()
def where(as_json: Json = False) -> None:
    """Show the folders that are looked in, and the weight files of other programs there."""
    app = App(load_settings())
    screen = Screen(as_json)
    cache = app.elsewhere.cache
    rows: list[tuple[str, ...]] = [
        (str(path), *_described(path)) for path in app.elsewhere.weight_files()
    ]
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
        screen.rows(("File", "Is", "Note"), rows)


def _described(path: Path) -> tuple[str, str]:
    try:
        found = recognise(path)
    except ToolError as error:
        return "not ours", error.message
    return f"{found.family} {found.kind}, {found.storage}", found.unreadable


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
def _pause_on_ctrl_c() -> Iterator[Control]:
    """Ctrl-C stops in order: what came is kept, and the message says how to go on."""
    control = Control()
    before = signal.signal(signal.SIGINT, lambda *_: control.pause())
    try:
        yield control
    finally:
        signal.signal(signal.SIGINT, before)
