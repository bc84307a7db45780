"""`qit serve`: a socket, a token, the app behind the gate, and an end in order."""

import asyncio
import contextlib
import errno
import json
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

import psutil
import uvicorn
from fastapi import FastAPI, Form
from fastapi.responses import HTMLResponse, RedirectResponse
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from qwen_image_tool import __version__
from qwen_image_tool.errors import BadRequest, NotWritten, Unknown
from qwen_image_tool.files import replace_file
from qwen_image_tool.server import plain
from qwen_image_tool.server.a1111 import a1111
from qwen_image_tool.server.answers import explain_errors
from qwen_image_tool.server.api import Here, api
from qwen_image_tool.server.gate import TOKEN_BYTES, Access, Gate, Password, TooManyTries
from qwen_image_tool.server.hub import Hub
from qwen_image_tool.server.mcp import Mounted
from qwen_image_tool.server.openai import openai
from qwen_image_tool.service import Service, Startup
from qwen_image_tool.types import Value

PORT = 7860  # preferred; the next free one otherwise
TRIED_PORTS = 20
TOKEN_VARIABLE = "QIT_TOKEN"  # noqa: S105
ANSWER_SECONDS = 10  # a busy server answers late
LEAVE_SECONDS = 2  # for open connections, when the server ends
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
APIS = ("/api", "/v1", "/sdapi", "/mcp")  # below these the page answers nothing


class Running(Value):
    """Where a service listens; the file `server.json` of the data folder, while it does."""

    url: str
    port: int
    token: str
    pid: int
    lan: bool = False

    @property
    def address(self) -> str:
        """For programs that take an address and nothing else: their HTTP client sends what stands
        before the @ as Basic authentication."""
        scheme, _, host = self.url.partition("://")
        return f"{scheme}://qit:{quote(self.token, safe='')}@{host}"


class Page(Protocol):
    """What answers where no API does. `start` and `close` are called in the event loop."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...
    async def start(self) -> None: ...
    async def close(self) -> None: ...


class Stopper:
    """Ends a server from another thread."""

    server: uvicorn.Server | None = None

    def stop(self) -> None:
        if self.server:
            self.server.should_exit = True


def running(data: Path) -> Running:
    """The service of this data folder. Raises Unknown where none runs."""
    with contextlib.suppress(OSError, ValueError):
        found = Running.from_json((data / "server.json").read_text(encoding="utf-8"))
        if _answers(found):
            return found
    raise Unknown("QwenImageTool is not running.", "Start it with `qit serve`.")


def _answers(found: Running) -> bool:
    """Whether who listens there is the process that wrote it down. One that was killed left its
    file; its number and its port may be another program's by now."""
    connection = HTTPConnection(urlsplit(found.url).netloc, timeout=ANSWER_SECONDS)
    with contextlib.closing(connection), contextlib.suppress(HTTPException):
        connection.request("GET", "/healthz")
        answer = json.loads(connection.getresponse().read(1000))
        return isinstance(answer, dict) and answer.get("pid") == found.pid
    return False


