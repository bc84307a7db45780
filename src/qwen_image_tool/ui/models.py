"""Models: get, prove, mend and delete them; use files that other programs have."""

from dataclasses import replace
from typing import Any

import gradio as gr

from qwen_image_tool.store.formats import Stranger
from qwen_image_tool.ui.cards import found_html, shelf_html
from qwen_image_tool.ui.kit import Kit
from qwen_image_tool.ui.shelf import Question, change, shelf, strangers_of


def build(kit: Kit, tab: gr.Tab) -> None:
    t, service = kit.t, kit.service
    shown = kit.html(elem_id="qit-shelf")
    seen, question, strangers = gr.State(), gr.State(), gr.State(())
    with gr.Accordion(t("Use files that other programs have"), open=False, elem_id="qit-strangers"):
        with gr.Row(equal_height=False, elem_classes="qit-beside-field"):
            place = gr.Textbox(
                label=t("A file or a folder"),
                placeholder=t("Empty: the folders of ComfyUI and StabilityMatrix"),
                max_lines=1,
                scale=4,
            )
            search = gr.Button(t("Look there"), scale=0, min_width=140)
        found = kit.html()

    def show(before: Any, asked: Question | None) -> tuple[Any, Any]:
        now = shelf(service, before[0] if before else None)
        if (now, asked) == before:
            return gr.skip(), gr.skip()
        return shelf_html(t, now, asked), (now, asked)

    def act(act: dict[str, str], before: Any) -> tuple[Any, ...]:
        if act["do"] == "use":
            return (*(gr.skip() for _ in range(3)), *kit.ask("create", model=act["model"]))
        asked = change(service, act)
        fresh = (replace(before[0], at=0.0), None) if before else None
        return (*show(fresh, asked), asked, gr.skip(), gr.skip())

    def look(place: str) -> tuple[str, tuple[Stranger, ...]]:
        strangers = strangers_of(service, place)
        return found_html(t, strangers), strangers

    def take(act: dict[str, str], strangers: tuple[Stranger, ...]) -> None:
        chosen = strangers[int(act["file"])]
        model = service.app.catalog.find(act["model"])
        service.transfers.start(model, "import", source=chosen.path)

    kit.watch(tab, show, [seen, question], [shown, seen])
    kit.on_act(shown, act, [seen], [shown, seen, question, kit.tabs, kit.wanted])
    kit.on([search.click, place.submit], look, [place], [found, strangers], here_only=True)
    kit.on_act(found, take, [strangers], here_only=True)

    def wanted(wanted: dict[str, Any], before: Any) -> tuple[Any, ...]:
        asked = Question("get", service.app.catalog.find(wanted["model"]).id, wanted["at"])
        return (*show(before, asked), asked)

    kit.on_wanted("models", wanted, [shown, seen, question], [seen])
