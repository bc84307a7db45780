"""Which kernel computes attention: torch's own choice, or a faster one of those that are there."""

from collections.abc import Iterable
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# diffusers' names; those that compute in 8 bits (sage) change the picture and are not asked
CANDIDATES = ("_native_cudnn", "_native_flash", "flash", "_flash_3")
# Where torch takes cuDNN's attention before others: compute capabilities
CUDNN_FIRST = ((9, 0), (10, 0))
TILE = 128  # tokens


def attend(
    backend: str, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """Attention of all on all; [1, tokens, heads, width] each, and the result.

    `backend`: diffusers' name; "" is torch's choice. Raises anything where it can't.
    """
    name = AttentionBackendName(backend or "native")
    result: torch.Tensor = dispatch_attention_fn(queries, keys, values, backend=name)
    return result


def agrees(backend: str, states: tuple[torch.Tensor, ...]) -> bool:
    """Whether attention of `states` (queries, keys, values) by `backend` is within two roundings of
    bfloat16 of torch's, and the same each time. Raises what `attend` does."""
    own = attend("", *states).float()
    first, second = attend(backend, *states), attend(backend, *states)
    error = (first.float() - own).norm() / own.norm()
    return bool(torch.equal(first, second) and error < 2 * 2**-8)


def use(blocks: Iterable[nn.Module], backend: str) -> None:
    """Let the attention of `blocks` be computed by `backend`; "" leaves it to torch.

    Unlike diffusers' set_attention_backend this changes no other model, and no call that names
    another backend: 2.1's first step, whose text is masked, stays with torch's choice.
    """
    name = AttentionBackendName(backend) if backend else None
    for block in blocks:
        for module in block.modules():
            processor: Any = getattr(module, "processor", None)
            if hasattr(processor, "_attention_backend"):
                processor._attention_backend = name


def for_prompts(device: torch.device) -> str:
    """transformers' name of the attention that reads prompts on `device`, with the bits of "sdpa".

    cuDNN makes a plan for each new number of tokens, and nothing is launched meanwhile: where it is
    torch's choice, prompts are read in whole tiles, so that nearly all have the same number.
    """
    cuda = device.type == "cuda" and torch.version.hip is None
    tiled = cuda and torch.cuda.get_device_capability(device) in CUDNN_FIRST
    return SDPA_IN_TILES if tiled else "sdpa"


def _in_tiles(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention without a mask, [1, heads, tokens, width] to [1, tokens, heads, width]: no
    token sees those that are appended."""
    tokens = query.shape[2]
    whole = [functional.pad(each, (0, 0, 0, -tokens % TILE)) for each in (query, key, value)]
    states, _ = sdpa_attention_forward(module, *whole, attention_mask, **others)
    return states[:, :tokens], None


SDPA_IN_TILES = "sdpa_in_tiles"
AttentionInterface.register(SDPA_IN_TILES, _in_tiles)
