"""Measure what the planner counts with, and write it into `catalog/costs.json`.

    python benchmarks/calibrate.py [--folder FOLDER] [--layers 12] [--dry]

Needs a GPU, 45 GB of free disk and two to four minutes. Models of full width and few layers are
made in FOLDER (a temporary one where none is given): what a step takes beside weights does not
depend on depth. A point of memory is one run of the engine in a process of its own, so that its
peaks are its own; they run beside each other. Times are taken before that, alone. `--dry` prints
and writes nothing.

Memory is fitted in hidden states: peak - weights = workspace + (working + held * streams) * state.
A block's seconds are those of a deeper model less those of a shallower one; what the products and
attention do not explain is taken as bytes that are read and written at the rate of a copy.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import full_size
from qwen_image_tool.catalog import load_catalog
from qwen_image_tool.catalog.costs import Costs, FamilyCosts, load_costs
from qwen_image_tool.decoding import DECODINGS
from qwen_image_tool.store import blocks_of
from qwen_image_tool.types import Rates, Size

FAMILIES = ("qwen-image", "qwen-image-2.1")
COMPILED = ("deep compiled", "shallow compiled")
SHALLOW, STEPS, WARM_STEPS = 6, 8, 2  # shallower, the host is slower than the device
PROMPT = "a red circle left of a blue square on a yellow background, drawn with a soft brush"
# (side, pictures, CFG halves)
MEMORY = ((512, 1, 1), (1024, 1, 1), (1024, 1, 2), (1024, 3, 2), (1536, 1, 2))
TIMED_SIDE = {"qwen-image": 1328, "qwen-image-2.1": 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        print(json.dumps(point(**options.point)), flush=True)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        found = calibrate(folder, options.layers)
    text = json.dumps(found.model_dump(mode="json"), indent=2) + "\n"
    print(text)
    if not options.dry:
        costs_file().write_text(text, encoding="utf-8")


def costs_file() -> Path:
    import qwen_image_tool.catalog

    return Path(qwen_image_tool.catalog.__file__).parent / "costs.json"


def calibrate(folder: Path, layers: int) -> Costs:
    """All of costs.json anew; what can't be measured here stays."""
    with said("models"):
        for name in FAMILIES:
            make(folder, name, layers)
    with said("seconds"):
        rates = Rates(**ask(kind="rates"))
        how = {"kind": "seconds", "attention": rates.attention_backend}
        timed = {
            name: ask(**how, folder=str(folder / name), side=TIMED_SIDE[name]) for name in FAMILIES
        }
    with said("memory"):
        peaks = {name: memory(folder, name) for name in FAMILIES}
    fits = {name: fitted(peaks[name]) for name in FAMILIES}
    first = timed[FAMILIES[0]]["deep"]
    return load_costs().model_copy(
        update={
            "machine": first["machine"],
            "versions": first["versions"],
            "context_bytes": max(each["deep"]["context"] for each in timed.values()),
            "compile_seconds": compile_seconds(timed),
            "workspace_bytes": int(max(fit[0] for fit in fits.values())),
            "process_bytes": {
                "cpu": ask(kind="cpu", folder=str(folder / FAMILIES[0]))["process"],
                "gpu": max(p["process"] for points in peaks.values() for p in points),
            },
            "families": {
                name: family(name, fits[name], timed[name], peaks[name], rates) for name in FAMILIES
            },
        }
    )


def make(folder: Path, name: str, layers: int) -> None:
    """A model of `layers` blocks; beside it one whose configuration names SHALLOW of them."""
    deep, shallow = folder / name, folder / f"{name}-shallow"
    if not deep.exists():
        full_size.make(deep, name, layers)
    if shallow.exists():
        return
    for file in sorted(path for path in deep.rglob("*") if path.is_file()):
        copy = shallow / file.relative_to(deep)
        copy.parent.mkdir(parents=True, exist_ok=True)
        os.link(file, copy)
    config = shallow / "transformer" / "config.json"
    fewer = json.loads(config.read_text(encoding="utf-8")) | {"num_layers": SHALLOW}
    config.unlink()
    config.write_text(json.dumps(fewer), encoding="utf-8")


def memory(folder: Path, name: str) -> list[dict[str, Any]]:
    """Every point of memory, all at the same time."""

    def measure(at: tuple[int, int, int]) -> dict[str, Any]:
        side, pictures, halves = at
        shallow = f"{folder / name}-shallow"
        return ask(kind="run", folder=shallow, side=side, pictures=pictures, halves=halves)

    with ThreadPoolExecutor(len(MEMORY)) as pool:
        return list(pool.map(measure, MEMORY))


