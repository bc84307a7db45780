"""Files are told by keys and shapes: real classes at full width on few layers, any name."""

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    QwenImage21Transformer2DModel,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLTextConfig, Qwen3VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

from qwen_image_tool.catalog import load_catalog
from qwen_image_tool.errors import BadRequest, ModelBroken, ModelUnsupported
from qwen_image_tool.store.formats import (
    OUTSIDE,
    PER_BLOCK,
    TEXT_OUTSIDE,
    TEXT_PER_LAYER,
    check_model,
    check_taken,
    check_whole,
    models_for,
    recognise,
)

CATALOG = load_catalog()
Shapes = dict[str, tuple[int, ...]]


def shapes(build: Any) -> Shapes:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}


DIT20 = shapes(lambda: QwenImageTransformer2DModel(num_layers=1))
LAYERED = shapes(
    lambda: QwenImageTransformer2DModel(
        num_layers=1, use_additional_t_cond=True, use_layer3d_rope=True
    )
)
DIT21 = shapes(lambda: QwenImage21Transformer2DModel(num_layers=1))
NARROW = shapes(lambda: QwenImageTransformer2DModel(num_layers=1, num_attention_heads=16))
VAE20, VAE21 = shapes(AutoencoderKLQwenImage), shapes(AutoencoderKLQwenImage21)
TEXT20: Shapes = {
    "model.embed_tokens.weight": (152064, 3584),
    "model.layers.0.self_attn.q_proj.weight": (3584, 3584),
}
TEXT21: Shapes = {
    "model.language_model.embed_tokens.weight": (151936, 4096),
    "model.language_model.layers.0.self_attn.q_norm.weight": (128,),
}
FUSED: Shapes = {
    name.replace("gate_layer", "gate_up"): (
        (shape[0] * 2, *shape[1:]) if "gate_" in name else shape
    )
    for name, shape in DIT21.items()
    if not name.endswith("img_mlp.proj.weight")
}
LORA: Shapes = {
    "transformer_blocks.0.attn.to_q.lora_down.weight": (64, 3072),
    "transformer_blocks.0.attn.to_q.lora_up.weight": (3072, 64),
}


def sparse(path: Path, tensors: Shapes, dtype: str = "BF16") -> Path:
    """A safetensors file whose tensors are holes: full size, no disk."""
    import json

    bits = {"BF16": 16, "F32": 32, "F8_E4M3": 8}[dtype]
    entries, at = {}, 0
    for name, shape in tensors.items():
        size = torch.Size(shape).numel() * bits // 8
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + at)
    return path


def gguf(path: Path, tensors: Shapes) -> Path:
    body, at = b"", 0
    for name, shape in tensors.items():
        kind, size = (12, 144 / 256) if len(shape) == 2 and not shape[-1] % 256 else (0, 4)
        encoded = name.encode()
        body += struct.pack("<Q", len(encoded)) + encoded + struct.pack("<I", len(shape))
        body += b"".join(struct.pack("<Q", side) for side in reversed(shape))
        body += struct.pack("<IQ", kind, at)
        at += -(-int(torch.Size(shape).numel() * size) // 32) * 32
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 0) + body
    with path.open("wb") as file:
        file.write(head)
        file.truncate(-(-len(head) // 32) * 32 + at)
    return path


def prefixed(tensors: Shapes, prefix: str = "model.diffusion_model.") -> Shapes:
    return {prefix + name: shape for name, shape in tensors.items()}


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (DIT20, {"kind": "transformer", "family": "qwen-image"}),
        (prefixed(DIT20), {"family": "qwen-image", "prefix": "model.diffusion_model."}),
        (LAYERED, {"family": "qwen-image", "layered": True}),
        (
            DIT20 | {"__index_timestep_zero__": (0,)},
            {"family": "qwen-image", "zero_cond_t": True},
        ),
        (DIT21, {"kind": "transformer", "family": "qwen-image-2.1", "fused": False}),
        (prefixed(FUSED), {"family": "qwen-image-2.1", "fused": True}),
        (VAE20, {"kind": "vae", "family": "qwen-image"}),
        (VAE21, {"kind": "vae", "family": "qwen-image-2.1"}),
        (TEXT20, {"kind": "text_encoder", "family": "qwen-image"}),
        (TEXT21, {"kind": "text_encoder", "family": "qwen-image-2.1"}),
        (LORA, {"kind": "lora", "family": "qwen-image"}),
    ],
)
def test_keys_and_shapes_say_what_it_is(
    tmp_path: Path, tensors: Shapes, expected: dict[str, object]
) -> None:
    found = recognise(sparse(tmp_path / "misleading-sdxl.safetensors", tensors))
    for name, value in expected.items():
        assert getattr(found, name) == value, name
    assert found.storage == "BF16"
    assert not found.unreadable


