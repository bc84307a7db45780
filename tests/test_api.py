"""Our own API over a real server: jobs, news, gallery, models, plans."""

import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from qwen_image_tool.app import App
from qwen_image_tool.errors import Busy, DatabaseBroken
from qwen_image_tool.feed import JobNews, News, QueueNews
from qwen_image_tool.service import Service
from running import FAKE, SMALL, Live, server, settings, wait


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with server(tmp_path_factory.mktemp("live")) as live:
        yield live


def test_a_job_becomes_a_picture(live: Live) -> None:
    found = live.wait(live.submit("a red fox", images=2))
    assert found["job"]["state"] == "done"
    assert [picture["seed"] for picture in found["pictures"]] == [5, 6]
    [first, _] = found["pictures"]
    answer = live.http.get(f"/api/gallery/{first['id']}/file")
    assert answer.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(answer.content)).size == (8, 8)
    info = live.http.get(f"/api/gallery/{first['id']}").json()
    assert info["request"]["prompt"] == "a red fox"
    assert info["picture"]["job"] == found["job"]["id"]


def test_open_choices_are_decided_when_a_job_is_queued(live: Live) -> None:
    job = live.http.post("/api/jobs", json={"model": "practice", "prompt": "x"}).json()["job"]
    assert job["request"]["seed"] is not None
    assert job["request"]["size"] == SMALL
    assert job["origin"] == "api"
    live.wait(job["id"])


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({"model": "practice"}, 400, "empty"),
        ({"model": "unicorn", "prompt": "x"}, 400, "no model"),
        ({"model": "/etc", "prompt": "x"}, 400, "no model"),
        ({"model": "qwen-image", "prompt": "x"}, 409, ""),
        ({"model": "practice", "prompt": "x", "size": "9x9"}, 400, "limits"),
        ({"model": "practice", "prompt": "x", "size": "x"}, 422, "size"),
        ({"model": "practice", "prompt": "x", "seed": -1}, 422, "seed"),
        ({"model": "practice", "prompt": "x", "colour": "red"}, 422, "colour"),
        ({"model": "practice", "prompt": "x" * 100_001}, 422, "100000"),
        ({"model": "practice", "prompt": "\ud800"}, 422, "unicode"),
        ({"model": "practice", "prompt": "x", "negative_prompt": "\udfff"}, 422, "unicode"),
        ([], 422, ""),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_sentence(
    live: Live, body: Any, status: int, word: str
) -> None:
    headers = {"content-type": "application/json"}
    answer = live.http.post("/api/jobs", content=json.dumps(body), headers=headers)
    assert answer.status_code == status, answer.text
    assert word in answer.json()["error"]["message"] + answer.json()["error"]["hint"]


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        ({"json": {"prompt": "x"}}, "model is missing. Give it."),
        ({"json": {"model": None}}, "model is empty. It has to be text."),
        ({"json": {"model": "m", "steps": "few"}}, "steps is 'few'. It has to be a whole number."),
        ({"json": {"model": "m", "steps": 0}}, "steps is 0. Use 1 or more."),
        ({"json": {"model": "m", "cfg": "x"}}, "cfg is 'x'. It has to be a number."),
        ({"json": {"model": "m", "seed": 2**63}}, f"seed is {2**63}. Use {2**63 - 1} or less."),
        (
            {"json": {"model": "m", "size": "big"}},
            "size is 'big'. Write it as WIDTHxHEIGHT: 1024x768.",
        ),
        ({"json": {"model": "m", "mode": "fast"}}, "mode is 'fast'. Choose default or exact."),
        ({"json": {"model": "m", "colour": 1}}, "colour is not a field here. Leave it out."),
        (
            {"content": b'{"model": "m", "\\ud800": 1}'},
            "A field is '\\ud800'. It has to be text of",
        ),
        ({"json": [1]}, "The body is no JSON object. Send one,"),
        ({"content": b"a=1", "headers": {"content-type": "text/plain"}}, "The body is no JSON obj"),
        ({"params": {"anyway": "x"}, "json": {"model": "m"}}, "anyway is 'x'. It has to be true"),
    ],
)
def test_a_wrong_field_is_told_in_our_words(live: Live, sent: dict[str, Any], said: str) -> None:
    sent = {"headers": {"content-type": "application/json"}} | sent
    answer = live.http.post("/api/jobs", **sent)
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(said)


