"""Cold start of a full-size model: from a new process to the end of its first step.

    python benchmarks/cold_start.py FOLDER [--model qwen-image-2.1] [--size 1328x1328] [--json FILE]
        [--docs FILE]

Beside it: reading the same bytes with several threads and nothing else, and diffusers' pipeline by
`from_pretrained` with `enable_model_cpu_offload`. The page cache is dropped before each, where the
system lets us; FOLDER should be on a disk, not in memory. A model of random weights is made there
if it is not there.
"""

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import any_card
from sections import write_section

PIECE = 16 << 20


def main() -> None:
    options = parse()
    if options.worker:
        print(json.dumps(WORKERS[options.worker](options)), flush=True)
        return
    if not options.folder.exists():
        import full_size  # imports torch, which our line should not begin with

        full_size.make(options.folder, options.model, options.layers)
    with tempfile.TemporaryDirectory() as home:
        options.home = Path(home)
        used_before(options.home)
        rows = {name: measure(options, name) for name in WORKERS}
    report = {"about": any_card.about(options), "rows": rows}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    text = table(report)
    print(text)
    if options.docs:
        write_section(options.docs, f"cold start {options.model}", text, add=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=("qwen-image", "qwen-image-2.1"), default="qwen-image")
    parser.add_argument("--size", default="1328x1328")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--layers", type=int, help="for a model that is made here")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--timeout", type=float, default=400, help="seconds a line")
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)  # seconds of the epoch
    return parser.parse_args()


def measure(options: argparse.Namespace, worker: str) -> dict[str, Any]:
    dropped = drop_page_cache()
    given = ["--model", options.model, "--size", options.size, "--steps", str(options.steps)]
    given += ["--home", str(options.home), "--worker", worker, "--began", str(time.time())]
    command = [sys.executable, __file__, str(options.folder), *given]
    with disk_reads() as gb_each_second:
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, timeout=options.timeout, check=True, text=True
            )
            row = json.loads(done.stdout.strip().splitlines()[-1])
        except (subprocess.SubprocessError, ValueError, IndexError) as error:
            row = {"error": repr(error)[:200]}
    row |= {"page_cache_dropped": dropped, "disk_gb_each_second": gb_each_second}
    print(worker, json.dumps(row), flush=True)
    return dict(row)


@contextlib.contextmanager
def disk_reads() -> Iterator[list[float]]:
    """GB that the machine's disks read in each second of the block; it grows while that runs."""
    found: list[float] = []
    ended = threading.Event()

    def look() -> None:
        before = disk_bytes()
        while not ended.wait(1):
            now = disk_bytes()
            found.append(round((now - before) / 1e9, 3))
            before = now

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def disk_bytes() -> int:
    import psutil

    counters = psutil.disk_io_counters()
    return counters.read_bytes if counters else 0


def used_before(home: Path) -> None:
    """A first picture has been made there: what a device does is measured then."""
    code = """
import sys
from pathlib import Path
from qwen_image_tool.app import App
from qwen_image_tool.settings import Settings
from qwen_image_tool.types import Request, Size
home = Path(sys.argv[1])
app = App(Settings(output=home / "out", cache=home / "cache"))
request = Request(model="practice", prompt="a red circle", size=Size(256, 256), steps=2)
app.generate(request, lambda _: None)
"""
    subprocess.run([sys.executable, "-c", code, str(home)], check=True, timeout=300)


def drop_page_cache() -> bool:
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")
    except OSError:
        return False
    return True


# Workers: each prints one JSON object