def build(service: Service, access: Access, page: Page | None = None) -> FastAPI:
    """All routes over a service, without the gate; what they don't know goes to the page."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.hub = hub = Hub(service)
        mounted = Mounted(service, hub)
        app.router.routes.append(Route("/mcp", mounted, include_in_schema=False))
        service.start()
        if page:
            await page.start()
        yield
        hub.close()
        await mounted.close()
        if page:
            await page.close()

    app = FastAPI(
        title="QwenImageTool",
        version=__version__,
        description="Pictures with Alibaba's open Qwen-Image models, on this computer.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/api/openapi.json",
    )
    app.state.service, app.state.access = service, access
    for router in (api, openai, a1111):
        app.include_router(router)
    _add_own_routes(app)
    explain_errors(app)
    if page:
        app.router.default = _page_or(app.router.default, page)
    return app


def serve(
    service: Service,
    host: str = "127.0.0.1",
    port: int | None = None,
    lan: bool = False,
    ready: Callable[[Running], None] = lambda _: None,
    guarded: bool = False,
    stopper: "Stopper | None" = None,
    page: Page | None = None,
) -> None:
    """Listen until a signal or `stopper` asks to end.

    `port`: None for the remembered one, or a free one near 7860; 0 for any. `guarded`: end with
    stdin. Raises BadRequest where the address can't be used, or LAN mode has no password.
    """
    _check_host(host)
    password = Password(service.data)
    if lan and not password.is_set:
        raise BadRequest("On the network, a password is needed.", "Set one: `qit password`.")
    if not lan and host not in ("127.0.0.1", "localhost", "::1"):
        raise BadRequest(
            f"{host} can be reached from other computers.", "Add --lan if you mean it."
        )
    bound = bind("0.0.0.0" if lan and host == "127.0.0.1" else host, port, service)  # noqa: S104
    with bound:
        number = bound.getsockname()[1]
        token = os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(TOKEN_BYTES)
        access = Access(token, password if lan else None)
        app: FastAPI = build(service, access, page)
        gate = Gate(app, access, lambda: [*LOOPBACK, *(own_addresses() if lan else ())], number)
        app.state.gate = gate
        url = f"http://{shown(host, lan)}:{number}"
        where = Running(url=url, port=number, token=token, pid=os.getpid(), lan=lan)
        with _announced(service, where):
            work = _listen(
                gate,
                bound,
                lambda: ready(where),
                lambda: app.state.hub.close(),  # noqa: PLW0108 - it is made when the app starts
                stopper or Stopper(),
                guarded,
            )
            asyncio.run(work)


def bind(host: str, port: int | None, service: Service) -> socket.socket:
    """A listening socket. Raises BadRequest."""
    remembered = service.remembered().get("port")
    known = [remembered] if isinstance(remembered, int) and 0 < remembered < 65536 else []
    near = [PORT + i for i in range(TRIED_PORTS)]
    wanted = [*known, *near, 0] if port is None else [port]
    for number in wanted:
        try:
            bound = _bind(host, number)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES) or number is wanted[-1]:
                why = error.strerror or str(error)
                raise BadRequest(
                    f"Port {number} of {host} can't be used: {why}.", "Choose another --port."
                ) from error
        else:
            if port is None:
                with contextlib.suppress(NotWritten):
                    service.remember(port=bound.getsockname()[1])
            return bound
    raise BadRequest("No port is free.", "Choose one with --port.")


def _check_host(host: str) -> None:
    """Raises BadRequest where no port of it could be listened on."""
    try:
        if not host:
            raise ValueError("the socket would take it for every address")
        _bind(host, 0).close()
    except (OSError, ValueError, TypeError) as error:  # TypeError: no name of the network's
        raise BadRequest(
            f"{host or 'An empty --host'} is no address that this computer can listen on.",
            "Give 127.0.0.1; with --lan also 0.0.0.0, or an address of this computer.",
        ) from error


def shown(host: str, lan: bool) -> str:
    """The name of this computer in a URL that leads to a server on `host`."""
    if lan and host in ("127.0.0.1", "0.0.0.0", "::"):  # noqa: S104
        return own_addresses()[-1]
    if host == "localhost":
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def own_addresses() -> list[str]:
    """Names and addresses under which the local network finds this computer; the last one is the
    best to show."""
    found = [
        address.address.split("%")[0]
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6)
    ]
    v6 = [f"[{address}]" for address in found if ":" in address]
    v4 = [address for address in found if ":" not in address and not address.startswith("127.")]
    v4.sort(key=_outgoing().__eq__)  # that one last; not a container's or a virtual machine's
    name = socket.gethostname().lower()
    return [name, f"{name}.local", *v6, *v4]


def _outgoing() -> str:
    """The address of this computer that other networks see; "" without a network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            asked.connect(("192.0.2.1", 9))  # RFC 5737: nobody's. Of UDP, which sends nothing yet
        except OSError:
            return ""
        return str(asked.getsockname()[0])


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio turns Nagle's delay off: 40 ms an answer otherwise
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        else:  # on Windows that option would let two programs share the port
            bound.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_EXCLUSIVEADDRUSE"), 1)  # noqa: B009
        bound.bind((host, port))
        bound.listen()  # at once: on POSIX two sockets that don't listen yet can share a port
    except BaseException:
        bound.close()
        raise
    return bound


