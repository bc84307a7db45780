"""Requests that have to be refused, whoever sends them, and requests that nobody meant: what the
server says to them."""

import base64
import http.client
import io
import itertools
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import schemathesis
from hypothesis import HealthCheck, given, settings
from PIL import Image

from faults import Tally
from qwen_image_tool.server.gate import MAX_BODY
from qwen_image_tool.server.run import build
from running import BEARER, TOKEN, Live

ROUTES = ("/", "/healthz", "/api/queue", "/v1/models", "/sdapi/v1/options", "/mcp", "/login")
HOSTS = (
    *("evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "", "localhost.evil"),
    *("127.0.0.1.evil.example:{port}", "localhost:{port}.evil", "[::2]:{port}", "0.0.0.0:{port}"),
)
ORIGINS = ("https://evil.example", "null", "http://127.0.0.1:1", "x", "http://localhost", "file://")
POSTED = ("/api/jobs", "/api/queue/pause", "/v1/images/generations", "/sdapi/v1/txt2img", "/mcp")
READ = (
    *("/api/jobs", "/api/plan", "/api/gallery/delete", "/v1/images/generations"),
    *("/sdapi/v1/txt2img", "/sdapi/v1/options", "/mcp"),
)
PATHS = (
    "/api/gallery/../../../etc/passwd",
    "/api/gallery/..%2f..%2fetc%2fpasswd/file",
    "/api/gallery/%2e%2e%2f%2e%2e%2fjobs.db/file",
    "/api/gallery/..%5c..%5cjobs.db/file",
    "/api/gallery/C:%5Cwindows%5Cwin.ini/file",
    "/api/gallery/%00/file",
    "/api/gallery/~root/file",
    "/api/gallery/%252e%252e%252fjobs.db/thumbnail",
    "/api/models/..%2f..",
    "/file=/etc/passwd",
    "//etc/passwd",
    "/../etc/passwd",
)


def other_hosts(live: Live) -> Tally:
    """DNS rebinding: the right token, another name of the server."""
    tally = Tally()
    for path, host in itertools.product(ROUTES, HOSTS):
        answer = live.http.get(path, headers={"host": host.format(port=live.where.port)})
        tally.check(f"{host} {path}", answer.status_code in (400, 421), answer.status_code)
    return tally


def other_websites(live: Live) -> Tally:
    """The browser sends its cookie, and the name of the page that asks."""
    tally = Tally()
    before = live.service.jobs.counts()
    cookie = {"cookie": f"qit_{live.where.port}={TOKEN}", "authorization": ""}
    for path, origin, method in itertools.product(POSTED, ORIGINS, ("POST", "PUT", "DELETE")):
        answer = live.http.request(method, path, headers={"origin": origin, **cookie})
        tally.check(f"{method} {path} {origin}", answer.status_code == 403, answer.status_code)
    tally.check("nothing was done", live.service.jobs.counts() == before)
    return tally


def paths(live: Live) -> Tally:
    """No path of a client is followed; sent as they are, which no client library does."""
    tally = Tally()
    for path, method in itertools.product(PATHS, ("GET", "HEAD", "DELETE")):
        connection = http.client.HTTPConnection("127.0.0.1", live.where.port)
        connection.request(method, path, headers=BEARER)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        right = answer.status in (400, 404, 405) and b"root:" not in content
        tally.check(f"{method} {path}", right, answer.status)
    return tally


def without_token(live: Live) -> Tally:
    tally = Tally()
    given = ("", "Bearer", "Bearer wrong", f"Bearer {TOKEN}x", "Basic !!!", f"Digest {TOKEN}")
    for path, header in itertools.product(
        live.http.get("/api/openapi.json").json()["paths"], given
    ):
        if path == "/healthz":
            continue
        answer = live.http.get(path, headers={"authorization": header})
        tally.check(f"{path} {header}", answer.status_code == 401, answer.status_code)
    return tally


def oversized(live: Live) -> Tally:
    """Bodies above the limit, with their length and in pieces that do not say it."""
    tally = Tally()
    large = b"x" * (MAX_BODY + 1)

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(large), 1 << 16):
            yield large[start : start + (1 << 16)]

    headers = {"content-type": "application/json", "accept": "application/json"}
    for path in READ:
        for content in (large, pieces()):
            answer = live.http.post(path, content=content, headers=headers)
            tally.check(path, answer.status_code == 413, answer.status_code)
    return tally


def bombs(live: Live) -> Tally:
    """Pictures that are small on the way and large in memory, or no pictures."""
    tally = Tally()
    for name, data in _bombs():
        files = {"picture": ("x.png", data, "image/png")}
        sent = live.http.post("/api/gallery/inspect", files=files)
        tally.check(name, sent.status_code == 400, sent.status_code)
        body = {"image": base64.b64encode(data).decode()}
        sent = live.http.post("/sdapi/v1/png-info", json=body)
        tally.check(f"{name} in base64", sent.status_code == 400, sent.status_code)
    return tally


def _bombs() -> Iterator[tuple[str, bytes]]:
    for size in ((30_000, 30_000), (1, 2**30), (2**31 - 1, 2**31 - 1)):
        yield f"a PNG of {size} in its header", _png_header(size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        buffer = io.BytesIO()
        Image.new("1", (30_000, 30_000)).save(buffer, "PNG")
    yield "a PNG of 900 megapixels", buffer.getvalue()
    buffer = io.BytesIO()
    Image.new("RGB", (16_000, 9000)).save(buffer, "WEBP")
    yield "a WebP of 144 megapixels", buffer.getvalue()
    yield "a PNG that unpacks to gigabytes", _png(b"IDAT", zlib.compress(bytes(1 << 26), 9))
    yield "a GIF", b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(20)
    yield (
        "an SVG",
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    )
    yield "nothing", b"\0"


def _png_header(size: tuple[int, int]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))


def _png(kind: bytes, data: bytes) -> bytes:
    return _png_header((60_000, 60_000)) + _chunk(kind, data) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


REFUSED: dict[str, Callable[[Live], Tally]] = {
    "another Host (DNS rebinding)": other_hosts,
    "another website's POST, PUT, DELETE": other_websites,
    "paths that lead out": paths,
    "without the token": without_token,
    "bodies that are too large": oversized,
    "bomb pictures and no pictures": bombs,
}

# Schemathesis

# News never end; a pause would make every later request wait; these answer 501; and this one asks
# torch for seconds
LEFT_OUT = (
    "/api/events",
    "/api/queue/pause",
    "/v1/images/edits",
    "/v1/images/variations",
    "/sdapi/v1/img2img",
    "/api/system/checks",
)


def operations() -> list[Any]:
    """Of the document, which needs no service."""
    nobody: Any = None
    whole = schemathesis.openapi.from_dict(build(nobody, nobody).openapi())
    found: Any = whole.exclude(path=list(LEFT_OUT)).get_all_operations()
    return [operation.ok() for operation in found]


def odd_requests(live: Live, operation: Any, examples: int) -> Tally:
    """Whatever is sent that the document allows, and what it does not: no 5xx."""
    tally = Tally()

    @given(case=operation.as_strategy())
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def run(case: Any) -> None:
        answer = case.call(base_url=live.url, headers=BEARER, timeout=60)
        tally.check(operation.label, answer.status_code < 500, answer.text[:500])

    run()
    return tally
