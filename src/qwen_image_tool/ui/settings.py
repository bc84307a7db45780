"""Settings: what settings.py declares, as a form; this page's own choices; who else may come in."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import gradio as gr
import segno
from pydantic.fields import FieldInfo

from qwen_image_tool.errors import BadRequest, Unknown
from qwen_image_tool.server.gate import MIN_PASSWORD, Password
from qwen_image_tool.server.run import Running, running
from qwen_image_tool.service import Service
from qwen_image_tool.settings import ENV_PREFIX, Settings, load_settings, origin, save_settings
from qwen_image_tool.ui.kit import Kit, button, fact, row, text
from qwen_image_tool.ui.words import Words

FIELDS = {name: field for name, field in Settings.model_fields.items() if field.title}
BRANDS = {"huggingface": "Hugging Face", "modelscope": "ModelScope"}
READ_PAGE = "() => [window.qit.chosen('language'), window.qit.chosen('theme')]"


def build(kit: Kit, tab: gr.Tab) -> None:
    t, service = kit.t, kit.service
    with gr.Column(elem_id="qit-settings"):
        _title(t("This page"))
        with gr.Row():
            languages = [(t("As the browser"), ""), ("English", "en"), ("简体中文", "zh")]
            language = gr.Dropdown(languages, value="", label=t("Language"), min_width=180)
            themes = [(t("As the system"), ""), (t("Light"), "light"), (t("Dark"), "dark")]
            theme = gr.Dropdown(themes, value="", label=t("Colours"), min_width=180)
            model = gr.Dropdown([], label=t("Model for whoever names none"), min_width=220)
        _title(t("The program"))
        waits = kit.html(elem_id="qit-restart")
        with gr.Row(elem_classes="qit-pairs"):
            fields = [_component(t, name, field) for name, field in FIELDS.items()]
        with gr.Row(elem_id="qit-save"):
            save = gr.Button(t("Save"), variant="primary", scale=0, min_width=120)
        _title(t("Other computers"))
        others = kit.html(elem_id="qit-lan")
        with gr.Row(equal_height=False, elem_classes="qit-beside-field"):
            password = gr.Textbox(
                label=t("New password, {count} characters or more", count=MIN_PASSWORD),
                type="password",
                max_lines=1,
                scale=3,
            )
            set_password = gr.Button(t("Set the password"), scale=0, min_width=180)
        _title(t("Other programs"))
        programs = kit.html(elem_id="qit-programs")

    def fill() -> list[Any]:
        found = load_settings()
        return [_shown(t, name, field, found) for name, field in FIELDS.items()]

    def show() -> tuple[Any, ...]:
        names = [(t.known(each.name), each.id) for each in service.models_here()]
        chosen = gr.Dropdown(names, value=service.default_model())
        where = _where(service)
        return (
            chosen,
            waits_html(t, _unused(service, load_settings())),
            lan_html(t, where, Password(service.data).is_set),
            programs_html(t, where),
        )

    def look(filled: bool) -> tuple[Any, ...]:
        """The form only once: later it could write over what somebody types."""
        form = [gr.skip() for _ in fields] if filled else fill()
        return (True, *form, *show())

    outputs = [model, waits, others, programs]
    filled = gr.State(False)

    def keep(*values: Any) -> tuple[Any, ...]:
        changes = changes_of(values, load_settings())
        if changes.get("lan") and not Password(service.data).is_set:
            raise BadRequest("On the network, a password is needed.", "Set it below first.")
        save_settings(changes)
        return (*fill(), *show())

    def protect(word: str) -> tuple[Any, ...]:
        Password(service.data).set(word)
        return ("", *show())

    kit.on(tab.select, look, [filled], [filled, *fields, *outputs])
    kit.on(save.click, keep, fields, [*fields, *outputs], here_only=True)
    pressed = [set_password.click, password.submit]
    kit.on(pressed, protect, [password], [password, *outputs], here_only=True)
    kit.on(model.input, lambda chosen: service.remember(model=chosen), [model])
    kit.on_act(programs, lambda act: programs_html(t, _where(service), act["do"]), [], [programs])
    kit.opened(None, None, [language, theme], js=READ_PAGE)
    language.input(None, [language], js="value => window.qit.choose('language', value)")
    theme.input(None, [theme], js="value => window.qit.choose('theme', value)")


def _title(said: str) -> None:
    gr.HTML(f"<h3>{text(said)}</h3>", apply_default_css=False)


# The form of what settings.py declares


def _component(t: Words, name: str, field: FieldInfo) -> Any:
    """The widget of a setting's type."""
    kind, label = field.annotation, t.known(field.title or name)
    more: dict[str, Any] = {
        "label": label,
        "info": t.known(field.description or ""),
        "elem_id": f"qit-{name}",
    }
    if get_origin(kind) is Literal:
        return gr.Dropdown([(BRANDS.get(one, one), one) for one in get_args(kind)], **more)
    if kind is bool:
        return gr.Checkbox(**more)
    return gr.Number(**more) if kind is float else gr.Textbox(max_lines=1, **more)


