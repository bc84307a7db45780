"""Who may come in, asked before anything else sees a request.

Loopback names or this computer's own addresses in Host (against DNS rebinding), this server's own
pages in Origin (against other websites), then a token, a session or a signature.
"""

import base64
import binascii
import contextlib
import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, RedirectResponse, Response

from qwen_image_tool.errors import BadRequest, NotWritten, ToolError
from qwen_image_tool.files import replace_file
from qwen_image_tool.server.plain import closed, language_of

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN_BYTES = 32
WRONG_TRIES, WINDOW = 5, 60.0  # wrong passwords or tokens of one address in so many seconds
MOST_ADDRESSES = 10_000  # whose tries are remembered
SESSION_SECONDS = 30 * 24 * 3600.0
MIN_PASSWORD = 8  # characters
MAX_BODY = 1 << 20  # bytes of a request
MAX_UPLOAD = 64 << 20  # bytes of a request that carries a picture
UPLOADS = (
    "/api/gallery/inspect",
    "/gradio_api/upload",
    "/sdapi/v1/png-info",
    "/sdapi/v1/img2img",
    "/v1/images/edits",
)
HASHED = "/assets/"  # the page's files below it have their content's hash in their names
OPEN = ("/healthz", "/login")
SAFE = ("GET", "HEAD", "OPTIONS")
# Gradio needs inline scripts and eval; nothing comes from or goes to another address
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval';"
    " style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' blob:;"
    " font-src 'self' data:; connect-src 'self' blob: data:; worker-src 'self' blob:;"
    " frame-ancestors 'none'; form-action 'self'; base-uri 'self'; object-src 'none'"
)
PROTECTION = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # with none at all browsers hide the login form's Origin
    "cross-origin-resource-policy": "same-origin",
}


class Password:
    """The password of LAN mode: its argon2 hash in a file that only the user can read."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "password"

    @property
    def is_set(self) -> bool:
        return self._path.is_file()

    def set(self, password: str) -> None:
        """Raises BadRequest where it is too short, NotWritten where it can't be kept."""
        from argon2 import PasswordHasher

        if len(password) < MIN_PASSWORD:
            raise BadRequest(
                "The password is too short.", f"Use {MIN_PASSWORD} characters or more."
            )
        kept = PasswordHasher().hash(password).encode()
        try:
            replace_file(self._path, kept, private=True)
        except OSError as error:
            raise NotWritten.of(self._path, error) from error

    def matches(self, password: str) -> bool:
        from argon2 import PasswordHasher
        from argon2.exceptions import InvalidHashError, VerificationError

        try:
            kept = self._path.read_text(encoding="utf-8")
            return PasswordHasher().verify(kept, password)
        except (OSError, VerificationError, InvalidHashError):
            return False


class Tries:
    """Wrong tries of each address. `clock` gives monotonic seconds."""

    def __init__(self, what: str, clock: Callable[[], float]) -> None:
        self._what, self._clock = what, clock
        self._wrong: dict[str, dict[bytes, float]] = {}

    def check(self, address: str) -> None:
        """Raises TooManyTries."""
        wrong = self._latest(address)
        if len(wrong) >= WRONG_TRIES:
            raise TooManyTries(self._what, WINDOW - (self._clock() - min(wrong.values())))

    def failed(self, address: str, given: str = "") -> None:
        """`given` counts once: a program that goes on with the token of the last start does not
        guess. Without it every try counts."""
        mark = hashlib.sha256(given.encode()).digest() if given else secrets.token_bytes(8)
        wrong = self._latest(address)
        if len(self._wrong) >= MOST_ADDRESSES:
            self._wrong.clear()
        self._wrong[address] = wrong | {mark: self._clock()}

    def forget(self, address: str) -> None:
        self._wrong.pop(address, None)

    def _latest(self, address: str) -> dict[bytes, float]:
        now = self._clock()
        wrong = self._wrong.get(address, {})
        return {given: then for given, then in wrong.items() if now - then < WINDOW}


class Access:
    """What opens the gate: the token of this start, a session after the password, a signature.

    With a `password` (LAN mode) an address may guess either a few times a minute. `clock` gives
    monotonic seconds.
    """

    def __init__(
        self, token: str, password: Password | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.token = token
        self._password = password
        self._clock = clock
        self._sessions: dict[str, float] = {}
        self._passwords = Tries("passwords", clock)
        self._tokens = Tries("tokens", clock)
        self._one_at_a_time = threading.Lock()  # a try costs time and 64 MiB

    @property
    def takes_password(self) -> bool:
        return self._password is not None

    def signature(self, path: str) -> str:
        """What lets a client without the token GET `path`, as long as this server runs."""
        return hmac.new(self.token.encode(), path.encode(), hashlib.sha256).hexdigest()[:32]

    def is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode(), self.token.encode())

    def opens(self, address: str, given: str) -> bool:
        """Whether a client at `address` that gives this may come in. Raises TooManyTries."""
        if self.is_session(given):
            return True
        if self._password is None or not given:
            return self.is_token(given)
        self._tokens.check(address)
        right = self.is_token(given)
        if not right:
            self._tokens.failed(address, given)
        return right

    def is_session(self, text: str) -> bool:
        return self._sessions.get(text, 0.0) > self._clock()

    def log_in(self, address: str, password: str) -> str | None:
        """A new session's key; None where the password is wrong. Raises TooManyTries."""
        with self._one_at_a_time:
            return self._log_in(address, password)

    def _log_in(self, address: str, password: str) -> str | None:
        self._passwords.check(address)
        if self._password and self._password.matches(password):
            self._passwords.forget(address)
            session = secrets.token_urlsafe(TOKEN_BYTES)
            self._sessions[session] = self._clock() + SESSION_SECONDS
            return session
        self._passwords.failed(address)
        return None


