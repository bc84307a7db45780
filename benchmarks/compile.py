"""What compiling the blocks takes and gives: full-size blocks of random weights, a few layers.

    python benchmarks/compile.py [--json FILE] [--models qwen-image qwen-image-2.1] [--variants]

Each line runs in a process of its own. "cold" starts with an empty cache on disk, "warm" with what
the cold process has left there. Streamed blocks, other prompts and another size must give no other
graph. `--variants` adds, for the first model: complex numbers left to torch; the picture's length
fixed in the graph; one thread that compiles; the attention that was measured to be the fastest.
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

GIB = 1 << 30
GRIDS = {"qwen-image": (83, 83), "qwen-image-2.1": (64, 64)}  # tokens: 1328 and 1024 pixels a side
PROMPTS, OTHER_PROMPTS = (187, 9), (64, 33)  # tokens, of both CFG halves
VARIANTS = ("complex", "fixed", "thread", "attention")


def main() -> None:
    options = parse()
    if options.worker:
        print(json.dumps(worker(options)), flush=True)
        return
    with tempfile.TemporaryDirectory() as scratch:
        options.scratch = Path(scratch)
        report = {"about": about(options), "rows": list(rows(options))}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--grid", type=int, nargs=2, help="tokens, in place of the usual size's")
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=("cold", "warm", *VARIANTS), help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--attention", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def about(options: argparse.Namespace) -> dict[str, Any]:
    """The machine, and what `measure` says of it."""
    import diffusers
    import torch

    from qwen_image_tool.device import probe
    from qwen_image_tool.engine.measure import measure, speeds
    from qwen_image_tool.engine.probe import torch_facts

    device = probe(torch_facts())
    began = time.perf_counter()
    rates = measure(device, options.scratch / "measure")
    found = {
        "device": device.name,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "measure_seconds": time.perf_counter() - began,
        "rates": rates.model_dump(),
    }
    began = time.perf_counter()
    speeds(torch.device(device.torch_name))
    found["speeds_seconds"] = time.perf_counter() - began
    options.attention = rates.attention_backend
    print(json.dumps(found), flush=True)
    return found


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for place, model in enumerate(options.models):
        write_transformer(options.scratch / model, model, options.layers)
        kinds = ["cold", "warm"]
        kinds += VARIANTS if options.variants and place == 0 else ()
        for kind in kinds:
            row = {"model": model, "line": kind, **run(options, model, kind)}
            print(json.dumps(row), flush=True)
            yield row


def write_transformer(folder: Path, model: str, layers: int) -> None:
    import torch
    from diffusers import QwenImage21Transformer2DModel, QwenImageTransformer2DModel

    import full_size
    from qwen_image_tool.engine.weights import no_weights

    kinds = {"qwen-image": QwenImageTransformer2DModel}
    kinds |= {"qwen-image-2.1": QwenImage21Transformer2DModel}
    pool = torch.randn(full_size.POOL, generator=torch.Generator().manual_seed(0))
    with no_weights():
        part = kinds[model](num_layers=layers)
    with ThreadPoolExecutor(full_size.WRITERS) as threads:
        full_size.write(folder, part, pool, threads)


def run(options: argparse.Namespace, model: str, kind: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--models", model, "--worker", kind]
    command += ["--layers", str(options.layers), "--steps", str(options.steps)]
    command += ["--device", options.device, "--scratch", str(options.scratch)]
    command += ["--grid", *map(str, options.grid)] if options.grid else []
    command += ["--attention", options.attention] if kind == "attention" else []
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": "1"} if kind == "thread" else {}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, check=False, text=True, env=os.environ | threads
    )
    try:
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return {"error": f"exit code {done.returncode}"}
    return found


# A worker


def worker(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from torch._dynamo.utils import counters

    from qwen_image_tool.engine import attention

    [model], kind = options.models, options.worker
    grid = tuple(options.grid or GRIDS[model])
    other_grid = (grid[0] * 3 // 4, grid[1])
    found: dict[str, Any] = {}
    failures: list[str] = []
    with torch.inference_mode():
        resident = Bench(options, model, streamed=False)
        expected, seconds = resident.steps(grid, PROMPTS)
        found["eager"] = figures(seconds, options)
        attention.use(resident.transformer.blocks, options.attention)
        compile_blocks(resident, kind, grid, options.scratch / f"cache-{model}", failures)
        got, seconds = resident.steps(grid, PROMPTS)
        first = seconds[resident.first]
        _, seconds = resident.steps(grid, PROMPTS)
        found["compiled"] = figures(seconds, options)
        found["speedup"] = found["eager"]["step"] / found["compiled"]["step"]
        found["first_call_seconds"] = first - found["compiled"]["step"]
        found["relative_error"] = float((got - expected).norm() / expected.norm())
        found["graphs"] = counters["stats"]["unique_graphs"]
        if kind in ("cold", "warm"):
            found |= others(resident, other_grid)
            found["graphs_in_all"] = counters["stats"]["unique_graphs"]
        if kind == "cold":
            found |= streamed(options, model, grid, got, failures)
            found["graphs_in_all"] = counters["stats"]["unique_graphs"]
    found["disk_cache"] = {name: counters["aot_autograd"][name] for name in CACHE_COUNTERS}
    found["failures"] = failures
    if options.device == "cuda":
        found["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
    return found


CACHE_COUNTERS = ("autograd_cache_hit", "autograd_cache_miss", "autograd_cache_saved")


def others(bench: "Bench", grid: tuple[int, int]) -> dict[str, Any]:
    """Another size and other prompts: the first step there shows whether anything is compiled."""
    _, seconds = bench.steps(grid, OTHER_PROMPTS)
    later = statistics.median(seconds[bench.first + 1 :])
    return {"other_size_extra_seconds": seconds[bench.first] - later}


def streamed(
    options: argparse.Namespace, model: str, grid: tuple[int, int], got: Any, failures: list[str]
) -> dict[str, Any]:
    import torch

    bench = Bench(options, model, streamed=True)
    compile_blocks(bench, "cold", grid, options.scratch / f"cache-{model}", failures)
    velocities, seconds = bench.steps(grid, PROMPTS)
    return {"streamed": figures(seconds, options), "streamed_equal": torch.equal(velocities, got)}


class Bench:
    """A placed transformer; resident, or streamed through two slots."""

    def __init__(self, options: argparse.Namespace, model: str, streamed: bool) -> None:
        import torch

        from qwen_image_tool.engine import families
        from qwen_image_tool.engine.weights import Reader
        from qwen_image_tool.types import Placement

        self.device, self.count = torch.device(options.device), options.steps
        self.first = int(model == "qwen-image-2.1")  # whose step 0 is not compiled
        self.family = families.family(model)
        self.reader = Reader(lambda: False)
        layers = options.layers
        source = "disk" if options.device == "cpu" else "pinned"
        placement = Placement(blocks=layers, resident=layers)
        if streamed:
            placement = Placement(blocks=layers, resident=layers - 3, slots=2, source=source)
        self.transformer = self.family.Transformer(
            options.scratch / model, placement, self.device, torch.bfloat16, self.reader
        )

    def steps(self, grid: tuple[int, int], prompts: tuple[int, ...]) -> tuple[Any, list[float]]:
        """The velocities of all steps, float32; and the seconds of each step."""
        import torch

        draw = torch.Generator().manual_seed(0)
        config = self.transformer.model.config
        width = getattr(config, "joint_attention_dim", None) or config.context_in_dim
        timesteps = torch.linspace(1000, 100, self.count, device=self.device)
        forward = self.family.Forward(self.transformer, timesteps, grid, self.reader)
        states = [torch.randn(1, n, width, generator=draw).bfloat16() for n in prompts]
        conditions = [forward.condition(each.to(self.device)) for each in states]
        shape = (1, grid[0] * grid[1], config.in_channels)
        latents = torch.randn(shape, generator=draw).bfloat16().to(self.device)
        velocities, seconds = [], []
        for step in range(self.count):
            self._synchronize()
            began = time.perf_counter()
            out = forward(latents, step, conditions)
            self._synchronize()
            seconds.append(time.perf_counter() - began)
            velocities += [v.float() for each in out for v in each]
        return torch.cat(velocities), seconds

    def _synchronize(self) -> None:
        import torch

        if self.device.type != "cpu":
            torch.accelerator.synchronize()


def compile_blocks(
    bench: Bench, kind: str, grid: tuple[int, ...], cache: Path, failures: list[str]
) -> None:
    from qwen_image_tool.engine import compiled

    def lengths(*args: Any, **kwargs: Any) -> Any:
        """Without those of the picture, where `kind` fixes them."""
        found = bench.family.lengths(*args, **kwargs)
        tokens = grid[0] * grid[1]
        if kind == "fixed" and found is not None:
            found = [(tensor, axis) for tensor, axis in found if tensor.shape[axis] != tokens]
        return found

    if kind == "complex":
        compiled._turn_in_real_numbers = lambda kind: None  # noqa: ARG005
        compiled._real = lambda value: value
    place = cache if kind in ("cold", "warm") else cache.with_name(f"{cache.name}-{kind}")
    compiled.compile_blocks(bench.transformer.blocks, lengths, place, failures.append)


def figures(seconds: list[float], options: argparse.Namespace) -> dict[str, float]:
    """A step as it is in the long run, and a block of it in milliseconds."""
    step = statistics.median(seconds[2:])
    return {"step": step, "block_ms": 1000 * step / options.layers / len(PROMPTS)}


if __name__ == "__main__":
    main()
