"""MCP with its own client: over HTTP, and over stdio through `qit mcp`."""

import asyncio
import io
import os
import sys
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from mcp import Client
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client
from PIL import Image

from qwen_image_tool import __version__
from running import BEARER, FAKE, SMALL, TOKEN, Live, process, server, wait


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with server(tmp_path_factory.mktemp("live")) as live:
        yield live


def over_http(live: Live, use: Any) -> Any:
    async def run() -> Any:
        async with (
            httpx2.AsyncClient(headers=BEARER, timeout=60) as http,
            Client(streamable_http_client(f"{live.url}/mcp", http_client=http)) as client,
        ):
            return await use(client)

    return asyncio.run(run())


def over_stdio(home: Path, use: Any, fake: bool = True) -> Any:
    environ = os.environ | {"QIT_HOME": str(home), "QIT_OUTPUT": str(home / "output")}
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environ |= {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    code = f"import qwen_image_tool.supervisor as s; s.COMMAND = {FAKE!r}\n" if fake else ""
    code += "from qwen_image_tool.cli import main; main()"
    parameters = StdioServerParameters(
        command=sys.executable, args=["-c", code, "mcp"], env=dict(environ)
    )

    async def run() -> Any:
        async with Client(stdio_client(parameters)) as client:
            return await use(client)

    return asyncio.run(run())


async def names(client: Client) -> list[str]:
    return sorted(tool.name for tool in (await client.list_tools()).tools)


async def fox(client: Client) -> Any:
    return await client.call_tool("generate", {"prompt": "a fox", "size": SMALL, "seed": 3})


def test_the_tools(live: Live) -> None:
    assert over_http(live, names) == ["generate", "models", "plan"]


def test_generate(live: Live) -> None:
    answer = over_http(live, fox)
    assert not answer.is_error
    picture, text = answer.content
    assert Image.open(io.BytesIO(b64decode(picture.data))).format == "WEBP"
    assert picture.mime_type == "image/webp"
    assert "seed 3" in text.text
    assert live.service.jobs.latest()[0].origin == "mcp"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": "x", "size": "big"}, "1024x768"),
        ({"prompt": "x", "size": "9x9"}, "Nearest"),
        ({"prompt": "x", "model": "unicorn"}, "no model"),
        ({"prompt": "fail broken picture"}, "Do something"),
        ({}, "prompt is missing. Give it."),
        ({"prompt": "x", "steps": "few"}, "steps is 'few'. It has to be a whole number."),
        ({"prompt": "x", "images": 0}, "images is 0. Use 1 or more."),
    ],
)
def test_refusals_are_told_to_the_model(live: Live, arguments: dict[str, Any], word: str) -> None:
    async def call(client: Client) -> Any:
        return await client.call_tool("generate", arguments)

    answer = over_http(live, call)
    assert answer.is_error
    assert word in answer.content[0].text
    assert "pydantic" not in answer.content[0].text


def test_models(live: Live) -> None:
    async def call(client: Client) -> Any:
        return await client.call_tool("models", {})

    found = over_http(live, call).structured_content
    assert found["default"] == "practice"
    assert {model["id"] for model in found["models"]} > {"practice", "qwen-image"}


def test_plan(live: Live) -> None:
    async def call(client: Client) -> Any:
        return await client.call_tool("plan", {"prompt": "a fox", "steps": 7})

    found = over_http(live, call).structured_content
    assert found["request"]["steps"] == 7
    assert found["ram_bytes"] > 0


def test_who_answers(live: Live) -> None:
    async def who(client: Client) -> Any:
        return client.server_info

    found = over_http(live, who)
    assert (found.name, found.version) == ("QwenImageTool", __version__)


@pytest.mark.parametrize("by", ["the client", "another one"])
def test_a_cancel_is_no_fault(live: Live, caplog: pytest.LogCaptureFixture, by: str) -> None:
    async def cancelled(client: Client) -> Any:
        slow = {"prompt": "slow", "steps": 900, "size": SMALL}
        call = asyncio.create_task(client.call_tool("generate", slow))
        while (job := live.service.queue().running) is None:
            await asyncio.sleep(0.02)
        if by == "the client":
            call.cancel()
        else:
            live.service.cancel(job)
        return (await asyncio.gather(call, return_exceptions=True))[0]

    answer = over_http(live, cancelled)
    wait(lambda: live.service.queue().running is None)
    assert live.service.jobs.latest()[0].state == "cancelled"
    if by == "another one":
        assert "was cancelled" in answer.content[0].text
    assert not [record for record in caplog.records if record.exc_info]


def test_it_is_behind_the_gate(live: Live) -> None:
    assert httpx2.post(f"{live.url}/mcp", json={}).status_code == 401


def test_stdio_uses_the_service_that_runs(tmp_path: Path) -> None:
    with process(tmp_path) as running:
        answer = over_stdio(tmp_path, fox)
        assert "seed 3" in answer.content[1].text
        assert running.http.get("/api/jobs").json()["jobs"][0]["job"]["origin"] == "mcp"


def test_stdio_runs_a_service_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QIT_TOKEN", TOKEN)
    answer = over_stdio(tmp_path, fox)
    assert "seed 3" in answer.content[1].text
    assert len(list((tmp_path / "output").glob("*.png"))) == 1
    assert not (tmp_path / "data" / "server.json").exists()
