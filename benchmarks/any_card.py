"""Any card, same picture: whole requests of a full-size model under memory caps, beside diffusers.

    python benchmarks/any_card.py FOLDER [--model qwen-image-2.1] [--size 1328x1328]
        [--caps 4 8 12 16 24] [--compiled 4 0] [--rivals group sequential cache-dit]
        [--json FILE] [--docs FILE]

FOLDER holds the model; one of random weights is made there if it is not there (full_size.py). Every
line runs in a process of its own, so that its peaks are its own. The yardstick is diffusers' own
pipeline with everything resident: final latents are compared bit for bit, pixels by levels of 255.
"""

import argparse
import itertools
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from processor import Processor
from sections import what_was_asked, write_section

GIB = 1 << 30
PROMPT = "a red circle left of a blue square on a yellow background, drawn with a soft brush"
OTHER = "an old lighthouse above a green sea under a sky of heavy clouds, painted in oil"
NEGATIVE, OTHER_NEGATIVE = "blurry", "flat colours, bad anatomy"
SEED = 7


def main() -> None:
    options = parse()
    if options.worker:
        sys.path[:0] = [str(Path(__file__).parent)]
        figures = WORKERS[options.worker](options)
        print(json.dumps(figures), flush=True)
        return
    if not options.folder.exists():
        import full_size  # imports torch, which no cold start should wait for

        began = time.perf_counter()
        full_size.make(options.folder, options.model, options.layers)
        print(f"model written in {time.perf_counter() - began:.0f} s", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        options.scratch = Path(scratch)
        report: dict[str, Any] = {"about": about(options), "rows": []}
        for row in measure(options):
            report["rows"].append(row)
            if options.json:  # at each row: a run that is cut off keeps what it has
                options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    text = table(report)
    print(text)
    if options.docs:
        name = f"any card {options.model} {options.size}"
        write_section(options.docs, name, text, add=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=("qwen-image", "qwen-image-2.1"), default="qwen-image")
    parser.add_argument("--size", default="1328x1328")
    parser.add_argument("--caps", type=float, nargs="*", default=[4, 8, 12, 16, 24], help="GiB")
    parser.add_argument("--compiled", type=float, nargs="*", default=[], help="caps; 0: none")
    parser.add_argument("--rivals", nargs="*", default=[])
    parser.add_argument("--rival-cap", type=float, default=16, help="GiB")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--layers", type=int, help="for a model that is made here")
    parser.add_argument(
        "--placement", help="RESIDENT,SLOTS,SOURCE[,DISK] in place of the planner's"
    )
    parser.add_argument("--text-placement", help="the same for the text encoder")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--timeout", type=float, default=300, help="seconds a line")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    parser.add_argument("--cap", type=float, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--mode", default="exact", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)  # seconds of the epoch
    return parser.parse_args()


def measure(options: argparse.Namespace) -> Any:
    """One row after the other, the yardstick before what is compared with it."""
    lines = [("rates", 0.0, ""), ("reference", 0.0, "exact")]
    lines += [("ours", cap, "exact") for cap in options.caps]
    lines += [("ours", cap, "compiled") for cap in options.compiled]
    lines += [(name, options.rival_cap, "exact") for name in options.rivals]
    for worker, cap, mode in lines:
        row = {"line": worker, "cap_gib": cap, "mode": mode, **run(options, worker, cap, mode)}
        print(json.dumps(row), flush=True)
        yield row


def run(options: argparse.Namespace, worker: str, cap: float, mode: str) -> dict[str, Any]:
    given = ["--model", options.model, "--size", options.size, "--steps", str(options.steps)]
    given += ["--worker", worker, "--cap", str(cap), "--mode", mode]
    given += ["--scratch", str(options.scratch), "--began", str(time.time())]
    if options.placement:
        given += ["--placement", options.placement]
    if options.text_placement:
        given += ["--text-placement", options.text_placement]
    command = [sys.executable, __file__, str(options.folder), *given]
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=options.timeout, check=False, text=True
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {options.timeout:.0f} s"}
    print(done.stderr, file=sys.stderr, end="")
    try:
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        [*_, why] = ["", *done.stderr.strip().splitlines()]
        return {"error": f"exit code {done.returncode}: {why[:100]}"}
    return found


# Workers: each prints one JSON object


