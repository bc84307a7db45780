"""The model hub: which files a repository has, and their bytes from any offset on.

Speaks HTTP through huggingface_hub's client and turns its errors into ours. Every redirect is
looked at before it is followed: https only, no private address, and no token off the hub; and so is
the address that answers.
Plain HTTP is used on purpose, not xet: it resumes at the byte where it stopped.
"""

import contextlib
import functools
import ipaddress
import os
import re
import socket
import ssl
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar
from urllib.parse import quote, urljoin, urlsplit

from pydantic import BaseModel, Field, ValidationError

from qwen_image_tool.errors import BadRequest, DownloadFailed, FailureKind
from qwen_image_tool.store.patience import Check, patiently
from qwen_image_tool.store.record import HubKind
from qwen_image_tool.types import wrong_field

if TYPE_CHECKING:
    from concurrent.futures import Future

    import httpx2

HUGGING_FACE = "https://huggingface.co"
MODELSCOPE = "https://www.modelscope.cn"
TOKEN_HOSTS = {"huggingface.co", "hf.co"}
MAX_HOPS = 5
MAX_LISTING = 16 << 20  # bytes of JSON
MAX_RETRY_AFTER = 120.0  # seconds
PIECE = 256 << 10  # bytes; a processor's own cache holds them from the socket to disk and hash
BREATH = 0.25  # seconds of silence after which the reader may look at something else
COMMIT = re.compile(r"[0-9a-f]{40}")
PROXY_PORTS = {"https": 443, "socks5": 1080, "socks5h": 1080}  # where none is given; else 80
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
WINDOWS_NAMES = {
    "con",
    "prn",
    "aux",
    "nul",
    *(f"{n}{i}" for n in ("com", "lpt") for i in range(10)),
}


class Transient(Exception):
    """May go away by itself. `retry_after`: seconds the server asks for."""

    def __init__(self, kind: FailureKind, message: str, retry_after: float = 0) -> None:
        super().__init__(message)
        self.kind: FailureKind = kind
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository; -1 is a size that the hub does not give. LFS files have `sha256`,
    small ones git's own SHA-1."""

    path: str
    size: int
    sha256: str = ""
    git_sha1: str = ""


@dataclass(frozen=True)
class Listing:
    """A repository of a hub at one commit; at a branch, where the hub does not tell its commit."""

    repo: str
    revision: str
    files: dict[str, RemoteFile] = field(default_factory=dict)
    hub: HubKind = "huggingface"


Sha256 = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]  # it names a file on disk


class _Lfs(BaseModel):
    size: int = Field(ge=0)
    sha256: Sha256 = ""


class _Sibling(BaseModel):
    """Of an answer of Hugging Face's API: what is used of it."""

    rfilename: str
    size: int | None = Field(default=None, ge=0)
    blob_id: str | None = Field(default=None, alias="blobId", pattern=r"^[0-9a-f]{40,64}$")
    lfs: _Lfs | None = None


class _Repo(BaseModel):
    sha: str | None = None
    siblings: list[_Sibling]


class _ScopeFile(BaseModel):
    """Of an answer of ModelScope's API. Folders have no size."""

    path: str = Field(alias="Path")
    type: str = Field(alias="Type")
    size: int | None = Field(default=None, alias="Size", ge=0)
    sha256: Sha256 | None = Field(default=None, alias="Sha256")


class _ScopeCommit(BaseModel):
    id: str | None = Field(default=None, alias="Id")


class _ScopeFiles(BaseModel):
    """`last`: the commit that is listed; its id may be empty."""

    files: list[_ScopeFile] = Field(alias="Files")
    last: _ScopeCommit | None = Field(default=None, alias="LatestCommitter")


class _ScopeRepo(BaseModel):
    data: _ScopeFiles = Field(alias="Data")


Form = TypeVar("Form", bound=BaseModel)


@dataclass(frozen=True)
class Body:
    """Bytes of a file from `start` on: 0 where the server ignored the wanted offset.

    A piece is gone when the next is asked for; an empty one says that nothing came for a while.
    """

    start: int
    pieces: Iterator[memoryview]


