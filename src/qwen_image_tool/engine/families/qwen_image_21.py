"""Qwen-Image-2.1 and its Turbo: their prompt template, their latents, their forward.

Same arithmetic as diffusers' QwenImage21Pipeline with its default `use_kv_cache`, for text to
image. Source: diffusers 0.42, pipelines/qwenimage21/pipeline_qwenimage21.py and
models/transformers/transformer_qwenimage21.py.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage21 import AutoencoderKLQwenImage21
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21Transformer2DModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

from qwen_image_tool.engine import transformer
from qwen_image_tool.engine.cache import TensorCache
from qwen_image_tool.engine.weights import Checkpoint, Reader
from qwen_image_tool.errors import ModelUnsupported
from qwen_image_tool.types import Placement

TOKENIZER = "processor"  # of which nothing else is loaded: the rest needs torchvision
TEXT_MODEL = Qwen3VLTextModel
TEXT_NORMED = False
TEXT_POSITIONS = 8191  # QwenImage21Rope has 8192 positions, and the picture takes one
SYSTEM: str | int = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"
VAE = AutoencoderKLQwenImage21
PATCH = 1


def wrap(prompt: str) -> str:
    """The prompt in its template; a space stands for an empty one."""
    return f"{SYSTEM}<|im_start|>user\n{prompt or ' '}<|im_end|>\n<|im_start|>assistant\n"


def pack(cells: torch.Tensor) -> torch.Tensor:
    """Latent cells, [pictures, 1, channels, height, width], to latents: a token is a cell."""
    return cells[:, 0].flatten(2).transpose(1, 2)


def unpack(latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """[pictures, tokens, channels] -> latent cells, [pictures, channels, 1, height, width]."""
    pictures, _, channels = latents.shape
    return latents.transpose(1, 2).reshape(pictures, channels, 1, *grid)


def guide(positive: torch.Tensor, negative: torch.Tensor, cfg: float) -> torch.Tensor:
    """Away from the negative prediction by `cfg`."""
    return negative + cfg * (positive - negative)


def unscale(cells: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Latent cells as the VAE reads them."""
    return cells * std + mean


def lengths(
    image: torch.Tensor,
    rotary_emb: torch.Tensor,
    layer_cache: "PrefixCache",
    kv_cache_mode: str,
    **_: Any,
) -> list[tuple[torch.Tensor, int]] | None:
    """See compiled.Lengths. The first step has a form of its own."""
    if kv_cache_mode == "extract":
        return None
    return [(image, 1), (rotary_emb, 0), (layer_cache.memory, 2)]


class Transformer(transformer.Transformer):
    """A QwenImage21Transformer2DModel. Raises ModelUnsupported where its text tokens depend on the
    timestep, which no published one's do."""

    def __init__(
        self,
        folder: Path,
        placement: Placement,
        device: torch.device,
        dtype: torch.dtype,
        reader: Reader,
        _cache: TensorCache | None = None,
    ) -> None:
        model = transformer.without_weights(QwenImage21Transformer2DModel, folder)
        if not model.config.causal_condition:
            raise ModelUnsupported(
                f"The transformer in {folder} has no causal condition.",
                "Use the transformer that Qwen-Image-2.1 was published with.",
            )
        super().__init__(model, Checkpoint(folder), placement, device, dtype, reader)

    def time_embedding(self, timestep: torch.Tensor) -> torch.Tensor:
        """[2, width], for a scalar timestep from 0 to 1000 and for 0."""
        time = timestep.expand(1).to(self.dtype) / 1000
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        embedding: torch.Tensor = self.model.time_text_embed(
            torch.cat([time, time.new_zeros(1)]), like
        )
        return embedding