@pytest.mark.parametrize(("tensors", "family"), [(DIT20, "qwen-image"), (DIT21, "qwen-image-2.1")])
def test_gguf_is_told_the_same_way(tmp_path: Path, tensors: Shapes, family: str) -> None:
    found = recognise(gguf(tmp_path / "any.gguf", tensors))
    check_taken(found)
    assert (found.container, found.family, found.storage) == ("gguf", family, "Q4_K")


BLOCK = "transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({f"{BLOCK}.scale_weight": ()}, "scaled fp8"),
        ({"scaled_fp8": (2,)}, "scaled fp8"),
        ({f"{BLOCK}.weight_scale": ()}, "scales of their own"),
        ({f"{BLOCK}.comfy_quant": (40,)}, "convrot"),
        ({f"{BLOCK}.wscales": (4, 4)}, "Nunchaku"),
        ({f"{BLOCK}.weight.absmax": (4,)}, "bitsandbytes"),
        ({"transformer_blocks.0.encoded_exponent": (4,)}, "DFloat11"),
    ],
)
def test_what_can_not_be_read_is_refused_with_the_reason(
    tmp_path: Path, extra: Shapes, reason: str
) -> None:
    path = sparse(tmp_path / "weights.safetensors", DIT20 | extra, "F8_E4M3")
    assert reason in recognise(path).unreadable
    with pytest.raises(ModelUnsupported, match=reason) as caught:
        check_taken(recognise(path))
    assert "bf16 or a GGUF" in caught.value.hint


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (NARROW, "2048 wide where that is 3072 wide"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)}, "no part"),
        ({"decoder.conv_in.weight": (512, 4, 3, 3)}, "VAE of another model"),
        ({"a.lora_down.weight": (8, 1280)}, "LoRA of another model"),
        ({"model.embed_tokens.weight": (32000, 2048)}, "2048 wide"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, tensors: Shapes, message: str) -> None:
    with pytest.raises(ModelUnsupported, match=message):
        recognise(sparse(tmp_path / "qwen-image.safetensors", tensors))


def test_the_configuration_comes_from_the_right_model(tmp_path: Path) -> None:
    def fitting(tensors: Shapes) -> set[str]:
        path = sparse(tmp_path / "x.safetensors", tensors)
        return {model.id for model in models_for(recognise(path), CATALOG)}

    assert fitting(LAYERED) == {"qwen-image-layered"}
    assert fitting(DIT20 | {"__index_timestep_zero__": (0,)}) == {"qwen-image-edit-2511"}
    assert fitting(DIT21) == {"qwen-image-2.1", "qwen-image-2.1-turbo"}
    assert {"qwen-image", "qwen-image-edit-2511"} < fitting(DIT20)
    assert "qwen-image-layered" not in fitting(DIT20)


def test_weights_of_another_model_are_not_taken(tmp_path: Path) -> None:
    found = recognise(sparse(tmp_path / "x.safetensors", LAYERED))
    check_model(found, CATALOG.find("qwen-image-layered"))
    for name in ("qwen-image", "qwen-image-2.1"):
        with pytest.raises(BadRequest, match="does not fit"):
            check_model(found, CATALOG.find(name))


