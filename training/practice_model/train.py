"""Trains the practice model by stages; each resumes from its state in --run-dir (see README.md)."""

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from evaluate import held_out_tasks
from optim import Optimizers
from safetensors import safe_open
from scenes import Scenes, gather_scenes
from text import (
    CaptionEncoder,
    Reader,
    build_encoder,
    fit_reader,
    reading_loss,
    targets,
    tokenise,
    train_tokenizer,
)
from torch import Tensor, nn
from transformer import (
    TOKENS,
    UNCONDITIONAL,
    build_scheduler,
    build_transformer,
    deepened,
    draw_latents,
    flow_loss,
    prepare_for_training,
    rehearse,
)
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from vae import Z_DIM, SingleFrameVae, from_real, picture_loss, to_real, window_batch
from world import SQUARE, arrange, render, sample_training_scene

WEIGHTS = Path(__file__).parents[2] / "src/qwen_image_tool/practice/weights"

# (loss, figure to print), both scalars on the device; is sent the share of the time that has gone
Steps = Generator[tuple[Tensor, Tensor], float, None]


@dataclass(frozen=True)
class Options:
    run_dir: Path
    minutes: float
    batch: int  # pictures or captions a step; 0 = the stage's own
    scenes: int  # how many different ones are made
    device: str
    compile: bool
    weights: Path  # what `import` reads
    out: Path  # what `export` writes


# Stages


def tokenizer_stage(options: Options) -> None:
    train_tokenizer().save_pretrained(options.run_dir / "tokenizer")