def reference(options: argparse.Namespace) -> dict[str, Any]:
    """diffusers' pipeline, everything resident; keeps what the others are compared with."""
    import numpy as np
    import torch

    pipe = pipeline(options, whole=True).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    texts = {"p": PROMPT} | ({"n": NEGATIVE} if options.model == "qwen-image" else {})
    embeds = {name: encode(pipe, text) for name, text in texts.items()}
    torch.save(embeds, options.scratch / "embeds.pt")
    call(pipe, options, embeds)  # the first run warms up
    torch.cuda.reset_peak_memory_stats()
    latents, seconds = call(pipe, options, embeds)
    torch.save(latents.cpu(), options.scratch / "latents.pt")
    peak = torch.cuda.max_memory_allocated()
    began = time.perf_counter()
    image = decode(pipe, latents, options)
    took = time.perf_counter() - began
    np.save(options.scratch / "image.npy", np.asarray(image))
    torch.cuda.empty_cache()
    return {
        "step_seconds": seconds,
        "decode_seconds": took,
        "peak_allocated_gib": peak / GIB,
        "finite": bool(latents.isfinite().all()),
        "bus_gb_s": bus(),
    }


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """Our engine under a cap: a cold request, one with new prompts, one with known prompts."""
    import numpy as np
    import torch

    from qwen_image_tool import device as hardware
    from qwen_image_tool.catalog import load_catalog
    from qwen_image_tool.engine import vae
    from qwen_image_tool.engine.engine import Engine
    from qwen_image_tool.engine.probe import torch_facts
    from qwen_image_tool.store import locate
    from qwen_image_tool.types import PhaseStarted, Rates, Stepped

    installed = locate(str(options.folder), load_catalog(), Path())
    rates = Rates.from_json((options.scratch / "rates.json").read_bytes())
    here = hardware.probe(torch_facts()).with_rates(rates)
    here = here.within(None, int(options.cap * GIB) or None)
    request = request_for(options, installed, PROMPT)
    plan = plan_for(options, request, installed, here)
    predicted = predict(request, installed, here, plan)
    steps: list[float] = []
    first: list[float] = []
    cells: list[Any] = []
    peaks = Peaks()

    def emit(event: Any) -> None:
        if isinstance(event, PhaseStarted):
            peaks.turn(event.phase)
        if isinstance(event, Stepped):
            steps.append(event.seconds)
            first.append(time.time() - options.began)

    plain = vae.decode

    def keep(model: Any, latents: Any, *rest: Any) -> Any:
        cells.append(latents.cpu())
        return plain(model, latents, *rest)

    vae.decode = keep  # type: ignore[assignment]
    cache = options.scratch / f"cache-{options.cap}-{options.mode}"
    cache.mkdir()
    (options.scratch / "compiled").mkdir(exist_ok=True)
    (cache / "compiled").symlink_to(options.scratch / "compiled")  # one for all lines
    engine = Engine(installed, cache)
    runs = []
    known = {"prompt": PROMPT, "negative_prompt": request.negative_prompt}
    new = {"prompt": OTHER, "negative_prompt": request.negative_prompt and OTHER_NEGATIVE}
    for prompts in (known, new, known):
        asked = request.model_copy(update=prompts)
        runs.append(engine.run(asked, [plan], emit, lambda: False))
    peaks.turn("")
    theirs = torch.load(options.scratch / "latents.pt")
    same = torch.equal(cells[0], theirs)
    levels = np.abs(
        np.asarray(runs[0].images[0]).astype(int) - np.load(options.scratch / "image.npy")
    )
    count = options.steps
    return {
        "placement": plan.placement.model_dump(),
        "text_placement": plan.text_placement.model_dump(),
        "compiled": plan.compiled,
        "step_seconds": [steps[i] for i in range(3 * count) if i % count],
        "seconds": [run.seconds for run in runs],
        "start_to_first_step": first[0],
        "equal_latents": same,
        "relative": float((cells[0].float() - theirs.float()).norm() / theirs.float().norm()),
        "strips": plan.strips,
        "repeats": torch.equal(cells[0], cells[2]),
        "equal_embeddings": same_embeddings(cache, options.scratch),
        "levels": int(levels.max()),
        "pixels_that_differ": float((levels > 0).mean()),
        "peak_reserved_gib": peaks.reserved / GIB,
        "peak_allocated_gib": {name: size / GIB for name, size in peaks.allocated.items()},
        "context_gib": peaks.context / GIB,
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
        "bytes_per_step": plan.bytes_per_step,
        "text_bytes": installed.text_layers.count * installed.text_layers.bytes,
        "predicted": predicted,
    }