class PrefixCache:
    """Keys and values of a prompt's tokens in one block: `store` is called at the first step, `get`
    at the others. Takes the place of diffusers' QwenImage21KVLayerCache; `memory`, [2, 1, text
    tokens, heads, head width], stays where it is."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory

    def store(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.memory[0].copy_(keys)
        self.memory[1].copy_(values)

    def get(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.memory[0], self.memory[1]


@dataclass(frozen=True)
class Condition:
    """One prompt as the blocks see it: its hidden state, [1, text tokens, inner], the rotary
    frequencies and the image's places in text and image, and its cache in each block."""

    text: torch.Tensor
    rotary: torch.Tensor
    is_image: torch.Tensor
    caches: list[PrefixCache]


class Forward:
    """The transformer on one schedule, in lockstep: block i runs on every picture and both CFG
    halves before block i + 1, so that a weight is needed once a step. No stream is padded or
    batched with another: each has the bits it would have alone.

    The first step runs on text and image and keeps the text's keys and values, which do not depend
    on the timestep or the picture; the other steps run on the image alone.

    `timesteps`: [steps], 0 to 1000. `grid`: rows and columns of image tokens.
    """

    def __init__(
        self,
        transformer: Transformer,
        timesteps: torch.Tensor,
        grid: tuple[int, int],
        _reader: Reader,
    ) -> None:
        self._transformer = transformer
        self._shape = (1, *grid)
        self._tembs = [transformer.time_embedding(timestep) for timestep in timesteps]
        self._modulations = [transformer.model.modulation(temb) for temb in self._tembs]

    def condition(self, embeddings: torch.Tensor) -> Condition:
        """`embeddings`: [1, text tokens, text encoder's width]."""
        model = self._transformer.model
        text = model.txt_in(embeddings)
        length, tokens = text.shape[1], math.prod(self._shape)
        is_image = torch.arange(length + tokens, device=text.device) >= length
        rotary = model.pos_embed([self._shape], is_image, device=text.device)
        config = model.config
        heads = config.num_attention_heads, config.attention_head_dim
        memory = text.new_empty(config.num_layers, 2, 1, length, *heads)
        return Condition(text, rotary, is_image, [PrefixCache(block) for block in memory])

    def rehearse(self, latents: torch.Tensor, conditions: list[Condition]) -> None:
        """See denoise.Forward. The first step is not compiled."""
        if len(self._tembs) == 1:
            return
        image, c = self._transformer.model.img_in(latents[:1]), conditions[0]
        with self._transformer.any_block() as block:
            block(image, layer_cache=c.caches[0], **self._seen(c, 1))

    def __call__(
        self, latents: torch.Tensor, step: int, conditions: list[Condition]
    ) -> list[list[torch.Tensor]]:
        """See denoise.Forward."""
        model, tokens, width = self._transformer.model, latents.shape[1], len(conditions)
        pictures = [model.img_in(latents[i : i + 1]) for i in range(len(latents))]
        seen = [(c, self._seen(c, step)) for c in conditions] * len(pictures)
        images = [picture for picture in pictures for _ in conditions]
        if step == 0:
            images = [torch.cat([c.text, i], 1) for i, (c, _) in zip(images, seen, strict=True)]
        for number, block in self._transformer.walk(last=step + 1 == len(self._tembs)):
            images = [
                block(i, layer_cache=c.caches[number], **how)
                for i, (c, how) in zip(images, seen, strict=True)
            ]
        out = [
            model.proj_out(model.norm_out(i, self._tembs[step], c.is_image[-i.shape[1] :]))
            for i, (c, _) in zip(images, seen, strict=True)
        ]
        out = [velocity[:, -tokens:] for velocity in out]
        return [out[i : i + width] for i in range(0, len(out), width)]

    def _seen(self, c: Condition, step: int) -> dict[str, Any]:
        """What a block is told of a stream at `step`."""
        length = c.text.shape[1]
        if step:
            return {
                "modulation": self._modulations[step][:1],
                "rotary_emb": c.rotary[length:],
                "kv_cache_mode": "cached",
            }
        return {
            "modulation": self._modulations[0],
            "rotary_emb": c.rotary,
            "target_token_mask": c.is_image,
            "kv_cache_mode": "extract",
            "cache_write_slice": slice(0, length),
            "segments": [(0, length, True)],
        }
