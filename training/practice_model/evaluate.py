"""Draws held-out sentences with the shipped weights and judges every picture by its pixels.

Prints JSON; `--write-card` also writes the table between the markers in README.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from checker import Verdict, check
from diffusers import QwenImagePipeline
from PIL import Image
from world import RATIO_SIZES, SQUARE, Scene, is_held_out, sample_scene, write_caption

HERE = Path(__file__).parent
WEIGHTS = HERE.parents[1] / "src/qwen_image_tool/practice/weights"
STEPS = 20
GUIDANCE = 3.0
NEGATIVE = " "
MARKS = ("<!-- figures -->", "<!-- end of figures -->")


@dataclass(frozen=True)
class Task:
    prompt: str
    scene: Scene
    size: tuple[int, int]
    seed: int


def held_out_tasks(sizes: Sequence[tuple[int, int]], count: int, seed: int) -> list[Task]:
    """`count` sentences with a combination the training never saw, spread evenly over the sizes."""
    rng = random.Random(seed)
    tasks: list[Task] = []
    while len(tasks) < count:
        scene = sample_scene(rng)
        if is_held_out(scene):
            size = sizes[len(tasks) % len(sizes)]
            tasks.append(Task(write_caption(scene, rng), scene, size, seed=len(tasks)))
    return tasks


def load_pipeline(weights: Path, device: str) -> QwenImagePipeline:
    pipeline = QwenImagePipeline.from_pretrained(weights, torch_dtype=torch.bfloat16).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipeline: QwenImagePipeline, batch: int, tasks: Sequence[Task], steps: int, guidance: float
) -> list[Image.Image]:
    """One picture a task, in their order; each has its own seed, whatever the batch."""
    pictures: dict[int, Image.Image] = {}
    order = sorted(range(len(tasks)), key=lambda i: (tasks[i].size, len(tasks[i].prompt)))
    while order:
        size = tasks[order[0]].size
        part = [i for i in order[:batch] if tasks[i].size == size]
        order = order[len(part) :]
        seeds = [torch.Generator("cpu").manual_seed(tasks[i].seed) for i in part]
        drawn = pipeline(
            prompt=[tasks[i].prompt for i in part],
            negative_prompt=[NEGATIVE] * len(part),
            width=size[0],
            height=size[1],
            num_inference_steps=steps,
            true_cfg_scale=guidance,
            generator=seeds,
        ).images
        pictures |= dict(zip(part, drawn, strict=True))
    return [pictures[i] for i in range(len(tasks))]


def draw_with_engine(
    weights: Path, tasks: Sequence[Task], steps: int, guidance: float
) -> list[Image.Image]:
    """The same as a user gets them: by our engine, on the device it chooses, one by one."""
    from qwen_image_tool import device as hardware
    from qwen_image_tool import planner, store
    from qwen_image_tool.catalog import load_catalog
    from qwen_image_tool.engine.engine import Engine
    from qwen_image_tool.engine.probe import torch_facts
    from qwen_image_tool.types import Request, Size

    here = hardware.probe(torch_facts())
    reference = "practice" if weights == WEIGHTS else str(weights)
    installed = store.locate(reference, load_catalog(), weights)
    engine = Engine(installed)
    pictures = []
    for task in tasks:
        request = Request(
            model=reference,
            prompt=task.prompt,
            size=Size(*task.size),
            steps=steps,
            cfg=guidance,
            seed=task.seed,
        )
        request = installed.model.resolve(request, task.seed)
        plan = planner.plan(request, installed, here)
        pictures += engine.run(request, [plan], lambda _: None, lambda: False).images
    return pictures


def judge(tasks: Sequence[Task], verdicts: Sequence[Verdict]) -> dict[str, object]:
    faults: Counter[str] = Counter()
    by_count: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    wrong = []
    for task, verdict in zip(tasks, verdicts, strict=True):
        group = f"{len(task.scene.things)} thing{'s' * (len(task.scene.things) > 1)}"
        totals[group] += 1
        by_count[group] += verdict.right
        if not verdict.right:
            faults[_sort_of(verdict.faults[0])] += 1
            wrong.append({"prompt": task.prompt, "seed": task.seed, "faults": verdict.faults})
    right = sum(by_count.values())
    return {
        "right": right,
        "of": len(tasks),
        "percent": round(100 * right / len(tasks), 1),
        "by_things": {k: f"{by_count[k]}/{totals[k]}" for k in sorted(totals)},
        "first_faults": dict(faults.most_common()),
        "wrong": wrong,
    }


def _sort_of(fault: str) -> str:
    for words in (
        "background",
        "stray",
        "looks like",
        "no clear",
        "place",
        "not small",
        "not large",
    ):
        if words in fault:
            return words
    return "missing thing" if fault.startswith("no ") else "size"


def table(report: dict[str, dict[str, object]], how: str) -> str:
    lines = [
        how,
        "",
        "| held-out sentences | right | one thing | two things | three things |",
        "|---|---|---|---|---|",
    ]
    for name, part in report.items():
        groups = part["by_things"]
        assert isinstance(groups, dict)
        cells = [groups.get(key, "-") for key in ("1 thing", "2 things", "3 things")]
        score = f"{part['right']}/{part['of']} = {part['percent']} %"
        lines.append(f"| {name} | {score} | {' | '.join(cells)} |")
    return "\n".join(lines)


SETS = {"256x256": [SQUARE], "six other ratios": [*RATIO_SIZES.values()]}
SWEEP_SEED = 7  # other sentences than the reported ones
SWEPT_STEPS = (12, 20, 30)
SWEPT_GUIDANCE = (1.0, 2.0, 3.0, 4.0, 5.0)
Draw = Callable[[Sequence[Task], int, float], list[Image.Image]]  # tasks, steps, guidance


def score(
    draw: Draw,
    pool: Executor,
    tasks: Sequence[Task],
    steps: int,
    guidance: float,
    keep: Path | None = None,
) -> dict[str, object]:
    """Draws the tasks here and judges them on all cores; wrong pictures go to `keep`."""
    pictures = draw(tasks, steps, guidance)
    scenes = [task.scene for task in tasks]
    verdicts = list(pool.map(check, pictures, scenes, chunksize=4))
    for task, picture, verdict in zip(tasks, pictures, verdicts, strict=True):
        if keep and not verdict.right:
            keep.mkdir(parents=True, exist_ok=True)
            picture.save(keep / f"{task.size[0]}x{task.size[1]}-{task.seed:03}.png")
    return judge(tasks, verdicts)


def sweep(draw: Draw, pool: Executor, count: int) -> list[dict[str, object]]:
    """Percent right for each number of steps and guidance, best last."""
    found = []
    for steps, guidance in itertools.product(SWEPT_STEPS, SWEPT_GUIDANCE):
        row: dict[str, object] = {"steps": steps, "guidance": guidance}
        for name, sizes in SETS.items():
            tasks = held_out_tasks(sizes, count, SWEEP_SEED)
            row[name] = score(draw, pool, tasks, steps, guidance)["percent"]
        print(row, flush=True)
        found.append(row)
    return sorted(found, key=lambda row: [row[name] for name in SETS])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--count", type=int, default=300, help="sentences a set")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--sweep", action="store_true", help="many steps and guidances instead")
    parser.add_argument("--batch", type=int, default=0, help="default: 100 on a GPU, 16 on a CPU")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--engine", action="store_true", help="draw with our own engine")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--machine", default=platform.machine(), help="named in the table")
    parser.add_argument("--write-card", action="store_true")
    parser.add_argument("--out", type=Path, help="file for the JSON too")
    parser.add_argument("--keep", type=Path, help="folder for the wrong pictures")
    args = parser.parse_args()

    if args.engine:
        drawer: Draw = partial(draw_with_engine, args.weights)
    else:
        pipeline = load_pipeline(args.weights, args.device)
        drawer = partial(draw, pipeline, args.batch or (16 if args.device == "cpu" else 100))
    begin = time.time()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), spawn, torch.set_num_threads, (1,)) as pool:
        if args.sweep:
            report: dict[str, Any] = {"sweep": sweep(drawer, pool, args.count)}
        else:
            report = {
                name: score(
                    drawer,
                    pool,
                    held_out_tasks(sizes, args.count, args.seed),
                    args.steps,
                    args.guidance,
                    args.keep,
                )
                for name, sizes in SETS.items()
            }
    text = json.dumps(report | {"seconds": round(time.time() - begin)}, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    if args.write_card and not args.sweep:
        through = "our engine" if args.engine else "the diffusers pipeline"
        how = f"{args.steps} steps, guidance {args.guidance:g}, through {through}, {args.machine}."
        write_card(table(report, how))


def write_card(figures: str) -> None:
    card = HERE / "README.md"
    before, rest = card.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    card.write_text(f"{before}{MARKS[0]}\n{figures}\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
