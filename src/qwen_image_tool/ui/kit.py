"""What every tab is made with: the service, the words, and the one way to answer an event."""

import html
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import gradio as gr

from qwen_image_tool.errors import BadRequest, ToolError
from qwen_image_tool.server.run import own_addresses
from qwen_image_tool.service import Service
from qwen_image_tool.types import Failure
from qwen_image_tool.ui.words import Words

Tab = Literal["create", "queue", "gallery", "models", "system", "settings"]
_log = logging.getLogger(__name__)
Output = Any  # a component of Gradio's: its classes have no common type that mypy knows

# Buttons in HTML say what they do in data-do; Python gets all their data-* by gr.EventData.
# What had the focus keeps it when the HTML is made anew, and what was unfolded stays so: data-key
# tells which one it was.
_ACTIONS = """
let focused = null;
const unfolded = new Map();
element.addEventListener('click', event => {
  const button = event.target.closest('[data-do]');
  if (button && !button.disabled) trigger('click', {...button.dataset});
});
element.addEventListener('focusin', event => { focused = event.target.dataset.key || null; });
element.addEventListener('focusout', event => { if (event.relatedTarget) focused = null; });
element.addEventListener('toggle', event => {
  const key = event.target.dataset.key;
  if (key && event.target.isConnected) unfolded.set(key, event.target.open);
}, true);
watch('value', () => {
  for (const one of element.querySelectorAll('details[data-key]'))
    if (unfolded.has(one.dataset.key)) one.open = unfolded.get(one.dataset.key);
  if (focused && document.activeElement === document.body)
    element.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
});
"""


