"""The gate: who comes in, and what is never let through."""

import base64
import http.client
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest

from qwen_image_tool.errors import BadRequest
from qwen_image_tool.server import run
from qwen_image_tool.server.gate import (
    MAX_BODY,
    PROTECTION,
    WRONG_TRIES,
    Access,
    Password,
    TooManyTries,
)
from running import TOKEN, Live, server
from strangers import REFUSED


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with server(tmp_path_factory.mktemp("live")) as live:
        yield live


@pytest.fixture
def stranger(live: Live) -> Iterator[httpx2.Client]:
    """A client without the token."""
    with httpx2.Client(base_url=live.url, timeout=60) as client:
        yield client


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def test_without_a_token_only_health_is_told(stranger: httpx2.Client) -> None:
    assert stranger.get("/healthz").json()["app"] == "qwen-image-tool"
    for path in ("/", "/api/jobs", "/api/openapi.json", "/startup", "/mcp", "/v1/models", "/x"):
        answer = stranger.get(path)
        assert answer.status_code == 401, path
        assert "qit token" in answer.json()["error"]["message"]
    assert "qit token" in stranger.get("/", headers={"accept": "text/html"}).text
    assert stranger.post("/api/jobs", json={}).status_code == 401


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (f"Bearer {TOKEN}", 200),
        (f"bearer {TOKEN}", 200),
        (basic("anyone", TOKEN), 200),
        ("Bearer wrong", 401),
        (f"Bearer {TOKEN}x", 401),
        ("Bearer", 401),
        (basic(TOKEN, ""), 401),
        ("Basic !!!", 401),
        ("Basic " + base64.b64encode(b"\xff\xfe").decode(), 401),
        ("Digest x", 401),
    ],
)
def test_the_token_opens_as_bearer_or_basic(
    stranger: httpx2.Client, authorization: str, status: int
) -> None:
    answer = stranger.get("/api/queue", headers={"authorization": authorization})
    assert answer.status_code == status


def test_the_address_with_the_token_gives_a_cookie(live: Live, stranger: httpx2.Client) -> None:
    assert stranger.get("/", params={"__t": "wrong"}).status_code == 401
    answer = stranger.get("/", params={"__t": TOKEN})
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith(f"qit_{live.where.port}=")
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert stranger.get("/api/queue").status_code == 200


@pytest.mark.parametrize("cookie", ["x", "qit_1=the-token", 'a="b;c', "qit=\x7f", "="])
def test_odd_cookies(live: Live, stranger: httpx2.Client, cookie: str) -> None:
    assert stranger.get("/api/queue", headers={"cookie": cookie}).status_code == 401


def test_localhost_is_this_computer(live: Live) -> None:
    host = f"LOCALHOST:{live.where.port}"
    assert live.http.get("/api/queue", headers={"host": host}).status_code == 200


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", list(REFUSED))
def test_what_is_refused(live: Live, kind: str) -> None:
    tally = REFUSED[kind](live)
    assert tally.tried > 10
    assert tally.wrong == []


def test_its_own_pages_can_post(live: Live) -> None:
    own = live.http.post("/api/gallery/sync", headers={"origin": live.url})
    assert own.status_code == 200


def test_every_answer_is_protected(live: Live, stranger: httpx2.Client) -> None:
    for answer in (
        live.http.get("/api/queue"),
        live.http.get("/nothing"),
        stranger.get("/api/queue"),
        live.http.get("/healthz", headers={"host": "evil"}),
        live.http.post("/api/jobs", content=b"{"),
    ):
        for name, value in PROTECTION.items():
            assert answer.headers[name] == value
        assert "server" not in answer.headers
        assert "access-control-allow-origin" not in answer.headers


def test_a_signed_address_opens_one_picture_and_no_more(
    live: Live, stranger: httpx2.Client
) -> None:
    one, other = (live.wait(live.submit("x", seed=seed))["pictures"][0]["id"] for seed in (1, 2))
    key = Access(TOKEN, None).signature(f"/api/gallery/{one}/file")
    assert stranger.get(f"/api/gallery/{one}/file?key={key}").status_code == 200
    assert stranger.get(f"/api/gallery/{other}/file?key={key}").status_code == 401
    assert stranger.get(f"/api/gallery/{one}?key={key}").status_code == 401
    assert stranger.post(f"/api/gallery/{one}/file?key={key}").status_code == 401
    assert stranger.get(f"/api/gallery/{one}/file?key=é").status_code == 401


def test_pictures_may_be_larger(live: Live) -> None:
    files = {"picture": ("x.png", b"x" * (MAX_BODY + 1), "image/png")}
    assert live.http.post("/api/gallery/inspect", files=files).status_code == 400


def test_websockets_are_closed(live: Live) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", live.where.port)
    headers = {"upgrade": "websocket", "connection": "upgrade", "sec-websocket-version": "13"}
    headers |= {"sec-websocket-key": "x", "authorization": f"Bearer {TOKEN}"}
    connection.request("GET", "/api/events/ws", headers=headers)
    assert connection.getresponse().status in (400, 403, 404)
    connection.close()


# LAN mode


