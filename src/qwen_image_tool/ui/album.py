"""Gallery: all pictures, found again; one with its settings; several beside each other."""

import json
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date, timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import gradio as gr

from qwen_image_tool import gallery
from qwen_image_tool.app import SEEDS
from qwen_image_tool.errors import BadRequest, ToolError, Unknown
from qwen_image_tool.gallery.export import decode_upload, thumbnail
from qwen_image_tool.gallery.index import Filter, Picture
from qwen_image_tool.gallery.series import alone, series
from qwen_image_tool.service import Service
from qwen_image_tool.types import Request
from qwen_image_tool.ui.compare import Entry, slider_html, table_html
from qwen_image_tool.ui.detail import Read, Shown, read_html, shown_html
from qwen_image_tool.ui.kit import Kit
from qwen_image_tool.ui.tiles import list_html, listed, tiles_from
from qwen_image_tool.ui.words import Words

ORIGIN = "page"
LARGE = 1024  # pixels of the copy of a dropped picture that the page shows
KINDS = [".png", ".jpg", ".jpeg", ".webp"]


@dataclass(frozen=True)
class View:
    """What a page looks at: the list, or pictures by their ids. `jobs`: of a series, whose pictures
    may be still to come; `back`: what it was before."""

    what: Literal["list", "picture", "slider", "table", "read"] = "list"
    pictures: tuple[str, ...] = ()
    jobs: tuple[str, ...] = ()
    x: str = ""
    y: str = ""
    note: str = ""
    read: Read | None = None
    back: "View | None" = None


@dataclass(frozen=True)
class Seen:
    """What a page was sent last."""

    version: int = -1
    wanted: Filter | None = None
    view: View | None = None
    detail: str = ""


Asked = tuple[int, View] | None  # by another tab: when, and what to look at


class Sitting:
    """A page that is open: what it looks at, and what it was sent. Its events come in threads, and
    one may overtake another, so each has it alone. `heard`: when it was last asked by a tab."""

    def __init__(self) -> None:
        self.alone = threading.Lock()
        self.view, self.seen, self.heard = View(), Seen(), 0

    def __deepcopy__(self, _: object) -> "Sitting":
        """Gradio copies a state for each page that opens."""
        return Sitting()


def build(kit: Kit) -> None:
    with gr.Column(elem_id="qit-album"):
        fields = _filters(kit)
        shown = kit.html(
            script=_script("tiles.js"), elem_id="qit-list", server_functions=[_tiles(kit)]
        )
    detail = kit.html(script=_script("detail.js"), elem_id="qit-picture")
    Album(kit, fields).wire(shown, detail)


def file_button(t: Words) -> gr.UploadButton:
    """page.js hands it the pictures that are dropped anywhere on the page."""
    label = t("Read a picture's settings")
    return gr.UploadButton(
        label, file_types=KINDS, size="sm", min_width=0, scale=0, elem_id="qit-dropped"
    )


def listen_for_files(kit: Kit, file: gr.UploadButton) -> None:
    """What a dropped picture says is shown in the gallery."""

    def read(path: str) -> tuple[Any, Any]:
        return kit.ask("gallery", read=read_file(kit.service, Path(path)))

    kit.on(file.upload, read, [file], [kit.tabs, kit.wanted])


def read_file(service: Service, path: Path) -> dict[str, Any]:
    """What a picture file says, and a small copy of it, as JSON; the file itself is removed. Raises
    BadRequest or NotOurPicture."""
    try:
        decode_upload(path.read_bytes())
        info = gallery.read_image_info(path)
        image = thumbnail(path, LARGE, service.app.settings.cache / "thumbnails")
    finally:
        path.unlink(missing_ok=True)
    return {"name": path.name, "image": image.hex(), "info": info.to_dict()}


