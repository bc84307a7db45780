"""`qit serve`, `token`, `password`: what a person and a starting program see."""

import io
import json
import os
import socket
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwen_image_tool.cli.commands import run
from qwen_image_tool.cli.screen import Screen
from qwen_image_tool.cli.serve import _welcome
from qwen_image_tool.errors import BadRequest
from qwen_image_tool.server import run as serving
from qwen_image_tool.server.gate import Password
from qwen_image_tool.settings import load_settings
from running import TOKEN, Live, process, server


def test_the_ready_line_and_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QIT_HOME", str(tmp_path))
    with process(tmp_path) as running:
        assert running.http.get("/startup").json()["step"] in ("gallery", "ready")
        assert run(["token", "--json"]) == 0
        found = json.loads(capfd.readouterr().out)
        assert found["token"] == TOKEN
        assert found["url"] == running.url
        assert found["address"] == running.url.replace("://", f"://qit:{TOKEN}@")
        assert run(["token"]) == 0
        assert f"{running.url}/?__t={TOKEN}" in capfd.readouterr().out
        assert run(["serve"]) == 2
        assert "running already" in capfd.readouterr().err


def test_without_a_service_there_is_no_token(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["token"]) == 2
    assert "Start it with `qit serve`" in capfd.readouterr().err


def test_a_file_that_a_killed_service_left_is_not_believed(home: Path) -> None:
    data = load_settings().data
    data.mkdir(parents=True)
    left = serving.Running(url="http://127.0.0.1:1", port=1, token="x", pid=2**22 + 5)
    (data / "server.json").write_text(left.to_json())
    with pytest.raises(BadRequest, match="not running"):
        serving.running(data)


def test_a_number_or_a_port_that_another_program_has_by_now_is_not_believed(
    tmp_path: Path, home: Path
) -> None:
    data = load_settings().data
    data.mkdir(parents=True)

    def noted(where: serving.Running) -> serving.Running:
        (data / "server.json").write_text(where.to_json())
        return serving.running(data)

    with server(tmp_path) as live, socket.create_server(("127.0.0.1", 0)) as other:
        threading.Thread(target=_say, args=(other, b"SSH-2.0-hello\r\n"), daemon=True).start()
        elsewhere = {"url": f"http://127.0.0.1:{other.getsockname()[1]}"}
        for change in (elsewhere, {"pid": os.getppid()}):
            with pytest.raises(BadRequest, match="not running"):
                noted(live.where.model_copy(update=change))
        assert noted(live.where) == live.where


def _say(listening: socket.socket, words: bytes) -> None:
    connection, _ = listening.accept()
    with connection:
        connection.recv(1000)
        connection.sendall(words)


def test_the_password_is_read_from_stdin(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("short\n"))
    assert run(["password"]) == 2
    monkeypatch.setattr(sys, "stdin", io.StringIO("correct horse\n"))
    assert run(["password"]) == 0
    assert "horse" not in "".join(capfd.readouterr())
    assert Password(load_settings().data).matches("correct horse")


def test_the_network_needs_a_password_first(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["serve", "--lan"]) == 2
    assert "qit password" in capfd.readouterr().err
    monkeypatch.setenv("QIT_LAN", "1")
    assert run(["serve"]) == 2
    assert "qit password" in capfd.readouterr().err
    monkeypatch.delenv("QIT_LAN")
    assert run(["serve", "--host", "0.0.0.0"]) == 2
    assert "--lan" in capfd.readouterr().err


def test_the_welcome_shows_the_address_as_a_picture_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    where = serving.Running(url="http://192.168.1.2:7860", port=7860, token="tok", pid=1)
    _welcome(Screen(), where, lan=True)
    said = capsys.readouterr().out
    assert "http://192.168.1.2:7860/?__t=tok" in said
    assert "▀" in said or "█" in said