def test_wrong_fields_of_other_routes_are_told_in_our_words(live: Live) -> None:
    def said(method: str, path: str, **sent: Any) -> str:
        answer = live.http.request(method, path, **sent)
        assert answer.status_code == 422, answer.text
        return str(answer.json()["detail"])

    many = {"ids": ["a"] * 1001}
    shapes = said("GET", "/api/gallery?shape=odd")
    assert shapes == "shape is 'odd'. Choose square, wide or tall."
    assert said("GET", "/api/jobs?limit=0") == "limit is 0. Use 1 or more."
    assert said("GET", "/api/jobs?limit=") == "limit is empty. It has to be a whole number."
    assert said("POST", "/api/gallery/delete", json=many) == (
        "ids has 1001 entries. Use 1000 or less."
    )
    assert said("POST", "/api/gallery/delete", json={"ids": 1}) == (
        "ids is 1. It has to be a list."
    )
    assert said("POST", "/api/gallery/inspect", data={"picture": "x"}) == (
        "picture is no file. Send it as multipart/form-data."
    )
    assert said("POST", "/sdapi/v1/txt2img", json={"override_settings": "x"}) == (
        "override_settings is 'x'. It has to be an object."
    )


def test_the_size_error_says_the_nearest(live: Live) -> None:
    body = {"model": "practice", "prompt": "x", "size": "9x9"}
    error = live.http.post("/api/jobs", json=body).json()["error"]
    assert error["kind"] == "unsupported size"
    assert "Nearest" in error["hint"]


def test_cancel_retry_repeat_move(live: Live) -> None:
    running = live.submit("slow", steps=300)
    wait(lambda: live.http.get("/api/queue").json()["running"] == running)
    first, second = live.submit("one"), live.submit("two")
    assert live.http.get(f"/api/jobs/{second}").json()["ahead"] == 1
    assert live.http.post(f"/api/jobs/{second}/move", json={"before": first}).json()["ahead"] == 0
    order = [job["id"] for job in live.http.get("/api/queue/jobs").json()]
    assert order == [second, first]
    assert live.http.post(f"/api/jobs/{first}/cancel").json()["job"]["state"] == "cancelled"
    assert live.http.post(f"/api/jobs/{first}/cancel").status_code == 400
    live.http.post(f"/api/jobs/{running}/cancel")
    assert live.wait(running)["job"]["state"] == "cancelled"
    live.wait(second)
    again = live.http.post(f"/api/jobs/{first}/retry").json()["job"]
    other = live.http.post(f"/api/jobs/{first}/repeat", json={}).json()["job"]
    assert again["request"]["seed"] == 5
    assert other["request"]["seed"] != 5
    assert live.wait(other["id"])["job"]["state"] == "done"
    assert live.http.get("/api/jobs/nothing").status_code == 404


def test_a_failure_is_explained(live: Live) -> None:
    failure = live.wait(live.submit("fail broken picture"))["job"]["failure"]
    assert failure["kind"] == "broken picture"
    assert failure["hint"] == "Do something."
    assert failure["kept"]


def test_lists_have_pages(live: Live) -> None:
    jobs = [live.submit(f"number {i}") for i in range(3)]
    for job in jobs:
        live.wait(job)
    page = live.http.get("/api/jobs", params={"state": "done", "limit": 2}).json()
    assert [view["job"]["id"] for view in page["jobs"]] == [jobs[2], jobs[1]]
    following = {"state": "done", "limit": 1, "before": page["next"]}
    assert live.http.get("/api/jobs", params=following).json()["jobs"][0]["job"]["id"] == jobs[0]


def test_news_of_a_job_end_with_it(live: Live) -> None:
    job = live.submit("a fox", steps=3)
    with live.http.stream("GET", f"/api/jobs/{job}/events") as stream:
        lines = [text for text in stream.iter_lines() if text.startswith("data:")]
    kinds = [json.loads(text[5:])["kind"] for text in lines]
    assert kinds[-1] == "job"
    assert live.http.get(f"/api/jobs/{job}").json()["job"]["state"] == "done"


