"""Trains the practice model by stages; each resumes from its state in --run-dir (see README.md)."""

from __future__ import annotations

import argparse
import copy
import os
import random
import shutil
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from optim import Optimizers
from text import (
    CaptionEncoder,
    Reader,
    build_encoder,
    caption_batches,
    reading_loss,
    train_tokenizer,
)
from torch import Tensor, nn
from transformer import (
    Shard,
    build_scheduler,
    build_transformer,
    caption_for,
    draw_shard,
    flow_loss,
    use_small_attention,
)
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from vae import Z_DIM, SingleFrameVae, from_real, picture_loss, to_real, window_batch
from world import SQUARE, arrange, render, sample_training_scene

WEIGHTS = Path(__file__).parents[2] / "src/qwen_image_tool/practice/weights"

Steps = Generator[tuple[Tensor, float], float, None]  # (loss, figure to print); takes the time gone


@dataclass(frozen=True)
class Options:
    run_dir: Path
    minutes: float
    batch: int  # pictures a step and worker; 0 = the stage's own
    device: str
    compile: bool
    weights: Path


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
            share = yield loss, (made.detach().float() - pictures).abs().mean().item() / 2

    fit("vae", options, model, losses, (0.02, 2e-3), ("conv_in", "conv_out", "quant_conv"))


def text_stage(options: Options) -> None:
    tokenizer = load_tokenizer(options)
    encoder = CaptionEncoder(build_encoder(tokenizer), tokenizer)
    model = nn.ModuleDict({"encoder": encoder, "reader": Reader()}).to(options.device)

    def losses(rng: random.Random) -> Steps:
        for captions, wanted in caption_batches(rng, options.batch or 96):
            ids, lengths = (x.to(options.device) for x in encoder.tokens(captions))
            with torch.autocast(options.device, torch.bfloat16):
                scores = model["reader"](encoder(ids), lengths)
            yield reading_loss(scores, wanted.to(options.device))

    fit("text", options, model, losses, (0.02, 2e-3), ("embed_tokens", "reader"))


def latents_stage(options: Options) -> None:
    """Draws and encodes scenes, 2048 a shard; a running training picks them up."""
    vae, mean, std = load_vae(options)
    if options.compile:
        vae.encoder.compile(dynamic=False)
    folder = options.run_dir / "latents"
    folder.mkdir(exist_ok=True)
    begin, seed = time.time(), len(list(folder.glob("*.pt")))
    while time.time() - begin < options.minutes * 60:
        shard = draw_shard(vae, mean, std, seed, options.batch or 2048, options.device)
        save(folder / f"{seed:05}.pt", vars(shard))
        print(f"{time.time() - begin:6.0f} s  shard {seed}", flush=True)
        seed += 1


def transformer_stage(options: Options) -> None:
    if options.device == "cpu":
        use_small_attention()
    encoder = load_text(options)[0].to(options.device)
    model = build_transformer().to(options.device)
    if options.compile:
        model.compile_repeated_blocks()

    def losses(rng: random.Random) -> Steps:
        batches = scene_batches(options, rng)
        while True:
            shard, rows, captions = next(batches)
            latents = shard.latents[rows].to(options.device).float()
            ids, lengths = (x.to(options.device) for x in encoder.tokens(captions))
            with torch.no_grad(), torch.autocast(options.device, torch.bfloat16):
                words = encoder(ids)
            mask = torch.arange(ids.shape[1], device=options.device) < lengths[:, None]
            loss = flow_loss(model, latents, words.float(), mask, shard.grid)
            yield loss, loss.item()

    fit("transformer", options, model, losses, (0.02, 2e-3), TRANSFORMER_ADAM_ONLY)


TRANSFORMER_ADAM_ONLY = ("_mod", "img_in", "txt_in", "time_text_embed", "norm_out", "proj_out")


