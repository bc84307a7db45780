"""Tiny random models of the real classes, in the real folder layout."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from processor import Processor

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
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>"]
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


def vae() -> Any:
    return AutoencoderKLQwenImage(base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1)


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
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=vae().eval(),
        text_encoder=text_encoder(len(words)).eval(),
        tokenizer=words,
        transformer=transformer.eval(),
    )


def save(folder: Path, seed: int = 0, layers: int = 2) -> Path:
    """Write a tiny model in bfloat16, as the published ones are."""
    pipeline(seed, layers).to(torch.bfloat16).save_pretrained(folder)
    return folder


# Qwen-Image-2.1

TURBO_SIGMAS = [1.0, 0.95, 0.84, 0.41]
TURBO_SCHEDULER = SCHEDULER | {"use_dynamic_shifting": False, "shift_terminal": None}


def text_encoder_21(vocabulary: int, width: int = 32) -> Any:
    text = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [4, 4, 4],
            "mrope_interleaved": True,
            "rope_theta": 5e6,
        },
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": width,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    }
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision))


def vae_21() -> Any:
    return AutoencoderKLQwenImage21(
        base_dim=4, decoder_base_dim=8, dim_mult=[1, 1, 2, 2, 2], num_res_blocks=1
    )


def save_21(folder: Path, seed: int = 0, layers: int = 4, turbo: bool = False) -> Path:
    """Write a tiny Qwen-Image-2.1 in the layout of the published one: several shards, bfloat16 with
    the VAE in float32. `seed` changes the transformer alone, as in Turbo."""
    words = tokenizer()
    torch.manual_seed(seed)
    transformer = QwenImage21Transformer2DModel(
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    torch.manual_seed(99)
    decoder = vae_21()
    transformer.to(torch.bfloat16).save_pretrained(folder / "transformer", max_shard_size="40KB")
    decoder.save_pretrained(folder / "vae")
    encoder = text_encoder_21(len(words)).to(torch.bfloat16)
    encoder.save_pretrained(folder / "text_encoder", max_shard_size="50KB")
    words.save_pretrained(folder / "processor")
    numbers = TURBO_SCHEDULER if turbo else SCHEDULER
    FlowMatchEulerDiscreteScheduler(**numbers).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "QwenImage21Pipeline",
        "_diffusers_version": "0.42.1",
        "processor": ["transformers", "Qwen3VLProcessor"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3VLForConditionalGeneration"],
        "transformer": ["diffusers", "QwenImage21Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage21"],
        "sample_sigmas": TURBO_SIGMAS if turbo else None,
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    licence = "Qwen Research License\nNot for commercial use.\n"
    (folder / "LICENSE").write_text(licence, encoding="utf-8")
    return folder


def load_21(folder: Path, dtype: torch.dtype) -> Any:
    """diffusers' own pipeline over a folder, with our processor."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    words = Qwen2Tokenizer.from_pretrained(folder / "processor")
    pipe = QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae=AutoencoderKLQwenImage21.from_pretrained(folder / "vae", dtype=dtype),
        text_encoder=Qwen3VLForConditionalGeneration.from_pretrained(
            folder / "text_encoder", dtype=dtype
        ).eval(),
        processor=Processor(words),
        transformer=QwenImage21Transformer2DModel.from_pretrained(
            folder / "transformer", dtype=dtype
        ),
        sample_sigmas=index["sample_sigmas"],
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