class _Server(uvicorn.Server):
    """Signals are ours: uvicorn would raise them again before the service has ended in order.
    `leave` ends what clients wait for, so that they are answered and none is torn off."""

    def __init__(self, config: uvicorn.Config, leave: Callable[[], None]) -> None:
        super().__init__(config)
        self._leave = leave

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._leave()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        main = threading.current_thread() is threading.main_thread()
        before = {n: signal.signal(n, self.handle_exit) for n in _ends()} if main else {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _ends() -> Iterator[signal.Signals]:
    """The signals that ask for an end. A terminal that is closed sends SIGHUP; nohup ignores it."""
    for name in ("SIGINT", "SIGTERM", "SIGBREAK", "SIGHUP"):
        number = getattr(signal, name, None)
        ignored = name == "SIGHUP" and number and signal.getsignal(number) is signal.SIG_IGN
        if number and not ignored:
            yield number


async def _listen(
    app: ASGIApp,
    bound: socket.socket,
    ready: Callable[[], None],
    leave: Callable[[], None],
    stopper: Stopper,
    guarded: bool,
) -> None:
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        timeout_graceful_shutdown=LEAVE_SECONDS,
    )
    server = _Server(config, leave)
    stopper.server = server
    if guarded:
        threading.Thread(target=_end_with_stdin, args=(stopper,), daemon=True).start()
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.005)
    if server.started:
        ready()
    await serving


def _end_with_stdin(stopper: Stopper) -> None:
    """The program that started us is gone, however it went."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdin.buffer.read()
    stopper.stop()


@contextlib.contextmanager
def _announced(service: Service, where: Running) -> Iterator[None]:
    path = service.data / "server.json"
    try:
        replace_file(path, where.to_json().encode(), private=True)
    except OSError as error:
        raise NotWritten.of(path, error) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _page_or(unknown: ASGIApp, page: Page) -> ASGIApp:
    async def choose(scope: Scope, receive: Receive, send: Send) -> None:
        below_api = any(f"{scope['path']}/".startswith(f"{root}/") for root in APIS)
        await (unknown if below_api else page)(scope, receive, send)

    return choose


def _add_own_routes(app: FastAPI) -> None:
    @app.get("/healthz", tags=["system"])
    def health() -> dict[str, Any]:
        """Who answers here."""
        return {"app": "qwen-image-tool", "version": __version__, "pid": os.getpid()}

    @app.get("/startup", tags=["system"])
    def startup(service: Here) -> Startup:
        """How far the start is."""
        return service.startup

    @app.get("/api", include_in_schema=False)
    def docs() -> HTMLResponse:
        """The routes, from the OpenAPI document; nothing is loaded from elsewhere."""
        return HTMLResponse(_reference(app.openapi()))

    @app.get("/login", include_in_schema=False)
    def login_page(http: HttpRequest) -> Response:
        return plain.login(plain.language_of(http.headers))

    @app.post("/login", include_in_schema=False)
    def login(http: HttpRequest, password: str = Form(default="", max_length=1000)) -> Response:
        access, gate = http.app.state.access, http.app.state.gate
        language = plain.language_of(http.headers)
        try:
            session = access.log_in(http.client.host if http.client else "", password)
        except TooManyTries as error:
            return plain.login(language, seconds=error.seconds)
        if session is None:
            return plain.login(language, wrong=True)
        answer: Response = gate.welcome(RedirectResponse("/", 303), session)
        return answer


def _reference(document: dict[str, Any]) -> str:
    rows = [
        f"<tr><td>{method.upper()}<td><code>{path}</code><td>{route.get('description', '')}"
        for path, routes in document["paths"].items()
        for method, route in routes.items()
    ]
    return (
        '<!doctype html><meta charset="utf-8"><title>QwenImageTool API</title>'
        f"<h1>{document['info']['title']} {document['info']['version']}</h1>"
        "<p>For tools: <a href='/api/openapi.json'>openapi.json</a>. MCP: /mcp.</p>"
        f"<table>{''.join(rows)}</table>"
    )


def ready_line(where: Running) -> str:
    """For the program that started us."""
    return json.dumps({"event": "ready", "port": where.port, "url": where.url})
