"""Write a full-size Qwen-Image (20B, 57.7 GB) of random weights in the layout it is published in.

    .venv/bin/python benchmarks/full_size.py FOLDER [--layers 60]

The values change neither time nor memory. They come from one small random pool, scaled so that
activations stay finite; normalisation weights are one. `--layers` makes a smaller one.
"""

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from qwen_image_tool.engine.weights import no_weights
from qwen_image_tool.store import practice_folder

SHARD_BYTES = 5_000_000_000
POOL = 1 << 26  # numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=60)
    options = parser.parse_args()
    make(options.folder, options.layers)


def make(folder: Path, layers: int = 60) -> None:
    """A folder that `--model` takes: 20.4B + 8.3B + 0.13B parameters at 60 layers, bfloat16."""
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    folder.mkdir(parents=True)
    for part in ("tokenizer", "scheduler", "model_index.json"):
        source = practice_folder() / part
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / part)
    with no_weights():
        text = {"hidden_size": 3584, "intermediate_size": 18944, "vocab_size": 152064}
        text |= {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
        models = {
            "transformer": QwenImageTransformer2DModel(num_layers=layers),
            "vae": AutoencoderKLQwenImage(),
            "text_encoder": Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text)),
        }
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0))
    for name, model in models.items():
        write(folder / name, model, pool)


def write(folder: Path, model: Any, pool: torch.Tensor) -> None:
    """One component: its config, its shards and their index."""
    folder.mkdir()
    save_config = getattr(model, "save_config", None) or model.config.save_pretrained
    save_config(folder)
    diffusers_name = hasattr(model, "save_config")
    stem = "diffusion_pytorch_model" if diffusers_name else "model"
    parameters = {stored_name(name): p.shape for name, p in model.named_parameters()}
    shards = list(split(parameters))
    names: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        names |= dict.fromkeys(shard, file)
        with (folder / file).open("wb") as out:
            write_shard(out, shard, pool)
    index = {"metadata": {}, "weight_map": names}
    path = folder / f"{stem}.safetensors.index.json"
    path.write_text(json.dumps(index, indent=1), encoding="utf-8")


def stored_name(name: str) -> str:
    """As the published text encoder names its tensors."""
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


def write_shard(out: BinaryIO, shard: dict[str, torch.Size], pool: torch.Tensor) -> None:
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
    out.write(len(text).to_bytes(8, "little") + text)
    for name, shape in shard.items():
        for piece in values(name, shape, pool):
            out.write(piece.to(torch.bfloat16).view(torch.uint8).numpy().tobytes())


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