@dataclass(frozen=True)
class Hub:
    """Where models come from. `local`: a test switch that allows http and private addresses."""

    endpoint: str = HUGGING_FACE
    token: str | None = None
    kind: HubKind = "huggingface"
    local: bool = False
    stall_seconds: float = 30.0

    @property
    def branch(self) -> str:
        """What a repository's main branch is called."""
        return "master" if self.kind == "modelscope" else "main"

    def list(self, repo: str, revision: str = "", check: Check = lambda: None) -> Listing:
        """The repository's files at `revision`, or at its current commit.

        Raises Transient, DownloadFailed, and what `check` does while a server is waited for.
        """
        if self.kind == "modelscope":
            return self._list_modelscope(repo, revision or self.branch, check)
        path = f"/api/models/{quote(repo)}"
        path += f"/revision/{quote(revision, safe='')}" if revision else ""
        found = self._answer(_Repo, f"{self.endpoint}{path}?blobs=true", repo, check)
        files = [_remote(sibling) for sibling in found.siblings]
        commit = found.sha or revision or self.branch
        return Listing(repo, commit, {file.path: file for file in files})

    def _list_modelscope(self, repo: str, revision: str, check: Check) -> Listing:
        url = f"{self.endpoint}/api/v1/models/{quote(repo)}/repo/files"
        url += f"?Revision={quote(revision, safe='')}&Recursive=true"
        found = self._answer(_ScopeRepo, url, repo, check).data
        files = [
            RemoteFile(entry.path, _or_unknown(entry.size), entry.sha256 or "")
            for entry in found.files
            if entry.type == "blob"
        ]
        commit = found.last.id if found.last else None
        known = commit if commit and COMMIT.fullmatch(commit) else revision
        return Listing(repo, known, {file.path: file for file in files}, "modelscope")

    def _answer(self, form: type[Form], url: str, repo: str, check: Check) -> Form:
        try:
            return form.model_validate(self._json(url, repo, check))
        except ValidationError as error:
            first = error.errors()[0]
            wrong = wrong_field(first, ".".join(map(str, first["loc"])) or "the whole")
            raise DownloadFailed(
                "server",
                f"{self.endpoint} did not answer with the files of {repo}"
                f" ({wrong.message.removesuffix('.')}).",
                OTHER_SOURCE,
            ) from error

    def _json(self, url: str, repo: str, check: Check) -> dict[str, Any]:
        import json

        with self._get(url, {}, repo, check) as response:
            raw = b""
            for piece in _pieces(response, self.stall_seconds, check):
                raw += piece
                check()
                if len(raw) > MAX_LISTING:
                    raise DownloadFailed("server", f"The list of {repo} is too long.", LATER)
        try:
            found = json.loads(raw)
        except (ValueError, RecursionError):
            raise Transient(
                "web page", f"{self.endpoint} did not answer with a file list"
            ) from None
        if not isinstance(found, dict):
            raise Transient("server", f"{self.endpoint} did not answer with a file list")
        return found

    def url(self, repo: str, revision: str, path: str) -> str:
        name, commit = quote(path), quote(revision, safe="")
        middle = "/models" if self.kind == "modelscope" else ""
        return f"{self.endpoint}{middle}/{quote(repo)}/resolve/{commit}/{name}"

    @contextlib.contextmanager
    def open(
        self,
        repo: str,
        revision: str,
        file: RemoteFile,
        offset: int = 0,
        check: Check = lambda: None,
    ) -> Iterator[Body]:
        """The file's bytes from `offset` on. Raises like `list`."""
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        url = self.url(repo, revision, file.path)
        with self._get(url, headers, repo, check, file) as response:
            kind = response.headers.get("Content-Type", "")
            if kind.startswith("text/html") and not file.path.endswith(".html"):
                raise Transient("web page", f"a web page came in place of {file.path}")
            start = _start_of(response, file) if response.status_code == 206 else 0
            if start > offset:
                raise Transient("server", f"the server sent the wrong part of {file.path}")
            yield Body(start, _pieces(response, self.stall_seconds, check))

    @contextlib.contextmanager
    def _get(
        self,
        url: str,
        headers: dict[str, str],
        repo: str,
        check: Check,
        file: RemoteFile | None = None,
    ) -> Iterator["httpx2.Response"]:
        """A streamed answer with a good status, after at most MAX_HOPS redirects."""
        for _ in range(MAX_HOPS + 1):
            ask = functools.partial(self._ask, url, headers)
            response = patiently(ask, check, _close_late)
            try:
                self._check_peer(url, response)
                if file:
                    _check_etag(response, file)
                if not response.has_redirect_location:
                    _check_status(response, repo, file, self.endpoint)
                    yield response
                    return
                url = self._next(url, response.headers["Location"])
            finally:
                response.close()
        raise DownloadFailed("redirect", f"{self.endpoint} redirects in a circle.", LATER)

    def _ask(self, url: str, headers: dict[str, str]) -> "httpx2.Response":
        from huggingface_hub.utils import build_hf_headers, get_session

        self._check_address(url)
        token = (self.token or False) if self._may_have_token(url) else False
        sent = build_hf_headers(token=token) | {"Accept-Encoding": "identity"} | headers
        client = get_session()
        request = client.build_request("GET", url, headers=sent, timeout=self.stall_seconds)
        with _translated(url):
            return client.send(request, stream=True, follow_redirects=False)

    def _next(self, url: str, location: str) -> str:
        """Where a redirect leads. Raises DownloadFailed where that is no address."""
        with contextlib.suppress(ValueError):
            found = urljoin(url, location)
            if _is_address(found):
                return found
        raise DownloadFailed(
            "redirect", f"{self.endpoint} redirects to {location!r}, which is no address.", NOT_SAFE
        )

    def _may_have_token(self, url: str) -> bool:
        if _origin(url) != _origin(self.endpoint):
            return False
        return self.local or urlsplit(url).hostname in TOKEN_HOSTS

    def _check_address(self, url: str) -> None:
        """Raises DownloadFailed where a redirect leads off https or to a private address."""
        if self._is_trusted(url):
            return
        parts = urlsplit(url)
        if parts.scheme != "https":
            raise DownloadFailed("redirect", f"{self.endpoint} redirects to {url}.", NOT_SAFE)
        try:
            with _translated(url):
                found = _addresses(parts.hostname, parts.port or 443)
        except Transient:
            if not _proxy_urls():
                raise
            found = set()  # a name that the proxy alone can resolve
        for address in found:
            self._check_public(address)

    def _check_peer(self, url: str, response: "httpx2.Response") -> None:
        """A name may lead elsewhere a moment after it was looked up: who answered counts. A proxy
        of the user's may be anywhere."""
        stream = response.extensions.get("network_stream")
        if self._is_trusted(url) or stream is None:
            return
        address, port, *_ = stream.get_extra_info("server_addr")
        if (address, port) not in _proxies():
            self._check_public(address)

    def _is_trusted(self, url: str) -> bool:
        """The hub that the user chose, wherever it is."""
        return self.local or _origin(url) == _origin(self.endpoint)

    def _check_public(self, address: str) -> None:
        if not ipaddress.ip_address(address.partition("%")[0]).is_global:
            raise DownloadFailed(
                "redirect",
                f"{self.endpoint} redirects to the private address {address}.",
                NOT_SAFE,
            )