def test_ports(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """The remembered one, else 7860, else the next free one; one that was asked for, or none."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        monkeypatch.setattr(serving, "PORT", taken)
        with serving.bind("127.0.0.1", None, live.service) as found:
            near = found.getsockname()[1]
            assert near != taken
        assert live.service.remembered()["port"] == near
        with serving.bind("127.0.0.1", None, live.service) as again:
            assert again.getsockname()[1] == near
        with pytest.raises(BadRequest, match="can't be used"):
            serving.bind("127.0.0.1", taken, live.service)
    with pytest.raises(BadRequest, match="can't be used"):
        serving.bind("203.0.113.1", None, live.service)


@pytest.mark.parametrize("lan", [[], ["--lan"]])
@pytest.mark.parametrize(
    "host", ["banana.invalid", "203.0.113.1", "127.0.0.1:8000", "http://127.0.0.1", "ä" * 80, ""]
)
def test_an_address_that_is_none_is_told_in_a_sentence(
    host: str, lan: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Password(load_settings().data).set("long enough")
    assert run(["serve", "--host", host, *lan]) == BadRequest.exit_code
    assert capsys.readouterr().err == (
        f"qit: {host or 'An empty --host'} is no address that this computer can listen on."
        " Give 127.0.0.1; with --lan also 0.0.0.0, or an address of this computer.\n"
    )


def test_a_port_in_use_is_told_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        assert run(["serve", "--port", str(taken)]) == BadRequest.exit_code
    said = capsys.readouterr().err
    assert said.startswith(f"qit: Port {taken} of 127.0.0.1 can't be used: ")
    assert said.endswith(". Choose another --port.\n")


@pytest.mark.parametrize("damaged", ["x", 99_999, -1, None, [7860]])
def test_a_remembered_port_that_is_none(
    live: Live, damaged: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "TRIED_PORTS", 0)
    live.service.remember(port=damaged)
    with serving.bind("127.0.0.1", None, live.service) as found:
        assert live.service.remembered()["port"] == found.getsockname()[1]


def test_two_that_start_at_once_get_two_ports(live: Live) -> None:
    with serving.bind("127.0.0.1", None, live.service) as first:
        taken = first.getsockname()[1]
        with pytest.raises(BadRequest, match="can't be used"):
            serving.bind("127.0.0.1", taken, live.service)
        with serving.bind("127.0.0.1", None, live.service) as second:
            assert second.getsockname()[1] != taken


def test_the_address_that_is_shown_leads_to_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "own_addresses", lambda: ["desk", "192.168.1.2"])
    alone = [serving.shown(host, lan=False) for host in ("127.0.0.1", "localhost", "::1")]
    assert alone == ["127.0.0.1", "127.0.0.1", "[::1]"]
    network = [serving.shown(host, lan=True) for host in ("127.0.0.1", "0.0.0.0", "::", "::1")]
    assert network == ["192.168.1.2", "192.168.1.2", "192.168.1.2", "[::1]"]


def test_addresses_of_this_computer(monkeypatch: pytest.MonkeyPatch) -> None:
    def address(family: int, text: str) -> SimpleNamespace:
        return SimpleNamespace(family=family, address=text)

    cards = {
        "lo": [address(socket.AF_INET, "127.0.0.1"), address(socket.AF_INET6, "::1")],
        "eth0": [
            address(socket.AF_INET6, "fe80::1%eth0"),
            address(socket.AF_INET, "192.168.1.2"),
            address(17, "aa:bb"),
        ],
        "docker0": [address(socket.AF_INET, "172.17.0.1")],
    }
    monkeypatch.setattr("psutil.net_if_addrs", lambda: cards)
    monkeypatch.setattr(serving, "_outgoing", lambda: "192.168.1.2")
    monkeypatch.setattr(socket, "gethostname", lambda: "Desk")
    found = serving.own_addresses()
    assert found[-1] == "192.168.1.2"
    assert {"desk", "desk.local", "[fe80::1]", "172.17.0.1"} <= set(found)
    assert "127.0.0.1" not in found


def test_the_address_that_other_networks_see() -> None:
    """One of this computer's, or none where it has no network."""
    assert serving._outgoing() in ("", *serving.own_addresses())


@pytest.fixture
def live(tmp_path: Path) -> Live:
    """What is remembered needs no server that runs."""
    with server(tmp_path) as live:
        return live


def test_ui_opens_the_page_of_the_one_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    done = threading.Event()

    def browse(url: str) -> None:
        opened.append(url)
        done.set()

    monkeypatch.setenv("QIT_HOME", str(tmp_path))
    monkeypatch.setattr("webbrowser.open", browse)
    with process(tmp_path) as running:
        assert run(["ui"]) == 0
        assert done.wait(10)
        assert opened == [f"{running.url}/?__t={TOKEN}"]
        said = capfd.readouterr()
        assert "running already" in said.err
        assert "Ctrl-C" not in said.err, "that would end nothing"
        assert said.out == f"QwenImageTool is at {running.url}/?__t={TOKEN}\n"
        assert run(["ui", "--no-browser", "--json-ready"]) == 0
        assert json.loads(capfd.readouterr().out)["event"] == "ready"
        assert len(opened) == 1