def test_all_news(live: Live) -> None:
    seen: list[dict[str, Any]] = []
    listening = threading.Event()

    def listen() -> None:
        with (
            httpx2.Client(base_url=live.url, headers=live.http.headers, timeout=60) as http,
            http.stream("GET", "/api/events") as stream,
        ):
            listening.set()
            for text in stream.iter_lines():
                if text.startswith("data:"):
                    seen.append(json.loads(text[5:]))
                    if seen[-1]["kind"] == "job" and seen[-1]["job"]["state"] == "done":
                        return

    thread = threading.Thread(target=listen)
    thread.start()
    listening.wait()
    job = live.submit("a fox in the news")
    thread.join(60)
    assert {"job", "queue", "event", "picture"} <= {news["kind"] for news in seen}
    steps = [news for news in seen if news["kind"] == "event" and news["event"]["kind"] == "step"]
    assert all(news["job"] == job and 0 <= news["progress"]["fraction"] <= 1 for news in steps)


def test_the_last_news_of_the_queue_is_that_nothing_runs(live: Live) -> None:
    seen: list[str | None] = []

    def heard(news: News) -> None:
        if isinstance(news, QueueNews):
            seen.append(news.queue.running)

    end = live.service.feed.subscribe(heard)
    job = live.submit("a fox")
    live.wait(job)
    wait(lambda: seen[-1] is None and job in seen)
    end()


def test_news_of_a_job_that_the_last_end_interrupted(tmp_path: Path) -> None:
    """Who asks while the gallery is looked at hears of it, as of any other."""
    with server(tmp_path) as live:
        live.http.post("/api/queue/pause")
        job = live.submit("a fox")
        assert live.service.jobs.take()
    heard: list[str] = []
    service = Service(App(settings(tmp_path)), command=FAKE)
    service.feed.subscribe(
        lambda news: heard.append(news.job.state) if isinstance(news, JobNews) else None
    )
    service.start()
    wait(lambda: service.jobs.get(job).has_ended)
    service.close()
    assert heard == ["queued", "running", "done"]


def test_an_interrupted_job_goes_on_where_the_index_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with server(tmp_path) as live:
        live.http.post("/api/queue/pause")
        job = live.submit("a fox")
        assert live.service.jobs.take()
    asked = Service.seeds_saved

    def fails_once(*_: object) -> set[int]:
        monkeypatch.setattr(Service, "seeds_saved", asked)
        raise DatabaseBroken("pictures.db is damaged.")

    monkeypatch.setattr(Service, "seeds_saved", fails_once)
    with server(tmp_path) as live:
        view = live.wait(job)["job"]
    assert (view["state"], view["again"]) == ("done", 1)
    assert "pictures.db is damaged" in caplog.text


def test_pause_and_resume(live: Live) -> None:
    live.wait(live.submit("first"))
    assert live.http.post("/api/queue/pause").json()["paused"]
    wait(lambda: not live.http.get("/api/queue").json()["loaded"])
    job = live.submit("waits")
    assert live.http.get(f"/api/jobs/{job}").json()["job"]["state"] == "queued"
    live.http.post("/api/queue/resume")
    assert live.wait(job)["job"]["state"] == "done"


def test_the_gallery(live: Live) -> None:
    [picture] = live.wait(live.submit("一只戴帽子的猫"))["pictures"]
    name = picture["id"]
    found = live.http.get("/api/gallery", params={"text": "帽子"}).json()["pictures"]
    assert [each["id"] for each in found] == [name]
    assert live.http.post(f"/api/gallery/{name}/star", json={"star": True}).json()["star"]
    starred = live.http.get("/api/gallery", params={"starred": True}).json()["pictures"]
    assert [each["id"] for each in starred] == [name]
    thumbnail = live.http.get(f"/api/gallery/{name}/thumbnail", params={"side": 16})
    assert thumbnail.headers["content-type"] == "image/webp"
    for form in ("jpeg", "webp"):
        options = {"format": form, "metadata": False, "download": True}
        answer = live.http.get(f"/api/gallery/{name}/file", params=options)
        assert answer.headers["content-type"] == f"image/{form}"
        assert answer.headers["content-disposition"] == f'attachment; filename="{name}.{form}"'
        assert "帽子".encode("utf-16-be") not in answer.content
    assert live.http.get("/api/gallery/models").json()["practice"] >= 1
    assert live.http.post("/api/gallery/delete", json={"ids": [name]}).json()["deleted"] == [name]
    assert live.http.get(f"/api/gallery/{name}").status_code == 404
    assert live.http.post("/api/gallery/undo").json()["restored"] == [name]
    assert live.http.get(f"/api/gallery/{name}").json()["picture"]["id"] == name
    assert live.http.get("/api/gallery", params={"shape": "odd"}).status_code == 422
    assert (live.service.index.folder.parent / "trash" / picture["file"]).exists()