LATER = "Try again later: what came is kept."
OTHER_SOURCE = (
    "Try again later, or from another source: HF_ENDPOINT, or `source` in the config file."
)
NOT_SAFE = "Nothing was fetched from there. Check the network, or HF_ENDPOINT."


def connect(source: HubKind = "huggingface", local: bool = False) -> Hub:
    """The hub that the settings name; HF_ENDPOINT moves Hugging Face to a mirror.

    The user's token goes to Hugging Face itself and to no mirror. Raises BadRequest.
    """
    own = os.environ.get("HF_ENDPOINT", "").rstrip("/") or HUGGING_FACE
    endpoint = own if source == "huggingface" else MODELSCOPE
    if not _is_address(endpoint) or (urlsplit(endpoint).scheme != "https" and not local):
        raise BadRequest(
            f"HF_ENDPOINT is {endpoint!r}.", "It has to be an address that starts with https://."
        )
    trusted = source == "huggingface" and (local or urlsplit(endpoint).hostname in TOKEN_HOSTS)
    return Hub(endpoint, _token() if trusted else None, source, local)


def _token() -> str | None:
    """The user's, of Hugging Face."""
    from huggingface_hub import get_token

    try:
        return get_token()
    except OSError as error:
        raise BadRequest(
            f"Your Hugging Face token in {error.filename} can't be read ({error.strerror}).",
            "Check who may read that file, or delete it: most models need no token.",
        ) from error


def _or_unknown(size: int | None) -> int:
    return -1 if size is None else size


