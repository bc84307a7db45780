"""What the Models tab shows and does: plain functions over the service."""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qwen_image_tool.app import Advice
from qwen_image_tool.catalog import Licence, Model
from qwen_image_tool.errors import BadRequest
from qwen_image_tool.gauges import Gauge, disk_gauges
from qwen_image_tool.service import Service
from qwen_image_tool.store.formats import Stranger, survey
from qwen_image_tool.store.places import Elsewhere
from qwen_image_tool.transfers import Action, Transfer

LOOK_AGAIN = 5.0  # seconds after which the disk is looked at again: others may have changed it
ACTIONS: dict[str, Action] = {
    "get": "download",
    "check": "check",
    "verify": "verify",
    "repair": "repair",
    "update": "update",
    "again": "again",
}


@dataclass(frozen=True)
class Question:
    """What is asked before a button does its work. `text`: a licence's words. `action`: what
    follows once it is agreed to. `freed`, `kept`: bytes of what is to be deleted. Of the kind
    "get", another tab asks for the model; `at`: when."""

    kind: str
    model: str
    at: int = 0
    action: str = "get"
    variant: str = ""
    text: str = ""
    freed: int = 0
    kept: int = 0


@dataclass(frozen=True)
class Book:
    """One model. `row`: as App.describe. `agreed`: to its licence, or none is needed."""

    model: Model
    row: dict[str, Any]
    licence: Licence
    agreed: bool
    transfer: Transfer | None = None


@dataclass(frozen=True)
class Shelf:
    """What the tab shows. `at`: when the disk was looked at (monotonic seconds); `knows`: whether
    the device is known."""

    books: tuple[Book, ...]
    best: Advice | None
    disks: tuple[Gauge, ...]
    used: int
    knows: bool
    at: float = field(compare=False, default=0.0)


def shelf(service: Service, before: Shelf | None = None) -> Shelf:
    """As it is now. What lies on the disk is looked at where work on it began or ended, and
    every few seconds."""
    transfers = {each.model: each for each in service.transfers.all()}
    if before and not _outdated(service, before, transfers):
        books = (replace(book, transfer=transfers.get(book.model.id)) for book in before.books)
        return replace(before, books=tuple(books))
    app, here = service.app, service.app.seen()
    rows = {row["id"]: row for row in service.described()}
    return Shelf(
        books=tuple(
            _book(service, model, rows[model.id], transfers) for model in app.catalog.models
        ),
        best=next(iter(app.recommend(here)), None) if here else None,
        disks=disk_gauges(service.folders),
        used=app.library.used_bytes(),
        knows=here is not None,
        at=time.monotonic(),
    )


def _book(
    service: Service, model: Model, row: dict[str, Any], transfers: dict[str, Transfer]
) -> Book:
    licence = service.app.catalog.licence_of(model)
    agreed = licence.commercial or service.app.library.accepted(model) is not None
    return Book(model, row, licence, agreed, transfers.get(model.id))


def _outdated(service: Service, before: Shelf, transfers: dict[str, Transfer]) -> bool:
    known = {book.model.id: book.transfer for book in before.books if book.transfer}
    states = [
        {name: (each.action, each.state) for name, each in found.items()}
        for found in (known, transfers)
    ]
    learnt = service.knows_device and not before.knows
    return states[0] != states[1] or learnt or time.monotonic() - before.at > LOOK_AGAIN


def change(service: Service, act: dict[str, str]) -> Question | None:
    """Does what a button says; returns what has to be asked before, if anything. Raises
    ToolError."""
    do, model = act["do"], service.app.catalog.find(act["model"])
    transfers, library = service.transfers, service.app.library
    match do:
        case "pause" | "cancel":
            transfers.stop(model.id, keep=do == "pause")
        case "go-on":
            last = next(each for each in transfers.all() if each.model == model.id)
            source = Path(last.source) if last.source else None
            action: Action = "download" if last.action == "again" else last.action
            transfers.start(model, action, last.variant, source=source)
        case "licence" | "ask-remove" | "ask-again":
            return _question(service, act, model)
        case "agree":
            transfers.start(model, ACTIONS[act["then"]], act.get("variant", ""), True)
        case "remove":
            _remove(service, model)
        case "close":
            pass
        case _:
            licence = service.app.catalog.licence_of(model)
            fetches = do in ("get", "update", "again")
            if fetches and not (licence.commercial or library.accepted(model)):
                return _question(service, act | {"do": "licence", "then": do}, model)
            transfers.start(model, ACTIONS[do], act.get("variant", ""))
    return None


def _question(service: Service, act: dict[str, str], model: Model) -> Question:
    library = service.app.library
    if act["do"] == "licence":
        text = library.licence_text(model)
        then, variant = act.get("then", ""), act.get("variant", "")
        return Question("licence", model.id, action=then, variant=variant, text=text)
    freed, kept = library.frees(model)
    return Question(act["do"].removeprefix("ask-"), model.id, freed=freed, kept=kept)


def _remove(service: Service, model: Model) -> None:
    if any(each.model == model.id and each.state == "running" for each in service.transfers.all()):
        raise BadRequest(f"{model.name} is being worked on.", "Wait for it, or cancel it.")
    service.app.library.remove(model)
    service.transfers.forget(model.id)


def strangers_of(service: Service, place: str) -> tuple[Stranger, ...]:
    """Weight files of a folder, or the file itself; of the other programs where none is named.
    Raises BadRequest."""
    app = service.app
    if not place.strip():
        return survey(app.elsewhere.weight_files(), app.catalog)
    path = Path(place.strip().strip('"')).expanduser().absolute()
    if not path.exists():
        raise BadRequest(f"{path} is not there.", "Check the path.")
    files = Elsewhere(None, (path,)).weight_files() if path.is_dir() else [path]
    return survey(files, app.catalog)
