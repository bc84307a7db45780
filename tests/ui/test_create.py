"""Create in a real browser: every control, the plan, the picture on its way, what goes wrong."""

import re
from typing import Any

import pytest
from playwright.sync_api import Locator, Route, expect
from playwright.sync_api import Request as BrowserRequest

from browsing import DESKTOP, LAPTOP, OPENS, PHONE, PREDICT, Site, Visit
from qwen_image_tool.catalog.sizes import RATIOS, RESOLUTIONS, SIZES


def newest(site: Site) -> dict[str, Any]:
    """The job that was queued last."""
    found: dict[str, Any] = site.http.get("/api/jobs?limit=1").json()["jobs"][0]["job"]
    return found


def generate(visit: Visit, prompt: str, steps: int | None = None) -> None:
    visit.write("Prompt", prompt)
    if steps:
        visit.advanced()
        visit.write("Steps", str(steps))
    visit.press("Generate")


pytestmark = pytest.mark.usefixtures("calm")


def test_the_size_menu(site: Site) -> None:
    """All 28, by keyboard: down the resolutions of one ratio, up those of the next."""
    with site.visit() as visit:
        visit.choose("Resolution", RESOLUTIONS[0])
        order = list(RESOLUTIONS)
        for ratio in RATIOS:
            for place, resolution in enumerate(order):
                if place:
                    visit.step("Resolution", "ArrowDown" if order[0] == "Small" else "ArrowUp")
                size = SIZES[ratio, resolution]
                expect(visit.field("Size")).to_have_value(f"{size.width} x {size.height} pixels")
            if ratio != RATIOS[-1]:
                visit.step("Aspect Ratio", "ArrowDown")
                order.reverse()
        expect(visit.field("Size")).not_to_be_editable()


def test_the_resolution_follows_the_ratio(site: Site) -> None:
    with site.visit() as visit:
        visit.choose("Resolution", "Small")
        visit.choose("Aspect Ratio", "9:16")
        expect(visit.field("Resolution")).to_have_value("Small")
        expect(visit.field("Size")).to_have_value("288 x 512 pixels")
        visit.choose("Resolution", "Model's own")
        expect(visit.field("Size")).to_have_value("180 x 320 pixels")


def test_labels_slide_under_the_buttons(site: Site) -> None:
    def slides(visit: Visit) -> bool:
        """Of a window that ends in the middle of the buttons, over a label."""
        label = visit.page.locator("label span", has_text="Pictures").first
        visit.page.set_viewport_size({"width": 1180, "height": 1000})
        [bar, box] = [each.bounding_box() for each in (visit.page.locator("#qit-go"), label)]
        assert bar
        assert box
        middle = box["y"] + box["height"] / 2
        height = int(middle + bar["height"] / 2)
        visit.page.set_viewport_size({"width": 1180, "height": height})
        above = "([x, y]) => !!document.elementFromPoint(x, y)?.closest('#qit-go')"
        return bool(visit.page.evaluate(above, [box["x"] + box["width"] / 2, middle]))

    with site.visit() as visit:  # asked again, because what comes late moves the labels
        site.wait_for(lambda: slides(visit), bool)


def test_a_number_beyond_its_limits_is_said_and_the_page_goes_on(site: Site) -> None:
    """Gradio's own limits would answer every event of the form with an error that says nothing."""
    with site.visit() as visit:
        visit.advanced()
        for label, wrong, right, said in (
            ("Steps", "0", "5", "The number of steps is 0. Use 1 or more."),
            ("True CFG scale", "99", "3", "The CFG scale is 99. Use 50 or less."),
            ("Pictures", "101", "1", "The number of pictures is 101. Use 100 or less."),
        ):
            visit.write(label, wrong)
            for part in re.split(r"(?<=\.) ", said):
                expect(visit.plan).to_contain_text(part)
            visit.write(label, right)
            expect(visit.plan).to_contain_text("Runs on", timeout=OPENS)


