"""Prompt -> embeddings."""

from typing import Any

import torch

from qwen_image_tool.engine.families import qwen_image
from qwen_image_tool.errors import PromptTooLong


def tokenize(tokenizer: Any, prompt: str, limit: int, truncate: bool) -> list[int]:
    """Token ids of the prompt in its template. `limit`: tokens the model reads, template apart.

    Raises PromptTooLong above the limit, unless `truncate`. Source:
    QwenImagePipeline._get_qwen_prompt_embeds, which cuts without a word.
    """
    ids: list[int] = tokenizer(qwen_image.PROMPT_TEMPLATE.format(prompt)).input_ids
    count = len(ids) - qwen_image.TEMPLATE_TOKENS
    if count > limit and not truncate:
        raise PromptTooLong(
            f"The prompt has {count} tokens; the model reads {limit}.",
            "Shorten it, or give --truncate to have its end cut off.",
        )
    return ids[: limit + qwen_image.TEMPLATE_TOKENS]


def embed(text_encoder: Any, ids: list[int], device: torch.device) -> torch.Tensor:
    """The prompt's embeddings, [1, tokens, width], in the text encoder's dtype.

    The language model's head and its vision tower are not run: only hidden states are read.
    """
    input_ids = torch.tensor([ids], device=device)
    hidden = text_encoder.model(
        input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False
    ).last_hidden_state
    embeddings: torch.Tensor = hidden[:, qwen_image.TEMPLATE_TOKENS :]
    return embeddings
