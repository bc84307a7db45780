"""Tiny random models of the real classes, in the real folder layout."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)

SCHEDULER = {
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
    "num_train_timesteps": 1000,
}


def tokenizer() -> Any:
    """Byte-level, without merges: one token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab |= {token: len(vocab) + i for i, token in enumerate(special)}
    return Qwen2Tokenizer(vocab=vocab, merges=[], extra_special_tokens=special[1:])


def text_encoder(vocabulary: int, width: int = 32) -> Any:
    text = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": width,
        "fullatt_block_indexes": [0],
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    )


def pipeline(seed: int = 0, layers: int = 2) -> Any:
    """A whole QwenImagePipeline in float32, a few 100,000 random parameters."""
    torch.manual_seed(seed)
    words = tokenizer()
    transformer = QwenImageTransformer2DModel(
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKLQwenImage(base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=vae.eval(),
        text_encoder=text_encoder(len(words)).eval(),
        tokenizer=words,
        transformer=transformer.eval(),
    )


def save(folder: Path, seed: int = 0) -> Path:
    """Write a tiny model in bfloat16, as the published ones are."""
    pipeline(seed).to(torch.bfloat16).save_pretrained(folder)
    return folder
