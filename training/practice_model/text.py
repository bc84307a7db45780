"""The sentence side: a small tokenizer, and a small Qwen2.5-VL trained to read a whole scene.

`QwenImagePipeline` wraps a prompt in a chat template whose last five tokens follow the prompt. Each
of them is trained to hold one part of the scene: things one to three, the background, and how they
lie. The picture transformer then finds structured words, which lets it learn quickly.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from world import (
    COLOUR_NAMES,
    KINDS,
    RADII,
    RELATIONS,
    Scene,
    layout,
    sample_scene,
    write_caption,
)

PREFIX_TOKENS = 34  # what the pipeline drops
SUFFIX_TOKENS = 5  # <|im_end|> newline <|im_start|> assistant newline
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)  # QwenImagePipeline.prompt_template_encode
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 640
LONGEST = 58  # tokens of a caption with its suffix; the world's longest take 48
WIDTH = 192


def train_tokenizer() -> Qwen2Tokenizer:
    """Byte-level pieces learnt from captions; every byte has a piece, so no word is unknown."""
    rng = random.Random(0)
    captions = [write_caption(sample_scene(rng), rng) for _ in range(30_000)]
    template = TEMPLATE.format("")
    for token in SPECIAL:
        template = template.replace(token, "")
    learner = Tokenizer(models.BPE())
    learner.normalizer = Qwen2Tokenizer().backend_tokenizer.normalizer
    learner.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator([*captions, *[template] * 30_000], trainer)
    state = json.loads(learner.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=[tuple(pair) for pair in state["merges"]],
        model_max_length=1024 + PREFIX_TOKENS,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:])})
    prefix, _ = TEMPLATE.split("{}")
    if (found := len(tokenizer(prefix).input_ids)) != PREFIX_TOKENS:
        raise RuntimeError(
            f"the template's prefix makes {found} tokens, the pipeline drops {PREFIX_TOKENS}"
        )
    return tokenizer


def build_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Four layers of 192. The vision tower only completes the class: no picture ever enters it."""
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": WIDTH,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [4, 6, 6],
            },
            "bos_token_id": ids("<|endoftext|>"),
            "eos_token_id": ids("<|im_end|>"),
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [0],
        },
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def tokenise(tokenizer: Qwen2Tokenizer, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Ids (B, LONGEST) of caption and suffix, padded on the right, and the lengths (B,)."""
    _, suffix = TEMPLATE.split("{}")
    rows = tokenizer([caption + suffix for caption in captions]).input_ids
    lengths = torch.tensor([len(row) for row in rows])
    if (longest := int(lengths.max())) > LONGEST:
        raise ValueError(f"a caption has {longest} tokens with its suffix; {LONGEST} is the most")
    padded = [row + [0] * (LONGEST - len(row)) for row in rows]
    return torch.tensor(padded), lengths


class CaptionEncoder(nn.Module):
    """Hidden states as the pipeline gets them: after the template's prefix."""

    def __init__(
        self, model: Qwen2_5_VLForConditionalGeneration, tokenizer: Qwen2Tokenizer
    ) -> None:
        super().__init__()
        self.language: Any = model.model.language_model
        self.prefix: Tensor
        before, _ = TEMPLATE.split("{}")
        prefix = tokenizer(before).input_ids
        self.register_buffer("prefix", torch.tensor([prefix]), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) to (B, L, 192). Causal attention never sees padding on the right: no mask."""
        whole = torch.cat((self.prefix.expand(len(ids), -1), ids), dim=1)
        hidden: Tensor = self.language(whole, use_cache=False).last_hidden_state
        return hidden[:, PREFIX_TOKENS:]

    def compile_layers(self) -> None:
        for layer in self.language.layers:
            layer.compile(dynamic=False)


# Reading: what each of the five last tokens must know

_XS = (0.19, 0.26, 0.5, 0.74, 0.81)
_TABLES = tuple(RADII)
_SIZES = ("", "small", "large")
_PARTS = {
    "kind": len(KINDS) + 2,  # any, absent
    "colour": len(COLOUR_NAMES) + 2,
    "size": len(_SIZES),
    "table": len(_TABLES),
    "x": len(_XS),
    "y": len(_XS),
}


def targets(scene: Scene) -> list[int]:
    """Classes for three things times six parts, then the background, then relation and count."""
    out: list[int] = []
    spots, tables = layout(scene, 1, 1) if scene.things else ([], [])
    for thing, (x, y), table in zip(scene.things, spots, tables, strict=True):
        kind = KINDS.index(thing.kind) if thing.kind else len(KINDS)
        colour = COLOUR_NAMES.index(thing.colour) if thing.colour else len(COLOUR_NAMES)
        place = [_TABLES.index(table), _XS.index(x), _XS.index(y)]
        out += [kind, colour, _SIZES.index(thing.size), *place]
    for _ in range(3 - len(scene.things)):
        out += [len(KINDS) + 1, len(COLOUR_NAMES) + 1, -100, -100, -100, -100]
    out.append(COLOUR_NAMES.index(scene.background) if scene.background else len(COLOUR_NAMES))
    out.append(
        RELATIONS.index(scene.relation) if scene.relation else len(RELATIONS) + len(scene.things)
    )
    return out


class Reader(nn.Module):
    """Linear heads on the last five hidden states; only used while training the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.thing = nn.Linear(WIDTH, sum(_PARTS.values()))
        self.background = nn.Linear(WIDTH, len(COLOUR_NAMES) + 1)
        self.whole = nn.Linear(WIDTH, len(RELATIONS) + 4)

    def forward(self, hidden: Tensor, lengths: Tensor) -> list[Tensor]:
        """20 tensors of class scores, in the order of `targets`."""
        last = lengths[:, None] - SUFFIX_TOKENS + torch.arange(SUFFIX_TOKENS, device=lengths.device)
        ends = hidden.gather(1, last[:, :, None].expand(-1, -1, hidden.shape[-1]))
        scores: list[Tensor] = []
        for slot in range(3):
            scores += self.thing(ends[:, slot]).split(list(_PARTS.values()), dim=-1)
        return [*scores, self.background(ends[:, 3]), self.whole(ends[:, 4])]


def fit_reader(
    encoder: CaptionEncoder, reader: Reader, ids: Tensor, lengths: Tensor, wanted: Tensor
) -> None:
    """Fits the heads to an encoder that stays as it is."""
    with torch.no_grad():
        hidden = torch.cat([encoder(part.long()) for part in torch.split(ids, 1024)])
    optimizer = torch.optim.Adam(reader.parameters(), lr=0.02)
    steps = 300
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        rows = torch.randint(len(ids), (1024,), device=ids.device)
        loss, _ = reading_loss(reader(hidden[rows], lengths[rows].long()), wanted[rows].long())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()


def reading_loss(scores: list[Tensor], wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over the parts, and the share of captions read without any mistake."""
    losses = [
        functional.cross_entropy(score.float(), wanted[:, part], ignore_index=-100)
        for part, score in enumerate(scores)
    ]
    right = torch.stack([s.argmax(-1) for s in scores], dim=1).eq(wanted) | wanted.eq(-100)
    return torch.stack(losses).mean(), right.all(dim=1).float().mean()