class Peaks:
    """GPU memory at its peak: in each phase what tensors took, over all what torch reserved, and
    what the process takes beside it."""

    def __init__(self) -> None:
        self.allocated: dict[str, int] = {}
        self.reserved = 0
        self.context = 0
        self._phase = ""

    def turn(self, phase: str) -> None:
        """Another phase begins."""
        import torch

        if self._phase:
            peak = torch.cuda.max_memory_allocated()
            self.allocated[self._phase] = max(peak, self.allocated.get(self._phase, 0))
        self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())
        free, total = torch.cuda.mem_get_info()
        self.context = total - free - torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        self._phase = phase


def predict(request: Any, installed: Any, here: Any, plan: Any) -> dict[str, Any]:
    """What the planner says of the plan as it is run, context included."""
    from qwen_image_tool.needs import Needs, Way

    way = Way(
        plan.device,
        plan.dtype,
        plan.placement,
        plan.text_placement,
        plan.single_frame,
        plan.strips,
        plan.compiled,
        plan.attention,
    )
    needs = Needs(request, installed, here)
    phases = {need.phase: need for need in needs.phases(way)}
    return {
        "step_seconds": needs.step_seconds(way),
        "decode_seconds": phases["decode"].seconds,
        "vram_gib": {name: need.vram_bytes / GIB for name, need in phases.items()},
        "ram_gib": max(need.ram_bytes for need in phases.values()) / GIB,
    }


def rates(options: argparse.Namespace) -> dict[str, Any]:
    """What the device is measured to do; kept for the others."""
    from qwen_image_tool import device as hardware
    from qwen_image_tool.engine.measure import measure
    from qwen_image_tool.engine.probe import torch_facts

    began = time.perf_counter()
    found = measure(hardware.probe(torch_facts()), options.scratch / "compiled")
    (options.scratch / "rates.json").write_text(found.to_json(), encoding="utf-8")
    return {"rates": found.model_dump(), "seconds": time.perf_counter() - began}


def rival(options: argparse.Namespace, place: Callable[[Any], None]) -> dict[str, Any]:
    """diffusers' pipeline with its transformer placed by `place`, on embeddings that are given."""
    import torch

    pipe = pipeline(options, whole=False)
    pipe.set_progress_bar_config(disable=True)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(options.cap * GIB / total)
    embeds = torch.load(options.scratch / "embeds.pt")
    began = time.perf_counter()
    place(pipe)
    set_up = time.perf_counter() - began
    latents, seconds = call(pipe, options, embeds, steps=2)
    return {
        "step_seconds": seconds,
        "set_up_seconds": set_up,
        "finite": bool(latents.isfinite().all()),
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
    }


