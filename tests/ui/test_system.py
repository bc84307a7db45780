"""The System tab in a real browser: memory, the worker, the doctor, the log, diagnostics."""

import re

import pytest
from playwright.sync_api import expect

from browsing import Site, Visit
from running import TOKEN


def submit(site: Site, prompt: str, **more: int) -> None:
    body = {"model": "practice", "prompt": prompt, "size": "256x256", "seed": 5, **more}
    assert site.http.post("/api/jobs", json=body).status_code == 201


pytestmark = pytest.mark.usefixtures("calm")


def test_memory_disk_and_the_doctor(site: Site) -> None:
    with site.visit() as visit:
        visit.go("System")
        gauges = visit.page.locator("#qit-live")
        expect(gauges).to_contain_text(re.compile(r"[\d.]+ GiB free of [\d.]+ GiB"))
        expect(gauges).to_contain_text(re.compile(r"Disk /.*models take"))
        found = visit.page.locator("#qit-checks")
        expect(found).to_contain_text("The practice model is complete.", timeout=60_000)
        expect(found.locator("li.pass").first).to_be_visible()
        visit.shot("system")
        visit.press("Check again")
        expect(found).to_contain_text("The practice model is complete.")


def test_the_worker_gives_its_memory_back(site: Site) -> None:
    with site.visit() as visit:
        visit.go("System")
        submit(site, "endless to watch")
        visit.sees(re.compile(r"Drawing “endless to watch”, with \d+ MiB of memory\."))
        visit.press("Pause and free the memory")
        visit.sees("The queue is paused and the memory is free for other programs.")
        site.wait_for(
            lambda: site.http.get("/api/queue").json()["loaded"], lambda loaded: not loaded
        )
        visit.press("Resume")
        visit.sees(re.compile("Drawing “endless to watch”"))
        visit.go("Create")
        visit.press("Cancel")
        visit.go("System")
        visit.sees(re.compile("Ready for the next picture: the model holds"))
        visit.press("Free the memory now")
        visit.sees("No model is loaded: the next picture loads it.")


def test_the_log_is_searched_and_filtered(site: Site) -> None:
    with site.visit() as visit:
        submit(site, "say Zebra on stderr exit 3")
        visit.go("System")
        log = visit.page.locator("#qit-log")
        expect(log).to_contain_text("Application startup complete.")
        visit.write("Search the log", "startup complete")
        expect(log).not_to_contain_text("Started server process")
        expect(log).to_contain_text("Application startup complete.")
        visit.write("Search the log", "no such words anywhere")
        visit.sees("The log has nothing like that.")
        visit.write("Search the log", "")
        visit.choose("Show", "Warnings and errors")
        expect(log).not_to_contain_text(" INFO ")


def test_diagnostics_tell_no_secrets(site: Site) -> None:
    with site.visit(permissions=["clipboard-read", "clipboard-write"]) as visit:
        visit.go("System")
        visit.press("Copy diagnostics")
        shown = visit.page.locator("#qit-diagnostics textarea")
        expect(shown).to_have_value(re.compile("## QwenImageTool"), timeout=60_000)
        text = shown.input_value()
        for part in ("## Device", "## Checks", "## Settings", "practice: ready", "## Log"):
            assert part in text
        assert TOKEN not in text
        site.wait_for(lambda: clipboard(visit), lambda found: found == text)


def clipboard(visit: Visit) -> str:
    return str(visit.page.evaluate("() => navigator.clipboard.readText()"))