class TooManyTries(ToolError):
    """Too many wrong passwords or tokens from one address."""

    def __init__(self, what: str, seconds: float) -> None:
        super().__init__(f"Too many wrong {what}.", f"Wait {seconds:.0f} seconds.")
        self.seconds = seconds


class _TooLarge(Exception):
    pass


class Gate:
    """ASGI middleware around everything. `names` tells what Host may say, but for the port: asked
    again where one is unknown, because a laptop joins other networks."""

    def __init__(
        self, app: "ASGIApp", access: Access, names: Callable[[], Collection[str]], port: int
    ) -> None:
        self._app, self._access = app, access
        self._names, self._port = names, port
        self._hosts: frozenset[str] = frozenset()
        self.cookie = f"qit_{port}"  # cookies are shared by all ports of a host

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = Headers(scope=scope)
        answer = self._refusal(scope, headers) or self._entrance(scope, headers)
        if answer:
            await answer(scope, receive, _protected(send, scope["path"]))
        else:
            await self._let_in(scope, receive, send)

    def _refusal(self, scope: "Scope", headers: Headers) -> Response | None:
        if not self._is_ours(headers.get("host", "")):
            return _problem(421, "wrong_host", "This address is not one of QwenImageTool's.")
        origin = headers.get("origin")
        if origin and scope["method"] not in SAFE and not self._own(origin):
            return _problem(403, "wrong_origin", "Another website sent this request.")
        if int(_number(headers.get("content-length")) or 0) > _limit(scope["path"]):
            return _problem(413, "request_too_large", "The request is too large.")
        return None

    def _own(self, origin: str) -> bool:
        parts = urlsplit(origin)
        return parts.scheme in ("http", "https") and self._is_ours(parts.netloc)

    def _is_ours(self, host: str) -> bool:
        if host.lower() not in self._hosts:
            self._hosts = frozenset(f"{name}:{self._port}".lower() for name in self._names())
        return host.lower() in self._hosts

    def _entrance(self, scope: "Scope", headers: Headers) -> Response | None:
        """What is answered instead of letting the request in; None lets it in."""
        try:
            return self._unless_known(scope, headers)
        except TooManyTries as error:
            refused = _problem(429, "too_many_tries", str(error))
            refused.headers["retry-after"] = f"{error.seconds:.0f}"
            return refused

    def _unless_known(self, scope: "Scope", headers: Headers) -> Response | None:
        query = parse_qs(scope["query_string"].decode("latin-1"))
        path, address = scope["path"], (scope["client"] or ("",))[0]
        if path == "/" and (given := query.get("__t")):
            if self._access.opens(address, given[0]):
                return self.welcome(RedirectResponse("/", 303), self._access.token)
            wrong = "The token is not the one of this start."
            return self._closed(scope, headers) or _problem(401, "invalid_api_key", wrong)
        if path in OPEN or any(self._access.opens(address, each) for each in self._given(headers)):
            return None
        key = query.get("key", [""])[0]
        if scope["method"] in SAFE and hmac.compare_digest(
            key.encode(), self._access.signature(path).encode()
        ):
            return None
        missing = "The token is missing or wrong: `qit token` prints it."
        return self._closed(scope, headers) or _problem(401, "invalid_api_key", missing)

    def _closed(self, scope: "Scope", headers: Headers) -> Response | None:
        """For a person; None for a program."""
        if "text/html" in headers.get("accept", "") and scope["method"] in SAFE:
            return closed(language_of(headers), self._access.takes_password)
        return None

    def welcome(self, answer: Response, key: str) -> Response:
        """The answer, with the cookie that opens the gate from now on."""
        answer.set_cookie(self.cookie, quote(key), httponly=True, samesite="strict", path="/")
        return answer

    def _given(self, headers: Headers) -> Iterator[str]:
        """What may be the token or a session."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            yield given.strip()
        if scheme.lower() == "basic":
            yield _basic_password(given)
        yield _cookie(headers.get("cookie", ""), self.cookie)

    async def _let_in(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        limit, read, started = _limit(scope["path"]), 0, False

        async def counted() -> "Message":
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > limit:
                raise _TooLarge
            return message

        async def watched(message: "Message") -> None:
            nonlocal started
            if read > limit and not started:  # the app has made another error of it
                return
            started = True
            await protected(message)

        protected = _protected(send, scope["path"])
        with contextlib.suppress(_TooLarge):
            await self._app(scope, counted, watched)
        if read > limit and not started:
            await _problem(413, "request_too_large", "The request is too large.")(
                scope, receive, protected
            )


def _protected(send: "Send", path: str) -> "Send":
    keep = "private, max-age=31536000, immutable" if path.startswith(HASHED) else "no-store"

    async def wrapped(message: "Message") -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in PROTECTION.items():
                headers.setdefault(name, value)
            headers.setdefault("cache-control", keep if message["status"] == 200 else "no-store")
        await send(message)

    return wrapped


def _limit(path: str) -> int:
    return MAX_UPLOAD if path in UPLOADS else MAX_BODY


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() else None


def _basic_password(given: str) -> str:
    try:
        text = base64.b64decode(given, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""
    return text.partition(":")[2]


def _cookie(header: str, name: str) -> str:
    jar: SimpleCookie = SimpleCookie()
    try:
        jar.load(header)
    except CookieError:
        return ""
    return unquote(jar[name].value) if name in jar else ""


def _problem(status: int, code: str, message: str) -> JSONResponse:
    """In the shapes of our own API, OpenAI's and AUTOMATIC1111's at once."""
    kind = "invalid_request_error"
    error: dict[str, Any] = {"message": message, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": error, "detail": message}, status)