def seconds(folder: str, side: int, attention: str) -> dict[str, Any]:
    """The deeper model and the shallower one, then both compiled, in one process."""

    def timed(place: str, compiled: bool) -> dict[str, Any]:
        return run(place, side, 1, 1, compiled=compiled, attention=attention)

    shallow = f"{folder}-shallow"
    return {
        "deep": timed(folder, compiled=False),
        "shallow": timed(shallow, compiled=False),
        "deep compiled": timed(folder, compiled=True),
        "shallow compiled": timed(shallow, compiled=True),
    }


@contextmanager
def said(what: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


def ask(**given: Any) -> dict[str, Any]:
    """The answer of a process of its own."""
    command = [sys.executable, __file__, "--point", json.dumps(given)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


# From points to constants


def fitted(points: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Workspace in bytes; working and held in hidden states: least squares of relative errors,
    then shifted so that no point is above the line."""
    rows = np.array([[1.0, p["hidden"], p["hidden"] * p["streams"]] for p in points])
    peaks = np.array([float(p["drawing"]) for p in points])
    workspace, working, held = np.linalg.lstsq(rows / peaks[:, None], np.ones(len(peaks)))[0]
    below = (peaks - rows @ np.array([workspace, working, held])).max()
    return max(0.0, workspace + max(0.0, below)), working, held


def compile_seconds(timed: dict[str, Any]) -> float:
    """Of the slowest family; what was known where nothing was compiled."""
    found = max(each[which]["compile_seconds"] for each in timed.values() for which in COMPILED)
    return round(found, 1) if found > 1 else load_costs().compile_seconds


def family(
    name: str,
    fit: tuple[float, float, float],
    timed: dict[str, Any],
    peaks: list[dict[str, Any]],
    rates: Rates,
) -> FamilyCosts:
    deep, shallow = timed["deep"], timed["shallow"]
    pixels = deep["side"] ** 2
    decoding = deep["decode_seconds"] - deep["decode_flop"] / rates.matmul
    counted = [DECODINGS[name].bytes(Size(p["side"], p["side"]), 1) for p in peaks]
    slack = max((p["decoding"] - fit[0]) / c for p, c in zip(peaks, counted, strict=True))
    return FamilyCosts(
        working=round(fit[1], 2),
        held=round(fit[2], 2),
        traffic=round(traffic(name, deep, shallow, rates), 1),
        compiled_traffic=round(
            traffic(name, timed["deep compiled"], timed["shallow compiled"], rates), 1
        ),
        decode_slack=round(max(1.0, slack), 3),
        decode_flop=round(deep["decode_flop"] / pixels),
        decode_traffic=round(decoding * rates.memory / pixels),
    )


def traffic(name: str, deep: dict[str, Any], shallow: dict[str, Any], rates: Rates) -> float:
    """Hidden states that a block reads and writes."""
    blocks = blocks_of({}, name)  # type: ignore[arg-type]
    layers = deep["layers"] - shallow["layers"]
    block = (deep["step_seconds"] - shallow["step_seconds"]) / layers
    keys = deep["hidden"] / (2 * blocks.width)
    queries = deep["tokens"] if name == "qwen-image-2.1" else keys
    products = queries * blocks.token_bytes / rates.matmul
    attention = 4 * queries * keys * blocks.width / rates.attention
    states = (block - products - attention) * rates.memory / (queries * blocks.width * 2)
    return float(states)


# Points: each runs in a process of its own and answers with one JSON object


def point(kind: str, **given: Any) -> dict[str, Any]:
    kinds: dict[str, Callable[..., dict[str, Any]]] = {
        "rates": measured_rates,
        "cpu": cpu_process,
        "run": run,
        "seconds": seconds,
    }
    return kinds[kind](**given)


def measured_rates() -> dict[str, Any]:
    """What the program itself measures of a device: the planner goes from that to seconds."""
    import torch

    from qwen_image_tool.engine import measure

    return measure.speeds(torch.device("cuda")).model_dump()


def cpu_process(folder: str) -> dict[str, Any]:
    """RAM of a process that has loaded what a run loads, and no weight."""
    import psutil

    engine_modules(Path(folder))
    return {"process": psutil.Process().memory_info().rss}


def engine_modules(folder: Path) -> Any:
    """Everything that a run imports."""
    from qwen_image_tool.engine import engine, families
    from qwen_image_tool.store import locate

    installed = locate(str(folder), load_catalog(), Path())
    families.family(installed.model.family)
    return engine, installed


def run(
    folder: str,
    side: int,
    pictures: int,
    halves: int,
    compiled: bool = False,
    attention: str = "",
) -> dict[str, Any]:
    """A warm request with everything on the GPU: peaks of each phase beside what was there before
    it, in bytes; seconds of a step, and of decoding a picture."""
    import psutil

    from qwen_image_tool.engine.probe import torch_facts

    torch_facts()  # sets the allocator as the program does
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    engine_room, installed = engine_modules(Path(folder))
    request, plan = resident(installed, side, pictures, halves)
    plan = plan.model_copy(update={"compiled": compiled, "attention": attention})
    scratch = tempfile.TemporaryDirectory()  # knows the prompt after the first run
    engine = engine_room.Engine(installed, Path(scratch.name))

    def follow(steps: int, **how: Any) -> Phases:
        phases = Phases(**how)
        asked = request.model_copy(update={"steps": steps})
        engine.run(asked, [plan], phases, lambda: False)
        phases.end()
        return phases

    cold = follow(STEPS)
    short, whole = follow(WARM_STEPS), follow(STEPS)
    peaks = follow(WARM_STEPS, afresh=True).peaks
    flop = {"decode": 0}
    if not compiled:  # the counter stops the compiler
        with FlopCounterMode(display=False) as counter:
            flop = follow(WARM_STEPS, counted=counter.get_total_flops).counts
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()  # right where nothing else runs there
    engine.release()
    scratch.cleanup()
    tokens, hidden = sizes(installed, side)
    return {
        "side": side,
        "streams": pictures * halves,
        "layers": installed.blocks.count,
        "hidden": hidden,
        "tokens": tokens,
        "drawing": peaks["denoise"],
        "decoding": peaks["decode"],
        "context": context,
        "process": psutil.Process().memory_info().rss,
        "step_seconds": (whole.seconds["denoise"] - short.seconds["denoise"])
        / (STEPS - WARM_STEPS),
        "compile_seconds": cold.seconds["denoise"] - whole.seconds["denoise"] if compiled else 0,
        "decode_seconds": whole.seconds["decode"] / pictures,
        "decode_flop": flop["decode"] / pictures,
        **about(),
    }


def resident(installed: Any, side: int, pictures: int, halves: int) -> tuple[Any, Any]:
    """The request, and a plan for it on a GPU that holds everything."""
    from qwen_image_tool import planner
    from qwen_image_tool.device import invented
    from qwen_image_tool.types import Request

    asked = Request(
        model="calibration",
        prompt=PROMPT,
        negative_prompt=PROMPT if halves == 2 else None,
        cfg=4.0 if halves == 2 else 1.0,
        size=Size(side, side),
        steps=STEPS,
        images=pictures,
    )
    request = installed.model.resolve(asked, 1)
    return request, planner.plan(request, installed, invented(1 << 42, 1 << 42))


def sizes(installed: Any, side: int) -> tuple[int, int]:
    """Image tokens; bytes of a hidden state, which has the prompt's tokens too."""
    from qwen_image_tool.engine import families, text

    family = families.family(installed.model.family)
    tokenizer = text.Tokenizer(installed.folder / family.TOKENIZER, family.wrap, family.SYSTEM)
    words = len(tokenizer(PROMPT, 1024, truncate=False)) - tokenizer.dropped
    tokens = (side // 16) ** 2
    return tokens, (tokens + words) * installed.blocks.width * 2


def about() -> dict[str, Any]:
    import torch

    from qwen_image_tool.app import library_versions
    from qwen_image_tool.device import cpu_name
    from qwen_image_tool.device import memory as ram

    gpu = torch.cuda.get_device_name()
    return {
        "machine": f"{gpu}, {cpu_name()}, {ram()[0] >> 30} GiB, {platform.platform(terse=True)}",
        "versions": library_versions() | {"python": platform.python_version()},
    }


class Phases:
    """Follows a run's events: seconds and peaks of its phases, each beside what was there before.
    The GPU is waited for between them. `afresh`: the allocator's leftovers are given back before
    each. `counted`: a total to take at each phase's ends."""

    def __init__(self, afresh: bool = False, counted: Any = lambda: 0) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self.counts: dict[str, int] = {}
        self._afresh, self._counted = afresh, counted
        self._phase = ""

    def __call__(self, event: Any) -> None:
        if event.kind == "phase":
            self.end()
            self._begin(event.phase)

    def end(self) -> None:
        import torch

        torch.cuda.synchronize()
        if self._phase:
            peak = torch.cuda.max_memory_reserved() - self._held
            self.peaks[self._phase] = max(peak, self.peaks.get(self._phase, 0))
            self.seconds[self._phase] = time.perf_counter() - self._began
            self.counts[self._phase] = self._counted() - self._count

    def _begin(self, phase: str) -> None:
        import torch

        if self._afresh:
            torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self._phase, self._held = phase, torch.cuda.memory_allocated()
        self._count, self._began = self._counted(), time.perf_counter()


if __name__ == "__main__":
    main()