def read(options: argparse.Namespace) -> dict[str, Any]:
    """The bytes that our engine reads, in the order of the files, by eight threads."""
    from qwen_image_tool.engine.weights import Checkpoint

    began = time.perf_counter()
    pieces: list[tuple[Path, int, int]] = []
    total = 0
    for name in ("text_encoder", "transformer", "vae"):
        for stored in Checkpoint(options.folder / name).tensors.values():
            if name == "text_encoder" and ".layers." not in stored.name:
                continue
            total += stored.bytes
            ends = range(stored.offset, stored.offset + stored.bytes, PIECE)
            pieces += [
                (stored.file, at, min(PIECE, stored.offset + stored.bytes - at)) for at in ends
            ]
    pieces.sort()

    def fetch(piece: tuple[Path, int, int]) -> None:
        path, at, size = piece
        with path.open("rb", buffering=0) as file:
            file.seek(at)
            file.readinto(bytearray(size))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(fetch, pieces))
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "gb": total / 1e9, "gb_s": total / 1e9 / seconds}


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """As `qit generate` does it, to the end of the first step, where the device is known already:
    it is measured once."""
    from qwen_image_tool.app import App
    from qwen_image_tool.errors import Cancelled
    from qwen_image_tool.settings import Settings
    from qwen_image_tool.types import Event, Notice, PhaseStarted, Request, Size, Stepped

    first: list[float] = []
    phases: list[tuple[str, float]] = [("asked", time.time() - options.began)]

    def emit(event: Event) -> None:
        if isinstance(event, Notice):
            phases.append((event.text, time.time() - options.began))
        if isinstance(event, PhaseStarted):
            phases.append((event.phase, time.time() - options.began))
        if isinstance(event, Stepped):
            first.append(time.time() - options.began)

    app = App(Settings(output=options.home / "out", cache=options.home / "cache"))
    request = Request(
        model=str(options.folder),
        prompt=any_card.PROMPT,
        size=Size.parse(options.size),
        steps=options.steps,
        seed=any_card.SEED,
    )
    with contextlib.suppress(Cancelled):
        app.generate(request, emit, lambda: bool(first))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": first[0], "peak_rss_gib": peak / any_card.GIB, "phases": phases}


def theirs(options: argparse.Namespace) -> dict[str, Any]:
    """diffusers: from_pretrained, enable_model_cpu_offload, to the end of the first step."""
    import torch

    from qwen_image_tool.types import Size

    pipe = any_card.pipeline(options, whole=True)
    pipe.enable_model_cpu_offload()
    size = Size.parse(options.size)
    first: list[float] = []

    def stepped(pipe: Any, _step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        torch.cuda.synchronize()
        first.append(time.time() - options.began)
        pipe._interrupt = True
        return values

    cfg = {"negative_prompt": any_card.NEGATIVE, "true_cfg_scale": 4.0}
    pipe(
        any_card.PROMPT,
        width=size.width,
        height=size.height,
        num_inference_steps=options.steps,
        output_type="latent",
        callback_on_step_end=stepped,
        **(cfg if options.model == "qwen-image" else {}),
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": first[0], "peak_rss_gib": peak / any_card.GIB}


WORKERS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "read": read,
    "ours": ours,
    "theirs": theirs,
}


def table(report: dict[str, Any]) -> str:
    rows, about = report["rows"], report["about"]
    names = {
        "read": "reading the bytes by eight threads",
        "ours": "ours: new process to the end of the first step",
        "theirs": "diffusers with model offload, the same",
    }
    base = rows["read"].get("seconds", 0)
    command = about["command"].replace("any_card", "cold_start").strip()
    dropped = "yes" if rows["ours"]["page_cache_dropped"] else "no"
    lines = [
        f"`{command}`, {about['date']}: {about['gpu']}; page cache dropped: {dropped}.",
        "",
        "| | seconds | times the reading | peak RAM GiB |",
        "|---|---|---|---|",
    ]
    for name, row in rows.items():
        if "error" in row:
            lines.append(f"| {names[name]} | {row['error']} | | |")
            continue
        peak = f"{row['peak_rss_gib']:.1f}" if "peak_rss_gib" in row else ""
        lines.append(
            f"| {names[name]} | {row['seconds']:.1f} | {row['seconds'] / base:.2f} | {peak} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
