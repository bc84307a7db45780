"""The Queue in a real browser; and what is said where no queue can be shown."""

import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Locator, expect

from browsing import PREDICT, Site, Visit
from qwen_image_tool.ui.queue import board
from running import server


def submit(site: Site, prompt: str, **more: Any) -> str:
    body = {"model": "practice", "prompt": prompt, "size": "256x256", "seed": 5, **more}
    return str(site.http.post("/api/jobs", json=body).json()["job"]["id"])


def waiting(site: Site) -> list[str]:
    return [job["request"]["prompt"] for job in site.http.get("/api/queue/jobs").json()]


def row(visit: Visit, prompt: str) -> Locator:
    return visit.page.locator("#qit-board li", has_text=prompt)


pytestmark = pytest.mark.usefixtures("calm")


def test_order_and_cancel(site: Site) -> None:
    with site.visit() as visit:
        submit(site, "very slow, endless first", steps=200)
        for prompt in ("second", "third", "fourth"):
            submit(site, prompt)
        visit.go("Queue")
        visit.sees("Waiting (3)")
        visit.sees(re.compile(r"Drawing: step \d+ of 200 · "))
        row(visit, "fourth").get_by_role("button", name="Sooner").click()
        site.wait_for(lambda: waiting(site), lambda found: found == ["second", "fourth", "third"])
        expect(visit.page.locator("#qit-board li").nth(2)).to_contain_text("fourth")
        row(visit, "second").get_by_role("button", name="Later").click()
        site.wait_for(lambda: waiting(site), lambda found: found == ["fourth", "second", "third"])
        row(visit, "third").get_by_role("button", name="Cancel").click()
        site.wait_for(lambda: waiting(site), lambda found: found == ["fourth", "second"])
        visit.shot("queue-busy")
        row(visit, "very slow, endless first").get_by_role("button", name="Cancel").click()
        expect(row(visit, "very slow, endless first")).to_contain_text("Stopped")
        expect(row(visit, "second")).to_contain_text("Done in")


def test_what_failed_is_told_and_tried_again(site: Site) -> None:
    with site.visit() as visit:
        submit(site, "fail disk full")
        visit.go("Queue")
        expect(row(visit, "fail disk full")).to_contain_text("The fake failed. Do something.")
        row(visit, "fail disk full").get_by_role("button", name="Retry").click()
        expect(row(visit, "fail disk full")).to_have_count(2)
        visit.press("Clear what has ended")
        visit.sees("Nothing waits.")
        expect(visit.page.locator("#qit-board li")).to_have_count(0)


def test_settings_go_back_into_the_form(site: Site) -> None:
    with site.visit() as visit:
        submit(site, "a blue star", size="320x180", steps=7)
        visit.go("Queue")
        row(visit, "a blue star").get_by_role("button", name="Restore settings").click()
        expect(visit.field("Prompt")).to_have_value("a blue star")
        expect(visit.field("Size")).to_have_value("320 x 180 pixels")
        visit.advanced()
        expect(visit.field("Steps")).to_have_value("7")


def test_pause_and_resume(site: Site) -> None:
    with site.visit() as visit:
        visit.go("Queue")
        submit(site, "endless")
        visit.press("Pause and free the memory")
        visit.sees("The queue is paused and the memory is free for other programs.")
        visit.go("Create")
        visit.state("queued")
        expect(visit.stage).to_contain_text("The queue is paused.")
        visit.stage.get_by_role("button", name="Resume").click()
        visit.state("running")


def test_nobody_asks_for_a_board_that_nobody_sees(site: Site) -> None:
    with site.visit() as visit:

        def for_the_queue() -> set[int]:
            visit.go("Queue")
            shown = asked_for(visit)
            visit.go("Create")
            return shown - asked_for(visit)

        [board] = site.wait_for(for_the_queue, lambda found: len(found) == 1, 60)
        visit.go("Queue")
        site.wait_for(lambda: asked_for(visit), lambda found: board in found, 60)
        visit.look_away()
        site.wait_for(lambda: asked_for(visit), lambda found: board not in found, 60)
        visit.look_away(False)
        site.wait_for(lambda: asked_for(visit), lambda found: board in found, 60)


def asked_for(visit: Visit) -> set[int]:
    """Numbers of the events that the page tells the server by itself, in one and a half seconds."""
    found: set[int] = set()

    def asked(request: Any) -> None:
        if request.url.endswith("/predict"):
            found.add(request.post_data_json["fn_index"])

    visit.page.wait_for_timeout(1200)
    visit.page.on("request", asked)
    visit.page.wait_for_timeout(1500)
    visit.page.remove_listener("request", asked)
    return found


def test_a_button_that_comes_too_late_says_so(site: Site) -> None:
    with site.visit() as visit:
        submit(site, "endless")
        job = submit(site, "too late")
        visit.go("Queue")
        expect(row(visit, "too late")).to_be_visible()
        visit.page.route(PREDICT, lambda route: _late(route, site, job))
        row(visit, "too late").get_by_role("button", name="Cancel").click()
        visit.sees("The job is cancelled already.")
        visit.shot("toast")
        visit.page.get_by_role("button", name="Close", exact=True).click()
        expect(visit.page.get_by_text("The job is cancelled already.")).to_have_count(0)


def _late(route: Any, site: Site, job: str) -> None:
    """Somebody else cancels it just before."""
    if job in (route.request.post_data or "") and "cancel" in route.request.post_data:
        site.http.post(f"/api/jobs/{job}/cancel")
    route.continue_()


def test_a_job_that_ends_between_two_looks_is_shown_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server(tmp_path) as live:
        job = live.submit("a red circle")
        live.wait(job)
        before = live.service.queue().model_copy(update={"running": job})
        monkeypatch.setattr(live.service, "queue", lambda: before)
        now = board(live.service)
    assert [each.id for each in now.ended] == [job]
    assert (now.running, now.progress) == (None, None)
