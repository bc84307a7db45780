"""What the page must show: python benchmarks/page.py [start plan gallery memory] [--write].

JSON goes to stdout, with --write a table into docs/benchmarks.md; the exit code is 1 where a limit
is missed. Chromium draws the page, on the machine that serves it; times inside the page are the
browser's own, from a person's event to the changed document. The worker is the tests' one without
torch. Needs about 1 GB of disk for the gallery.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import gradio
import psutil
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from app import fill
from browsing import CHROMIUM, OPENS, Site
from dev import find_browser
from qwen_image_tool.device import cores, cpu_name
from qwen_image_tool.gallery.index import Index
from running import TOKEN, process
from sections import PAGE, write_section

LIMITS = {
    "painted_seconds": 2.0,
    "interactive_ratio": 1.4,
    "plan_ms": 150,
    "open_ms": 1000,
    "search_ms": 300,
    "growth_percent": 5,
}
PICTURES = 100_000
GENERATIONS = 500
LINKS = 10_000  # of one file; file systems allow 65,000 or fewer
TABLE = """\
`.venv/bin/python benchmarks/page.py --write`, {date}: {machine}, Python {python}, Gradio {gradio},
{chromium}.

| | measured | limit |
|---|---|---|
{rows}

Process start to a form that takes input: {interactive_seconds:.1f} s; `import gradio` alone, in
turn with it: {import_seconds:.1f} s. The first load is {first_load_requests} files of
{first_load_kb:.0f} kB in all. From the newest of {pictures:,} pictures to the oldest (End):
{last_ms:.0f} ms. The server held {memory_mb} MB after {memory_after} pictures.
"""
# Resolves with the milliseconds from the next EVENT on the page until DONE, a condition, holds
WATCH = """([event, done]) => new Promise(resolve => {
  let began = null;
  const holds = new Function('return ' + done);
  const look = () => {
    if (began === null) return;
    if (holds()) resolve(performance.now() - began); else requestAnimationFrame(look);
  };
  addEventListener(event, () => { began ??= performance.now(); requestAnimationFrame(look); },
    {capture: true, once: true});
})"""
# Notes when the form takes input. Playwright, asked for it, looks twice a second after a reload
OPENED = """(() => {
  const look = () => {
    if (document.querySelector('body.qit-open #qit-generate')?.offsetParent)
      window.qitOpened = performance.timeOrigin + performance.now();
    else requestAnimationFrame(look);
  };
  look();
})()"""
PLAN = "document.querySelector('#qit-plan').innerText"
LOADED = "[...document.querySelectorAll('.qit-tiles img')].every(image => image.complete)"
TILES = "document.querySelector('.qit-tiles li[data-picture] img')?.complete"


def start(browser: Browser, folder: Path) -> dict[str, Any]:
    """Process start to the first paint, and on to a form that takes input, beside the import of
    Gradio; then what a browser without a cache loads."""
    painted, interactive, imported = [], [], []
    load: dict[str, Any] = {}
    for number in range(3):
        imported.append(_timed(_import_gradio))
        began = time.time()  # the browser's clock
        with (
            process(folder / str(number), "--no-browser", command="ui") as running,
            browser.new_context() as context,
        ):
            context.add_init_script(OPENED)
            page = context.new_page()
            loaded = _loaded(page)
            page.goto(f"{running.url}/?__t={TOKEN}", wait_until="commit")
            page.wait_for_function("performance.getEntriesByType('paint').length")
            painted.append(time.time() - began)
            page.wait_for_selector("body.qit-open #qit-generate", timeout=OPENS)
            interactive.append(float(page.evaluate("window.qitOpened")) / 1000 - began)
            page.wait_for_timeout(1000)
            load = {"first_load_requests": len(loaded), "first_load_kb": sum(loaded) / 1000}
    import_seconds = statistics.median(imported)
    ratios = [whole / alone for whole, alone in zip(interactive, imported, strict=True)]
    return load | {
        "painted_seconds": statistics.median(painted),
        "interactive_seconds": statistics.median(interactive),
        "import_seconds": import_seconds,
        "interactive_ratio": statistics.median(ratios),
    }


def _import_gradio() -> None:
    subprocess.run([sys.executable, "-c", "import gradio"], check=True)


def _loaded(page: Page) -> list[float]:
    """Bytes over the network of each file that comes; what the browser has kept is none."""
    found: list[float] = []

    def came(event: dict[str, Any]) -> None:
        if event["encodedDataLength"]:
            found.append(event["encodedDataLength"])

    session = page.context.new_cdp_session(page)
    session.send("Network.enable")
    session.on("Network.loadingFinished", came)
    return found


def plan(browser: Browser, folder: Path) -> dict[str, Any]:
    """A resolution is chosen until the plan box says what that needs."""
    times = []
    with _site(browser, folder) as site, site.visit() as visit:
        visit.plan.get_by_text("Memory").wait_for(timeout=OPENS)
        for number in range(15):
            said = json.dumps(visit.page.evaluate(PLAN))
            done = f"{PLAN} !== {said}"
            visit.field("Resolution").click()
            choice = "Small" if number % 2 == 0 else "Model's own"
            option = visit.page.get_by_role("option", name=choice)
            option.wait_for()
            with _watched(visit.page, "mousedown", done) as taken:
                option.click()
            times.append(taken[0])
    return {"plan_ms": statistics.median(times[3:]), "plan_slowest_ms": max(times[3:])}


def gallery(browser: Browser, folder: Path) -> dict[str, Any]:
    """Open it, search it and go to its end, with pictures that are there as files."""
    words = _pictures(folder)
    searches = {
        "in all": "picture",
        "in few": words[5],
        "two words": f"{words[5]} {words[6]}",
        "two letters": "zq",
        "in none": "nothing-at-all",
    }
    found = {}
    with _site(browser, folder) as site:
        site.wait_for(lambda: site.http.get("/api/system").json(), _is_ready, 300)
        opened = [_opened(site) for _ in range(3)]
        with site.visit() as visit:
            visit.go("Gallery")
            visit.page.wait_for_function(TILES)
            for name, text in searches.items():
                wanted = json.dumps(text)
                done = (
                    "(album => JSON.parse(album.dataset.filter).text === " + wanted + " && ("
                    "album.dataset.count === '0' || document.querySelector('.qit-tiles img')))"
                    "(document.querySelector('.qit-album'))"
                )
                visit.page.wait_for_function(LOADED)
                with _watched(visit.page, "input", done) as taken:
                    visit.page.locator("#qit-search :is(input, textarea)").fill(text)
                found[name] = taken[0]
            visit.write("Search", "")
            visit.page.wait_for_function(
                f"document.querySelector('.qit-album').dataset.count == {PICTURES}"
            )
            visit.page.locator(".qit-tile").first.focus()
            last = f".qit-tiles li[aria-posinset='{PICTURES}'][data-picture]"
            with _watched(visit.page, "keydown", f"document.querySelector(`{last}`)") as taken:
                visit.page.keyboard.press("End")
    return {
        "pictures": PICTURES,
        "open_ms": max(opened),
        "search_ms": max(found.values()),
        "searches_ms": found,
        "last_ms": taken[0],
    }


def _pictures(folder: Path) -> list[str]:
    """The gallery's files, few with many names, and an index that knows them. Returns words."""
    output = folder / "output"
    output.mkdir(parents=True)
    index = Index(output, folder / "data" / "pictures.db")
    original = output / "0.png"

    def more(number: int) -> dict[str, Any]:
        nonlocal original
        path = output / f"{number}.png"
        if number % LINKS == 0:
            Image.effect_noise((320, 320), 60).save(path)
            original = path
        else:
            os.link(original, path)
        stat = path.stat()
        return {"bytes": stat.st_size, "changed": stat.st_mtime_ns}

    words = fill(index, PICTURES, more)
    index.close()
    return words