def test_every_control_is_in_the_request(site: Site) -> None:
    with site.visit() as visit:
        visit.choose("Aspect Ratio", "3:2")
        visit.choose("Resolution", "Small")
        visit.write("Negative prompt", "fog")
        visit.write("Pictures", "2")
        visit.write("Seed", "9223372036854775806")
        visit.advanced()
        visit.write("Steps", "5")
        visit.write("True CFG scale", "2.5")
        visit.choose("Mode", "Exact, as diffusers")
        visit.write("Prompt", "a letter A")
        visit.press("Generate")
        visit.state("done")
        assert newest(site)["request"] == {
            "model": "practice",
            "prompt": "a letter A",
            "negative_prompt": "fog",
            "size": "512x342",
            "steps": 5,
            "cfg": 2.5,
            "seed": 9223372036854775806,
            "images": 2,
            "mode": "exact",
            "truncate": False,
        }
        expect(visit.stage.locator("figure img")).to_have_count(2)


def test_the_plan_follows_the_controls(site: Site) -> None:
    with site.visit() as visit:
        expect(visit.plan).to_contain_text("Memory", timeout=OPENS)
        expect(visit.plan).to_contain_text("Runs on the CPU")
        visit.choose("Model", "Qwen-Image-2512")
        expect(visit.plan).to_contain_text("57.7 GB")
        expect(visit.plan.get_by_role("button", name="Get this model")).to_be_visible()
        expect(visit.field("Model")).to_have_value(re.compile("57.7 GB to download"))
        visit.advanced()
        expect(visit.field("Steps")).to_have_value("50")
        visit.write("Steps", "33")
        visit.field("Model").focus()
        visit.field("Steps").focus()
        expect(visit.field("Steps")).to_have_value("33")
        visit.step("Model", "ArrowUp")
        expect(visit.field("Model")).to_have_value(re.compile(r"Qwen-Image\s"))
        visit.step("Model", "ArrowUp")
        expect(visit.field("Model")).to_have_value(re.compile("Practice model"))
        expect(visit.field("Steps")).to_have_value("20")
        expect(visit.plan).not_to_contain_text("57.7 GB")
        visit.choose("Resolution", "Large")
        expect(visit.plan).to_contain_text("outside this model's limits")
        expect(visit.plan).to_contain_text("Nearest: size 512x512.")
        visit.choose("Resolution", "Small")
        expect(visit.plan).to_contain_text("What it will need")
        visit.write("True CFG scale", "1")
        visit.write("Negative prompt", "fog")
        expect(visit.plan).to_contain_text("A negative prompt does nothing at CFG 1.")
        visit.press("Generate")
        visit.sees("The prompt is empty.")


@pytest.mark.parametrize("late", ["sizes", "steps"])
def test_a_model_that_is_passed_by_leaves_nothing_in_the_form(site: Site, late: str) -> None:
    """Another is chosen before the answer for the first is there."""
    inputs = {"sizes": 3, "steps": 2}[late]

    def asks(request: BrowserRequest) -> bool:
        asked: Any = request.post_data_json if request.url.endswith("/predict") else None
        return bool(asked) and len(asked["data"]) == inputs

    with site.visit() as visit:
        expect(visit.plan).to_contain_text("Memory", timeout=OPENS)
        visit.advanced()
        held: list[Route] = []
        is_late = True

        def answer(route: Route) -> None:
            if is_late and asks(route.request):
                held.append(route)
            else:
                route.continue_()

        visit.page.route(PREDICT, answer)
        with visit.page.expect_request(asks):
            visit.choose("Model", "Qwen-Image-2512")
        visit.choose("Model", "Qwen-Image-2.1-Turbo")
        expect(visit.field("Model")).to_have_value(re.compile("Qwen-Image-2.1-Turbo"))
        is_late = False
        for route in held:
            route.continue_()
        expect(visit.field("Steps")).to_have_value("8")
        expect(visit.field("True CFG scale")).to_have_value("1")
        expect(visit.field("Size")).to_have_value("2048 x 2048 pixels")


def test_seeds_are_drawn_shown_and_used_again(site: Site) -> None:
    with site.visit() as visit:
        generate(visit, "first")
        visit.state("done")
        seed = str(newest(site)["request"]["seed"])
        visit.sees(f"Seed {seed}")
        visit.press("Again with another seed")
        visit.state("done")
        other = site.wait_for(lambda: newest(site), lambda job: job["request"]["seed"] != int(seed))
        assert other["request"]["prompt"] == "first"
        visit.sees(f"Seed {other['request']['seed']}")
        visit.press("Reuse last seed")
        expect(visit.field("Seed")).to_have_value(str(other["request"]["seed"]))
        visit.press("Random seed")
        expect(visit.field("Seed")).to_have_value("")