def group(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    def place(pipe: Any) -> None:
        pipe.transformer.enable_group_offload(
            onload_device=torch.device("cuda"),
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=True,
            record_stream=True,
        )

    return rival(options, place)


def sequential(options: argparse.Namespace) -> dict[str, Any]:
    return rival(options, lambda pipe: pipe.enable_sequential_cpu_offload())


def cache_dit(options: argparse.Namespace) -> dict[str, Any]:
    from cache_dit.offload import layerwise_offload

    def place(pipe: Any) -> None:
        # It moves single layers; some stay, spread over as many stretches as there are blocks, as
        # many as fit beside 2 GiB on their way and what a step takes
        layers = [part for part in pipe.transformer.modules() if not [*part.children()]]
        sizes = [sum(p.nbytes for p in layer.parameters()) for layer in layers]
        sizes = [size for size in sizes if size]
        stretches = len(pipe.transformer.transformer_blocks)

        def stay_bytes(count: int) -> int:
            begins = (i * len(sizes) // stretches for i in range(stretches))
            counts = ((count + stretches - 1 - i) // stretches for i in range(stretches))
            return sum(sum(sizes[at : at + n]) for at, n in zip(begins, counts, strict=True))

        fits = (n for n in range(len(sizes)) if stay_bytes(n) <= (options.cap - 9) * GIB)
        layerwise_offload(
            pipe.transformer,
            async_transfer=True,
            non_blocking=True,
            transfer_buckets=4,
            prefetch_limit=False,
            max_inflight_prefetch_bytes=2 * GIB,
            persistent_buckets=max(fits),
            persistent_bins=stretches,
        )

    return rival(options, place)


WORKERS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "rates": rates,
    "reference": reference,
    "ours": ours,
    "group": group,
    "sequential": sequential,
    "cache-dit": cache_dit,
}


# What the workers share


def request_for(options: argparse.Namespace, installed: Any, prompt: str) -> Any:
    from qwen_image_tool.types import Request, Size

    cfg = 4.0 if options.model == "qwen-image" else 1.0
    return installed.model.resolve(
        Request(
            model=str(options.folder),
            prompt=prompt,
            negative_prompt=NEGATIVE if cfg > 1 else None,
            cfg=cfg,
            size=Size.parse(options.size),
            steps=options.steps,
            mode="exact" if options.mode == "exact" else "default",
        ),
        SEED,
    )


def plan_for(options: argparse.Namespace, request: Any, installed: Any, here: Any) -> Any:
    """The planner's, with what was given in place of its own; `compiled` also where the few steps
    of a benchmark don't pay for it."""
    from qwen_image_tool import planner
    from qwen_image_tool.types import Placement

    plan = planner.plan(request, installed, here)
    changes: dict[str, Any] = {}
    if options.mode == "compiled":
        changes = {"compiled": True, "attention": here.rates.attention_backend}
    for name in ("placement", "text_placement"):
        if getattr(options, name):
            resident, slots, source, *disk = getattr(options, name).split(",")
            count = getattr(plan, name).blocks
            changes |= {"device": "cuda", "dtype": "bfloat16"}
            changes[name] = Placement(
                blocks=count,
                resident=min(count, int(resident)),
                slots=int(slots),
                source=source or "",
                disk=int(disk[0]) if disk else 0,
            )
    return plan.model_copy(update=changes)


def pipeline(options: argparse.Namespace, whole: bool) -> Any:
    """diffusers' pipeline over the folder, in bfloat16; not `whole`: its transformer alone."""
    import diffusers
    import torch
    import transformers

    folder, new = options.folder, options.model == "qwen-image-2.1"
    load = {"dtype": torch.bfloat16}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    kinds: tuple[Any, Any, Any] = (
        diffusers.QwenImageTransformer2DModel,
        diffusers.AutoencoderKLQwenImage,
        transformers.Qwen2_5_VLForConditionalGeneration,
    )
    if new:
        kinds = (
            diffusers.QwenImage21Transformer2DModel,
            diffusers.AutoencoderKLQwenImage21,
            transformers.Qwen3VLForConditionalGeneration,
        )
    parts = {
        "scheduler": scheduler,
        "transformer": kinds[0].from_pretrained(folder / "transformer", **load),
        "vae": kinds[1].from_pretrained(folder / "vae", **load) if whole else None,
        "text_encoder": kinds[2].from_pretrained(folder / "text_encoder", **load)
        if whole
        else None,
    }
    words = transformers.Qwen2Tokenizer.from_pretrained(
        folder / ("processor" if new else "tokenizer")
    )
    if new:
        return diffusers.QwenImage21Pipeline(processor=Processor(words), **parts)
    return diffusers.QwenImagePipeline(tokenizer=words, **parts)


def encode(pipe: Any, prompt: str) -> Any:
    import torch

    with torch.no_grad():
        return pipe.encode_prompt(prompt, device=torch.device("cuda"))[0]


def call(
    pipe: Any, options: argparse.Namespace, embeds: dict[str, Any], steps: int = 0
) -> tuple[Any, list[float]]:
    """Final latents as cells, and the seconds of each step but the first."""
    import torch

    from qwen_image_tool.types import Size

    size = Size.parse(options.size)
    times = [time.perf_counter()]

    def stepped(_pipe: Any, _step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        torch.cuda.synchronize()
        times.append(time.perf_counter())
        return values

    how: dict[str, Any] = {"prompt_embeds": embeds["p"]}
    if options.model == "qwen-image":
        how |= {"negative_prompt_embeds": embeds["n"], "true_cfg_scale": 4.0}
    latents = pipe(
        **how,
        width=size.width,
        height=size.height,
        num_inference_steps=steps or options.steps,
        generator=torch.Generator("cpu").manual_seed(SEED),
        output_type="latent",
        callback_on_step_end=stepped,
    ).images
    cells = pipe._unpack_latents(latents, size.height, size.width, pipe.vae_scale_factor)
    return cells, [b - a for a, b in itertools.pairwise(times)][1:]


def decode(pipe: Any, cells: Any, options: argparse.Namespace) -> Any:
    """As the pipelines' __call__ ends."""
    import torch

    from qwen_image_tool.catalog import load_catalog
    from qwen_image_tool.engine import families, vae

    family = families.family(load_catalog().find(options.model).family)
    with torch.no_grad():
        return vae.decode(pipe.vae, cells.to("cuda"), family.unscale)


def same_embeddings(cache: Path, scratch: Path) -> bool:
    """Whether what our engine kept of the prompts ends in what diffusers encoded."""
    import torch
    from safetensors.torch import load_file

    kept = [load_file(file)["tensor"] for file in (cache / "embeddings").glob("*.safetensors")]
    theirs = [embeds.cpu() for embeds in torch.load(scratch / "embeds.pt").values()]
    return all(
        any(torch.equal(mine[:, -each.shape[1] :], each) for mine in kept) for each in theirs
    )


def bus() -> float:
    """GB/s of a page-locked copy to the GPU."""
    import torch

    host = torch.empty(GIB // 2, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device="cuda")
    rates = []
    for _ in range(4):
        torch.cuda.synchronize()
        began = time.perf_counter()
        there.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        rates.append(host.nbytes / (time.perf_counter() - began) / 1e9)
    return max(rates)


# The report


def about(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers

    from qwen_image_tool.app import library_versions

    return {
        "command": f"python benchmarks/any_card.py FOLDER {what_was_asked(sys.argv[2:])}",
        "date": time.strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "machine": platform.platform(terse=True),
        "versions": library_versions() | {"transformers": transformers.__version__},
        "model": options.model,
        "size": options.size,
        "steps": options.steps,
    }


COLUMNS = (
    "cap GiB",
    "s a step",
    "predicted",
    "of resident speed",
    "equal latents",
    "levels (pixels that differ)",
    "peak reserved GiB",
    "with context",
    "predicted",
    "GB a step",
    "resident",
    "strips",
    "peak RAM GiB",
    "predicted",
    "first step s",
    "new prompts s",
    "known ms",
    "request s",
    "predicted",
)


def table(report: dict[str, Any]) -> str:
    made = report["about"]
    rows = [row for row in report["rows"] if row["line"] != "rates"]
    plain = statistics.median(rows[0]["step_seconds"])
    versions = ", ".join(f"{k} {v}" for k, v in made["versions"].items())
    bus_rate = f"bus {rows[0]['bus_gb_s']:.1f} GB/s"
    lines = [
        f"`{made['command']}`, {made['date']}: {made['gpu']}, {versions}; {bus_rate}.",
        "",
        f"| | {' | '.join(COLUMNS)} |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for row in rows:
        name = row["line"] if row["line"] != "ours" else f"ours, {row['mode']}"
        cells = [name, f"{row['cap_gib']:g}", *(cells_of(row, plain, made["steps"]))]
        lines.append(f"| {' | '.join(cells + [''] * (len(COLUMNS) + 1 - len(cells)))} |")
    return "\n".join(lines)


def cells_of(row: dict[str, Any], plain: float, steps: int) -> list[str]:
    """`plain`: seconds of the yardstick's step. The request is the one with known prompts."""
    if "error" in row:
        return [row["error"]]
    step = statistics.median(row["step_seconds"])
    if row["line"] != "ours":
        peak = row.get("peak_reserved_gib", row.get("peak_allocated_gib", 0))
        return [f"{step:.4f}", "", f"{plain / step:.3f}", "", "", f"{peak:.2f}"]
    predicted = row["predicted"]
    return [
        f"{step:.4f}",
        f"{predicted['step_seconds'] or 0:.4f}",
        f"{plain / step:.3f}",
        "yes" if row["equal_latents"] else f"no ({row['relative']:.1e})",
        f"{row['levels']} ({row['pixels_that_differ']:.2%})",
        f"{row['peak_reserved_gib']:.2f}",
        f"{row['peak_reserved_gib'] + row['context_gib']:.2f}",
        f"{max(predicted['vram_gib'].values()):.2f}",
        f"{row['bytes_per_step'] / 1e9:.1f}",
        f"{row['placement']['resident']} of {row['placement']['blocks']}",
        f"{row['strips']}",
        f"{row['peak_rss_gib']:.1f}",
        f"{predicted['ram_gib']:.1f}",
        f"{row['start_to_first_step']:.1f}",
        f"{row['seconds'][1]['encode']:.3f}",
        f"{row['seconds'][2]['encode'] * 1000:.1f}",
        f"{sum(row['seconds'][2].values()):.2f}",
        f"{steps * (predicted['step_seconds'] or 0) + (predicted['decode_seconds'] or 0):.2f}",
    ]


if __name__ == "__main__":
    main()
