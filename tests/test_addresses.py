"""Where a hub's redirects may lead: https, no private address, whatever names turn into."""

import os
import select
import socket
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import close_session

import tiny
from hub import Fault, LocalHub, make_certificate, serve
from qwen_image_tool.catalog import load_catalog
from qwen_image_tool.errors import DownloadFailed
from qwen_image_tool.store.download import Effort
from qwen_image_tool.store.hub import Hub
from qwen_image_tool.store.library import Library

CATALOG = load_catalog()
T2I = CATALOG.find("qwen-image")
QUICK = Effort(tries=2, first_wait=0.01, longest_wait=0.02)
PUBLIC = "93.184.216.34"
NAME = "hub.example"  # what the certificate is for


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("repos") / "20b")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    close_session()  # the client reads proxies and certificates when it is made
    yield
    close_session()


@pytest.fixture
def hub(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """Over https; its weights come from a second server by the name hub.example."""
    certificate = make_certificate(tmp_path, NAME)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with serve(certificate) as hub:
        hub.add_folder(T2I.repo, repo)
        hub.cdn = hub.cdn.replace("127.0.0.1", NAME)
        yield hub


def strict(hub: LocalHub, folder: Path) -> Library:
    """Without the switch that tests of other things set."""
    reached = Hub(hub.endpoint, stall_seconds=5)
    return Library(CATALOG, folder / "models", lambda: reached, None, QUICK)


def refused(library: Library) -> DownloadFailed:
    with pytest.raises(DownloadFailed) as caught:
        library.download(T2I)
    assert not list(library.models.rglob("*.safetensors"))
    assert caught.value.kind == "redirect", caught.value.message
    return caught.value


class Names:
    """The system's resolver, but for the name: each look-up gives the next of its addresses, and
    the last one from then on; none: it is unknown."""

    def __init__(self, *addresses: str) -> None:
        self._left = list(addresses)
        self._real = socket.getaddrinfo
        self._lock = threading.Lock()

    def __call__(self, host: Any, port: Any, *rest: Any, **named: Any) -> Any:
        if host in (NAME, NAME.encode()):
            with self._lock:
                if not self._left:
                    raise socket.gaierror(socket.EAI_NONAME, "unknown")
                host = self._left.pop(0) if len(self._left) > 1 else self._left[0]
        return self._real(host, port, *rest, **named)


@pytest.mark.parametrize(
    "target",
    [
        "http://example.com/x",
        "https://127.0.0.1:1/x",
        "https://169.254.169.254/latest",
        "https://[::1]/x",
        "https://10.0.0.1/x",
        "https://example.com:99999/x",
        "https://[bad/x",
        "https://example..com/x",
        "https://example.com\x7f/x",
    ],
)
@pytest.mark.parametrize("proxied", [False, True], ids=["direct", "by a proxy"])
def test_unsafe_redirects_are_not_followed(
    hub: LocalHub, tmp_path: Path, target: str, proxied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if proxied:
        monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
    hub.faults = [Fault("to " + target, 99, where="hub", match=".json")]
    assert "Nothing was fetched from there" in refused(strict(hub, tmp_path)).hint


def test_a_name_that_is_private_is_not_followed(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", Names("127.0.0.1"))
    assert "private address 127.0.0.1" in refused(strict(hub, tmp_path)).message
    assert not [seen for seen in hub.requests if seen.where == "cdn"]


def test_a_name_that_turns_private_after_the_look_is_noticed(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS rebinding: who answers counts, and nothing of the answer is read."""
    monkeypatch.setattr(socket, "getaddrinfo", Names(PUBLIC, "127.0.0.1"))
    assert "private address 127.0.0.1" in refused(strict(hub, tmp_path)).message
    partial = tmp_path / "models" / T2I.id / ".qit" / "partial"
    weights = [path for path in partial.iterdir() if path.stat().st_size]
    assert not weights


class _Tunnel(socketserver.BaseRequestHandler):
    """CONNECT, and from then on bytes in both directions; every name is 127.0.0.1 here."""

    def handle(self) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += self.request.recv(4096)
        host, _, port = head.split()[1].decode().rpartition(":")
        self.server.asked.append(host)  # type: ignore[attr-defined]
        with socket.create_connection(("127.0.0.1", int(port))) as there:
            self.request.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            pairs = {self.request: there, there: self.request}
            while True:
                for ready in select.select(list(pairs), [], [])[0]:
                    data = ready.recv(65536)
                    if not data:
                        return
                    pairs[ready].sendall(data)


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A proxy that everything goes through but the hub itself; the hosts it was asked for."""
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Tunnel)
    server.daemon_threads = True
    asked: list[str] = []
    server.asked = asked  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield asked
    server.shutdown()
    server.server_close()


def test_a_proxy_may_know_names_that_nobody_else_does(
    hub: LocalHub, tmp_path: Path, proxy: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's own proxy may be anywhere, on this machine too."""
    monkeypatch.setattr(socket, "getaddrinfo", Names())
    library = strict(hub, tmp_path)
    library.download(T2I)
    assert library.verify(T2I, full=True) == ()
    assert set(proxy) == {NAME}


def test_behind_a_proxy_too_a_private_name_is_not_followed(
    hub: LocalHub, tmp_path: Path, proxy: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", Names("192.168.1.1"))
    assert "private address 192.168.1.1" in refused(strict(hub, tmp_path)).message
    assert not proxy


def test_what_goes_past_the_proxy_is_looked_at(
    hub: LocalHub, tmp_path: Path, proxy: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`no_proxy` names it, so it is connected to directly."""
    monkeypatch.setenv("no_proxy", f"127.0.0.1,{NAME}")
    monkeypatch.setattr(socket, "getaddrinfo", Names(PUBLIC, "127.0.0.1"))
    assert "private address 127.0.0.1" in refused(strict(hub, tmp_path)).message
    assert not proxy