def test_the_network_needs_a_password(live: Live) -> None:
    with pytest.raises(BadRequest, match="password"):
        run.serve(live.service, lan=True)
    for host in ("0.0.0.0", "192.168.1.2", "::"):
        with pytest.raises(BadRequest, match="--lan"):
            run.serve(live.service, host=host)


def test_the_network_mode(tmp_path: Path) -> None:
    Password(tmp_path / "data").set("correct horse")
    with server(tmp_path, lan=True) as live:
        host = urlsplit(live.url).netloc
        assert not host.startswith("127.")
        base = f"http://127.0.0.1:{live.where.port}"
        with httpx2.Client(base_url=base, headers={"host": host}, timeout=60) as client:
            assert "password" in client.get("/login").text
            assert client.get("/api/queue").status_code == 401
            wrong = client.post("/login", data={"password": "wrong"})
            assert wrong.status_code == 401
            right = client.post("/login", data={"password": "correct horse"})
            assert right.status_code == 303
            session = right.headers["set-cookie"].partition(";")[0]
            assert TOKEN not in session
            assert client.get("/api/queue", headers={"cookie": session}).status_code == 200
            for _ in range(WRONG_TRIES):
                client.post("/login", data={"password": "wrong"})
            slow = client.post("/login", data={"password": "correct horse"})
            assert slow.status_code == 429
            assert "Too many wrong passwords: wait" in slow.text
            assert 0 < int(slow.headers["retry-after"]) <= 60
            evil = client.get("/api/queue", headers={"host": f"evil.example:{live.where.port}"})
            assert evil.status_code == 421


def test_another_network_is_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name that it gives this computer opens, and the one of the last network closes where
    another is asked for."""
    Password(tmp_path / "data").set("correct horse")
    addresses = ["desk", "192.168.1.2"]
    monkeypatch.setattr(run, "own_addresses", lambda: addresses)
    with server(tmp_path, lan=True) as live:

        def ask(host: str) -> int:
            headers = {"host": f"{host}:{live.where.port}"}
            return httpx2.get(
                f"http://127.0.0.1:{live.where.port}/healthz", headers=headers
            ).status_code

        assert [ask("192.168.1.2"), ask("10.0.0.7")] == [200, 421]
        addresses[1] = "10.0.0.7"
        assert [ask("10.0.0.7"), ask("192.168.1.2"), ask("localhost")] == [200, 421, 200]


def test_tokens_are_not_guessed_in_the_network(tmp_path: Path) -> None:
    """Each wrong one counts once, so a program with an old token shuts nobody out; sessions go on
    while tokens of their address are not looked at."""
    Password(tmp_path / "data").set("correct horse")
    with server(tmp_path, lan=True) as live:
        base = f"http://127.0.0.1:{live.where.port}"
        host = {"host": urlsplit(live.url).netloc}
        with httpx2.Client(base_url=base, headers=host, timeout=60) as client:

            def ask(token: str, **more: str) -> httpx2.Response:
                headers = {"authorization": f"Bearer {token}", **more}
                return client.get("/api/queue", headers=headers)

            session = client.post("/login", data={"password": "correct horse"}).cookies
            client.cookies.clear()
            for _ in range(WRONG_TRIES + 1):
                assert ask("of the last start").status_code == 401
            assert ask(TOKEN).status_code == 200
            for number in range(WRONG_TRIES - 1):
                credentials = basic("x", f"guess {number}")
                assert client.get("/", headers={"authorization": credentials}).status_code == 401
            for refused in (ask(TOKEN), ask("another"), client.get("/", params={"__t": TOKEN})):
                assert refused.status_code == 429
                assert 0 < int(refused.headers["retry-after"]) <= 60
                assert "Wait" in refused.json()["error"]["message"]
            cookie = "; ".join(f"{name}={value}" for name, value in session.items())
            assert client.get("/api/queue", headers={"cookie": cookie}).status_code == 200
            again = client.post("/login", data={"password": "correct horse"})
            assert again.status_code == 303


def test_without_a_password_nobody_logs_in(live: Live, stranger: httpx2.Client) -> None:
    assert stranger.post("/login", data={"password": ""}).status_code == 401


def test_tries_are_forgotten_after_a_while(tmp_path: Path) -> None:
    now = 0.0
    password = Password(tmp_path)
    password.set("correct horse")
    access = Access(TOKEN, password, clock=lambda: now)
    for _ in range(WRONG_TRIES):
        assert access.log_in("a", "wrong") is None
    with pytest.raises(TooManyTries):
        access.log_in("a", "correct horse")
    session = access.log_in("b", "correct horse")
    assert session
    assert access.is_session(session)
    now = 61.0
    assert access.log_in("a", "correct horse")
    now = 10_000_000.0
    assert not access.is_session(session)


def test_passwords_are_kept_as_a_hash_for_the_user_alone(tmp_path: Path) -> None:
    password = Password(tmp_path / "data")
    assert not password.is_set
    assert not password.matches("")
    with pytest.raises(BadRequest, match="too short"):
        password.set("short")
    password.set("correct horse")
    kept = tmp_path / "data" / "password"
    assert "horse" not in kept.read_text()
    assert kept.read_text().startswith("$argon2id$")
    assert password.matches("correct horse")
    assert not password.matches("correct horses")
    if os.name == "posix":
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    kept.write_text("rubbish")
    assert not password.matches("correct horse")
