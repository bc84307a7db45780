"""The Models tab in a real browser, against a local hub with faults."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, Locator, expect
from safetensors.torch import load_file, save_file

import tiny
from browsing import Site, Visit
from hub import Fault, LocalHub, serve
from running import process

MODEL, REPO = "qwen-image", "Qwen/Qwen-Image"
LICENCE = b"Tongyi Qianwen RESEARCH LICENSE AGREEMENT\n" + b"You may look at the pictures.\n" * 40
SLOW = 10_000  # bytes a second


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    repos = tmp_path_factory.mktemp("repos")
    with serve() as hub:
        hub.add_folder(REPO, tiny.save(repos / "20b"))
        hub.add_folder("Qwen/Qwen-Image-2.1", tiny.save_21(repos / "21"))
        hub.repos["Qwen/Qwen-Image-2.1"]["LICENSE"] = LICENCE
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def site(home: Path, hub: LocalHub, browser: Browser, shots: Path) -> Iterator[Site]:
    """`qit ui` whose model hub is the local one, and which knows the tiny model's width."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.endpoint)
        patch.setenv("QIT_LOCAL_HUB", "1")
        patch.setenv("HF_HUB_CACHE", str(home / "none"))
        first = "from qwen_image_tool.store import formats; formats.WIDTHS[32] = 'qwen-image'"
        with process(home, "--no-browser", command="ui", first=first) as running:
            yield Site(running.url, running.http, running.child, browser, shots)


@pytest.fixture
def visit(site: Site, hub: LocalHub) -> Iterator[Visit]:
    hub.bytes_per_second, hub.faults = 0, []
    with site.visit() as visit:
        visit.go("Models")
        expect(book(visit, "Practice model")).to_be_visible()
        yield visit


@pytest.fixture
def here(site: Site, hub: LocalHub) -> None:
    """Qwen-Image is on this computer, whole."""
    hub.bytes_per_second, hub.faults = 0, []
    if state(site) != "ready":
        site.http.post(f"/api/models/{MODEL}/download", json={})
    site.wait_for(lambda: state(site), lambda found: found == "ready")
    site.wait_for(lambda: busy(site), lambda found: not found)


@pytest.fixture
def gone(site: Site) -> None:
    """Nothing of Qwen-Image is here."""
    if busy(site):
        site.http.post(f"/api/models/{MODEL}/cancel")
        site.wait_for(lambda: busy(site), lambda found: not found)
    site.http.delete(f"/api/models/{MODEL}")


def state(site: Site) -> str:
    return str(site.http.get(f"/api/models/{MODEL}").json()["state"])


def busy(site: Site) -> bool:
    return any(each["state"] == "running" for each in site.http.get("/api/transfers").json())


def book(visit: Visit, name: str = "Qwen-Image") -> Locator:
    heading = visit.page.get_by_role("heading", name=name, exact=True)
    return visit.page.locator(".qit-book").filter(has=heading)


def press(where: Locator, name: str | re.Pattern[str]) -> None:
    where.get_by_role("button", name=name).first.click()


def says(where: Locator, text: str | re.Pattern[str]) -> None:
    expect(where.get_by_text(text).first).to_be_visible()


def unfold(where: Locator) -> None:
    where.get_by_text("Files, licence and repair").click()


def damage(home: Path, change: Callable[[bytearray], None]) -> str:
    """Change a weight file of Qwen-Image; returns its name."""
    [shard] = (home / "models" / MODEL / "vae").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    change(content)
    shard.write_bytes(content)
    return shard.name


def test_what_each_model_needs_here_and_the_best_one(visit: Visit) -> None:
    best = visit.page.locator(".qit-book.best")
    expect(best).to_be_visible(timeout=60_000)
    says(best, "Best for this computer")
    says(best, re.compile(r"Runs on "))
    says(best, "Memory")
    expect(best.get_by_role("button", name="Get: ")).to_be_visible()
    says(book(visit, "Practice model"), "✓ on this computer")
    says(visit.page.locator(".qit-gauges"), re.compile(r"models take .*B"))
    visit.page.get_by_text(re.compile(r"^Models that this version can't run yet")).click()
    says(book(visit, "Qwen-Image-Layered"), re.compile("It splits a picture into layers"))
    visit.shot("models")


