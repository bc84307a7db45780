"""OpenAI's Images API with its own client, and what Open WebUI and LibreChat send."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from PIL import Image

from qwen_image_tool import gallery
from running import SMALL, TOKEN, Live, server, wait


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with server(tmp_path_factory.mktemp("live")) as live:
        yield live


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key=TOKEN, max_retries=0) as client:
        yield client


def opened(text: str | None) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(text or "")))
    image.load()
    return image


def test_generate(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="a fox", model="practice", size="256x256")
    assert answer.data
    [datum] = answer.data
    assert opened(datum.b64_json).format == "PNG"
    assert (answer.output_format, answer.size) == ("png", SMALL)
    assert answer.created > 1_700_000_000
    assert answer.usage
    assert answer.usage.total_tokens == 0


def test_several_at_once_with_the_extras(client: openai.OpenAI, live: Live, tmp_path: Path) -> None:
    extra = {"seed": 7, "steps": 3, "true_cfg_scale": 2.5, "negative_prompt": "blurry"}
    answer = client.images.generate(prompt="a fox", n=2, extra_body=extra)
    assert answer.data
    seeds = []
    for number, datum in enumerate(answer.data):
        path = tmp_path / f"{number}.png"
        path.write_bytes(base64.b64decode(datum.b64_json or ""))
        request = gallery.request_from(path)
        seeds.append(request.seed)
        assert (request.steps, request.cfg, request.negative_prompt) == (3, 2.5, "blurry")
    assert seeds == [7, 8]


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_other_formats(client: openai.OpenAI, form: Any) -> None:
    answer = client.images.generate(
        prompt="a fox", output_format=form, output_compression=50, background="opaque"
    )
    assert answer.data
    assert opened(answer.data[0].b64_json).format == form.upper()
    assert answer.background == "opaque"


def test_addresses_open_without_the_token(client: openai.OpenAI) -> None:
    forms: tuple[Any, ...] = ("png", "jpeg")
    for form in forms:
        answer = client.images.generate(
            prompt="a fox",
            response_format="url",
            output_format=form,
        )
        assert answer.data
        url = answer.data[0].url
        assert url
        found = httpx2.get(url)
        assert found.status_code == 200
        assert found.headers["content-type"] == f"image/{form}"


def test_quality_low_takes_half_of_the_steps(client: openai.OpenAI, live: Live) -> None:
    client.images.generate(prompt="cheap", quality="low")
    client.images.generate(prompt="dear", quality="high")
    client.images.generate(prompt="dear", extra_body={"quality": "max"})
    latest = live.service.jobs.latest(["done"], limit=3)
    dearest, dear, cheap = (job.request.steps for job in latest)
    assert dear
    assert dearest == dear
    assert cheap == dear // 2


def test_streaming(client: openai.OpenAI) -> None:
    stream = client.images.generate(
        prompt="slow fox",
        stream=True,
        partial_images=2,
        extra_body={"steps": 8},
        output_format="webp",
    )
    events = list(stream)
    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert [getattr(event, "partial_image_index", None) for event in events] == [0, 1, None]
    for event in events:
        assert opened(event.b64_json).format == "WEBP"


def test_streaming_several(client: openai.OpenAI) -> None:
    stream = client.images.generate(prompt="fox", stream=True, partial_images=0, n=2)
    assert [event.type for event in stream] == ["image_generation.completed"] * 2


def test_a_quiet_stream_says_that_it_lives(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comments of server-sent events, which every client passes over: ours, and FastAPI's where the
    stream is one of our own API."""
    monkeypatch.setattr("qwen_image_tool.server.openai.KEEP_ALIVE_SECONDS", 0.1)
    body = {"prompt": "slow", "steps": 20, "stream": True}
    with live.http.stream("POST", "/v1/images/generations", json=body) as answer:
        lines = [text for text in answer.iter_lines() if text]
    assert lines.count(": ping") >= 3
    assert [text for text in lines if text.startswith("event: ")] == [
        "event: image_generation.completed"
    ]
    monkeypatch.setattr("fastapi.routing._PING_INTERVAL", 0.1)
    with live.http.stream("GET", "/api/events") as answer:
        assert next(answer.iter_lines()) == ": ping"


def test_a_long_job_is_answered(live: Live) -> None:
    """Longer than the server keeps an idle connection open (5 s)."""
    answer = live.http.post("/v1/images/generations", json={"prompt": "slow", "steps": 120})
    assert answer.status_code == 200
    assert answer.elapsed.total_seconds() > 5


