"""A tiny random model of the 2.1 family: real classes, real folder layout, several shards."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Transformer2DModel,
)
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

import tiny


def text_encoder(width: int = 32) -> Any:
    text = {
        "vocab_size": 300,
        "hidden_size": width,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": width,
        "deepstack_visual_indexes": [0],
    }
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision))


def save(folder: Path, seed: int = 0) -> Path:
    """Write the components in bfloat16. `seed` changes the transformer alone, as in Turbo."""
    torch.manual_seed(seed)
    transformer = QwenImage21Transformer2DModel(
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    torch.manual_seed(99)
    vae = AutoencoderKLQwenImage21(
        base_dim=8, decoder_base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2, 2], num_res_blocks=1
    )
    save_parts(folder, transformer, vae, text_encoder())
    FlowMatchEulerDiscreteScheduler(**tiny.SCHEDULER).save_pretrained(folder / "scheduler")
    (folder / "processor").mkdir()
    (folder / "processor" / "preprocessor_config.json").write_text("{}")
    index = {"_class_name": "QwenImage21Pipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "LICENSE").write_text("Qwen Research License\nNot for commercial use.\n")
    return folder


def save_parts(folder: Path, transformer: Any, vae: Any, encoder: Any) -> None:
    transformer.to(torch.bfloat16).save_pretrained(folder / "transformer", max_shard_size="40KB")
    vae.to(torch.bfloat16).save_pretrained(folder / "vae")
    encoder.to(torch.bfloat16).save_pretrained(folder / "text_encoder", max_shard_size="60KB")