@pytest.mark.usefixtures("gone")
def test_get_pause_reload_resume(visit: Visit, hub: LocalHub, site: Site) -> None:
    hub.bytes_per_second = SLOW
    press(book(visit), re.compile("^Get: "))
    says(book(visit), re.compile(r"Downloading · .* of .*B · .* a second · .* left"))
    visit.shot("models-downloading")
    press(book(visit), "Pause")
    says(book(visit), re.compile("^Paused · "))
    expect(book(visit).get_by_role("progressbar")).to_have_attribute(
        "aria-valuenow", re.compile(r"^\d{1,2}$")
    )
    visit.reload()
    visit.go("Models")
    says(book(visit), "not complete")
    hub.bytes_per_second = 0
    press(book(visit), "Resume")
    says(book(visit), "The download is complete.")
    says(book(visit), "✓ on this computer")
    assert any(seen.range for seen in hub.requests), "it began anew"


@pytest.mark.usefixtures("gone")
def test_cancel_throws_away_what_came(visit: Visit, hub: LocalHub, home: Path) -> None:
    hub.bytes_per_second = SLOW
    press(book(visit), re.compile("^Get: "))
    says(book(visit), re.compile("a second"))
    press(book(visit), "Cancel")
    expect(book(visit).get_by_role("progressbar")).to_have_count(0)
    expect(book(visit).get_by_role("button", name=re.compile("^(Get|Resume): "))).to_be_visible()
    assert not list((home / "models" / MODEL).rglob("partial/*"))


@pytest.mark.usefixtures("gone")
def test_a_failure_has_its_sentence_and_its_button(visit: Visit, hub: LocalHub) -> None:
    hub.faults = [Fault("404", where="api", match="Qwen-Image")]
    press(book(visit), re.compile("^Get: "))
    says(book(visit).get_by_role("alert"), re.compile(r"has no Qwen/Qwen-Image\."))
    visit.shot("models-failed")
    press(book(visit), "Resume")
    says(book(visit), "The download is complete.")


@pytest.mark.usefixtures("here")
def test_damage_is_found_and_mended(visit: Visit, home: Path) -> None:
    unfold(book(visit))
    press(book(visit), "Check quickly")
    says(book(visit), "Nothing is missing: sizes and headers are right.")

    def flip(content: bytearray) -> None:
        content[-1] ^= 1

    name = damage(home, flip)
    press(book(visit), "Check every byte")
    fault = book(visit).get_by_role("alert")
    says(fault, re.compile(rf"vae/{name} has changed: its hash is not the published one\."))
    visit.shot("models-damaged")
    press(fault, "Repair")
    says(book(visit), "Mended:")
    press(book(visit), "Check every byte")
    says(book(visit), "Every byte is as published.")


@pytest.mark.usefixtures("here")
def test_update_and_clear(visit: Visit, hub: LocalHub, site: Site) -> None:
    unfold(book(visit))
    before = hub.commit(REPO)[:12]
    says(book(visit), before)
    hub.commits[REPO] = "f" * 40
    hub.repos[REPO]["tokenizer/more.json"] = b"{}"
    press(book(visit), "Update")
    says(book(visit), re.compile(r"goes from revision \w+ to f{40}: \d+ files change\."))
    says(book(visit), "f" * 12)
    hub.sent.clear()
    press(book(visit), "Clear and download again")
    says(book(visit), "Then everything is fetched anew. What was imported stays.")
    press(book(visit).get_by_role("alert"), "Clear and download again")
    site.wait_for(lambda: [name for name in hub.sent if name.endswith(".safetensors")], bool)
    says(book(visit), "The download is complete.")


@pytest.mark.usefixtures("here")
def test_delete_says_what_it_frees(visit: Visit, home: Path) -> None:
    unfold(book(visit))
    press(book(visit), "Delete")
    says(book(visit).get_by_role("alert"), re.compile(r"[\d.]+ [kM]B become free\."))
    visit.shot("models-delete")
    press(book(visit), "Close")
    expect(book(visit).get_by_role("alert")).to_have_count(0)
    press(book(visit), "Delete")
    press(book(visit), "Delete Qwen-Image")
    expect(book(visit).get_by_role("button", name="Get: ")).to_be_visible()
    assert not (home / "models" / MODEL).exists()