@pytest.mark.parametrize(
    "odd", ["a\0b", "\0", "\u00b2" * 20, "9" * 39, "\ufffe", '%ff"*(', "\u0661"]
)
def test_no_text_of_a_client_breaks_the_databases(live: Live, odd: str) -> None:
    from urllib.parse import quote

    for name in ("text", "model", "since", "until", "after"):
        found = live.http.get("/api/gallery", params={name: odd})
        assert found.status_code in (200, 400), (name, found.text)
    assert live.http.get("/api/gallery", params={"text": odd}).is_error == ("\0" in odd)
    paths = (f"gallery/{quote(odd)}", f"gallery/{quote(odd)}/file", f"jobs/{quote(odd)}")
    for path in paths:
        assert live.http.get(f"/api/{path}").status_code in (404, 422)
    assert live.http.post("/api/gallery/delete", json={"ids": [odd]}).is_client_error
    [picture] = live.wait(live.submit(f"odd {odd}", negative_prompt=odd))["pictures"]
    assert picture["seed"] == 5
    lone = live.http.post(
        "/api/gallery/delete",
        content=b'{"ids": ["\\ud800"]}',
        headers={"content-type": "application/json"},
    )
    assert lone.is_client_error


def test_a_picture_deleted_by_hand_is_no_broken_page(live: Live) -> None:
    [picture] = live.wait(live.submit("soon gone"))["pictures"]
    (live.service.index.folder / picture["file"]).unlink()
    for path in ("", "/file", "/thumbnail"):
        assert live.http.get(f"/api/gallery/{picture['id']}{path}").status_code == 404
    assert live.http.get("/api/gallery", params={"text": "soon"}).json()["pictures"] == []


def test_inspect_reads_a_request_back(live: Live) -> None:
    [picture] = live.wait(live.submit("read me"))["pictures"]
    data = live.http.get(f"/api/gallery/{picture['id']}/file").content
    files = {"picture": ("x.png", data, "image/png")}
    found = live.http.post("/api/gallery/inspect", files=files).json()
    assert found["request"]["prompt"] == "read me"
    again = live.http.post("/api/jobs", json=found["request"])
    assert again.status_code == 201
    live.wait(again.json()["job"]["id"])
    text = "a cat\nSteps: 4, Sampler: Euler, CFG scale: 3, Seed: 9, Model: Practice model"
    from PIL.PngImagePlugin import PngInfo

    chunks, buffer = PngInfo(), io.BytesIO()
    chunks.add_text("parameters", text)
    Image.new("RGB", (9, 7)).save(buffer, "PNG", pnginfo=chunks)
    files = {"picture": ("y.png", buffer.getvalue(), "image/png")}
    found = live.http.post("/api/gallery/inspect", files=files).json()
    assert (found["request"]["prompt"], found["request"]["steps"]) == ("a cat", 4)
    files = {"picture": ("z.png", b"rubbish", "image/png")}
    assert live.http.post("/api/gallery/inspect", files=files).status_code == 400