def vae_stage(options: Options) -> None:
    model = SingleFrameVae().to(options.device)
    forward = torch.compile(model, dynamic=False) if options.compile else model

    def losses(rng: random.Random) -> Steps:
        share = 0.0
        while True:
            side, count = (64, 24) if share < 0.35 else (128, 10)
            pictures = window_batch(rng, options.batch or count, side).to(options.device)
            pictures = pictures.contiguous(memory_format=torch.channels_last)
            noise = torch.randn(len(pictures), Z_DIM, side // 16, side // 16, device=options.device)
            with torch.autocast(options.device, torch.bfloat16):
                made, latents = forward(pictures, noise)
            loss = picture_loss(made, pictures) + 1e-3 * latents.float().square().mean()
            share = yield loss, (made.detach().float() - pictures).abs().mean() / 2

    fit("vae", options, model, losses, (0.02, 2e-3), ("conv_in", "conv_out", "quant_conv"))


def text_stage(options: Options) -> None:
    train_text(options, make_scenes(options))


def transformer_stage(options: Options) -> None:
    begin = time.time()
    every = make_scenes(options)
    latents = make_latents(options, every)
    model = compiled_transformer(options)
    left = options.minutes - (time.time() - begin) / 60
    train_transformer(replace(options, minutes=left), model, every, latents)


def all_stage(options: Options) -> None:
    """From the weights in `options.weights` to better ones in `options.out`, in `options.minutes`.

    One after the other: beside the compiler, on the same GPU, latents came 900 times slower.
    """
    begin = time.time()
    import_stage(options)
    every = make_scenes(options)
    train_text(replace(options, minutes=TEXT_SHARE * options.minutes, compile=False), every)
    latents = make_latents(options, every)
    model = compiled_transformer(options)
    left = options.minutes - (time.time() - begin) / 60 - MINUTES_AROUND
    train_transformer(replace(options, minutes=left), model, every, latents)


LATENTS_SHARE = 0.12  # of the time, at most
TEXT_SHARE = 0.02  # of the time, for the text encoder's steps, if it has to learn
READS_WELL = 0.995  # share of held-out captions
MINUTES_AROUND = 0.3  # for Python's imports before and the export after


def judge_stage(options: Options) -> None:
    judge(options)


def judge(options: Options) -> None:
    """Figures, sweep and contact sheet of the exported weights; a fault here loses no weights."""
    here = Path(__file__).parent
    for script, *arguments in (
        ("evaluate.py", "--out", options.run_dir / "figures.json"),
        ("evaluate.py", "--sweep", "--count", "120", "--out", options.run_dir / "sweep.json"),
        ("contact_sheet.py", "--out", options.run_dir / "contact_sheet.png"),
    ):
        command = [here / script, "--weights", options.out, "--device", options.device, *arguments]
        subprocess.run([sys.executable, *map(str, command)], check=False)


def make_scenes(options: Options) -> list[Scenes]:
    begin = time.time()
    folder, seed = options.run_dir / "tokenizer", time.time_ns()
    every = gather_scenes(folder, options.scenes, seed, options.device)
    print(f"{sum(map(len, every)):,} scenes in {time.time() - begin:.0f} s", flush=True)
    return every


def train_text(options: Options, every: list[Scenes]) -> None:
    tokenizer = load_tokenizer(options)
    encoder = CaptionEncoder(build_encoder(tokenizer), tokenizer)
    reader = Reader()
    model = nn.ModuleDict({"encoder": encoder, "reader": reader}).to(options.device)
    if options.compile:
        encoder.compile_layers()
    ids = torch.cat([scenes.ids for scenes in every])
    lengths = torch.cat([scenes.lengths for scenes in every])
    wanted = torch.cat([scenes.targets for scenes in every])
    count = options.batch or 2048

    file = options.run_dir / "text.pt"
    if file.exists():
        model.load_state_dict(load_state(options, "text"))
        fit_reader(encoder, reader, ids[:4096, 0], lengths[:4096, 0], wanted[:4096])
        save(file, {"average": model.state_dict()})
        print(f"reads {(share := read_held_out(options)):.2%} at first", flush=True)
        if share >= READS_WELL:
            return

    def losses(_: random.Random) -> Steps:
        while True:
            rows = torch.randint(len(ids), (count,), device=options.device)
            wording = torch.randint(ids.shape[1], (count,), device=options.device)
            with torch.autocast(options.device, torch.bfloat16):
                hidden = encoder(ids[rows, wording].long())
                scores = model["reader"](hidden, lengths[rows, wording].long())
            yield reading_loss(scores, wanted[rows].long())

    rates = (0.006, 1e-3) if file.exists() else (0.02, 2e-3)
    fit("text", options, model, losses, rates, ("embed_tokens", "reader"))
    print(
        f"reads {read_held_out(options):.2%} of the held-out captions without a mistake", flush=True
    )


@torch.no_grad()
def read_held_out(options: Options) -> float:
    """The share of 2,000 captions with an unseen combination that is read without a mistake."""
    tokenizer = load_tokenizer(options)
    encoder = CaptionEncoder(build_encoder(tokenizer), tokenizer)
    model = nn.ModuleDict({"encoder": encoder, "reader": Reader()})
    model.load_state_dict(load_state(options, "text"))
    model.to(options.device)
    tasks = held_out_tasks([(256, 256)], 2000, seed=1)
    ids, lengths = tokenise(tokenizer, [task.prompt for task in tasks])
    wanted = torch.tensor([targets(task.scene) for task in tasks]).to(options.device)
    scores = model["reader"](encoder(ids.to(options.device)), lengths.to(options.device))
    return reading_loss(scores, wanted)[1].item()


def make_latents(options: Options, every: list[Scenes]) -> list[Tensor]:
    begin = time.time()
    until = begin + LATENTS_SHARE * options.minutes * 60
    latents = draw_latents(*load_vae(options), every, until)
    print(f"{sum(map(len, latents)):,} latents in {time.time() - begin:.0f} s", flush=True)
    return latents


def compiled_transformer(options: Options) -> QwenImageTransformer2DModel:
    """Its training graphs are made here, one for each number of tokens in a picture."""
    model = build_transformer().to(options.device)
    prepare_for_training(model, options.device)
    if options.compile:
        begin = time.time()
        model.compile_repeated_blocks(dynamic=False)
        rehearse(model, options.batch or STEP_PICTURES, options.device)
        print(f"compiled in {time.time() - begin:.0f} s", flush=True)
    return model


STEP_PICTURES = 1024


def train_transformer(
    options: Options, model: nn.Module, every: list[Scenes], latents: list[Tensor]
) -> None:
    """Steps of one picture size each. The words of every sentence are encoded once, before."""
    begin = time.time()
    tokenizer = load_tokenizer(options)
    encoder = load_text(options)[0].to(options.device)
    words = [encode_words(encoder, s, pictures) for s, pictures in zip(every, latents, strict=True)]
    blank, blank_length = (x.to(options.device) for x in tokenise(tokenizer, [" "]))
    nothing = encode_ids(encoder, blank)
    print(f"words in {time.time() - begin:.0f} s", flush=True)
    count = options.batch or STEP_PICTURES

    def losses(rng: random.Random) -> Steps:
        frequencies = [len(done) for done in latents]
        choices = [*zip(every, latents, words, strict=True)]
        while True:
            [(scenes, pictures, said)] = rng.choices(choices, frequencies)
            rows = torch.randint(len(pictures), (count,), device=options.device)
            wording = torch.randint(said.shape[1], (count,), device=options.device)
            unsaid = torch.rand(count, device=options.device) < UNCONDITIONAL
            spoken = said[rows, wording]
            spoken = torch.where(unsaid[:, None, None], nothing[:, : spoken.shape[1]], spoken)
            lengths = torch.where(unsaid, blank_length, scenes.lengths[rows, wording].long())
            mask = torch.arange(spoken.shape[1], device=options.device) < lengths[:, None]
            loss = flow_loss(model, pictures[rows].float(), spoken.float(), mask, scenes.size)
            yield loss, loss.detach()

    left = replace(options, minutes=options.minutes - (time.time() - begin) / 60)
    fit(
        "transformer",
        left,
        model,
        losses,
        (0.015, 1.5e-3),
        TRANSFORMER_ADAM_ONLY,
        partial(export_stage, options),
    )


def encode_words(encoder: CaptionEncoder, scenes: Scenes, pictures: Tensor) -> Tensor:
    """(n, WORDINGS, TOKENS - picture tokens, 192) bfloat16 for the n scenes with pictures."""
    ids = scenes.ids[: len(pictures), :, : TOKENS - pictures.shape[1]]
    parts = [encode_ids(encoder, part) for part in torch.split(ids.flatten(0, 1), 4096)]
    return torch.cat(parts).view(*ids.shape, -1)


@torch.no_grad()
def encode_ids(encoder: CaptionEncoder, ids: Tensor) -> Tensor:
    with torch.autocast(ids.device.type, torch.bfloat16):
        hidden: Tensor = encoder(ids.long())
    return hidden.bfloat16()


TRANSFORMER_ADAM_ONLY = ("_mod", "img_in", "txt_in", "time_text_embed", "norm_out", "proj_out")


def export_stage(options: Options) -> None:
    """Writes the diffusers folder in bfloat16 beside the old one, then swaps them."""
    _, text_model, tokenizer = load_text(options)
    transformer = build_transformer()
    transformer.load_state_dict(load_state(options, "transformer"))
    pipeline = QwenImagePipeline(
        scheduler=build_scheduler(),
        vae=to_real(*load_vae(options)),
        text_encoder=text_model,
        tokenizer=tokenizer,
        transformer=transformer,
    ).to(torch.bfloat16)
    fresh = options.out.with_name(f"{options.out.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    pipeline.save_pretrained(fresh)
    old = options.out.with_name(f"{options.out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if options.out.exists():
        options.out.rename(old)
    fresh.rename(options.out)
    shutil.rmtree(old, ignore_errors=True)
    print(json.dumps(catalogue_figures(options.out)), flush=True)


def catalogue_figures(folder: Path) -> dict[str, dict[str, int]]:
    """What catalog/models.json must say of each component with weights, and the whole folder."""
    figures: dict[str, dict[str, int]] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            numbers = sum(weights.get_tensor(key).numel() for key in weights.keys())  # noqa: SIM118
        figures[file.parent.name] = {"parameters": numbers, "bytes": file.stat().st_size}
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return figures | {"whole folder": {"bytes": size}}


def import_stage(options: Options) -> None:
    """Starts a run from the shipped weights: everything but the optimizers' state.

    A transformer with fewer blocks than `build_transformer` makes gets new ones in between.
    """
    tokenizer = Qwen2Tokenizer.from_pretrained(options.weights / "tokenizer")
    tokenizer.save_pretrained(options.run_dir / "tokenizer")
    vae, mean, std = from_real(options.weights / "vae")
    save(options.run_dir / "vae.pt", {"average": vae.state_dict()})
    save(options.run_dir / "latents_statistics.pt", {"mean": mean, "std": std})
    text = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        options.weights / "text_encoder", dtype=torch.float32
    )
    model = nn.ModuleDict({"encoder": CaptionEncoder(text, tokenizer), "reader": Reader()})
    save(options.run_dir / "text.pt", {"average": model.state_dict()})
    transformer = QwenImageTransformer2DModel.from_pretrained(
        options.weights / "transformer", torch_dtype=torch.float32
    )
    save(options.run_dir / "transformer.pt", {"average": deepened(transformer).state_dict()})


STAGES: dict[str, Callable[[Options], None]] = {
    "tokenizer": tokenizer_stage,
    "vae": vae_stage,
    "text": text_stage,
    "transformer": transformer_stage,
    "export": export_stage,
    "import": import_stage,
    "all": all_stage,
    "judge": judge_stage,
}


# The loop all stages share


def fit(
    name: str,
    options: Options,
    model: nn.Module,
    losses: Callable[[random.Random], Steps],
    rates: tuple[float, float],
    adam_only: tuple[str, ...],
    kept: Callable[[], None] = lambda: None,
) -> None:
    """Trains for `options.minutes`; weights, moving average and optimizers live in NAME.pt.

    `kept` is called whenever that file was written. Nothing but a line of print every hundred steps
    makes the program wait for the device.
    """
    file = options.run_dir / f"{name}.pt"
    optimizers = Optimizers(model, *rates, adam_only)
    average = copy.deepcopy(model)
    iteration = 0
    if file.exists():
        state = torch.load(file, map_location=options.device)
        model.load_state_dict(state.get("model", state.get("average")))
        average.load_state_dict(state.get("average", state.get("model")))
        iteration = state.get("iteration", 0)
        if "optimizers" in state:
            optimizers.load_state_dict(state["optimizers"])
    slow: list[Tensor] = list(average.parameters())
    fast: list[Tensor] = list(model.parameters())
    seed = time.time_ns()
    torch.manual_seed(seed % 2**31)
    steps = losses(random.Random(seed))

    def keep() -> None:
        save(
            file,
            {
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimizers": optimizers.state_dict(),
                "iteration": iteration,
            },
        )
        kept()

    begin = saved = time.time()
    first, share = iteration, 0.0
    loss, figure = next(steps)
    shown = figure.clone()
    while True:
        torch.autograd.backward(loss)
        optimizers.step(min((iteration - first + 1) / WARM_UP, 1.0, (1 - share) / 0.65))
        iteration += 1
        with torch.no_grad():
            torch._foreach_lerp_(slow, fast, 1 - min(AVERAGE, (1 + iteration) / (10 + iteration)))
        shown.lerp_(figure, 0.03)
        if (iteration - first) % 100 == 0:
            report(name, time.time() - begin, iteration - first, shown.item())
        share = (time.time() - begin) / max(options.minutes * 60, 1e-9)
        if share >= 1:
            return keep()
        if time.time() - saved > 120:
            saved = time.time()
            keep()
        loss, figure = steps.send(share)


WARM_UP = 200  # steps
AVERAGE = 0.998  # share of itself that the moving average keeps each step


def report(name: str, seconds: float, steps: int, figure: float) -> None:
    rate = steps / max(seconds, 1e-9)
    print(f"{name} {seconds:5.0f} s  {steps:6d}  {rate:5.1f} it/s  {figure:.4f}", flush=True)


# State


def save(path: Path, state: object) -> None:
    """Whole or not at all."""
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def load_state(options: Options, name: str) -> dict[str, Tensor]:
    state = torch.load(options.run_dir / f"{name}.pt", map_location="cpu")
    return dict(state.get("average", state.get("model")))


def load_tokenizer(options: Options) -> Qwen2Tokenizer:
    return Qwen2Tokenizer.from_pretrained(options.run_dir / "tokenizer")


def load_text(
    options: Options,
) -> tuple[CaptionEncoder, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer]:
    tokenizer = load_tokenizer(options)
    model = build_encoder(tokenizer)
    encoder = CaptionEncoder(model, tokenizer)
    nn.ModuleDict({"encoder": encoder, "reader": Reader()}).load_state_dict(
        load_state(options, "text")
    )
    return encoder.requires_grad_(False), model, tokenizer


def load_vae(options: Options) -> tuple[SingleFrameVae, Tensor, Tensor]:
    """The VAE with the mean and deviation of each latent channel, measured once and kept."""
    model = SingleFrameVae()
    model.load_state_dict(load_state(options, "vae"))
    model = model.to(options.device).requires_grad_(False)
    file = options.run_dir / "latents_statistics.pt"
    if not file.exists():
        save(file, measure_latents(model, options.device))
    statistics = torch.load(file, map_location=options.device)
    return model, statistics["mean"], statistics["std"]


def measure_latents(vae: SingleFrameVae, device: str) -> dict[str, Any]:
    """Over 192 drawings at 256x256."""
    rng = random.Random(1)
    channels = []
    for _ in range(12):
        drawings = [arrange(sample_training_scene(rng), *SQUARE, rng) for _ in range(16)]
        latents = vae.encode(render(drawings).to(device) * 2 - 1)
        channels.append(latents.transpose(0, 1).flatten(1))
    values = torch.cat(channels, dim=1)
    return {"mean": values.mean(dim=1), "std": values.std(dim=1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--run-dir", type=Path, required=True, help="state of the training")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--batch", type=int, default=0, help="a step; default: the stage's own")
    parser.add_argument("--scenes", type=int, default=200_000, help="different ones to train on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where to start from")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="where to export to")
    arguments = vars(parser.parse_args())
    stage = STAGES[arguments.pop("stage")]
    options = Options(**arguments)
    options.run_dir.mkdir(parents=True, exist_ok=True)
    torch._dynamo.config.recompile_limit = 32  # one graph a picture size
    torch.manual_seed(0)
    stage(options)


if __name__ == "__main__":
    main()