def test_a_licence_is_read_before_it_is_agreed_to(visit: Visit, home: Path, hub: LocalHub) -> None:
    name = "Qwen-Image-2.1"
    says(book(visit, name), "Not for commercial use")
    press(book(visit, name), re.compile("^Get: "))
    text = book(visit, name).get_by_role("region", name="Text of the licence")
    expect(text).to_contain_text("RESEARCH LICENSE AGREEMENT")
    assert not (home / "models" / "qwen-image-2.1").exists()
    visit.shot("models-licence")
    press(book(visit, name), "I have read it and agree: download")
    says(book(visit, name), "The download is complete.")
    assert list((home / "models" / "licences").glob("qwen-research-*.json"))
    unfold(book(visit, name))
    press(book(visit, name), "Read the licence")
    expect(text).to_be_visible()
    agree = book(visit, name).get_by_role("button", name=re.compile("I have read it"))
    expect(agree).to_have_count(0)
    press(book(visit, name), "Close")
    hub.repos["Qwen/Qwen-Image-2.1"]["LICENSE"] = LICENCE + b"But not on Sundays.\n"
    hub.commits["Qwen/Qwen-Image-2.1"] = "e" * 40
    press(book(visit, name), "Update")
    failed = book(visit, name).get_by_role("alert")
    says(failed, re.compile(r"reads otherwise than when you agreed to it"))
    says(failed, "Press “Read the licence”: the download goes on once you agree.")
    press(failed, "Read the licence")
    expect(text).to_contain_text("But not on Sundays.")
    agree.click()
    says(book(visit, name), "The download is complete.")
    says(book(visit, name), "e" * 12)


@pytest.mark.usefixtures("gone")
def test_a_file_of_another_program_is_used_where_it_lies(
    visit: Visit, home: Path, tmp_path: Path, hub: LocalHub
) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name, data in hub.repos[REPO].items():
        if name.startswith("transformer/") and name.endswith(".safetensors"):
            (tmp_path / "part").write_bytes(data)
            tensors |= load_file(tmp_path / "part")
    (tmp_path / "comfy").mkdir()
    save_file(tensors, tmp_path / "comfy" / "any name.safetensors")
    (tmp_path / "comfy" / "notes.safetensors").write_bytes(b"not a weight file")
    visit.page.get_by_role("button", name="Use files that other programs have").click()
    visit.write("A file or a folder", str(tmp_path / "nowhere"))
    visit.press("Look there")
    visit.sees(re.compile(r"nowhere is not there\."))
    visit.write("A file or a folder", str(tmp_path / "comfy"))
    visit.press("Look there")
    row = visit.page.locator("li", has_text="any name.safetensors")
    says(row, re.compile(r"qwen-image · transformer · BF16"))
    expect(visit.page.locator("li", has_text="notes.safetensors")).not_to_contain_text("Use for")
    visit.shot("models-import")
    row.get_by_role("button", name="Use for Qwen-Image", exact=True).click()
    says(book(visit), "The file is used where it lies.")
    hub.sent.clear()
    press(book(visit), re.compile("^Resume: "))
    says(book(visit), "✓ on this computer")
    weights = [name for name in hub.sent if name.endswith(".safetensors")]
    assert weights
    assert not [name for name in weights if name.startswith("transformer/")]


@pytest.mark.usefixtures("gone")
def test_create_leads_to_the_model_and_back(visit: Visit, site: Site) -> None:
    """A Create that nobody touches, in another tab, learns that the model is here."""
    second = site.another(visit)
    for one in (visit, second):
        one.go("Create")
        one.choose("Model", "Qwen-Image  ·")
        expect(one.field("Model")).to_have_value(re.compile("to download"))
    visit.press("Get this model")
    expect(book(visit)).to_be_visible()
    expect(book(visit)).to_be_focused()
    press(book(visit), re.compile("^Get: "))
    says(book(visit), "The download is complete.")
    expect(second.field("Model")).to_have_value(re.compile("^Qwen-Image  ·  ✓ on this computer$"))
    expect(second.plan.get_by_role("button", name="Get this model")).to_have_count(0)
    visit.go("Create")
    visit.choose("Model", "Practice")
    visit.write("Prompt", "a fox that stays")
    visit.go("Models")
    press(book(visit), "Draw with this model")
    expect(visit.field("Model")).to_have_value(re.compile("^Qwen-Image  ·  ✓ on this computer$"))
    expect(visit.field("Prompt")).to_have_value("a fox that stays")