@dataclass(frozen=True)
class Kit:
    """`wanted` holds what one tab asks another to show: `ask` sets it, `on_wanted` hears it.
    `clock` ticks twice a second; `opened` is the event of a page that was opened or reloaded,
    `returned` of one that is looked at again. `said` shows what went wrong last."""

    service: Service
    t: Words
    tabs: gr.Tabs
    wanted: gr.JSON
    clock: gr.Timer
    opened: Any
    returned: Any
    said: gr.HTML

    def on(
        self,
        trigger: Any,
        do: Callable[..., Any],
        inputs: Sequence[Output] = (),
        outputs: Sequence[Output] = (),
        here_only: bool = False,
        **options: Any,
    ) -> Any:
        """`do` answers an event. Not through Gradio's queue: a call is one short request, and
        nothing waits behind another. What goes wrong is said, and changes no output.

        `trigger`: an event of a component, such as `button.click`, or a list of them; `here_only`:
        of this computer's browsers alone, because paths are opened; `options` go to Gradio.
        """

        def answer(http: gr.Request, *values: Any) -> Any:
            asked = _from_here(http, do) if here_only else do
            return self._said_or_done(asked, values, len(outputs))

        return self._listen(trigger, answer, inputs, outputs, options)

    def on_act(
        self,
        shown: gr.HTML,
        do: Callable[..., Any],
        inputs: Sequence[Output] = (),
        outputs: Sequence[Output] = (),
        here_only: bool = False,
    ) -> Any:
        """`do(act, *inputs)` answers a button of a `Kit.html`; `act` holds its data-*, as text.
        `here_only`: as `on`."""

        def answer(http: gr.Request, event: gr.EventData, *values: Any) -> Any:
            asked = _from_here(http, do) if here_only else do
            return self._said_or_done(asked, (dict(event._data), *values), len(outputs))

        every = {"trigger_mode": "multiple"}  # also a press while another one is answered
        return self._listen(shown.click, answer, inputs, outputs, every)

    def watch(
        self,
        tab: gr.Tab,
        look: Callable[..., Any],
        inputs: Sequence[Output],
        outputs: Sequence[Output],
        seconds: float = 0.5,
    ) -> None:
        """`look` is asked again and again while the tab is shown, and no more when it is not, or
        when the whole page is not."""
        clock, shown = gr.Timer(seconds, active=False), gr.JSON(visible="hidden")

        def ticked(shown: bool, *values: Any) -> Any:
            if not shown:
                return (gr.Timer(active=False), *(gr.skip() for _ in outputs))
            found = look(*values)
            return (gr.skip(), *(found if len(outputs) > 1 else (found,)))

        is_shown = f"!document.hidden && !!document.getElementById('{tab.elem_id}')?.offsetParent"
        values = f"(...values) => [{is_shown}, ...values.slice(1)]"
        self.on(clock.tick, ticked, [shown, *inputs], [clock, *outputs], js=values)
        self.on(tab.select, lambda: gr.Timer(active=True), outputs=[clock])
        self.on(
            self.returned,
            lambda shown: gr.Timer(active=bool(shown)),
            [shown],
            [clock],
            js=f"() => [{is_shown}]",
        )
        self.on(tab.select, look, inputs, outputs)

    def _listen(
        self,
        trigger: Any,
        answer: Callable[..., Any],
        inputs: Sequence[Output],
        outputs: Sequence[Output],
        options: dict[str, Any],
    ) -> Any:
        triggers = trigger if isinstance(trigger, list) else [trigger]
        options = {"queue": False, "show_progress": "hidden", "api_visibility": "private"} | options
        if any(each.event_name in ("input", "change") for each in triggers):
            # While one choice is answered another may be made, which Gradio would leave out
            options.setdefault("trigger_mode", "always_last")
        return gr.on(triggers, answer, list(inputs), [*outputs, self.said], **options)

    def _said_or_done(self, do: Callable[..., Any], values: Sequence[Any], outputs: int) -> Any:
        """The outputs, then what is said of an error. Gradio's own errors are HTTP 500 here."""
        try:
            done = do(*values)
        except ToolError as error:
            failure = Failure.of(error)
        except Exception as error:  # noqa: BLE001  no button ends in silence
            _log.exception("The page's %s failed.", getattr(do, "__name__", do))
            failure = Failure.from_table("other", f"({error})")
        else:
            found = (done,) if outputs == 1 else tuple(done or ())
            return (*found, gr.skip()) if outputs else gr.skip()
        said = toast(self.t, failure)
        return (*(gr.skip() for _ in range(outputs)), said) if outputs else said

    def html(self, value: str = "", script: str = "", **options: Any) -> gr.HTML:
        """HTML whose buttons with data-do are heard by `on_act`; `script` is JavaScript of its
        own, which has `element`, `trigger`, `server` and `watch` as Gradio's HTML gives them."""
        code = f"{_ACTIONS}{script}"
        return gr.HTML(value, js_on_load=code, apply_default_css=False, **options)

    def ask(self, tab: Tab, **what: Any) -> tuple[Any, Any]:
        """For the outputs `[kit.tabs, kit.wanted]`: go to a tab, which hears `what`."""
        return gr.Tabs(selected=tab), {"tab": tab, "at": time.time_ns()} | what

    def on_wanted(
        self,
        tab: Tab,
        do: Callable[..., Any],
        outputs: Sequence[Output],
        inputs: Sequence[Output] = (),
    ) -> None:
        """`do(wanted, *inputs)` gets what was asked of this tab."""
        skipped = gr.skip() if len(outputs) == 1 else tuple(gr.skip() for _ in outputs)

        def heard(wanted: dict[str, Any] | None, *values: Any) -> Any:
            return do(wanted, *values) if wanted and wanted["tab"] == tab else skipped

        self.on(self.wanted.change, heard, [self.wanted, *inputs], outputs)


def _from_here(http: gr.Request, do: Callable[..., Any]) -> Callable[..., Any]:
    """`do`; for a browser on another computer, what raises in its place."""
    name = http.client.host if http.client else ""
    if name in ("127.0.0.1", "::1", *own_addresses()):
        return do

    def refuse(*_: Any) -> None:
        raise BadRequest(
            "This can be done only on the computer that QwenImageTool runs on.",
            "Open the page there.",
        )

    return refuse


