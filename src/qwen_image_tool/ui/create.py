"""Create: shape, sentence, what it will need, Generate; and the stage where the picture forms."""

import asyncio
import secrets
import threading
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from qwen_image_tool.app import SEEDS
from qwen_image_tool.catalog import Model
from qwen_image_tool.catalog.sizes import RATIOS, RESOLUTIONS
from qwen_image_tool.errors import ToolError
from qwen_image_tool.jobs import ENDED
from qwen_image_tool.types import Request
from qwen_image_tool.ui import welcome
from qwen_image_tool.ui.detail import MODES, mode_text
from qwen_image_tool.ui.form import NATIVE, Form, form_of, request_of, size_of, sizes_of
from qwen_image_tool.ui.kit import Kit, picture_url, size_text
from qwen_image_tool.ui.planbox import plan_box, refused_box, waiting_box
from qwen_image_tool.ui.stage import Scene, scene, stage

ORIGIN = "page"
LAST_JOBS = 20  # among which the page's last one is looked for
LOOK_SECONDS = 0.2  # between two looks at a job that a program waits for


def build(kit: Kit, tab: gr.Tab) -> None:
    t = kit.t
    guide = kit.html(elem_id="qit-welcome")
    with gr.Row(equal_height=False, elem_classes="qit-columns"):
        with gr.Column(scale=5, min_width=320, elem_id="qit-form"):
            fields, pixels = _fields(kit)
            plan = kit.html(waiting_box(t), elem_id="qit-plan")
            with gr.Row(elem_id="qit-go"):
                go = gr.Button(t("Generate"), variant="primary", elem_id="qit-generate", scale=3)
                stop = gr.Button(
                    t("Cancel"), variant="stop", elem_id="qit-cancel", interactive=False
                )
        with gr.Column(scale=7, min_width=320):
            show = kit.html(elem_id="qit-stage")
    Create(kit, fields, pixels).wire(tab, plan, go, stop, guide, show)


def _fields(kit: Kit) -> tuple[list[Any], gr.Textbox]:
    """The form's components in the order of `Form`, and the read-only pixels."""
    t = kit.t
    default = kit.service.app.catalog.find(kit.service.default_model())
    with gr.Row():
        ratio = gr.Dropdown(
            list(RATIOS), value="1:1", label=t("Aspect Ratio"), min_width=112, scale=3
        )
        resolution = gr.Dropdown(
            [NATIVE], value=NATIVE, label=t("Resolution"), min_width=150, scale=5
        )
        pixels = gr.Textbox(
            label=t("Size"), interactive=False, min_width=160, scale=5, elem_id="qit-pixels"
        )
    prompt = gr.Textbox(
        "",
        label=t("Prompt"),
        placeholder=t("Say in a sentence what the picture shows."),
        lines=3,
        max_lines=12,
        elem_id="qit-prompt",
    )
    negative = gr.Textbox(
        "",
        label=t("Negative prompt"),
        placeholder=t("What it should not show."),
        lines=1,
        max_lines=6,
    )
    model = gr.Dropdown(
        [(t.known(default.name), default.id)],
        value=default.id,
        label=t("Model"),
        elem_id="qit-model",
    )
    with gr.Row(elem_id="qit-seeds"):
        # Without limits: beyond them Gradio answers no event of the form, and says nothing
        images = gr.Number(1, label=t("Pictures"), precision=0, min_width=80)
        seed = gr.Textbox(
            label=t("Seed"), placeholder=t("random"), max_lines=1, min_width=150, elem_id="qit-seed"
        )
        with gr.Row(elem_id="qit-seed-buttons"):
            random = gr.Button(t("Random seed"), min_width=0, size="sm")
            reuse = gr.Button(t("Reuse last seed"), min_width=0, size="sm")
    with gr.Accordion(t("Advanced"), open=False), gr.Row():
        steps = gr.Number(label=t("Steps"), precision=0, min_width=90)
        cfg = gr.Number(label=t("True CFG scale"), step=0.5, min_width=90)
        modes = [(mode_text(t, mode), mode) for mode in MODES]
        mode = gr.Dropdown(modes, value="default", label=t("Mode"), min_width=170)

    def last_seed() -> str:
        job = scene(kit.service).job
        return str(job.request.seed) if job else ""

    kit.on(random.click, lambda: "", outputs=[seed])
    kit.on(reuse.click, last_seed, outputs=[seed])
    return [ratio, resolution, prompt, negative, model, images, seed, steps, cfg, mode], pixels


