"""Latents to pixels: diffusers' full frame and its tiling, ours and ours in strips, in one run.

    .venv/bin/python benchmarks/decode.py [--strips 3 7] [--json FILE] [--write]

Full-size VAEs with random weights, in bfloat16: the values change neither time nor memory. On a GPU
the caps are those of torch's allocator, weights included; strips are chosen as the planner chooses
them. Each cap has a process of its own: where memory is short, cuDNN takes kernels that need less,
and keeps them. Seconds are from latents to levels of 0 to 255, both on the device: the median of
`--repeats`, after two that don't count. Working memory is the peak beside the weights. `--write`
puts the table into docs/benchmarks.md. `--small` makes narrow VAEs and small frames, which is what
a CPU can do; it has no caps, but `--caps` makes their lines. `--run-out` adds, by a process of its
own, what decoding takes without a cap after memory ran out under one, in the same thread and in
that which the engine takes then.
"""

import argparse
import copy
import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLQwenImage21

from qwen_image_tool.catalog import Family
from qwen_image_tool.catalog.costs import load_costs
from qwen_image_tool.decoding import DECODINGS
from qwen_image_tool.device import cpu_name
from qwen_image_tool.engine import vae
from qwen_image_tool.engine.fresh import FreshThread, times_ran_out
from qwen_image_tool.engine.probe import torch_facts
from qwen_image_tool.types import Size
from sections import PAGE, what_was_asked, write_section

