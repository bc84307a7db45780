"""The Settings tab in a real browser."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, expect

from browsing import OPENS, PHONE, Site, Visit, findings
from qwen_image_tool.server.gate import Password
from running import TOKEN, process


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def site(home: Path, browser: Browser, shots: Path) -> Iterator[Site]:
    """With a config file of its own, that lets the network in."""
    (home / "config.toml").write_text("# mine\nlan = true\nidle_seconds = 300.0\n", "utf-8")
    Password(home / "data").set("long enough")
    with process(home, "--no-browser", command="ui") as running:
        url = running.url.replace(re.sub(r"http://(.*):\d+", r"\1", running.url), "127.0.0.1")
        yield Site(url, running.http, running.child, browser, shots)


def field(visit: Visit, label: str) -> Locator:
    """A setting's: its label goes on with its help."""
    return visit.page.get_by_label(re.compile(label)).first


def written(home: Path) -> dict[str, object]:
    return tomllib.loads((home / "config.toml").read_text("utf-8"))


def test_what_is_declared_is_a_form_and_is_kept(site: Site, home: Path) -> None:
    with site.visit() as visit:
        visit.go("Settings")
        visit.sees("They are read when QwenImageTool starts.")
        expect(field(visit, "Idle seconds")).to_have_value("300")
        expect(field(visit, "Picture folder")).to_be_disabled()
        visit.sees(re.compile("QIT_OUTPUT decides it"))
        expect(visit.page.get_by_label("local_hub")).to_have_count(0)
        field(visit, "Idle seconds").fill("90")
        field(visit, "Model folder").fill(str(home / "elsewhere"))
        visit.choose("Model hub", "ModelScope")
        visit.shot("settings")
        visit.press("Save")
        visit.sees(re.compile("Start QwenImageTool again to use what was changed: Model folder,"))
        assert written(home) == {
            "lan": True,
            "idle_seconds": 90,
            "models": str(home / "elsewhere"),
            "source": "modelscope",
        }
        assert (home / "config.toml").read_text("utf-8").startswith("# mine\n")
        field(visit, "Idle seconds").fill("-1")
        visit.press("Save")
        visit.sees(re.compile('The setting "Idle seconds" is -1'))
        visit.sees("Use more than 0.")
        field(visit, "Idle seconds").fill("600")
        field(visit, "Model folder").fill(str(home / "config.toml" / "models"))
        visit.press("Save")
        visit.sees(re.compile('The setting "Model folder" can\'t be .*config.toml is a file'))
        field(visit, "Model folder").fill("")
        visit.choose("Model hub", "Hugging Face")
        visit.press("Save")
        visit.sees(re.compile(r"what was changed: Idle seconds\."))
        assert written(home) == {"lan": True}


@pytest.mark.parametrize("look", ["en", "zh"])
def test_the_gates_own_pages(site: Site, shots: Path, browser: Browser, look: str) -> None:
    """Closed, a wrong password, the right one: in the page's look and the browser's language."""
    options: dict[str, Any] = {"viewport": PHONE}
    options["color_scheme"] = "dark" if look == "zh" else "light"
    said = {
        "en": ("Log in with the password", "That was not it.", "Log in"),
        "zh": ("用密码登录", "密码不对。", "登录"),
    }
    link, wrong, button = said[look]
    locale = {"en": "en-US", "zh": "zh-CN"}[look]
    with browser.new_context(locale=locale, **options) as context:
        page = context.new_page()
        page.goto(f"{site.url}/?__t=of-the-last-start")
        page.screenshot(path=shots / f"closed-{look}.png")
        assert findings(page) == []
        page.get_by_role("link", name=link).click()
        page.keyboard.type("not this one")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_have_text(wrong)
        page.screenshot(path=shots / f"login-{look}.png")
        assert findings(page) == []
        page.locator("input").fill("long enough")
        page.get_by_role("button", name=button).click()
        page.wait_for_selector("#qit-tabs", timeout=OPENS)


def test_the_network_and_other_programs(site: Site) -> None:
    with site.visit() as visit:
        visit.go("Settings")
        expect(visit.page.get_by_role("img", name="The address as a QR code")).to_be_visible()
        visit.sees(re.compile("It is not encrypted"))
        visit.write("New password, 8 characters or more", "short")
        visit.press("Set the password")
        visit.sees("The password is too short.")
        visit.write("New password, 8 characters or more", "another long one")
        visit.press("Set the password")
        expect(visit.field("New password, 8 characters or more")).to_have_value("")
        programs = visit.page.locator("#qit-programs")
        expect(programs).to_contain_text("/v1")
        expect(programs).not_to_contain_text(TOKEN)
        visit.press("Show the token")
        expect(programs).to_contain_text(TOKEN)
        visit.press("Hide the token")
        expect(programs).not_to_contain_text(TOKEN)


def test_colours_and_language_stay(site: Site) -> None:
    with site.visit() as visit:
        body = visit.page.locator("body")
        visit.go("Settings")
        expect(body).not_to_have_class(re.compile("dark"))
        visit.choose("Colours", "Dark")
        expect(body).to_have_class(re.compile("dark"))
        visit.reload()
        expect(body).to_have_class(re.compile("dark"))
        visit.go("Settings")
        expect(visit.field("Colours")).to_have_value("Dark")
        visit.choose("Language", "简体中文")
        visit.page.get_by_role("tab", name="设置", exact=True).click(timeout=60_000)
        expect(visit.field("语言")).to_have_value("简体中文")
        visit.shot("settings-dark-zh")
        visit.choose("语言", "跟随浏览器")
        expect(visit.page.get_by_role("tab", name="Settings", exact=True)).to_be_visible(
            timeout=60_000
        )