def test_models(live: Live) -> None:
    states = {m["id"]: m["state"] for m in live.http.get("/api/models").json()}
    assert states["practice"] == "ready"
    assert states["qwen-image"] == "not here"
    assert live.http.get("/api/models/qwen-image").json()["sampling"]["steps"]
    live.service.device()  # looked at: from now on the list tells what they need here
    needs = {m["id"]: m["needs"] for m in live.http.get("/api/models").json()}
    assert needs["practice"]["ram_bytes"] > 0
    assert needs["practice"]["runs"]
    live.wait(live.submit("a blue square"))
    assert live.http.get("/api/models/practice").json()["needs"]["seconds"] > 0, "of the last job"
    assert live.http.get("/api/models/unicorn").status_code == 400
    assert live.http.delete("/api/models/qwen-image").status_code == 409
    answer = live.http.post("/api/models/qwen-image-2.1/download", json={})
    assert answer.status_code == 403
    assert "accept_licence" in answer.json()["error"]["hint"]
    assert live.http.post("/api/models/qwen-image/pause").status_code == 404
    assert live.http.post("/api/models/practice/verify").status_code == 202
    wait(lambda: live.http.get("/api/transfers").json()[0]["state"] != "running")


def test_the_default_model_is_chosen_and_remembered(live: Live) -> None:
    assert live.http.get("/api/system").json()["default_model"] == "practice"
    answer = live.http.put("/api/system/default-model", json={"model": "practice"})
    assert answer.json()["default_model"] == "practice"
    assert live.service.remembered()["model"] == "practice"
    assert live.http.put("/api/system/default-model", json={"model": "x"}).status_code == 400


def test_the_reference(live: Live) -> None:
    document = live.http.get("/api/openapi.json").json()
    assert "/v1/images/generations" in document["paths"]
    page = live.http.get("/api")
    assert "/sdapi/v1/txt2img" in page.text
    assert "https://" not in page.text


def test_a_plan_of_this_machine(live: Live) -> None:
    """Asks torch, in a child process."""
    answer = live.http.post("/api/plan", json={"model": "practice", "prompt": "x"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["plan"]["device"]
    assert live.http.get("/api/system/device").json()["ram_bytes"] > 0


def test_one_service_for_a_data_folder(live: Live) -> None:
    with pytest.raises(Busy, match="running already"):
        Service(live.service.app)


def test_an_end_does_not_wait_for_the_gallery(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_image_tool.gallery.index.BATCH", 1)
    service = Service(App(settings(tmp_path)), command=FAKE)
    (tmp_path / "output").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / "output" / f"{number}.png")
    service._closing = True
    service._start()
    assert service.index.count() == 0
    assert service.startup.step == "gallery"
    service.close()


def test_a_fault_at_the_start_does_not_stop_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr("qwen_image_tool.gallery.index.Index.sync", broken)
    with server(tmp_path) as live:
        assert live.http.get("/startup").json()["step"] == "ready"
        assert live.wait(live.submit("a fox"))["job"]["state"] == "done"
    assert "a fault of ours" in caplog.text


def test_a_new_job_does_not_look_through_the_folder(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may hold 100,000 pictures."""

    def look(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(live.service.index, "add_by_seed", look)
    assert live.wait(live.submit("a fox"))["job"]["state"] == "done"


def test_no_picture_is_drawn_twice_when_the_index_is_full(tmp_path: Path) -> None:
    with server(tmp_path) as live:
        live.service.index.database._connection.execute("PRAGMA query_only = ON")
        body = {"prompt": "a fox", "n": 2}
        answer = live.http.post("/v1/images/generations", json=body).json()
        assert len(answer["data"]) == 2
        [job] = live.service.jobs.latest()
    service = Service(App(settings(tmp_path)), command=FAKE)
    service.index.database._connection.execute("PRAGMA query_only = ON")
    assert service.seeds_saved(job) == set(job.request.seeds)
    service.close()


def test_an_idle_worker_leaves_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QIT_IDLE_SECONDS", "0.2")
    with server(tmp_path) as live:
        live.wait(live.submit("a fox"))
        wait(lambda: not live.http.get("/api/queue").json()["loaded"])


def test_what_waited_goes_on_at_the_next_start(tmp_path: Path) -> None:
    with server(tmp_path) as first:
        running, waiting = first.submit("slow", steps=400), first.submit("next")
        wait(lambda: first.http.get("/api/queue").json()["running"] == running)
    with server(tmp_path) as second:
        assert second.http.post(f"/api/jobs/{running}/cancel").status_code == 200
        assert second.wait(waiting)["job"]["state"] == "done"
        assert second.http.get(f"/api/jobs/{running}").json()["job"]["again"] == 0
