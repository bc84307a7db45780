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
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

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
    pipeline: QwenImagePipeline, tasks: Sequence[Task], steps: int, guidance: float, batch: int
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


def draw_and_check(
    weights: Path, device: str, tasks: Sequence[Task], steps: int, guidance: float, batch: int
) -> list[tuple[Image.Image, Verdict]]:
    """A worker's share, on one core of a CPU; a batch of 0 means our own engine."""
    if device == "cpu":
        torch.set_num_threads(1)
    if batch:
        pictures = draw(load_pipeline(weights, device), tasks, steps, guidance, batch)
    else:
        pictures = draw_with_engine(weights, tasks, steps, guidance)
    return [(p, check(p, task.scene)) for p, task in zip(pictures, tasks, strict=True)]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument(
        "--count", type=int, default=300, help="sentences at 256x256, and over the ratios"
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--engine", action="store_true", help="draw with our own engine")
    parser.add_argument("--square-only", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--machine", default=platform.machine(), help="named in the table")
    parser.add_argument("--write-card", action="store_true")
    parser.add_argument("--keep", type=Path, help="folder for the wrong pictures")
    args = parser.parse_args()

    sets = {"256x256": [SQUARE], "six other ratios": [*RATIO_SIZES.values()]}
    if args.square_only:
        del sets["six other ratios"]
    report = {}
    begin = time.time()
    workers = (os.cpu_count() or 1) if args.device == "cpu" else 1
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        for name, sizes in sets.items():
            tasks = held_out_tasks(sizes, args.count, args.seed)
            shares = [tasks[worker::workers] for worker in range(workers)]
            work = partial(
                draw_and_check,
                args.weights,
                args.device,
                steps=args.steps,
                guidance=args.guidance,
                batch=0 if args.engine else args.batch,
            )
            results = dict(
                zip(
                    itertools.chain(*shares),
                    itertools.chain(*pool.map(work, shares)),
                    strict=True,
                )
            )
            report[name] = judge(tasks, [results[task][1] for task in tasks])
            if args.keep:
                args.keep.mkdir(parents=True, exist_ok=True)
                for task, (picture, verdict) in results.items():
                    if not verdict.right:
                        picture.save(args.keep / f"{name.split()[0]}-{task.seed:03}.png")
    print(json.dumps(report | {"seconds": round(time.time() - begin)}, indent=1))
    if args.write_card:
        card = HERE / "README.md"
        before, rest = card.read_text().split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        through = "our engine" if args.engine else "the diffusers pipeline"
        how = f"{args.steps} steps, guidance {args.guidance:g}, through {through}, {args.machine}."
        figures = table(report, how)
        card.write_text(f"{before}{MARKS[0]}\n{figures}\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
