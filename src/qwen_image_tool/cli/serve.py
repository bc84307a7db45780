"""`qit ui`, `qit serve` and what belongs to it: the token, the password, MCP over stdio."""

import sys
import threading
import webbrowser
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_image_tool.app import App
from qwen_image_tool.cli.screen import Screen
from qwen_image_tool.errors import Unknown
from qwen_image_tool.settings import load_settings

if TYPE_CHECKING:
    from qwen_image_tool.server.run import Running

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[
    int | None,
    typer.Option(help="7860 or the next free one if not given; 0 for any.", min=0, max=65535),
]
Lan = Annotated[
    bool, typer.Option("--lan", help="Let other computers in; `qit password` sets a password.")
]
JsonReady = Annotated[
    bool, typer.Option("--json-ready", help="Print one line of JSON when it is ready.")
]
Guarded = Annotated[
    bool, typer.Option("--guarded", help="End when stdin ends: for the program that starts it.")
]
NoBrowser = Annotated[bool, typer.Option("--no-browser", help="Do not open the browser.")]


def ui(
    host: Host = "127.0.0.1",
    port: Port = None,
    lan: Lan = False,
    no_browser: NoBrowser = False,
    json_ready: JsonReady = False,
    guarded: Guarded = False,
) -> None:
    """Open the page in the browser; it runs until Ctrl-C.

    [bold]Examples[/]

      qit ui

      qit ui --lan --no-browser
    """
    screen = Screen(json_ready)
    if where := _found_running():
        screen.note("QwenImageTool is running already; this is its page.")
        _where(screen, where)
        if not no_browser:
            _browse(where)
    else:
        then = _nothing if no_browser else _browse
        _run(screen, host, port, lan, guarded, then, page_at_once=True)


def serve(
    host: Host = "127.0.0.1",
    port: Port = None,
    lan: Lan = False,
    json_ready: JsonReady = False,
    guarded: Guarded = False,
) -> None:
    """Run the queue, the gallery, the APIs and the page until Ctrl-C.

    [bold]Examples[/]

      qit serve

      qit serve --lan --port 8000
    """
    _run(Screen(json_ready), host, port, lan, guarded, _nothing)


def token(as_json: Json = False) -> None:
    """Print the address and the token of the service that is running."""
    from qwen_image_tool.server.run import running

    where = running(load_settings().data)
    screen = Screen(as_json)
    if as_json:
        facts = where.model_dump(include={"url", "port", "token"})
        screen.json(facts | {"address": where.address})
    else:
        page = f"{where.url}/?__t={where.token}"
        screen.facts({"Page": page, "Token": where.token, "For programs": where.address})


def password() -> None:
    """Set the password that `qit serve --lan` asks for.

    Reads it from stdin where that is no terminal.
    """
    from qwen_image_tool.server.gate import Password

    if sys.stdin.isatty():
        given = typer.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
    else:
        given = sys.stdin.readline().rstrip("\r\n")
    Password(load_settings().data).set(given)
    Screen().note("The password is set: `qit serve --lan` lets other computers in with it.")


def mcp() -> None:
    """Speak MCP on stdin and stdout, for programs that start their tools themselves.

    Uses the service that is running, else runs one until stdin ends.
    """
    from qwen_image_tool.server.stdio import speak

    speak(load_settings())


def _run(
    screen: Screen,
    host: str,
    port: int | None,
    lan: bool,
    guarded: bool,
    then: "Callable[[Running], None]",
    page_at_once: bool = False,
) -> None:
    from qwen_image_tool.server import run
    from qwen_image_tool.service import Service
    from qwen_image_tool.ui.host import Page

    def ready(where: "Running") -> None:
        _welcome(screen, where, lan)
        then(where)

    settings = load_settings()
    lan = lan or settings.lan
    service = Service(App(settings))
    try:
        for said in service.rescued:
            screen.note(said)
        page = Page(service, page_at_once)
        run.serve(service, host, port, lan, ready, guarded, page=page)
    finally:
        service.close()


def _found_running() -> "Running | None":
    from qwen_image_tool.server.run import running

    try:
        return running(load_settings().data)
    except Unknown:
        return None


def _nothing(_: "Running") -> None:
    pass


def _browse(where: "Running") -> None:
    """In a thread: some browsers keep the program that starts them waiting."""
    url = f"{where.url}/?__t={where.token}"
    threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()


def _where(screen: Screen, where: "Running") -> None:
    from qwen_image_tool.server.run import ready_line

    page = f"QwenImageTool is at {where.url}/?__t={where.token}"
    screen.line(ready_line(where) if screen.as_json else page)
    sys.stdout.flush()


def _welcome(screen: Screen, where: "Running", lan: bool) -> None:
    _where(screen, where)
    if screen.as_json:
        return
    if lan:
        import segno

        screen.line(f"On the network, with the password: {where.url}")
        segno.make(where.url).terminal(out=sys.stdout, compact=True, border=2)
    screen.note("Ctrl-C ends it; what is in the queue stays there.")