def test_a_failure_in_a_stream_is_its_last_event(live: Live) -> None:
    body = {"prompt": "fail broken picture", "stream": True}
    with live.http.stream("POST", "/v1/images/generations", json=body) as answer:
        lines = [text for text in answer.iter_lines() if text]
    assert lines[-2] == "event: error"
    error = json.loads(lines[-1][5:])["error"]
    assert error["code"] == "broken_picture"
    assert error["type"] == "server_error"


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"prompt": ""}, "request", None),
        ({"size": "10x10"}, "unsupported_size", None),
        ({"size": "large"}, "invalid_value", "size"),
        ({"n": 11}, "invalid_value", "n"),
        ({"background": "transparent"}, "unsupported_background", "background"),
        ({"style": "vivid"}, "unknown_parameter", "style"),
        ({"output_compression": 5}, "unsupported_parameter", "output_compression"),
        ({"quality": "best"}, "invalid_value", "quality"),
        ({"partial_images": 4}, "invalid_value", "partial_images"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_a_code(
    client: openai.OpenAI, fields: dict[str, Any], code: str, param: str | None
) -> None:
    body = {"prompt": "a fox", **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**body)
    assert (caught.value.code, caught.value.param) == (code, param)
    assert "Input" not in caught.value.message


def test_failures_are_server_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client.images.generate(prompt="fail broken picture")
    assert caught.value.code == "broken_picture"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").images.generate(prompt="a fox")


def test_editing_is_clearly_not_there(client: openai.OpenAI) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    with pytest.raises(openai.InternalServerError) as caught:
        client.images.edit(image=("x.png", buffer.getvalue()), prompt="more")
    assert caught.value.status_code == 501
    assert caught.value.code == "not_supported"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["practice"]
    assert client.models.retrieve("practice").owned_by == "qwen-image-tool"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-5")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt="a fox", model="gpt-5")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("method", "path", "sent", "status", "code"),
    [
        ("GET", "/v1/nothing", {}, 404, "not_found"),
        ("GET", "/v1/images/generations", {}, 405, "method_not_allowed"),
        ("POST", "/v1/images/generations", {"content": b"{"}, 400, "invalid_json"),
        ("POST", "/v1/images/generations", {"json": []}, 400, "invalid_value"),
        ("GET", "/v1/models", {"headers": {"authorization": "x"}}, 401, "invalid_api_key"),
        ("GET", "/v1/models", {"headers": {"host": "evil"}}, 421, "wrong_host"),
        ("POST", "/v1/models", {"headers": {"origin": "http://evil"}}, 403, "wrong_origin"),
        ("POST", "/v1/models", {"content": bytes(2 << 20)}, 413, "request_too_large"),
    ],
)
def test_every_error_has_the_same_shape(
    live: Live, method: str, path: str, sent: dict[str, Any], status: int, code: str
) -> None:
    headers = {"content-type": "application/json"} | sent.pop("headers", {})
    answer = live.http.request(method, path, headers=headers, **sent)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", None)
    assert error["code"] == code
    assert status != 405 or answer.headers["allow"] == "POST"


def test_a_fault_of_ours_has_that_shape_too(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(live.service, "models_here", broken)
    answer = live.http.get("/v1/models")
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "a fault" not in answer.text


@pytest.mark.parametrize("stream", [False, True])
def test_the_job_ends_with_its_client(live: Live, stream: bool) -> None:
    body = {"prompt": "slow", "steps": 900, "stream": stream}
    before = live.service.jobs.counts()["cancelled"]
    with pytest.raises(httpx2.ReadTimeout):
        live.http.post("/v1/images/generations", json=body, timeout=1)
    wait(lambda: live.service.jobs.counts()["cancelled"] == before + 1)
    wait(lambda: live.service.queue().running is None)


def test_a_job_that_another_one_cancels(live: Live) -> None:
    import threading

    def cancel() -> None:
        wait(lambda: live.service.queue().running is not None)
        live.service.cancel(live.service.queue().running or "")

    thread = threading.Thread(target=cancel)
    thread.start()
    answer = live.http.post("/v1/images/generations", json={"prompt": "slow", "steps": 900})
    thread.join()
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "cancelled")


def test_open_webui(live: Live) -> None:
    """Its model list, then a generation as routers/images.py sends it."""
    body = {
        "model": "practice",
        "prompt": "a fox",
        "n": 1,
        "size": SMALL,
        "response_format": "b64_json",
    }
    answer = live.http.post("/v1/images/generations", json=body).json()
    assert opened(answer["data"][0]["b64_json"]).size == (8, 8)


def test_libre_chat(live: Live) -> None:
    """The tool OpenAIImageTools.js."""
    body = {
        "model": "gpt-image-1",
        "prompt": "a fox",
        "n": 1,
        "background": "auto",
        "output_format": "png",
        "quality": "auto",
        "size": "auto",
        "moderation": "auto",
        "user": "someone",
    }
    answer = live.http.post("/v1/images/generations", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"][0]["b64_json"]
    body |= {"output_format": "webp", "output_compression": 100}
    assert live.http.post("/v1/images/generations", json=body).status_code == 200
