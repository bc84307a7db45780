"""The 20B family (Qwen-Image, -2512): its prompt template, its latents, its forward.

Same arithmetic as diffusers' QwenImagePipeline, taken apart so that the loop and the placement of
weights are ours. Source: diffusers 0.42, pipelines/qwenimage/pipeline_qwenimage.py and
models/transformers/transformer_qwenimage.py.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from qwen_image_tool.engine import transformer
from qwen_image_tool.engine.cache import TensorCache
from qwen_image_tool.engine.modulation import Modulation
from qwen_image_tool.engine.weights import Checkpoint, Reader
from qwen_image_tool.types import Placement

TOKENIZER = "tokenizer"
TEXT_MODEL = Qwen2_5_VLTextModel
TEXT_NORMED = True
TEXT_POSITIONS = 1024
SYSTEM: str | int = 34
VAE = AutoencoderKLQwenImage
PATCH = 2

PROMPT_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity,"
    " text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


def wrap(prompt: str) -> str:
    return PROMPT_TEMPLATE.format(prompt)


def pack(cells: torch.Tensor) -> torch.Tensor:
    """Latent cells, [pictures, 1, channels, height, width], to latents: a token is 2x2 cells."""
    pictures, _, channels, height, width = cells.shape
    cells = cells.view(pictures, channels, height // 2, 2, width // 2, 2)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(pictures, -1, channels * 4)


def unpack(latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """[pictures, tokens, 4 * channels] -> latent cells, [pictures, channels, 1, height, width]."""
    rows, columns = grid
    pictures, _, packed = latents.shape
    latents = latents.view(pictures, rows, columns, packed // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return latents.reshape(pictures, packed // 4, 1, rows * 2, columns * 2)


def guide(positive: torch.Tensor, negative: torch.Tensor, cfg: float) -> torch.Tensor:
    """Away from the negative prediction by `cfg`, at the conditional one's norm a token."""
    combined = negative + cfg * (positive - negative)
    norm = torch.norm(positive, dim=-1, keepdim=True)
    rescaled: torch.Tensor = combined * (norm / torch.norm(combined, dim=-1, keepdim=True))
    return rescaled


def unscale(cells: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Latent cells as the VAE reads them."""
    return cells / (1.0 / std) + mean


def lengths(
    image: torch.Tensor,
    text: torch.Tensor,
    _mask: None,
    _temb: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
) -> list[tuple[torch.Tensor, int]]:
    """See compiled.Lengths."""
    return [(image, 1), (text, 1), (rotary[0], 0), (rotary[1], 0)]


class Transformer(transformer.Transformer):
    """A QwenImageTransformer2DModel whose blocks are without their modulation weights."""

    def __init__(
        self,
        folder: Path,
        placement: Placement,
        device: torch.device,
        dtype: torch.dtype,
        reader: Reader,
        cache: TensorCache | None = None,
    ) -> None:
        model = transformer.without_weights(QwenImageTransformer2DModel, folder)
        checkpoint = Checkpoint(folder)
        self.modulation = Modulation(
            list(model.transformer_blocks), transformer.PREFIX, checkpoint, device, dtype, cache
        )
        super().__init__(model, checkpoint, placement, device, dtype, reader)

    def time_embedding(self, timestep: torch.Tensor) -> torch.Tensor:
        """[1, width], for a scalar timestep from 0 to 1000."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        time = timestep.expand(1).to(self.dtype) / 1000
        embedding: torch.Tensor = self.model.time_text_embed(time, like, None)
        return embedding


@dataclass(frozen=True)
class Condition:
    """One prompt as the blocks see it: its hidden state, [1, text tokens, inner], and the rotary
    frequencies of (image, text) that go with its length."""

    text: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor]


class Forward:
    """The transformer on one schedule, in lockstep: block i runs on every picture and both CFG
    halves before block i + 1, so that a weight is needed once a step. No stream is padded or
    batched with another: each has the bits it would have alone.

    `timesteps`: [steps], 0 to 1000. `grid`: rows and columns of image tokens.
    """

    def __init__(
        self,
        transformer: Transformer,
        timesteps: torch.Tensor,
        grid: tuple[int, int],
        reader: Reader,
    ) -> None:
        self._transformer = transformer
        self._shapes = [[(1, *grid)]]
        self._tembs = [transformer.time_embedding(timestep) for timestep in timesteps]
        self._table = transformer.modulation.table(timesteps, self._tembs, reader)

    def condition(self, embeddings: torch.Tensor) -> Condition:
        """`embeddings`: [1, text tokens, text encoder's width]."""
        model = self._transformer.model
        text = model.txt_in(model.txt_norm(embeddings))
        rotary = model.pos_embed(
            self._shapes, max_txt_seq_len=embeddings.shape[1], device=embeddings.device
        )
        return Condition(text, rotary)

    def rehearse(self, latents: torch.Tensor, conditions: list[Condition]) -> None:
        """See denoise.Forward."""
        image, c = self._transformer.model.img_in(latents[:1]), conditions[0]
        with self._transformer.any_block() as block:
            self._table.set(block, 0, 0)
            block(image, c.text, None, self._tembs[0], c.rotary)

    def __call__(
        self, latents: torch.Tensor, step: int, conditions: list[Condition]
    ) -> list[list[torch.Tensor]]:
        """See denoise.Forward."""
        model, temb = self._transformer.model, self._tembs[step]
        pictures = [model.img_in(latents[i : i + 1]) for i in range(latents.shape[0])]
        streams = [(image, c.text, c.rotary) for image in pictures for c in conditions]
        for number, block in self._transformer.walk(last=step + 1 == len(self._tembs)):
            self._table.set(block, number, step)
            streams = [
                (*reversed(block(image, text, None, temb, rotary)), rotary)
                for image, text, rotary in streams
            ]
        out = [model.proj_out(model.norm_out(image, temb)) for image, _, _ in streams]
        width = len(conditions)
        return [out[i : i + width] for i in range(0, len(out), width)]