def _opened(site: Site) -> float:
    """Milliseconds from the press on the tab to the first tile with its picture."""
    with site.visit() as visit:
        visit.page.wait_for_selector("body.qit-open", timeout=OPENS)
        visit.page.wait_for_timeout(1000)
        with _watched(visit.page, "mousedown", TILES) as taken:
            visit.go("Gallery")
        return taken[0]


def _is_ready(system: dict[str, Any]) -> bool:
    return bool(system["startup"]["step"] == "ready")


def memory(browser: Browser, folder: Path) -> dict[str, Any]:
    """The server's memory while a page follows many small pictures; the first hundred let caches
    fill."""
    held, after = [], []
    with _site(browser, folder) as site, site.visit() as visit:
        server = psutil.Process(site.child.pid)
        visit.go("Gallery")
        made = 0
        for many in (100, *[100] * (GENERATIONS // 100)):
            for _ in range(many // 50):
                body = {"model": "practice", "prompt": "small", "size": "64x64", "steps": 2}
                site.http.post("/api/jobs", json=body | {"images": 50}).raise_for_status()
            site.settle()
            made += many
            held.append(round(server.memory_info().rss / 1e6))
            after.append(made)
    return {
        "memory_mb": ", ".join(map(str, held)),
        "memory_after": ", ".join(map(str, after)),
        "growth_percent": 100 * (held[-1] - held[0]) / held[0],
    }


@contextlib.contextmanager
def _site(browser: Browser, folder: Path) -> Iterator[Site]:
    with process(folder, "--no-browser", command="ui") as running:
        yield Site(running.url, running.http, running.child, browser, folder / "shots")


@contextlib.contextmanager
def _watched(page: Page, event: str, done: str) -> Iterator[list[float]]:
    """The list has the milliseconds once the block has ended."""
    taken: list[float] = []
    page.evaluate(f"wanted => {{ window.qitTaken = ({WATCH})(wanted); }}", [event, done])
    yield taken
    taken.append(float(page.evaluate("window.qitTaken")))


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def table(report: dict[str, Any]) -> str:
    def row(what: str, name: str, unit: str, digits: int) -> str:
        return f"| {what} | {report[name]:.{digits}f}{unit} | {LIMITS[name]:g}{unit} |"

    rows = (
        row("process start to the first painted page", "painted_seconds", " s", 2),
        row("to a form that takes input, in imports of Gradio", "interactive_ratio", "", 2),
        row("a resolution is chosen, to the new plan box", "plan_ms", " ms", 0),
        row(f"open a gallery of {PICTURES:,}, slowest of 3", "open_ms", " ms", 0),
        row("search it, slowest of 5", "search_ms", " ms", 0),
        row(f"the server's memory over {GENERATIONS} generations", "growth_percent", " %", 1),
    )
    return TABLE.format(**report, rows="\n".join(rows))


PARTS: dict[str, Callable[[Browser, Path], dict[str, Any]]] = {
    "start": start,
    "plan": plan,
    "gallery": gallery,
    "memory": memory,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []])
    parser.add_argument("--write", action="store_true", help="the table into docs/benchmarks.md")
    arguments = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # a user's Python keeps what it compiled
    load = f", load {os.getloadavg()[0]:.0f} before" if hasattr(os, "getloadavg") else ""
    report: dict[str, Any] = {
        "machine": f"{cpu_name()}, {cores()} cores, {platform.system()}{load}",
        "python": platform.python_version(),
        "gradio": gradio.__version__,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as base:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=list(CHROMIUM))
        report["chromium"] = f"Chromium {browser.version}"
        for part in arguments.parts or PARTS:
            found = PARTS[part](browser, Path(base) / part)
            report |= found
            print(f"{part:10} {json.dumps(found)}", file=sys.stderr)
        browser.close()
    missed = [name for name, limit in LIMITS.items() if report.get(name, 0) > limit]
    print(json.dumps(report | {"missed": missed}))
    if arguments.write:
        write_section(PAGE, "page", table(report))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
