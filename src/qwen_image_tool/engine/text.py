"""Prompts -> embeddings: the language model of Qwen2.5-VL or Qwen3-VL, walked layer by layer.

Its head and its vision tower are never loaded, its table of words is read row by row.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, Qwen2Tokenizer

from qwen_image_tool.engine import attention, placed, weights
from qwen_image_tool.engine.weights import Checkpoint, Reader, no_weights
from qwen_image_tool.errors import ModelUnsupported, PromptTooLong
from qwen_image_tool.store.formats import TEXT_PREFIXES
from qwen_image_tool.types import Placement


class Tokenizer:
    """Prompts in their template. `wrap` puts a prompt into it. `system`: its leading text, or the
    number of leading tokens, that is not in the embeddings."""

    def __init__(self, folder: Path, wrap: Callable[[str], str], system: str | int) -> None:
        self._tokenizer = Qwen2Tokenizer.from_pretrained(folder)
        self._wrap = wrap
        self.dropped = len(self._ids(system)) if isinstance(system, str) else system

    def __call__(self, prompt: str, limit: int, truncate: bool) -> list[int]:
        """Token ids; `limit`: how many the model reads, beside the dropped ones. Raises
        PromptTooLong above it, unless `truncate`.

        Source: QwenImagePipeline._get_qwen_prompt_embeds, which cuts without a word.
        """
        ids = self._ids(self._wrap(prompt))
        count = len(ids) - self.dropped
        if count > limit and not truncate:
            raise PromptTooLong(
                f"The prompt has {count} tokens; the model reads {limit}.",
                "Shorten it. `qit generate --truncate` cuts off its end.",
            )
        return ids[: limit + self.dropped]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text).input_ids
        return ids


def positions(folder: Path) -> int:
    """How many tokens the text encoder in `folder` has positions for."""
    return int(AutoConfig.from_pretrained(folder).get_text_config().max_position_embeddings)


class TextEncoder:
    """A language model of transformers' class `kind` on `device` in `dtype`, its layers placed by a
    plan. `normed`: its last hidden states go through its final norm.

    What stays is loaded by `reader`, the layers in the background. Raises ModelMissing,
    ModelUnsupported.
    """

    def __init__(
        self,
        kind: Any,
        normed: bool,
        folder: Path,
        placement: Placement,
        device: torch.device,
        dtype: torch.dtype,
        reader: Reader,
    ) -> None:
        self._normed, self._device, self._dtype = normed, device, dtype
        self._checkpoint = Checkpoint(folder)
        config: Any = AutoConfig.from_pretrained(folder).get_text_config()
        if set(getattr(config, "layer_types", ())) - {"full_attention"}:
            raise ModelUnsupported(
                f"The text encoder in {folder} has windowed attention.",
                "Use the text encoder that Qwen-Image was published with.",
            )
        config._attn_implementation = attention.for_prompts(device)
        with no_weights():
            self._model: Any = kind(config).eval()
        self._model.rotary_emb.to(device)
        found = self._checkpoint.tensors
        prefix = next((p for p in TEXT_PREFIXES if f"{p}norm.weight" in found), "")
        words = self._model.embed_tokens.weight
        self._words = self._checkpoint.check(f"{prefix}embed_tokens.weight", words)
        names = [("norm.weight", f"{prefix}norm.weight")] if normed else []
        placed.load(self._model, names, self._checkpoint, device, dtype, reader)
        self._layers = placed.Blocks(
            list(self._model.layers),
            f"{prefix}layers.",
            self._checkpoint,
            placement,
            device,
            dtype,
            reader,
        )

    @property
    def loading(self) -> Future[None]:
        """Done when what stays of the layers is read."""
        return self._layers.loading

    def encode(self, prompts: Sequence[list[int]], reader: Reader) -> list[torch.Tensor]:
        """The last hidden states of each prompt's token ids, [1, tokens, width].

        Prompts run in lockstep, each alone: a layer is needed once. `reader` reads those that
        stream from disk. Ends with Cancelled within a layer. Source:
        Qwen2_5_VLTextModel.forward and Qwen3VLTextModel.forward without padding, where sdpa needs
        no mask to be causal.
        """
        try:
            # On their way while the words are read
            layers = self._layers.walk(last=True, reader=reader)
            states = [self._embed(ids) for ids in prompts]
            rotary = [self._rotary(state) for state in states]
            for _, layer in layers:
                reader.check()
                states = [
                    layer(state, attention_mask=None, position_embeddings=turns)
                    for state, turns in zip(states, rotary, strict=True)
                ]
        finally:
            self._layers.rest()
        return [self._model.norm(state) for state in states] if self._normed else states

    def close(self) -> None:
        """End what runs in the background, and give the memory back."""
        self._layers.close()

    def _embed(self, ids: list[int]) -> torch.Tensor:
        states = torch.empty(1, len(ids), self._words.shape[1], dtype=self._dtype)
        weights.read([(self._words.row(token), states[0, i]) for i, token in enumerate(ids)])
        return states.to(self._device)

    def _rotary(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        positions = (
            torch.arange(state.shape[1], device=self._device).view(1, 1, -1).expand(3, 1, -1)
        )
        cos, sin = self._model.rotary_emb(state, positions)
        return cos, sin