def _tiles(kit: Kit) -> Callable[[str], list[str]]:
    """What tiles.js asks for a page of the list."""

    def tiles(asked: str) -> list[str]:
        """`asked`: JSON of the filter, as the list has it, and a place."""
        what = json.loads(asked)
        wanted = Filter.from_json(what["filter"])
        return tiles_from(kit.t, kit.service.index, wanted, int(what["start"]))

    return tiles


def _script(name: str) -> str:
    return "{" + files(__package__).joinpath(name).read_text(encoding="utf-8") + "}"


def _filters(kit: Kit) -> list[Any]:
    """The components in the order of `wanted_of`."""
    t = kit.t
    with gr.Row(elem_id="qit-filters"):
        search = gr.Textbox(
            label=t("Search"),
            placeholder=t("Words of the prompt"),
            max_lines=1,
            min_width=220,
            scale=3,
            elem_id="qit-search",
        )
        model = gr.Dropdown([(t("All"), "")], value="", label=t("Model"), min_width=150)
        when = gr.Dropdown([(t("Any time"), "")], value="", label=t("Made"), min_width=150)
        shapes = [
            (t("Any shape"), ""),
            (t("Square"), "square"),
            (t("Wide"), "wide"),
            (t("Tall"), "tall"),
        ]
        shape = gr.Dropdown(shapes, value="", label=t("Shape"), min_width=120, filterable=False)
        starred = gr.Checkbox(label=t("Starred only"), min_width=120, elem_id="qit-starred")
    return [search, model, when, shape, starred]


def wanted_of(
    search: str | None, model: str | None, when: str | None, shape: Any, starred: bool
) -> Filter:
    """What the filters say. `when`: a number of days up to today, or a month such as "2026-11"."""
    since = until = ""
    if when and when.isdecimal():
        since = (date.today() - timedelta(days=int(when) - 1)).isoformat()
    elif when:
        year, month = map(int, when.split("-"))
        since, until = when, f"{year + month // 12}-{month % 12 + 1:02}"
    return Filter(
        text=search or "",
        model=model or "",
        starred=starred,
        shape=shape or "",
        since=since,
        until=until,
    )


def _hear(sitting: Sitting, asked: Asked) -> None:
    """What another tab asked for is looked at once."""
    if asked and asked[0] > sitting.heard:
        sitting.heard, sitting.view = asked