def scene_batches(
    options: Options, rng: random.Random
) -> Iterator[tuple[Shard, list[int], list[str]]]:
    """Batches of one size each, with captions of like length together so that little is padding."""
    folder, shards, looked = options.run_dir / "latents", dict[str, Shard](), 0.0
    count = options.batch or 40
    while True:
        if time.time() - looked > 60:
            looked = time.time()
            for file in sorted(folder.glob("*.pt")):
                if file.name not in shards:
                    shards[file.name] = Shard(**torch.load(file, weights_only=False))
        shard = rng.choice(list(shards.values()))
        rows = rng.sample(range(len(shard.scenes)), 4 * count)
        written = [(caption_for(shard.scenes[row], rng), row) for row in rows]
        written.sort(key=lambda item: len(item[0]))
        for start in rng.sample(range(0, 4 * count, count), 4):
            part = written[start : start + count]
            yield shard, [row for _, row in part], [caption for caption, _ in part]


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
    fresh = options.weights.with_name("weights.new")
    shutil.rmtree(fresh, ignore_errors=True)
    pipeline.save_pretrained(fresh)
    old = options.weights.with_name("weights.old")
    shutil.rmtree(old, ignore_errors=True)
    if options.weights.exists():
        options.weights.rename(old)
    fresh.rename(options.weights)
    shutil.rmtree(old, ignore_errors=True)
    files = [file for file in options.weights.rglob("*") if file.is_file()]
    print(f"{sum(file.stat().st_size for file in files):,} bytes in {options.weights}")


def import_stage(options: Options) -> None:
    """Starts a run from the shipped weights: everything but the optimizers' state."""
    tokenizer = Qwen2Tokenizer.from_pretrained(options.weights / "tokenizer")
    tokenizer.save_pretrained(options.run_dir / "tokenizer")
    vae, _, _ = from_real(options.weights / "vae")
    save(options.run_dir / "vae.pt", {"average": vae.state_dict()})
    text = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        options.weights / "text_encoder", dtype=torch.float32
    )
    model = nn.ModuleDict({"encoder": CaptionEncoder(text, tokenizer), "reader": Reader()})
    save(options.run_dir / "text.pt", {"average": model.state_dict()})
    transformer = QwenImageTransformer2DModel.from_pretrained(
        options.weights / "transformer", torch_dtype=torch.float32
    )
    save(options.run_dir / "transformer.pt", {"average": transformer.state_dict()})


STAGES: dict[str, Callable[[Options], None]] = {
    "tokenizer": tokenizer_stage,
    "vae": vae_stage,
    "text": text_stage,
    "latents": latents_stage,
    "transformer": transformer_stage,
    "export": export_stage,
    "import": import_stage,
}


# The loop all stages share


def fit(
    name: str,
    options: Options,
    model: nn.Module,
    losses: Callable[[random.Random], Steps],
    rates: tuple[float, float],
    adam_only: tuple[str, ...],
) -> None:
    """Trains for `options.minutes`; weights, moving average and optimizers live in NAME.pt.

    `losses` is sent the share of the time that has passed.
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
    seed = time.time_ns() + rank()
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

    begin = saved = time.time()
    share = 0.0
    loss, figure = next(steps)
    shown = figure
    while True:
        torch.autograd.backward(loss)
        optimizers.step(min(share / 0.03 + 0.01, 1.0, (1 - share) / 0.6))
        iteration += 1
        decay = min(0.998, (1 + iteration) / (10 + iteration))
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)
        shown = 0.97 * shown + 0.03 * figure
        share = agreed((time.time() - begin) / (options.minutes * 60), options.device)
        if iteration % 25 == 0 and rank() == 0:
            print(f"{time.time() - begin:6.0f} s  {iteration:6d}  {shown:.4f}", flush=True)
        if share >= 1:
            return keep()
        if time.time() - saved > 60:
            saved = time.time()
            keep()
        loss, figure = steps.send(share)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def agreed(value: float, device: str) -> float:
    """The first worker's value, so that all workers switch and stop together."""
    if not dist.is_initialized():
        return value
    message = torch.tensor([value], device=device)
    dist.broadcast(message, 0)
    return float(message)


# State


def save(path: Path, state: dict[str, Any]) -> None:
    """Whole or not at all, and by the first worker only."""
    if rank() == 0:
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
    parser.add_argument(
        "--batch", type=int, default=0, help="a step and worker; default: the stage's"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="for export and import")
    arguments = vars(parser.parse_args())
    stage = STAGES[arguments.pop("stage")]
    options = Options(**arguments)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo" if options.device == "cpu" else "nccl")
    options.run_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    stage(options)


if __name__ == "__main__":
    main()