def _remote(sibling: _Sibling) -> RemoteFile:
    if sibling.lfs:
        return RemoteFile(sibling.rfilename, sibling.lfs.size, sibling.lfs.sha256)
    return RemoteFile(sibling.rfilename, _or_unknown(sibling.size), "", sibling.blob_id or "")


def safe_name(path: str) -> str:
    """`path` as it is, where it stays inside its folder on every system. Raises DownloadFailed."""
    parts = path.split("/")
    bad = (
        not path
        or len(path) > 240
        or any(part in ("", ".", "..") or part.endswith((".", " ")) for part in parts)
        or any(letter in '\\:*?"<>|' or not letter.isprintable() for letter in path)
        or any(part.split(".")[0].lower() in WINDOWS_NAMES for part in parts)
    )
    if bad or PurePosixPath(path).is_absolute():
        raise DownloadFailed(
            "bad name", f"The repository has a file of the name {path!r}.", "It was not fetched."
        )
    return path


def _addresses(host: str | None, port: int) -> set[str]:
    """Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return {str(address[0]) for *_, address in found}


def _proxies() -> set[tuple[str, int]]:
    """Addresses and ports of the proxies that are set."""
    found = set()
    for url in _proxy_urls():
        with contextlib.suppress(OSError, ValueError):  # not one that anything goes through
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port or PROXY_PORTS.get(parts.scheme, 80)
            found |= {(address, port) for address in _addresses(parts.hostname, port)}
    return found


def _proxy_urls() -> list[str]:
    return [url for kind, url in urllib.request.getproxies().items() if kind != "no"]


def _is_address(url: str) -> bool:
    """Whether the client and the system's resolver can take it."""
    import httpx2

    try:
        httpx2.URL(url).host.encode("idna")
        return bool(_origin(url)[1])
    except (httpx2.InvalidURL, ValueError):
        return False


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


def _start_of(response: "httpx2.Response", file: RemoteFile) -> int:
    """Where a partial answer starts; its whole size has to be the file's."""
    unit, _, rest = response.headers.get("Content-Range", "").partition(" ")
    span, _, total = rest.partition("/")
    start = span.partition("-")[0]
    if unit != "bytes" or not start.isdecimal():
        raise Transient("server", f"the server sent the wrong part of {file.path}")
    if total.isdecimal() and int(total) != file.size:
        raise _moved(file)
    return int(start)


def _check_etag(response: "httpx2.Response", file: RemoteFile) -> None:
    """The hub's ETag of an LFS file is its SHA-256."""
    raw = response.headers.get("X-Linked-Etag") or response.headers.get("ETag") or ""
    etag = raw.removeprefix("W/").strip('"')
    is_hash = len(etag) == 64 and not set(etag) - set("0123456789abcdef")
    if response.status_code < 400 and file.sha256 and is_hash and etag != file.sha256:
        raise _moved(file)


def _moved(file: RemoteFile) -> DownloadFailed:
    return DownloadFailed(
        "changed",
        f"{file.path} is another file on the server now than when the download began.",
        "`qit models download --again` starts with the current files.",
    )


def _check_status(
    response: "httpx2.Response", repo: str, file: RemoteFile | None, endpoint: str
) -> None:
    from huggingface_hub import errors
    from huggingface_hub.utils import hf_raise_for_status

    status = response.status_code
    if status in TRANSIENT:
        kind: FailureKind = "busy" if status == 429 else "server"
        raise Transient(kind, f"{endpoint} answered {status}", _retry_after(response))
    if status == 416:
        raise Transient("server", "the server refused to go on within the file")
    what = f"{repo}/{file.path}" if file else repo
    try:
        hf_raise_for_status(response)
    except (errors.GatedRepoError, errors.DisabledRepoError) as error:
        raise _no_access(repo, endpoint) from error
    except errors.HfHubHTTPError as error:
        if status in (401, 403) and not isinstance(error, errors.RevisionNotFoundError):
            raise _no_access(repo, endpoint) from error
        if isinstance(error, errors.RevisionNotFoundError):
            hint = "`qit models download --update` goes on to the current one."
            text = f"{endpoint} has no longer the revision of {repo} that was asked for."
            raise DownloadFailed("not found", text, hint) from error
        if status == 404 or isinstance(error, errors.RepositoryNotFoundError):
            hint = (
                "Update QwenImageTool: the file may have moved. Nothing else was fetched instead."
            )
            raise DownloadFailed("not found", f"{endpoint} has no {what}.", hint) from error
        raise DownloadFailed(
            "server", f"{endpoint} answered {status} for {what}.", LATER
        ) from error