@dataclass(frozen=True)
class Seen:
    """What a tab of the browser has been sent. `device`: whether it was known what this computer
    can do; `over`: how many jobs and transfers have come to an end: with them, models are here and
    times are known."""

    scene: Scene
    guide: welcome.Steps | None
    device: bool
    over: tuple[int, int]


class Create:
    """Answers the events of the form. What it shows is asked of the service each time."""

    def __init__(self, kit: Kit, fields: list[Any], pixels: gr.Textbox) -> None:
        self._kit, self._fields, self._pixels = kit, fields, pixels
        self._settled = gr.State()  # the model whose steps and CFG the form has

    def wire(
        self,
        tab: gr.Tab,
        plan: gr.HTML,
        go: gr.Button,
        stop: gr.Button,
        guide: gr.HTML,
        show: gr.HTML,
    ) -> None:
        kit, fields = self._kit, self._fields
        ratio, resolution, _, _, model, _, _, steps, cfg, _ = fields
        whole = [*fields, self._pixels, self._settled]
        seen = gr.State()

        size = [ratio, resolution, model]
        # A list that is left tells input too, and one that is used by keyboard tells no select
        kit.on([ratio.input, model.input], self._sizes, size, [resolution, self._pixels])
        kit.on(resolution.change, self._pixels_of, size, [self._pixels])
        kit.on(model.input, self._sampling, [model, self._settled], [steps, cfg, self._settled])
        changes = [field.change for field in fields]
        kit.on(changes, self._plan, fields, [plan])

        kit.on(go.click, self._generate, fields)
        kit.on(stop.click, self._cancel)
        kit.on_act(plan, self._settle, fields, [kit.tabs, kit.wanted])
        kit.on_act(show, self._act, outputs=[*whole, kit.tabs, kit.wanted])
        kit.on_act(guide, self._guided, outputs=[*whole, kit.tabs, kit.wanted])
        stage_parts = [show, stop, guide, model, plan, seen]
        kit.on(kit.clock.tick, self._look, [seen, *fields], stage_parts)
        # Also when the page opens: the memory that is free and the models may be others by now
        kit.on(tab.select, lambda *values: self._look(None, *values), fields, stage_parts)
        kit.on_wanted("create", self._wanted, whole, fields)
        opened = kit.on(kit.opened, self._open, outputs=whole)
        is_open = "() => document.body.classList.add('qit-open')"
        opened.then(self._ask_torch, js=is_open, queue=False, api_visibility="private")
        gr.api(self.generate, api_name="generate", concurrency_limit=None)

    def _ask_torch(self) -> None:
        """What this computer can do takes seconds to find out: begun when the page is there, so
        that it does not slow it."""
        threading.Thread(target=self._kit.service.device, name="device", daemon=True).start()

    # The form

    def _open(self) -> tuple[Any, ...]:
        """The form as a page that is opened shows it: as it was last sent, with a new seed."""
        service = self._kit.service
        for job in service.jobs.latest(limit=LAST_JOBS):
            if job.origin == ORIGIN and service.app.catalog.get(job.request.model):
                return self._filled(job.request.model_copy(update={"seed": None}))
        return self._filled(Request(model=service.default_model()))

    def _filled(self, request: Request) -> tuple[Any, ...]:
        """The form that asks for a request, as updates of its components."""
        model = self._model(request.model)
        return self._filled_with(form_of(request, model), model)

    def _filled_with(self, form: Form, model: Model) -> tuple[Any, ...]:
        values = list(form.values())
        values[1] = self._resolutions(form.ratio, form.resolution, model)
        values[4] = gr.Dropdown(self._models(), value=form.model)
        return (*values, self._pixels_text(form.ratio, form.resolution, model), model.id)

    def _model(self, name: str) -> Model:
        return self._kit.service.app.catalog.find(name)

    def _models(self) -> list[tuple[str, str]]:
        """The models that this version runs, each with whether it is here."""
        app = self._kit.service.app
        known = [app.describe(model) for model in app.catalog.models if not model.unsupported]
        return [
            (f"{self._kit.t.known(one['name'])}  ·  {self._badge(one)}", one["id"]) for one in known
        ]

    def _badge(self, model: dict[str, Any]) -> str:
        if model["state"] == "ready":
            return self._kit.t("✓ on this computer")
        return self._kit.t("↓ {size} to download", size=size_text(model["to_fetch"]))

    def _sizes(self, ratio: str, resolution: str, name: str) -> tuple[Any, str]:
        """The resolutions follow the ratio and the model."""
        model = self._model(name)
        kept = resolution if resolution in (NATIVE, *RESOLUTIONS) else NATIVE
        return (
            self._resolutions(ratio, kept, model),
            self._pixels_text(ratio, kept, model),
        )

    def _resolutions(self, ratio: str, resolution: str, model: Model) -> gr.Dropdown:
        names = list(sizes_of(ratio, model))
        if resolution not in names:
            names.append(resolution)
        t = self._kit.t
        labels = {NATIVE: t("Model's own")} | {name: t(name) for name in RESOLUTIONS}
        return gr.Dropdown([(labels.get(name, name), name) for name in names], value=resolution)

    def _pixels_of(self, ratio: str, resolution: str, name: str) -> str:
        return self._pixels_text(ratio, resolution, self._model(name))

    def _pixels_text(self, ratio: str, resolution: str, model: Model) -> str:
        size = size_of(ratio, resolution, model)
        return self._kit.t("{width} x {height} pixels", width=size.width, height=size.height)

    def _sampling(self, name: str, settled: str) -> tuple[Any, Any, str]:
        """The model card's own settings, once the model is another."""
        if name == settled:
            return gr.skip(), gr.skip(), name
        sampling = self._model(name).sampling
        return sampling.steps, sampling.cfg, name

    def _request(self, values: tuple[Any, ...]) -> Request:
        form = Form(*values)
        return request_of(form, self._model(form.model))

    def _plan(self, *values: Any) -> str:
        kit = self._kit
        if not kit.service.knows_device:
            return waiting_box(kit.t)
        try:
            request = self._request(values)
            shown = request if request.prompt else request.model_copy(update={"prompt": "-"})
            resolved, (plan, *_) = kit.service.plans(shown)
            model = kit.service.app.describe(self._model(request.model))
            device = kit.service.device()
            seconds = kit.service.seconds(resolved, plan.seconds)
            return plan_box(kit.t, plan, seconds, device, model["id"], model["to_fetch"])
        except ToolError as error:
            return refused_box(kit.t, error)

    # The buttons

    def _generate(self, *values: Any) -> None:
        self._kit.service.submit(self._request(values), ORIGIN)

    def _cancel(self) -> None:
        job = scene(self._kit.service).job
        if job and not job.has_ended:
            self._kit.service.cancel(job.id)

    def _settle(self, act: dict[str, str], *values: Any) -> tuple[Any, Any]:
        """The buttons of the plan box: get the model, or run it anyway."""
        if act["do"] == "get":
            return self._kit.ask("models", model=act["model"])
        self._kit.service.submit(self._request(values), ORIGIN, anyway=True)
        return gr.skip(), gr.skip()

    def _act(self, act: dict[str, str]) -> tuple[Any, ...]:
        """The buttons of the stage."""
        service = self._kit.service
        match act["do"]:
            case "again":
                service.repeat(act["job"], secrets.randbelow(SEEDS), ORIGIN)
            case "retry":
                service.repeat(act["job"], origin=ORIGIN)
            case "resume":
                service.supervisor.resume()
            case "restore":
                return (*self._filled(service.jobs.get(act["job"]).request), gr.skip(), gr.skip())
            case "open":
                return (*self._unchanged(), *self._kit.ask("gallery", picture=act["picture"]))
        return (*self._unchanged(), gr.skip(), gr.skip())

    def _guided(self, act: dict[str, str]) -> tuple[Any, ...]:
        """The buttons of the walk-through."""
        match act["do"]:
            case "first":
                first = welcome.first_request()
                self._kit.service.submit(first, ORIGIN)
                return (*self._filled(first), gr.skip(), gr.skip())
            case "get":
                return (*self._unchanged(), *self._kit.ask("models", model=act["model"]))
            case "later":
                self._kit.service.remember(welcomed=True)
        return (*self._unchanged(), gr.skip(), gr.skip())

    def _wanted(self, wanted: dict[str, Any], *values: Any) -> tuple[Any, ...]:
        """Another tab's settings in the form: `request`, the JSON of a Request, or a `model` in the
        place of the form's own."""
        if "request" in wanted:
            return self._filled(Request.model_validate(wanted["request"]))
        model = self._model(wanted["model"])
        steps, cfg = model.sampling.steps, model.sampling.cfg
        form = replace(Form(*values), model=model.id, resolution=NATIVE, steps=steps, cfg=cfg)
        return self._filled_with(form, model)

    def _unchanged(self) -> tuple[Any, ...]:
        return tuple(gr.skip() for _ in (*self._fields, self._pixels, self._settled))

    # The stage

    def _look(self, seen: Seen | None, *values: Any) -> tuple[Any, ...]:
        """What is new since `seen`; nothing is sent where nothing is."""
        kit, now = self._kit, self._now()
        if now == seen:
            return tuple(gr.skip() for _ in range(6))
        job = now.scene.job
        busy = job is not None and not job.has_ended
        guide = welcome.guide(kit.t, now.guide) if now.guide else ""
        same = seen and (seen.device, seen.over) == (now.device, now.over)
        model, plan = (gr.skip(), gr.skip()) if same else self._anew(*values)
        return stage(kit.t, now.scene), gr.Button(interactive=busy), guide, model, plan, now

    def _now(self) -> Seen:
        service, shown = self._kit.service, scene(self._kit.service)
        jobs = sum(shown.queue.counts[state] for state in ENDED)
        over = jobs, service.transfers.ended
        return Seen(shown, welcome.steps(service), service.knows_device, over)

    def _anew(self, *values: Any) -> tuple[Any, str]:
        """What changes under a form that nobody touches: which models are here, and the plan."""
        return gr.Dropdown(self._models()), self._plan(*values)

    # For programs

    async def generate(
        self,
        prompt: str,
        model: str = "",
        ratio: str = "1:1",
        resolution: str = NATIVE,
        negative_prompt: str = "",
        steps: int = 0,
        cfg: float = 0,
        seed: int = -1,
        images: int = 1,
    ) -> dict[str, Any]:
        """The same as the button, for gradio_client: waits for the pictures. Empty, 0 and -1 stand
        for the model's own values."""
        service = self._kit.service
        chosen = self._model(model or service.default_model())
        form = Form(
            ratio=ratio,
            resolution=resolution,
            prompt=prompt,
            negative=negative_prompt,
            model=chosen.id,
            images=images,
            seed="" if seed < 0 else str(seed),
            steps=steps or None,
            cfg=cfg or None,
            mode="default",
        )
        job = service.submit(request_of(form, chosen), ORIGIN)
        while not job.has_ended:
            await asyncio.sleep(LOOK_SECONDS)
            job = service.jobs.get(job.id)
        if job.failure:
            raise gr.Error(str(job.failure.message), print_exception=False)
        pictures = [{"seed": one.seed, "url": picture_url(one.id)} for one in service.pictures(job)]
        return {"job": job.id, "state": job.state, "pictures": pictures}