def test_settings_are_restored_and_the_picture_is_saved(site: Site) -> None:
    with site.visit() as visit:
        visit.choose("Aspect Ratio", "4:3")
        expect(visit.field("Size")).to_have_value("288 x 216 pixels")
        generate(visit, "a green ring")
        visit.state("done")
        visit.write("Prompt", "something else")
        visit.choose("Aspect Ratio", "1:1")
        visit.press("Restore settings")
        expect(visit.field("Prompt")).to_have_value("a green ring")
        expect(visit.field("Aspect Ratio")).to_have_value("4:3")
        expect(visit.field("Size")).to_have_value("288 x 216 pixels")
        expect(visit.field("Seed")).to_have_value(str(newest(site)["request"]["seed"]))
        with visit.page.expect_download() as saved:
            visit.page.get_by_role("link", name="Download").click()
        assert saved.value.suggested_filename.endswith(".png")


def test_progress_and_cancel(site: Site) -> None:
    with site.visit() as visit:
        generate(visit, "slow and endless", steps=1000)
        visit.sees(re.compile(r"Drawing: step \d+ of 1000"))
        visit.sees(re.compile(r"\d+ s left · 0\.\d+ s a step"))
        expect(visit.stage.locator("img[src^='data:image/jpeg']")).to_be_visible()
        expect(visit.stage.get_by_role("progressbar")).to_be_visible()
        visit.shot("progress")
        visit.press("Cancel")
        visit.state("cancelled")
        visit.sees("Stopped. Pictures that were finished are kept.")
        expect(visit.page.locator("#qit-cancel")).to_be_disabled()


def test_a_reload_and_more_tabs_change_nothing(site: Site) -> None:
    """More tabs than a browser opens connections to a host."""
    with site.visit() as visit:
        generate(visit, "endless, slow and seen by seven", steps=300)
        visit.sees(re.compile(r"Drawing: step"))
        job = visit.stage.get_attribute("data-job")
        visit.reload()
        every = [visit, *(site.another(visit) for _ in range(6))]
        for one in every:
            one.sees(re.compile(r"Drawing: step"))
            expect(one.stage).to_have_attribute("data-job", job or "")
            expect(one.field("Prompt")).to_have_value("endless, slow and seen by seven")
        every[-1].press("Cancel")
        for one in every:
            one.state("cancelled")


NOTIFICATIONS = """
window.told = [];
window.Notification = class {
  static permission = 'default';
  static async requestPermission() { return this.permission = 'granted'; }
  constructor(title, options) { window.told.push([title, options.body]); }
};
"""


def test_a_long_job_tells_when_it_has_ended(site: Site) -> None:
    """Once the person has allowed it, and only where the page is not looked at."""
    with site.visit() as visit:
        visit.page.add_init_script(NOTIFICATIONS)
        visit.reload()
        generate(visit, "very slow to wait for", steps=900)
        visit.press("Tell me when it is done")
        expect(visit.page.get_by_role("button", name="Tell me when it is done")).to_be_hidden()
        visit.press("Cancel")
        visit.state("cancelled")
        assert visit.page.evaluate("told") == []
        visit.press("Again with another seed")
        visit.state("running")
        visit.look_away()
        site.http.post(f"/api/jobs/{newest(site)['id']}/cancel")
        visit.page.wait_for_function("told.length === 1")
        [[title, body]] = visit.page.evaluate("told")
        assert title == "QwenImageTool"
        assert body == "Stopped. Pictures that were finished are kept."


def test_a_worker_that_dies_is_told_and_the_job_goes_on(site: Site) -> None:
    with site.visit() as visit:
        generate(visit, "slow once signal 9", steps=200)
        why = r"The process that draws was ended from outside\. \(SIGKILL during \w+\)"
        told = visit.stage.get_by_text(re.compile(rf"{why} The job goes on by itself\."))
        expect(told).to_be_visible(timeout=60_000)
        visit.shot("worker-died")
        visit.state("done", 60)


def test_a_failure_is_the_servers_sentence_with_its_button(site: Site) -> None:
    with site.visit() as visit:
        generate(visit, "say it and fail broken picture")
        visit.state("failed")
        for said in ("The fake failed.", "Do something.", "Nothing black was saved."):
            expect(visit.stage.get_by_role("alert")).to_contain_text(said)
        visit.shot("failed")
        first = newest(site)["id"]
        visit.press("Retry")
        site.wait_for(lambda: newest(site), lambda job: job["id"] != first)