class Album:
    """Answers the events of the gallery. A button gives the view that follows; `_news` makes of it
    what changed on the page."""

    def __init__(self, kit: Kit, fields: list[Any]) -> None:
        self._kit, self._fields = kit, fields

    def wire(self, shown: gr.HTML, detail: gr.HTML) -> None:
        kit, fields = self._kit, self._fields
        inputs = [gr.State(Sitting()), asked := gr.State(), *fields]
        outputs = [shown, detail, fields[1], fields[2]]

        def look(sitting: Sitting, asked: Asked, *filters: Any) -> tuple[Any, ...]:
            with sitting.alone:
                _hear(sitting, asked)
                return self._news(sitting, filters)

        def act(act: dict[str, str], sitting: Sitting, _: Asked, *filters: Any) -> tuple[Any, ...]:
            with sitting.alone:
                if gone := self._leave(act, sitting.view):
                    return (*(gr.skip() for _ in outputs), *gone)
                sitting.view = self._act(act, sitting.view)
                return (*self._news(sitting, filters), gr.skip(), gr.skip())

        def wanted(wanted: dict[str, Any]) -> Asked:
            return wanted["at"], self._wanted(wanted)

        changes = [field.change for field in fields]
        kit.on([*changes, kit.clock.tick], look, inputs, outputs)
        for one in (shown, detail):
            kit.on_act(one, act, inputs, [*outputs, kit.tabs, kit.wanted])
        kit.on_wanted("gallery", wanted, [asked])

    def _news(self, sitting: Sitting, filters: tuple[Any, ...]) -> tuple[Any, ...]:
        """The outputs; nothing is sent where nothing is new."""
        index, seen, wanted = self._kit.service.index, sitting.seen, wanted_of(*filters)
        version, detail = index.version, seen.detail
        new = version != seen.version
        shown = None
        if new or wanted != seen.wanted:
            shown = list_html(self._kit.t, listed(index, wanted))
        if new or sitting.view.jobs or sitting.view != seen.view:
            sitting.view, detail = self._looked_at(sitting.view)
        sitting.seen = Seen(version, wanted, sitting.view, detail)
        return (
            gr.skip() if shown is None else shown,
            gr.skip() if detail == seen.detail else detail,
            self._models() if new else gr.skip(),
            self._months() if new else gr.skip(),
        )

    def _looked_at(self, view: View) -> tuple[View, str]:
        """Its HTML; where its picture was deleted, here or in another tab, what was before it."""
        while True:
            try:
                return view, self._detail(view)
            except Unknown:
                view = view.back or View()

    def _models(self) -> gr.Dropdown:
        """Those that pictures were made by."""
        known = self._kit.service.index.models()
        names = {
            model.id: self._kit.t.known(model.name)
            for model in self._kit.service.app.catalog.models
        }
        made = [(f"{names.get(one, one)} ({n:,})", one) for one, n in known.items() if one]
        return gr.Dropdown([(self._kit.t("All"), ""), *made])

    def _months(self) -> gr.Dropdown:
        t = self._kit.t
        days = [
            (t("Any time"), ""),
            (t("Today"), "1"),
            (t("Last 7 days"), "7"),
            (t("Last 30 days"), "30"),
        ]
        months = [
            (f"{month} ({n:,})", month) for month, n in self._kit.service.index.months().items()
        ]
        return gr.Dropdown([*days, *months])

    # What is looked at

    def _detail(self, view: View) -> str:
        t, index = self._kit.t, self._kit.service.index
        match view.what:
            case "list":
                return ""
            case "read":
                return read_html(t, view.read) if view.read else ""
            case "picture":
                return shown_html(t, self._shown(view))
            case "slider":
                before, after = map(index.get, view.pictures)
                found = [index.info(picture).request for picture in view.pictures]
                return slider_html(t, before, after, [one for one in found if one])
            case "table":
                return table_html(t, self._entries(view), view.x, view.y)

    def _shown(self, view: View) -> Shown:
        index = self._kit.service.index
        [picture] = view.pictures
        newer, older = index.beside(picture, Filter())
        info = index.info(picture)
        alike = self._alike(picture, info.request) if info.request else {}
        return Shown(
            picture=index.get(picture),
            info=info,
            newer=newer.id if newer else "",
            older=older.id if older else "",
            alike={name: len(ids) for name, ids in alike.items()},
            note=view.note,
        )

    def _alike(self, picture: str, request: Request) -> dict[str, list[str]]:
        """By setting: the pictures that differ from this one in it alone."""
        found = {one.id: self._request(one) for one in self._kit.service.index.relatives(picture)}
        return alone(request, {name: one for name, one in found.items() if one})

    def _request(self, picture: Picture) -> Request | None:
        """None where its file says nothing, or is not there any more."""
        try:
            return self._kit.service.index.info(picture.id).request
        except ToolError:
            return None

    def _entries(self, view: View) -> list[Entry]:
        index = self._kit.service.index
        entries = []
        for picture in view.pictures:
            request = index.info(picture).request
            if request is None:
                raise BadRequest(
                    f"{index.get(picture).file} does not say what it was made from.",
                    "Compare pictures that QwenImageTool made.",
                )
            entries.append(Entry(request, picture))
        return entries + [self._entry(job) for job in view.jobs]

    def _entry(self, job_id: str) -> Entry:
        t, job = self._kit.t, self._kit.service.jobs.get(job_id)
        made = self._kit.service.pictures(job)
        said = {
            "queued": t("waiting"),
            "running": t("drawing"),
            "failed": t("failed"),
            "cancelled": t("stopped"),
            "done": t("deleted"),
        }[job.state]
        return Entry(job.request, made[0].id if made else "", said)

    # The buttons

    def _act(self, act: dict[str, str], view: View) -> View:
        """What is looked at after a button."""
        service = self._kit.service
        pictures = tuple(filter(None, act.get("pictures", "").split(",")))
        match act["do"]:
            case "show":
                back = view.back if view.what == "picture" else view
                return View("picture", (act["picture"],), back=back)
            case "back":
                return view.back or View()
            case "slider" | "table" as what:
                return View("slider" if what == "slider" else "table", pictures, back=view)
            case "axes":
                return replace(view, x=act["x"], y=act["y"])
            case "alike":
                return self._compared(act["picture"], act["setting"], view)
            case "series":
                return self._series(act, view)
            case "again":
                request = self._made_from(act["picture"])
                service.submit(
                    request.model_copy(update={"seed": secrets.randbelow(SEEDS)}), ORIGIN
                )
                note = self._kit.t("It is in the queue, and comes into the gallery by itself.")
                return replace(view, note=note)
            case "unsaved":
                raise _unsaved(act["said"])
        return self._changed(act["do"], pictures or (act.get("picture", ""),), view)

    def _changed(self, do: str, pictures: tuple[str, ...], view: View) -> View:
        """After the gallery itself was changed."""
        index = self._kit.service.index
        match do:
            case "star":
                [picture] = pictures
                index.star(picture, not index.get(picture).star)
            case "stars":
                for picture in pictures:
                    index.star(picture, True)
            case "delete":
                beside = index.beside(pictures[0], Filter())[1] if view.what == "picture" else None
                index.delete(pictures)
                if beside:
                    return replace(view, pictures=(beside.id,), note="")
                return view if view.what == "table" else View()
            case "undo":
                index.undo()
            case "forget":
                index.forget_deleted()
        return view

    def _compared(self, picture: str, setting: str, view: View) -> View:
        """A table of a picture with those that differ from it in one setting."""
        request = self._made_from(picture)
        others = self._alike(picture, request).get(setting, [])
        return View("table", (picture, *others), x=setting, back=view)

    def _series(self, act: dict[str, str], view: View) -> View:
        """Queues it, and looks at the table that it fills."""
        over = {act["x"]: act["x_values"]}
        if act["y"]:
            over[act["y"]] = act["y_values"]
        request = self._made_from(act["picture"])
        jobs = [self._kit.service.submit(one, ORIGIN) for one in series(request, over)]
        x, y = act["x"], act["y"] or "-"
        return View("table", (act["picture"],), tuple(job.id for job in jobs), x, y, back=view)

    def _leave(self, act: dict[str, str], view: View) -> tuple[Any, Any] | None:
        """For the buttons that lead to Create: what it is asked."""
        service = self._kit.service
        if act["do"] == "watch":
            return gr.Tabs(selected="create"), gr.skip()
        if act["do"] != "restore":
            return None
        if view.read:
            fields = view.read.fields
        else:
            fields = service.app.fields_of(service.index.info(act["picture"]))
        request = Request.from_user(**{"model": service.default_model()} | fields)
        return self._kit.ask("create", request=request.to_dict())

    def _made_from(self, picture: str) -> Request:
        info = self._kit.service.index.info(picture)
        if info.request is None:
            raise BadRequest("This picture does not say what it was made from.", "Choose another.")
        return info.request

    def _wanted(self, wanted: dict[str, Any]) -> View:
        """What another tab asks to be shown."""
        if "picture" in wanted:
            return View("picture", (wanted["picture"],))
        told = wanted["read"]
        info = gallery.ImageInfo.model_validate(told["info"])
        fields = self._kit.service.app.fields_of(info)
        read = Read(told["name"], bytes.fromhex(told["image"]), info, fields)
        return View("read", read=read)


def _unsaved(said: str) -> ToolError:
    """What the server answered instead of a file, as an error of the page."""
    answer = json.loads(said) or {}
    found = answer.get("error", {})
    return ToolError(
        str(found.get("message") or "The picture could not be saved."),
        str(found.get("hint") or "Try again."),
    )