GIB = 2**30
CLASSES: dict[Family, Any] = {
    "qwen-image": AutoencoderKLQwenImage,
    "qwen-image-2.1": AutoencoderKLQwenImage21,
}
WIDE = Size(1664, 928)
SIZES: dict[Family, list[Size]] = {
    "qwen-image": [Size(1024, 1024), Size(1328, 1328), Size(2048, 2048), WIDE],
    "qwen-image-2.1": [Size(1024, 1024), Size(2048, 2048), WIDE],
}
NARROW: dict[Family, dict[str, Any]] = {
    "qwen-image": {"base_dim": 8, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1},
    "qwen-image-2.1": {"base_dim": 4, "decoder_base_dim": 8, "num_res_blocks": 1},
}
HEADINGS = [
    "VAE", "size", "decode", "cap GiB", "seconds", "of full frame", "working GiB", "reserved GiB",
    "levels apart", "pixels apart",
]  # fmt: skip
Row = dict[str, Any]
Levels = npt.NDArray[np.uint8]


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=tuple(CLASSES), default=tuple(CLASSES))
    parser.add_argument("--sizes", type=Size.parse, nargs="+", help="as 1024x1024")
    parser.add_argument("--caps", type=float, nargs="*", help="GiB; 1.5, 2 and 4 on a GPU")
    parser.add_argument("--strips", type=int, nargs="*", default=[], help="counts, without a cap")
    parser.add_argument("--run-out", action="store_true", help="also after memory ran out")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args(arguments)
    if options.caps is None:
        options.caps = [1.5, 2, 4] if torch.device(options.device).type == "cuda" else []
    rows: list[Row] = []
    for family in options.models:
        for size in options.sizes or ([Size(128, 128)] if options.small else SIZES[family]):
            rows += measured(family, size, options)
    asked = what_was_asked(sys.argv[1:] if arguments is None else arguments)
    report = {
        "command": f"benchmarks/decode.py {asked}".strip(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(options.device),
        "versions": versions(),
        "rows": rows,
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    else:
        print(json.dumps(report))
    if options.write:
        write_section(PAGE, "decode", table(report))
    return rows


def measured(family: Family, size: Size, options: argparse.Namespace) -> list[Row]:
    """The lines of one VAE at one size, diffusers' full frame first."""
    bench, rows = Bench(family, size, options), list[Row]()

    def add(row: Row) -> None:
        rows.append(row)
        print(line(row, rows[0]), flush=True)

    theirs, ours = bench.theirs, bench.ours
    add(bench.row("diffusers, full frame", theirs))
    add(bench.row("diffusers, full frame in float32", copy.deepcopy(theirs).float()))
    theirs.enable_tiling()
    add(bench.row("diffusers, tiling", theirs))
    add(bench.row("ours, full frame", ours))
    for strips in bench.counts:
        add(bench.row(f"ours, {strips} strips", ours, strips=strips))
    apart: list[Callable[..., list[Row]]] = [partial(capped, cap=cap) for cap in options.caps]
    for make in apart + ([after_running_out] if options.run_out else []):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            for row in process.submit(make, family, size, options, bench.reference).result():
                add(row)
    return rows


def capped(
    family: Family, size: Size, options: argparse.Namespace, reference: Levels | None, cap: float
) -> list[Row]:
    """The lines of one cap."""
    bench = Bench(family, size, options)
    bench.reference = reference
    bench.theirs.enable_tiling()
    strips = bench.strips(cap)
    what = "ours, full frame" if strips == 1 else f"ours, {strips} strips"
    ours = bench.row(what, bench.ours, cap, strips)
    return [bench.row("diffusers, tiling", bench.theirs, cap), ours]


def after_running_out(
    family: Family, size: Size, options: argparse.Namespace, reference: Levels | None
) -> list[Row]:
    """The lines of a process in which memory ran out: there was as much as the tensors take, and
    none for kernels to work in."""
    bench, decoding = Bench(family, size, options), DECODINGS[family]
    bench.reference = reference
    strips = decoding.most_strips(size)
    cap = (bench.weights + decoding.bytes(size, strips)) / GIB
    rows = [bench.row(f"ours, {strips} strips", bench.ours, round(cap, 2), strips)]
    if bench.on_gpu and not times_ran_out(bench.device):
        raise RuntimeError(f"{cap:.2f} GiB were enough")
    what = f"ours, {strips} strips, after memory ran out"
    rows.append(bench.row(what, bench.ours, strips=strips))
    with closing(FreshThread(bench.device)) as thread:
        row = partial(bench.row, f"{what}: another thread", bench.ours, strips=strips)
        return [*rows, thread.run(row)]


class Bench:
    """One VAE, as diffusers' and as ours, and one picture's latents."""

    def __init__(self, family: Family, size: Size, options: argparse.Namespace) -> None:
        torch_facts()  # sets the allocator as the program does
        diffusers.logging.set_verbosity_error()
        self.family, self.size, self.device = family, size, torch.device(options.device)
        self.on_gpu = self.device.type == "cuda"
        self.counts = options.strips or ([] if self.on_gpu else [4])
        self.repeats = options.repeats
        torch.manual_seed(0)
        with self.device:
            made = CLASSES[family](**NARROW[family] if options.small else {})
        self.theirs = made.to(torch.bfloat16).eval().requires_grad_(False)
        self.ours = copy.deepcopy(self.theirs)
        vae.keep_decoder(self.ours)
        vae.make_single_frame(self.ours, DECODINGS[family], faithful=self.on_gpu)
        cell = vae.scale(made)
        cells = (1, made.config.z_dim, 1, size.height // cell, size.width // cell)
        self.cells = torch.randn(cells, generator=torch.Generator().manual_seed(1))
        self.reference: Levels | None = None
        self.weights = sum(p.numel() * p.element_size() for p in self.ours.parameters())

    def strips(self, cap: float) -> int:
        """As the planner would; as many as it takes at most where none fits."""
        decoding, costs = DECODINGS[self.family], load_costs()
        left = cap * GIB - self.weights - costs.workspace_bytes
        most = decoding.most_strips(self.size)
        found = decoding.strips(self.size, int(left / costs.families[self.family].decode_slack))
        return min(found or most, most)

    @torch.inference_mode()
    def row(self, what: str, model: Any, cap: float | None = None, strips: int = 1) -> Row:
        """One line of the table."""
        row: Row = {"family": self.family, "size": str(self.size), "what": what, "cap_gib": cap}
        with self.alone(model, cap):
            cells = self.cells.to(self.device, model.dtype)
            try:
                return row | self.timed(model, cells, strips)
            except torch.OutOfMemoryError:
                return row | {"failed": "out of memory"}

    @contextmanager
    def alone(self, model: Any, cap: float | None) -> Iterator[None]:
        """Only this model is on the device, and torch's allocator takes no more than the cap."""
        self.theirs.cpu()
        self.ours.cpu()
        if self.on_gpu:
            torch.cuda.empty_cache()
            share = cap * GIB / torch.cuda.mem_get_info()[1] if cap else 1.0
            torch.cuda.set_per_process_memory_fraction(share)
        try:
            model.to(self.device)
            yield
        finally:
            model.cpu()
            if self.on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.set_per_process_memory_fraction(1.0)

    def timed(self, model: Any, cells: torch.Tensor, strips: int) -> Row:
        row, took = self.apart(vae.levels(model, cells, strips)[0]), []
        vae.levels(model, cells, strips)
        weights = torch.cuda.memory_allocated() if self.on_gpu else 0
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(self.repeats):
            self.synchronize()
            started = time.perf_counter()
            vae.levels(model, cells, strips)
            self.synchronize()
            took.append(time.perf_counter() - started)
        row["seconds"] = statistics.median(took)
        if self.on_gpu:
            row["working_gib"] = (torch.cuda.max_memory_allocated() - weights) / GIB
            row["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
        return row

    def apart(self, picture: torch.Tensor) -> Row:
        """How far the picture is from the first one."""
        levels: Levels = picture.cpu().numpy()
        if self.reference is None:
            self.reference = levels
        difference = np.abs(levels.astype(int) - self.reference)
        return {
            "levels_apart": int(difference.max()),
            "share_apart": float((difference > 0).mean()),
            "share_over_one": float((difference > 1).mean()),
        }

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def line(row: Row, full: Row) -> str:
    """A row of the table; its speed against diffusers' full frame of that size."""
    cells = [row["family"], row["size"], row["what"], row["cap_gib"] or ""]
    if "failed" in row:
        cells += [row["failed"], "", "", "", "", ""]
    else:
        cells += [
            f"{row['seconds']:.4f}",
            f"{row['seconds'] / full['seconds']:.2f}" if "seconds" in full else "",
            f"{row['working_gib']:.2f}" if "working_gib" in row else "",
            f"{row['reserved_gib']:.2f}" if "reserved_gib" in row else "",
            row["levels_apart"],
            f"{100 * row['share_apart']:.2f} %",
        ]
    return "| " + " | ".join(map(str, cells)) + " |"


def table(report: dict[str, Any]) -> str:
    """Markdown; every line is compared with the first of its VAE and size."""
    full: dict[tuple[str, str], Row] = {}
    body = [line(r, full.setdefault((r["family"], r["size"]), r)) for r in report["rows"]]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    head = f"`{report['command']}`, {report['date']}: {report['machine']}, {versions}; bfloat16,"
    head += " random weights."
    return "\n".join([head, "", f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|", *body])


def machine(device: str) -> str:
    on_gpu = torch.device(device).type == "cuda"
    return f"{torch.cuda.get_device_name() if on_gpu else cpu_name()}, {platform.system()}"


def versions() -> dict[str, str]:
    cudnn: Any = torch.backends.cudnn
    found = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    return found | ({"cuDNN": str(cudnn.version())} if cudnn.is_available() else {})


if __name__ == "__main__":
    main()
