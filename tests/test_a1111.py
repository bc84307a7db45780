"""AUTOMATIC1111's API, in the sequences that SillyTavern, Open WebUI and LibreChat send."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from PIL import Image

from running import SMALL, TOKEN, Live, server, wait

FIXED = {"prompt": "a fox", "width": 256, "height": 256}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with server(tmp_path_factory.mktemp("live")) as live:
        yield live


def opened(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_silly_tavern(live: Live) -> None:
    """Its connection, its menus, a change of the model, a picture."""
    credentials = base64.b64encode(f"user:{TOKEN}".encode()).decode()
    live.http.headers["authorization"] = f"Basic {credentials}"
    assert live.http.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == "practice"
    for name in ("upscalers", "latent-upscale-modes", "sd-vae", "sd-modules", "loras"):
        assert isinstance(live.http.get(f"/sdapi/v1/{name}").json(), list)
    assert live.http.get("/sdapi/v1/samplers").json()[0]["name"] == "Euler"
    assert live.http.get("/sdapi/v1/schedulers").json()[0]["label"] == "Simple"
    titles = [model["title"] for model in live.http.get("/sdapi/v1/sd-models").json()]
    assert titles == ["practice"]
    chosen = live.http.post("/sdapi/v1/options", json={"sd_model_checkpoint": titles[0]})
    assert chosen.status_code == 200
    progress = live.http.get("/sdapi/v1/progress").json()
    assert (progress["progress"], progress["state"]["job_count"]) == (0, 0)
    body = FIXED | {
        "url": live.url,
        "auth": f"user:{TOKEN}",
        "negative_prompt": "blurry",
        "sampler_name": "Euler",
        "scheduler": "simple",
        "steps": 5,
        "cfg_scale": 2.5,
        "seed": -1,
        "enable_hr": False,
        "restore_faces": False,
        "hr_upscaler": "Latent",
        "hr_scale": 1,
        "hr_additional_modules": [],
        "hr_second_pass_steps": 0,
        "denoising_strength": 0.7,
        "override_settings": {"CLIP_stop_at_last_layers": 1},
        "override_settings_restore_afterwards": True,
        "clip_skip": 1,
        "save_images": True,
        "send_images": True,
        "do_not_save_grid": False,
        "do_not_save_samples": False,
    }
    answer = live.http.post("/sdapi/v1/txt2img", json=body)
    assert answer.status_code == 200, answer.text
    assert opened(answer.json()["images"][0]).format == "PNG"


def test_open_webui(live: Live) -> None:
    body = FIXED | {"batch_size": 2, "negative_prompt": "", "steps": 4}
    answer = live.http.post("/sdapi/v1/txt2img", json=body).json()
    assert len(answer["images"]) == 2
    info = json.loads(answer["info"])
    assert info["all_seeds"] == [info["seed"], info["seed"] + 1]
    assert info["steps"] == 4


def test_libre_chat(live: Live) -> None:
    """StableDiffusion.js: a fixed preset to SD_WEBUI_URL and no way to give a token but in that
    address, which axios, as the client here, sends as Basic; it reads info.infotexts[0]."""
    body = {"prompt": "a fox", "negative_prompt": "words", "cfg_scale": 4.5, "steps": 22}
    too_large = body | {"width": 1024, "height": 1024}  # for the practice model
    body |= FIXED
    answer = httpx2.post(f"{live.where.address}/sdapi/v1/txt2img", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert opened(answer.json()["images"][0]).format == "PNG"
    info = json.loads(answer.json()["info"])
    text = info["infotexts"][0]
    assert text.startswith("a fox\nNegative prompt: words\nSteps: 22, ")
    assert "CFG scale: 4.5" in text
    refused = httpx2.post(f"{live.where.address}/sdapi/v1/txt2img", json=too_large)
    assert (refused.status_code, refused.json()["error"]) == (400, "UnsupportedSize")
    for wrong in (live.url, live.where.address.replace(TOKEN, "wrong")):
        assert httpx2.post(f"{wrong}/sdapi/v1/txt2img", json=body).status_code == 401


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"enable_hr": True}, 400),
        ({"tiling": True}, 400),
        ({"styles": ["x"]}, 400),
        ({"alwayson_scripts": {"controlnet": {}}}, 400),
        ({"sampler_name": "DPM++ 2M"}, 400),
        ({"scheduler": "Karras"}, 400),
        ({"width": 5}, 400),
        ({"steps": 0}, 422),
        ({"override_settings": {"sd_vae": "x"}}, 400),
        ({"override_settings": {"samples_format": "jpg"}}, 400),
        ({"override_settings": {"samples_format": "png"}}, 200),
        ({"override_settings": {"sd_model_checkpoint": 5}}, 400),
        ({"override_settings": {"sd_model_checkpoint": None}}, 200),
        ({"override_settings": {"CLIP_stop_at_last_layers": 2}}, 400),
        ({"override_settings": {"unheard_of": None}}, 400),
        ({"override_settings": {"sd_model_checkpoint": "unicorn"}}, 400),
        ({"override_settings": {"sd_model_checkpoint": "practice [abc]"}}, 200),
        ({"subseed_strength": 0.4}, 400),
        ({"eta": 0.5}, 400),
        ({"clip_skip": 2}, 400),
        ({"unheard_of": "yes"}, 400),
        ({"alwayson_scripts": {}, "styles": [], "tiling": False}, 200),
        ({"eta": None, "s_noise": 1.0, "subseed": -1, "hr_scale": 2, "send_images": True}, 200),
    ],
)
def test_what_cannot_be_honoured(live: Live, fields: dict[str, Any], status: int) -> None:
    answer = live.http.post("/sdapi/v1/txt2img", json=FIXED | fields)
    assert answer.status_code == status, answer.text
    if status != 200:
        assert answer.json()["detail"]


@pytest.mark.parametrize("odd", ['"denoising_strength": Infinity', '"comments": "\\ud800"'])
def test_what_is_no_json_is_not_told_again(live: Live, odd: str) -> None:
    text = f'{{"prompt": "a fox", "width": 256, "height": 256, {odd}, "auth": "user:secret"}}'
    headers = {"content-type": "application/json"}
    answer = live.http.post("/sdapi/v1/txt2img", content=text, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.json()["parameters"]["prompt"] == "a fox"
    assert "secret" not in answer.text


def test_progress_and_interrupt(live: Live) -> None:
    found: dict[str, Any] = {}

    def generate() -> None:
        body = FIXED | {"prompt": "slow", "steps": 900}
        found.update(live.http.post("/sdapi/v1/txt2img", json=body).json())

    thread = threading.Thread(target=generate)
    thread.start()
    wait(lambda: live.http.get("/sdapi/v1/progress").json()["current_image"] is not None)
    progress = live.http.get("/sdapi/v1/progress").json()
    assert 0 <= progress["progress"] < 1
    assert progress["eta_relative"] > 0
    assert progress["state"]["job_count"] == 1
    assert progress["state"]["sampling_steps"] == 900
    assert opened(progress["current_image"]).format == "JPEG"
    assert live.http.post("/sdapi/v1/interrupt").status_code == 200
    thread.join(60)
    assert found["images"] == []


def test_interrupt_leaves_other_jobs_alone(live: Live) -> None:
    job = live.submit("slow", steps=30)
    wait(lambda: live.service.queue().running == job)
    live.http.post("/sdapi/v1/interrupt")
    assert live.wait(job)["job"]["state"] == "done"


def test_png_info(live: Live) -> None:
    picture = live.http.post("/sdapi/v1/txt2img", json=FIXED | {"seed": 9}).json()["images"][0]
    for text in (picture, f"data:image/png;base64,{picture}"):
        found = live.http.post("/sdapi/v1/png-info", json={"image": text}).json()
        assert found["info"].startswith("a fox\n")
        assert found["parameters"]["seed"] == 9
    assert live.http.post("/sdapi/v1/png-info", json={"image": "§"}).status_code == 400


def test_the_rest_that_clients_probe(live: Live) -> None:
    for name in ("embeddings", "scripts", "cmd-flags", "memory"):
        assert isinstance(live.http.get(f"/sdapi/v1/{name}").json(), dict)
    for name in ("refresh-checkpoints", "refresh-loras", "refresh-vae", "reload-checkpoint"):
        assert live.http.post(f"/sdapi/v1/{name}").json() == {}
    assert live.http.post("/sdapi/v1/options", json={"CLIP_stop_at_last_layers": 2}).is_error
    assert live.http.post("/sdapi/v1/img2img", json={"init_images": []}).status_code == 501
    live.wait(live.submit("x", size=SMALL))
    assert live.http.post("/sdapi/v1/unload-checkpoint").status_code == 200
    wait(lambda: not live.service.queue().loaded)


def test_a_setting_of_half_a_character_is_refused_in_a_sentence(live: Live) -> None:
    body, headers = rb'{"override_settings": {"\ud800": 1}}', {"content-type": "application/json"}
    answer = live.http.post("/sdapi/v1/txt2img", content=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith(r"The setting '\ud800' can't be changed.")
