"""Write a full-size model of random weights in the layout it is published in: Qwen-Image (20B,
57.7 GB) or Qwen-Image-2.1 (7B, 32.4 GB).

    .venv/bin/python benchmarks/full_size.py FOLDER [--model qwen-image-2.1] [--layers 60]

The values change neither time nor memory. They come from one small random pool, scaled so that
activations stay finite; normalisation weights are one. `--layers` makes a smaller one.
"""

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from qwen_image_tool.catalog import load_catalog
from qwen_image_tool.engine.weights import no_weights
from qwen_image_tool.store import practice_folder

SHARD_BYTES = 2_500_000_000
POOL = 1 << 24  # numbers
WRITERS = 8  # threads
# Transformer, its blocks, VAE, text encoder, what its configuration says of the text
PUBLISHED: dict[str, tuple[str, int, str, str, dict[str, int]]] = {
    "qwen-image": (
        "QwenImageTransformer2DModel",
        60,
        "AutoencoderKLQwenImage",
        "Qwen2_5_VL",
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "vocab_size": 152064,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
    ),
    "qwen-image-2.1": (
        "QwenImage21Transformer2DModel",
        32,
        "AutoencoderKLQwenImage21",
        "Qwen3VL",
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "vocab_size": 151936,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=tuple(PUBLISHED), default="qwen-image")
    parser.add_argument(
        "--layers", type=int, help="of transformer and text encoder; fewer: smaller"
    )
    options = parser.parse_args()
    make(options.folder, options.model, options.layers)


def make(folder: Path, model: str = "qwen-image", layers: int | None = None) -> None:
    """A folder that `--model` takes; at full depth as many parameters as published, bfloat16."""
    folder.mkdir(parents=True)
    practice = practice_folder()
    index = json.loads((practice / "model_index.json").read_text(encoding="utf-8"))
    tokenizer = "tokenizer"
    if model == "qwen-image-2.1":
        index |= {"_class_name": "QwenImage21Pipeline", "sample_sigmas": None}
        tokenizer = "processor"
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    shutil.copytree(practice / "tokenizer", folder / tokenizer)
    row = load_catalog().find(model)
    (folder / "scheduler").mkdir()
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", **row.scheduler.model_dump()}
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(scheduler), encoding="utf-8"
    )
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0))
    with no_weights():
        parts = published(model, layers)
    with ThreadPoolExecutor(WRITERS) as threads:
        for name, part in parts.items():
            write(folder / name, part, pool, threads)


def published(model: str, layers: int | None) -> dict[str, Any]:
    """The components as published, or with fewer `layers`."""
    import diffusers
    import transformers

    transformer, depth, vae, encoder, text = PUBLISHED[model]
    if layers:
        depth, text = layers, text | {"num_hidden_layers": layers}
    config = getattr(transformers, f"{encoder}Config")(text_config=text)
    return {
        "transformer": getattr(diffusers, transformer)(num_layers=depth),
        "vae": getattr(diffusers, vae)(),
        "text_encoder": getattr(transformers, f"{encoder}ForConditionalGeneration")(config),
    }


def write(folder: Path, model: Any, pool: torch.Tensor, threads: ThreadPoolExecutor) -> None:
    """One component: its config, its shards and their index."""
    folder.mkdir()
    save_config = getattr(model, "save_config", None) or model.config.save_pretrained
    save_config(folder)
    diffusers_name = hasattr(model, "save_config")
    stem = "diffusion_pytorch_model" if diffusers_name else "model"
    kind = type(model).__name__
    parameters = {stored_name(kind, name): p.shape for name, p in model.named_parameters()}
    shards = list(split(parameters))
    files = [f"{stem}-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    done = [
        threads.submit(write_shard, folder / file, shard, pool)
        for file, shard in zip(files, shards, strict=True)
    ]
    for each in done:
        each.result()
    names = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    index = {"metadata": {}, "weight_map": names}
    path = folder / f"{stem}.safetensors.index.json"
    path.write_text(json.dumps(index, indent=1), encoding="utf-8")


def stored_name(kind: str, name: str) -> str:
    """As the published text encoder of that class names its tensors."""
    if kind != "Qwen2_5_VLForConditionalGeneration":
        return name
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def split(parameters: dict[str, torch.Size]) -> Iterator[dict[str, torch.Size]]:
    shard: dict[str, torch.Size] = {}
    for name, shape in parameters.items():
        shard[name] = shape
        if sum(2 * math.prod(s) for s in shard.values()) > SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def write_shard(path: Path, shard: dict[str, torch.Size], pool: torch.Tensor) -> None:
    header, offset = {}, 0
    for name, shape in shard.items():
        size = 2 * math.prod(shape)
        header[name] = {
            "dtype": "BF16",
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shard.items():
            for piece in values(name, shape, pool):
                out.write(piece.to(torch.bfloat16).view(torch.uint8).numpy().data)


def values(name: str, shape: torch.Size, pool: torch.Tensor) -> Iterator[torch.Tensor]:
    count = math.prod(shape)
    if "norm" in name and name.endswith(("weight", "gamma")):
        yield torch.ones(count)
        return
    scale = 0.5 / math.sqrt(math.prod(shape[1:]) or 1) if len(shape) > 1 else 0.02
    start = hash_of(name) % 1000
    while count:
        piece = pool[start : start + count] * scale
        yield piece
        count, start = count - len(piece), 0


def hash_of(name: str) -> int:
    return sum(ord(letter) * (i + 1) for i, letter in enumerate(name))


if __name__ == "__main__":
    main()