# Pieces of HTML


def sentence(t: Words, said: str) -> str:
    """What the program says, for the page: options of the command line lose their dashes, but not
    in a command, which stands in backticks."""
    return t.known(re.sub(r"(`[^`]*`)|(?<!\S)--(?=[a-z])", lambda found: found[1] or "", said))


def told(t: Words, said: str) -> str:
    """A `sentence` as HTML."""
    return marked(sentence(t, said))


def marked(said: str) -> str:
    """Words as HTML: what stands in backticks is code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", text(said))


def picture_url(picture: str) -> str:
    """Of a picture's file; with ?download=true it is saved."""
    return f"/api/gallery/{picture}/file"


def text(value: object) -> str:
    """Safe between tags and in attributes."""
    return html.escape(str(value), quote=True)


def button(label: str, do: str, kind: str = "", title: str = "", **data: object) -> str:
    """A button of a `Kit.html`; `data` comes back with its click. `kind`: "", primary, cancel.
    `title`: what it does, where the label is only a sign."""
    key = "-".join([do, *(str(value) for value in data.values())])
    extra = "".join(f' data-{name}="{text(value)}"' for name, value in data.items())
    if title:
        extra += f' title="{text(title)}" aria-label="{text(title)}"'
    return (
        f'<button type="button" class="qit-button {kind}" data-do="{text(do)}"'
        f' data-key="{text(key)}"{extra}>{text(label)}</button>'
    )


def failure_card(t: Words, failure: Failure, buttons: str = "") -> str:
    """What happened, what to do, what was kept."""
    return (
        f'<div class="qit-card bad" role="alert"><p><strong>{told(t, failure.message)}'
        f"</strong></p><p>{told(t, failure.hint)}</p>"
        f'<p class="soft">{told(t, failure.kept)}</p>{row(buttons)}</div>'
    )


def toast(t: Words, failure: Failure) -> str:
    """What a button could not do. page.js takes it away with the next press."""
    what, then = told(t, failure.message), told(t, failure.hint)
    close = button("×", "close", "plain", title=t("Close"))
    said = f"<p><strong>{what}</strong> {then}</p>"
    again = f'data-at="{time.time_ns()}"'  # the same words a second time are news too
    return f'<div class="qit-toast qit-card bad" role="alert" {again}>{said}{close}</div>'


def row(buttons: str) -> str:
    return f'<div class="qit-row">{buttons}</div>' if buttons else ""


def meter(share: float, full: bool = False) -> str:
    """A thin bar: how much of something is taken, 0 to 1. What it says is said in words beside."""
    state = "full" if full else ""
    width = f"{min(1.0, max(0.0, share)):.1%}"
    return f'<span class="qit-meter {state}"><i style="width:{width}"></i></span>'


def fact(name: str, value: str, more: str = "") -> str:
    """A name with its value, for a `dl`; `more` is HTML."""
    return f"<div><dt>{text(name)}</dt><dd>{text(value)}{more}</dd></div>"


# Numbers as people read them


def size_text(count: float) -> str:
    """Bytes of files: "31 MB", "14.2 GB"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            value = count / factor
            return f"{value:.0f} {unit}" if value >= 100 or unit != "GB" else f"{value:.1f} {unit}"
    return f"{count:.0f} B"


def memory_text(count: int) -> str:
    """Bytes of memory, as its makers count them: "969 MiB", "21.1 GiB"."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def time_text(t: Words, seconds: float) -> str:
    """Seconds: "8 s", "3 min 20 s", "2 h 5 min"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return t("{s} s", s=whole)
    if whole < 3600:
        return t("{m} min {s} s", m=whole // 60, s=whole % 60)
    return t("{h} h {m} min", h=whole // 3600, m=whole % 3600 // 60)