def _no_access(repo: str, endpoint: str) -> DownloadFailed:
    return DownloadFailed(
        "no access",
        f"{endpoint} does not let you have {repo}.",
        f"Accept its terms on {endpoint}/{repo}, then log in with `hf auth login`.",
    )


def _retry_after(response: "httpx2.Response") -> float:
    text = response.headers.get("Retry-After", "")
    return min(float(text), MAX_RETRY_AFTER) if text.isdecimal() else 0.0


def _pieces(
    response: "httpx2.Response", stall_seconds: float, check: Check
) -> Iterator[memoryview]:
    """The body of an answer. Raises Transient, and what `check` does.

    httpx2 gives 64 KiB at a time after three copies, which costs more than their SHA-256. When it
    has given the first of them, nothing of the body is left in its parser: the rest is read from
    its socket, all into one buffer. The client does not use that socket again.
    """
    with _translated("the server"):
        body = response.iter_raw()
        first = _piece(response, body, check) or b""
        yield memoryview(first)
        left = int(response.headers.get("Content-Length", 0)) - len(first)
        if left > 0 and (source := _socket_of(response)):
            yield from _from_socket(source, left, stall_seconds)
        else:
            while (piece := _piece(response, body, check)) is not None:
                yield memoryview(piece)


def _piece(response: "httpx2.Response", body: Iterator[bytes], check: Check) -> bytes | None:
    """The next of the client's own pieces; None at the end. Where `check` raises, the connection
    is ended and left by the thread that waits for it before anybody closes it."""
    done = threading.Event()
    try:
        return patiently(lambda: next(body, None), check, lambda _: done.set())
    except BaseException:
        if not done.is_set() and (stream := response.extensions.get("network_stream")):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(stream.get_extra_info("socket"), socket.SHUT_RDWR)
            done.wait(1)
        raise


def _close_late(answer: "Future[httpx2.Response]") -> None:
    """Of an answer that nobody waits for any more."""
    if answer.exception() is None:
        answer.result().close()


def _socket_of(response: "httpx2.Response") -> socket.socket | None:
    """Where the body's bytes come from as they are; None where there is more to do to them."""
    stream = response.extensions.get("network_stream")
    if response.http_version != "HTTP/1.1" or "Transfer-Encoding" in response.headers or not stream:
        return None
    if isinstance(stream.get_extra_info("ssl_object"), ssl.SSLObject):
        return None  # TLS within a proxy's TLS: the socket is the outer one's
    found = stream.get_extra_info("socket")
    return found if isinstance(found, socket.socket) else None


def _from_socket(source: socket.socket, left: int, stall_seconds: float) -> Iterator[memoryview]:
    """Up to `left` bytes. Raises TimeoutError after `stall_seconds` without one."""
    buffer = memoryview(bytearray(PIECE))
    breath, silent = min(BREATH, stall_seconds), 0.0
    source.settimeout(breath)
    while left > 0:
        try:
            count = source.recv_into(buffer[: min(left, PIECE)])
        except TimeoutError:
            silent += breath
            if silent >= stall_seconds:
                raise
            yield buffer[:0]
            continue
        if not count:
            return
        left, silent = left - count, 0.0
        yield buffer[:count]


@contextlib.contextmanager
def _translated(where: str) -> Iterator[None]:
    """The client's errors as ours: what may go away is Transient."""
    import httpx2

    host = urlsplit(where).hostname or where
    try:
        yield
    except (httpx2.TimeoutException, TimeoutError) as error:
        raise Transient("stalled", f"nothing came from {host}") from error
    except (httpx2.TransportError, OSError) as error:
        if _is_tls(error):
            _tls_failure(host, error)
        raise Transient("network", f"the connection to {host} broke ({error})") from error


def _is_tls(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLError) or "CERTIFICATE_VERIFY_FAILED" in str(error):
            return isinstance(error, ssl.SSLCertVerificationError) or "CERTIFICATE" in str(error)
        error = error.__cause__ or error.__context__
    return False


def _tls_failure(host: str, error: Exception) -> NoReturn:
    raise DownloadFailed(
        "tls",
        f"{host} does not prove who it is ({error}).",
        "Check this computer's clock; behind a company's proxy, set SSL_CERT_FILE to its"
        " certificate.",
    ) from error
