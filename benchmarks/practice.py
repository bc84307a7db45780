"""The practice model on this machine's CPU: ours and diffusers' QwenImagePipeline in one run.

    .venv/bin/python benchmarks/practice.py [--pairs 7] [--json]

Warm: the same request in turn, ours, theirs, ours ..., after one of each; the ratio is taken pair
by pair. Cold: a new process from its start to the saved picture. Prints medians and the machine.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen_image_tool.app import library_versions
from qwen_image_tool.catalog import DEFAULT_MODEL, load_catalog
from qwen_image_tool.device import cores, cpu_name
from qwen_image_tool.store import locate
from qwen_image_tool.types import Request

PROMPT = "a red circle left of a blue square on a yellow background"
THEIRS = """
import sys, torch
from diffusers import QwenImagePipeline
folder, prompt, negative, cfg, width, height, steps, out = sys.argv[1:]
pipe = QwenImagePipeline.from_pretrained(folder, dtype=torch.float32)
image = pipe(prompt, negative_prompt=negative, true_cfg_scale=float(cfg), width=int(width),
    height=int(height), num_inference_steps=int(steps),
    generator=torch.Generator().manual_seed(1)).images[0]
image.save(out)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    installed = locate(DEFAULT_MODEL, load_catalog(), Path())
    request = installed.model.resolve(Request(model=DEFAULT_MODEL, prompt=PROMPT), seed=1)
    figures = {
        "machine": f"{cpu_name()}, {cores()} cores, {platform.system()}",
        "versions": library_versions(),
        "request": request.to_dict(),
        **warm(request, options.pairs),
        **cold(request, installed.folder),
    }
    print(json.dumps(figures) if options.json else table(figures))


def warm(request: Request, pairs: int) -> dict[str, float]:
    """Seconds of a picture with everything in memory, median of `pairs`."""
    import numpy as np
    import torch
    from diffusers import QwenImagePipeline

    from qwen_image_tool import planner
    from qwen_image_tool.device import probe
    from qwen_image_tool.engine.engine import Engine
    from qwen_image_tool.engine.probe import torch_facts

    installed = locate(DEFAULT_MODEL, load_catalog(), Path())
    plan = planner.plan(request, installed, probe(torch_facts()))
    engine = Engine(installed)
    pipe = QwenImagePipeline.from_pretrained(installed.folder, dtype=getattr(torch, plan.dtype))
    pipe.set_progress_bar_config(disable=True)
    assert request.size

    def ours() -> Any:
        return engine.run(request, [plan], lambda _: None, lambda: False).images[0]

    def theirs() -> Any:
        assert request.size
        return pipe(
            request.prompt,
            negative_prompt=request.negative_prompt,
            true_cfg_scale=request.cfg,
            width=plan.working_size.width,
            height=plan.working_size.height,
            num_inference_steps=request.steps,
            generator=torch.Generator().manual_seed(request.seeds[0]),
        ).images[0]

    apart = np.abs(np.asarray(ours()).astype(int) - np.asarray(theirs()).astype(int))
    took = [(timed(ours), timed(theirs)) for _ in range(pairs)]
    return {
        "largest_difference_levels": int(apart.max()),
        "warm_ours_seconds": statistics.median(a for a, _ in took),
        "warm_diffusers_seconds": statistics.median(b for _, b in took),
        "warm_ratio": statistics.median(a / b for a, b in took),
    }


def cold(request: Request, folder: Path) -> dict[str, float]:
    """Seconds from the start of a process to the saved picture; ours through the command line."""
    assert request.size
    with tempfile.TemporaryDirectory() as out:
        ours = [sys.executable, "-c", "from qwen_image_tool.cli import main; main()", "generate"]
        ours += [request.prompt, "--seed", "1", "--out", out]
        theirs = [sys.executable, "-c", THEIRS, str(folder), request.prompt]
        theirs += [str(request.negative_prompt), str(request.cfg), str(request.size.width)]
        theirs += [str(request.size.height), str(request.steps), f"{out}/theirs.png"]

        def run(command: list[str]) -> Callable[[], object]:
            environ = os.environ | {"QIT_HOME": out}
            return lambda: subprocess.run(command, check=True, capture_output=True, env=environ)

        return {
            "cold_ours_seconds": min(timed(run(ours)) for _ in range(3)),
            "cold_diffusers_seconds": min(timed(run(theirs)) for _ in range(3)),
        }


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def table(figures: dict[str, object]) -> str:
    return "\n".join(
        f"{name:24} {value:.3f}" if isinstance(value, float) else f"{name:24} {value}"
        for name, value in figures.items()
    )


if __name__ == "__main__":
    main()
