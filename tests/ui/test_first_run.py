"""Somebody who has never run such a model: from the start page to a picture, without reading."""

import io
import re

import numpy as np
from gradio_client import Client
from PIL import Image
from playwright.sync_api import expect

from browsing import Site
from running import BEARER


def test_first_run_to_the_first_picture(real_site: Site) -> None:
    with real_site.visit() as visit:
        visit.sees("Three steps to your own pictures")
        visit.sees("Runs on the CPU", seconds=60)
        visit.press("Draw a first picture now")
        visit.state("running")
        visit.sees(re.compile("Drawing: step|Done in"), seconds=60)
        visit.shot("drawing")
        visit.state("done", seconds=120)
        picture = visit.stage.locator("img").get_attribute("src")
        assert colours(real_site.http.get(picture or "").content) >= {"red", "blue"}
        visit.shot("first-picture")
        third = visit.page.locator(".qit-guide li").nth(2)
        expect(third).to_contain_text("Get the real model for this computer")
        third.get_by_role("button", name=re.compile("^Get Qwen-Image")).click()
        expect(visit.page.locator(".qit-book.best")).to_be_focused(timeout=60_000)


def test_the_same_through_gradio_client(real_site: Site) -> None:
    client = Client(real_site.url, headers=BEARER, verbose=False, analytics_enabled=False)
    try:
        answer = client.predict(prompt="a blue circle on a white background", api_name="/generate")
    finally:
        client.close()
    assert answer["state"] == "done"
    [picture] = answer["pictures"]
    assert "blue" in colours(real_site.http.get(picture["url"]).content)


def colours(data: bytes) -> set[str]:
    """Which of red and blue cover more than a hundredth of the picture."""
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=int)
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    share = {
        "red": ((red > 180) & (green < 110) & (blue < 110)).mean(),
        "blue": ((blue > 180) & (red < 110) & (green < 140)).mean(),
    }
    return {name for name, part in share.items() if part > 0.01}