def test_a_prompt_is_text_and_nothing_else(site: Site) -> None:
    prompt = '<b onclick="x">${1+1} {{this}} {s} \\n</b>'
    with site.visit() as visit:
        generate(visit, prompt)
        visit.state("done")
        expect(visit.stage.locator(".qit-prompt")).to_have_text(prompt)
        visit.go("Queue")
        expect(visit.page.locator("#qit-board").get_by_text(prompt)).to_be_visible()


def test_by_keyboard_alone(site: Site) -> None:
    with site.visit() as visit:
        keyboard, focused = visit.page.keyboard, visit.page.locator("*:focus")
        visit.page.locator("body").press("Tab")
        for _ in range(30):
            if focused.evaluate("e => e.closest('#qit-prompt') !== null"):
                break
            shown = focused.evaluate(
                "e => getComputedStyle(e).outlineStyle + getComputedStyle(e.closest('.wrap') || e)"
                ".outlineStyle"
            )
            assert shown != "nonenone", focused.evaluate("e => e.outerHTML")
            keyboard.press("Tab")
        keyboard.type("endless by keyboard")
        keyboard.press("Control+Enter")
        visit.state("running")
        assert newest(site)["request"]["prompt"] == "endless by keyboard"
        expect(visit.page.locator("#qit-cancel")).to_be_enabled()
        keyboard.press("Escape")
        visit.state("cancelled")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("light", {"viewport": DESKTOP}),
        ("dark", {"viewport": DESKTOP, "color_scheme": "dark"}),
        ("phone", {"viewport": PHONE}),
        ("phone-dark", {"viewport": PHONE, "color_scheme": "dark"}),
    ],
)
def test_it_fits_and_is_seen(site: Site, name: str, options: dict[str, Any]) -> None:
    with site.visit(**options) as visit:
        expect(visit.plan).to_contain_text("Memory", timeout=OPENS)
        visit.shot(f"create-{name}")
        assert visit.overflow() == 0
        visit.go("Queue")
        expect(visit.page.locator("#qit-board")).to_contain_text("Nothing waits.")
        visit.shot(f"queue-{name}")
        assert visit.overflow() == 0


@pytest.mark.parametrize("window", [LAPTOP, PHONE])
def test_shape_sentence_and_generate_are_seen_together(site: Site, window: Any) -> None:
    with site.visit(viewport=window) as visit:
        if window == PHONE:  # the walk-through may come after the form
            close = visit.page.get_by_role("button", name="Close the walk-through")
            visit.page.add_locator_handler(close, lambda found: found.click())
        expect(visit.plan).to_contain_text("Memory", timeout=OPENS)
        for one in (visit.field("Resolution"), visit.field("Prompt"), *buttons(visit)):
            expect(one).to_be_in_viewport(ratio=1)
        visit.write("Prompt", "endless to watch")
        visit.press("Generate")
        visit.state("running")
        expect(visit.stage.locator(".qit-frame").first).to_be_in_viewport()
        expect(visit.page.locator("#qit-cancel")).to_be_enabled()
        visit.page.keyboard.press("Escape")
        visit.state("cancelled")


def buttons(visit: Visit) -> list[Locator]:
    return visit.page.locator("#qit-go button").all()


def test_the_badge_and_the_plan_are_as_things_are_now(site: Site) -> None:
    """A job that ended tells what the next one takes."""
    with site.visit() as visit:
        visit.choose("Resolution", "Small")
        before = visit.plan.inner_text()
        generate(visit, "slow to be measured", steps=20)
        visit.state("done")
        visit.page.wait_for_function(
            "said => document.querySelector('#qit-plan .qit-plan').innerText !== said", arg=before
        )


def test_in_chinese(site: Site) -> None:
    with site.visit(locale="zh-CN") as visit:
        expect(visit.plan).to_contain_text("所需资源", timeout=OPENS)
        assert visit.page.evaluate("document.documentElement.lang") == "zh-CN"
        visit.write("提示词", "一只狐狸")
        visit.press("生成")
        visit.state("done")
        visit.sees("换个种子再来")
        visit.shot("create-chinese")
        english = visit.page.evaluate(
            "[...document.querySelectorAll('#qit-form label, #qit-form button, [role=tab]')]"
            ".map(e => e.innerText.trim()).filter(t => /^[A-Za-z ]{4,}$/.test(t))"
        )
        assert english == []
