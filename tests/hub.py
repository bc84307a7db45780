"""A local model hub with faults: the parts of huggingface.co that the real client uses.

Small files come from the hub itself; weights by redirect from a second server, as from its CDN.
"""

import functools
import hashlib
import json
import os
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from multiprocessing.connection import Connection


@functools.cache
def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@functools.cache
def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Fault:
    """What goes wrong, how often, and where: `where` is "api", "hub" or "cdn"."""

    kind: str
    times: int = 1
    at: int = 0
    where: str = "cdn"
    match: str = ""


@dataclass
class Seen:
    where: str
    path: str
    range: str
    token: str


@dataclass
class LocalHub:
    """`requests`: what came; `sent`: bytes of each file that left; `faults`: what goes wrong."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    requests: list[Seen] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    bytes_per_second: float = 0
    piece: int = 16 << 10  # bytes sent at once
    ignore_range: bool = False
    chunked: bool = False  # bodies without a length
    holding: int = 0  # connections that stall now
    go_on: threading.Event = field(default_factory=threading.Event)  # ends a stall
    gated: bool = False
    hashes: bool = True  # whether the list has them, of weights and of texts
    sizes: bool = True
    listing: bytes = b""  # answers every question for a list, where given
    commits: dict[str, str] = field(default_factory=dict)  # of repositories that moved on
    endpoint: str = ""
    cdn: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def commit(self, repo: str) -> str:
        return self.commits.get(repo) or hashlib.sha1(repo.encode()).hexdigest()

    def add_folder(self, repo: str, folder: Path) -> None:
        self.repos[repo] = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    def list_modelscope(self, repo: str, last: dict[str, str] | None) -> None:
        """Answer as ModelScope does; `last`: the commit that is listed, as far as it tells."""
        files = [
            {"Path": name, "Size": len(data), "Sha256": sha256(data), "Type": "blob"}
            for name, data in self.repos[repo].items()
        ]
        data: dict[str, object] = {"Files": files} | ({"LatestCommitter": last} if last else {})
        self.repos["models/" + repo] = self.repos[repo]
        self.listing = json.dumps({"Code": 200, "Data": data}).encode()

    def take(self, where: str, path: str) -> Fault | None:
        """The fault that the next answer shows, if any."""
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.where == where and fault.match in path:
                    fault.times -= 1
                    return fault
        return None


def is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".gguf"))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub
    is_cdn = False

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        try:
            self._answer()
        except (BrokenPipeError, ConnectionResetError, ssl.SSLError):
            self.close_connection = True

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        where = "cdn" if self.is_cdn else "api" if path.startswith("/api/") else "hub"
        seen = Seen(
            where, path, self.headers.get("Range", ""), self.headers.get("Authorization", "")
        )
        with self.hub.lock:
            self.hub.requests.append(seen)
        fault = self.hub.take(where, path)
        if fault and self._refuse(fault):
            return
        if where == "api":
            self._list(path, parse_qs(parts.query), fault)
        else:
            self._file(path, fault)

    def _refuse(self, fault: Fault) -> bool:
        """Faults that need no file. True where they were the whole answer."""
        if fault.kind.isdigit():
            headers = {"Retry-After": "0"} if fault.kind == "429" else {}
            if fault.kind == "403":
                headers["X-Error-Code"] = "GatedRepo"
            self._say(int(fault.kind), b"no", headers)
        elif fault.kind == "html":
            self._say(200, b"<!DOCTYPE html><html>Login</html>", {"Content-Type": "text/html"})
        elif fault.kind == "loop":
            self._say(302, b"", {"Location": self.path})
        elif fault.kind.startswith("to "):
            self._say(302, b"", {"Location": fault.kind[3:]})
        elif fault.kind == "hold":
            self._hold()
            self.close_connection = True
        elif fault.kind == "drop":
            self.connection.close()
            self.close_connection = True
        else:
            return False
        return True

    def _list(self, path: str, query: dict[str, list[str]], fault: Fault | None) -> None:
        if self.hub.listing:
            return self._say(200, self.hub.listing, {"Content-Type": "application/json"})
        repo, _, revision = path.removeprefix("/api/models/").partition("/revision/")
        if self.hub.gated and not self.headers.get("Authorization"):
            return self._say(401, b"{}", {"X-Error-Code": "GatedRepo"})
        if repo not in self.hub.repos:
            return self._say(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        commit = self.hub.commit(repo)
        if revision not in ("", "main", commit):
            return self._say(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        siblings = []
        for name, data in self.hub.repos[repo].items():
            entry = {"rfilename": name, "size": len(data), "blobId": git_sha1(data)}
            if is_lfs(name):
                digest = sha256(data)
                entry["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 135}
            gone = [] if self.hub.hashes else ["blobId", "lfs"]
            gone += [] if self.hub.sizes else ["size", "lfs"]
            siblings.append({key: value for key, value in entry.items() if key not in gone})
        body = {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "tags": []}
        answer, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        if fault and fault.kind == "stall":
            self._say(200, answer[: fault.at], headers, len(answer))
            self._hold()
            self.close_connection = True
            return None
        self._say(200, answer, headers)
        return None

    def _file(self, path: str, fault: Fault | None) -> None:
        repo, _, rest = path[1:].partition("/resolve/")
        name = rest.partition("/")[2]
        data = self.hub.repos.get(repo, {}).get(name)
        if data is None:
            return self._say(404, b"", {"X-Error-Code": "EntryNotFound"})
        etag = sha256(data) if is_lfs(name) else git_sha1(data)
        if fault and fault.kind == "etag":
            etag = hashlib.sha256(b"another file").hexdigest()
        if is_lfs(name) and not self.is_cdn:
            headers = {"Location": self.hub.cdn + self.path, "X-Linked-Etag": f'"{etag}"'}
            return self._say(302, b"", headers)
        self._send_file(name, data, f'"{etag}"', fault)
        return None

    def _send_file(self, name: str, data: bytes, etag: str, fault: Fault | None) -> None:
        start, asked = 0, self.headers.get("Range", "")
        if asked and not self.hub.ignore_range:
            start = int(asked.removeprefix("bytes=").partition("-")[0])
        body = data[start:]
        if fault and fault.kind == "flip":
            body = bytes([body[0] ^ 1]) + body[1:]
        length = len(body)
        if fault and fault.kind.startswith("length"):
            length += int(fault.kind[6:])
        self.send_response(206 if start else 200)
        if self.hub.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(length))
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("ETag", etag)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        self._send(name, body[: max(length, 0)], fault)

    def _send(self, name: str, body: bytes, fault: Fault | None) -> None:
        stop = fault.at if fault and fault.kind in ("cut", "stall") else len(body)
        for at in range(0, min(stop, len(body)), self.hub.piece):
            piece = body[at : min(at + self.hub.piece, stop)]
            with self.hub.lock:  # before: who has the last byte finds it counted
                self.hub.sent[name] += len(piece)
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if self.hub.chunked else piece)
            if self.hub.bytes_per_second:
                time.sleep(len(piece) / self.hub.bytes_per_second)
        if self.hub.chunked:
            self.wfile.write(b"0\r\n\r\n")
        if fault and fault.kind == "stall":
            self._hold()
        if fault and fault.kind.startswith(("cut", "stall", "length")):
            self.close_connection = True

    def _hold(self) -> None:
        with self.hub.lock:
            self.hub.holding += 1
        self.hub.go_on.wait(20)
        with self.hub.lock:
            self.hub.holding -= 1

    def _say(
        self, status: int, body: bytes, headers: dict[str, str], length: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        pass


def make_certificate(folder: Path, name: str = "hub.example") -> Path:
    """For 127.0.0.1 and a name, signed by itself, with its key."""
    made = folder / "made.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=127.0.0.1", "-addext", f"subjectAltName=IP:127.0.0.1,DNS:{name}"]
    command += ["-keyout", str(made), "-out", str(folder / "cert")]
    subprocess.run(command, check=True, capture_output=True)
    made.write_bytes(made.read_bytes() + (folder / "cert").read_bytes())
    return made


def download(endpoint: str, models: str) -> None:
    """What a child process does that is going to be killed; it imports no torch."""
    from qwen_image_tool.catalog import load_catalog
    from qwen_image_tool.store.hub import Hub
    from qwen_image_tool.store.library import Library

    catalog = load_catalog()
    library = Library(catalog, Path(models), lambda: Hub(endpoint, local=True))
    library.download(catalog.find("qwen-image"))


def attempt(endpoint: str, models: str, action: str, user: int, answer: "Connection") -> None:
    """What a child process does as `user`, where it may change to that one; sends what it ended
    with. All is imported before, because others may not read where it lies."""
    import tenacity  # noqa: F401

    from qwen_image_tool.catalog import load_catalog
    from qwen_image_tool.errors import ToolError
    from qwen_image_tool.store.download import Effort
    from qwen_image_tool.store.hub import Hub
    from qwen_image_tool.store.library import Library

    model, reached = load_catalog().find("qwen-image"), Hub(endpoint, local=True)
    library = Library(load_catalog(), Path(models), lambda: reached, None, Effort(tries=1))
    reached.list(model.repo)
    if sys.platform != "win32" and os.geteuid() == 0:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    try:
        if action == "verify":
            faults = library.verify(model, full=True)
            answer.send(f"{[(fault.kind, fault.path) for fault in faults]}")
        else:
            answer.send(str(library.download(model, again=action == "again")))
    except ToolError as error:
        answer.send(f"{type(error).__name__} {getattr(error, 'kind', '')}: {error}")


@contextmanager
def serve(certificate: Path | None = None) -> Iterator[LocalHub]:
    """A running hub on 127.0.0.1; over https where a certificate (with its key) is given."""
    hub = LocalHub()
    servers = []
    for is_cdn in (False, True):
        handler = type("Handler", (_Handler,), {"hub": hub, "is_cdn": is_cdn})
        server = _Server(("127.0.0.1", 0), handler)
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    scheme = "https" if certificate else "http"
    hub.endpoint, hub.cdn = (f"{scheme}://127.0.0.1:{s.server_port}" for s in servers)
    try:
        yield hub
    finally:
        hub.go_on.set()
        for server in servers:
            server.shutdown()
            server.server_close()