def _shown(t: Words, name: str, field: FieldInfo, found: Settings) -> dict[str, Any]:
    """Its value as it is written now. What an environment variable says can't be changed here."""
    value, info = getattr(found, name), t.known(field.description or "")
    fixed = origin(name) == "environment"
    if fixed:
        info += " · " + t("{variable} decides it.", variable=ENV_PREFIX + name.upper())
    shown = str(value) if isinstance(value, Path) else value
    return gr.update(value=shown, info=info, interactive=not fixed)


def changes_of(values: Sequence[Any], now: Settings) -> dict[str, Any]:
    """Of the form's values, in the order of FIELDS, those that are others than `now`. None stands
    for the default."""
    changes: dict[str, Any] = {}
    for (name, field), value in zip(FIELDS.items(), values, strict=True):
        before, default = getattr(now, name), field.get_default(call_default_factory=True)
        given = value.strip() if isinstance(value, str) else value
        if origin(name) == "environment" or str(given) == str(before):
            continue
        changes[name] = None if given in ("", None) or str(given) == str(default) else given
    return changes


def _unused(service: Service, found: Settings) -> list[str]:
    """Titles of what is written, but not in use before the next start."""
    used = service.app.settings
    return [
        field.title or name
        for name, field in FIELDS.items()
        if getattr(found, name) != getattr(used, name)
    ]


def waits_html(t: Words, titles: Sequence[str]) -> str:
    if not titles:
        said = t("They are read when QwenImageTool starts.")
        return f'<p class="soft">{text(said)}</p>'
    names = ", ".join(t.known(title) for title in titles)
    said = t("Start QwenImageTool again to use what was changed: {names}.", names=names)
    return f'<div class="qit-card warn" role="status"><p>{text(said)}</p></div>'


# Who else may come in


def _where(service: Service) -> Running | None:
    try:
        return running(service.data)
    except Unknown:  # the file was taken away
        return None


def lan_html(t: Words, where: Running | None, has_password: bool) -> str:
    if where and where.lan:
        said = t("Phones and other computers of the network open this address, with the password:")
        code = segno.make(where.url).svg_inline(scale=4, border=3, dark="#000", light="#fff")
        seen = text(t("The address as a QR code"))
        warned = t("It is not encrypted: use it in a network that you trust.")
        return (
            f'<div class="qit-card qit-lan"><div role="img" aria-label="{seen}">{code}</div><div>'
            f'<p>{text(said)}</p><p><a href="{text(where.url)}">{text(where.url)}</a></p>'
            f'<p class="soft">{text(warned)}</p></div></div>'
        )
    if has_password:
        said = t("The password is set. Other computers come in once the setting above allows it.")
    else:
        said = t("Nobody else comes in. To change that, set a password, then the setting above.")
    return f'<p class="soft">{text(said)}</p>'


def programs_html(t: Words, where: Running | None, do: str = "") -> str:
    """Addresses of the APIs; the token only where it is asked for."""
    if where is None:
        return ""
    said = t("Open WebUI, SillyTavern, LibreChat and others draw with these addresses.")
    hidden = do != "reveal"
    facts = [
        fact("OpenAI Images", f"{where.url}/v1"),
        fact("AUTOMATIC1111", where.url if hidden else where.address),
        fact("MCP", f"{where.url}/mcp"),
        fact(t("Our own"), f"{where.url}/api"),
        fact(t("Token, as API key or Bearer"), "••••••••" if hidden else where.token),
    ]
    show = button(t("Show the token"), "reveal") if hidden else button(t("Hide the token"), "hide")
    more = t("It is another one at every start, unless QIT_TOKEN sets it.")
    return (
        f'<div class="qit-card"><p>{text(said)}</p><dl class="qit-needs one">{"".join(facts)}</dl>'
        f'<p class="soft">{text(more)}</p>{row(show)}</div>'
    )