@pytest.mark.parametrize(
    "tensors",
    [
        {"img_in.weight": (), "txt_norm.weight": (3584,)},
        {"img_in.weight": (), "txt_in.text_norm.weight": (4096,)},
        {"img_in.weight": (3072,), "txt_norm.weight": ()},
        {"controlnet_blocks.0": ()},
        {"controlnet_blocks.0.weight": (7, 7)},
        {"control_img_in.weight": ()},
        {"token_embd.weight": ()},
        {"decoder.conv_in.weight": ()},
        {"lora_down": ()},
        {},
    ],
    ids=str,
)
@pytest.mark.parametrize("write", [sparse, gguf])
def test_what_only_looks_like_a_model_is_refused(tmp_path: Path, write: Any, tensors: Any) -> None:
    with pytest.raises(ModelUnsupported):
        recognise(write(tmp_path / "some.safetensors", tensors))


@pytest.mark.parametrize(("tensors", "family"), [(DIT20, "qwen-image"), (DIT21, "qwen-image-2.1")])
def test_the_needed_tensors_are_those_of_the_real_classes(tensors: Shapes, family: Any) -> None:
    blocks = {f"transformer_blocks.0.{name}" for name in PER_BLOCK[family]}
    assert blocks | set(OUTSIDE[family]) == set(tensors)


@pytest.mark.parametrize(
    ("build", "family"),
    [
        (lambda: Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(num_hidden_layers=1)), "qwen-image"),
        (lambda: Qwen3VLTextModel(Qwen3VLTextConfig(num_hidden_layers=1)), "qwen-image-2.1"),
    ],
)
def test_the_needed_tensors_of_text_encoders_are_those_of_the_real_classes(
    build: Any, family: Any
) -> None:
    layer = {f"layers.0.{name}" for name in TEXT_PER_LAYER[family]}
    assert layer | set(TEXT_OUTSIDE) == set(shapes(build))


@pytest.mark.parametrize(
    ("tensors", "message", "hint"),
    [
        (LORA, "is a LoRA of the qwen-image family", "LoRAs can't be used yet"),
        (VAE20, "is a VAE of the qwen-image family", "qit models download"),
        (VAE21, "is a VAE of the qwen-image-2.1 family", "qit models download"),
        ({"controlnet_blocks.0.weight": (3072, 3072)}, "is a ControlNet", "can't be used yet"),
    ],
)
def test_what_is_not_taken_says_what_it_is_and_what_to_do(
    tmp_path: Path, tensors: Shapes, message: str, hint: str
) -> None:
    found = recognise(sparse(tmp_path / "some.safetensors", tensors))
    with pytest.raises(ModelUnsupported, match=message) as caught:
        check_taken(found)
    assert hint in caught.value.hint


def test_a_quantised_text_encoder_is_not_taken(tmp_path: Path) -> None:
    found = recognise(sparse(tmp_path / "some.safetensors", TEXT20, "F8_E4M3"))
    with pytest.raises(ModelUnsupported, match="F8_E4M3, and this version runs bf16"):
        check_taken(found)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_a_second_embedding_of_any_shape_is_no_text_encoder(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    tensors = {"visual.embed_tokens.weight": (8, 3584), "model.embed_tokens.weight": shape}
    with pytest.raises(ModelBroken, match="not a whole text encoder"):
        check_whole(sparse(tmp_path / "any.safetensors", tensors))


def test_a_transformer_of_fewer_blocks_than_published_is_not_whole(tmp_path: Path) -> None:
    path = sparse(
        tmp_path / "two.safetensors", {k: DIT20[k] for k in DIT20 if "_in." in k or "txt_n" in k}
    )
    with pytest.raises(ModelBroken, match=r"first is norm_out\.linear\.weight"):
        check_whole(path)
    with pytest.raises(ModelBroken, match=r"first is transformer_blocks\.1\."):
        check_whole(sparse(tmp_path / "one.safetensors", DIT21))


@pytest.mark.parametrize(
    ("data", "hint"),
    [
        (b"<!DOCTYPE html><html></html>", "download the file itself"),
        (b"\x80\x02}q\x00.", "Take the safetensors or GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"", "Get the file again"),
        (None, "Check the path"),
    ],
)
def test_what_is_no_weight_file_names_the_next_step(
    tmp_path: Path, data: bytes | None, hint: str
) -> None:
    path = tmp_path / "some.safetensors"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ModelBroken) as caught:
        recognise(path)
    assert hint in caught.value.hint
    with pytest.raises(ModelBroken, match="is a folder") as caught:
        recognise(tmp_path)
    assert "--model" in caught.value.hint
