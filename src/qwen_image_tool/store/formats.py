"""What a weight file is: told by its keys and shapes, never by its name.

The layouts are those of diffusers, ComfyUI and ggml's tools; what can't be read yet is recognised
all the same, so that it can be refused with the reason.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwen_image_tool.catalog import Catalog, Family, Model
from qwen_image_tool.errors import BadRequest, FaultKind, ModelBroken, ModelUnsupported
from qwen_image_tool.store.headers import Header, Stored, read_header
from qwen_image_tool.types import Value

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "vae.")
SIGNS = ("img_in.weight", "decoder.conv_in.weight", "decoder.conv1.weight")  # in every such model
WIDTHS: dict[int, Family] = {3072: "qwen-image", 4096: "qwen-image-2.1"}
TEXT_WIDTHS: dict[int, Family] = {3584: "qwen-image", 4096: "qwen-image-2.1"}
Kind = Literal["transformer", "text_encoder", "vae", "lora", "controlnet"]
WORDS: dict[Kind, str] = {
    "transformer": "transformer",
    "text_encoder": "text encoder",
    "vae": "VAE",
    "lora": "LoRA",
    "controlnet": "ControlNet",
}
RUNNING = ("BF16", "F16", "F32")  # storage that the engine computes from
FUSED, GATE, UP = "img_mlp.gate_up.", "img_mlp.gate_layer.", "img_mlp.proj."


def _pairs(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}.{part}" for name in names for part in ("weight", "bias"))


def _weights(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}.weight" for name in names)


# diffusers' names of a transformer's tensors: of each block, and outside of the blocks
TIME = ("time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2")
PER_BLOCK: dict[Family, tuple[str, ...]] = {
    "qwen-image": (
        *_pairs("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.to_add_out"),
        *_pairs("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "img_mod.1", "txt_mod.1"),
        *_pairs("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
        *_weights("attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k"),
    ),
    "qwen-image-2.1": _weights(
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.norm_q", "attn.norm_k"),
        *("img_mlp.gate_layer", "img_mlp.proj", "img_mlp.out"),
    ),
}
OUTSIDE: dict[Family, tuple[str, ...]] = {
    "qwen-image": (
        *_pairs("img_in", "txt_in", "norm_out.linear", "proj_out", *TIME),
        "txt_norm.weight",
    ),
    "qwen-image-2.1": _weights(
        *("img_in", "txt_in.in_layer", "txt_in.out_layer", "txt_in.text_norm"),
        *("modulation.1", "norm_out.linear", "proj_out", *TIME),
    ),
}
LATENT_CHANNELS: dict[Family, int] = {"qwen-image": 16, "qwen-image-2.1": 64}
BLOCKS = {3072: 60, 4096: 32}  # of the published transformers, by their width

# Of a text encoder's tensors, behind one of these prefixes; what is written since transformers 4.52
# has the second. The vision tower and the head are not read.
TEXT_PREFIXES = ("model.", "model.language_model.")
TEXT_OUTSIDE = _weights("embed_tokens", "norm")
TEXT_PER_LAYER: dict[Family, tuple[str, ...]] = {
    "qwen-image": (
        *_pairs("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        *_weights("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        *_weights("input_layernorm", "post_attention_layernorm"),
    ),
    "qwen-image-2.1": _weights(
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        *("self_attn.q_norm", "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        *("input_layernorm", "post_attention_layernorm"),
    ),
}
TEXT_LAYERS = {3584: 28, 4096: 36}  # of the published text encoders, by their width

# How the names begin of those of a component's tensors that a run computes from. The others (a
# vision tower, an encoder of pictures, what other programs leave in a file) may be of any kind
COMPUTED: dict[Kind, tuple[str, ...]] = {
    "transformer": (
        *("transformer_blocks.", "img_in.", "txt_in.", "txt_norm.", "time_text_embed."),
        *("modulation.", "norm_out.", "proj_out."),
    ),
    "text_encoder": tuple(
        prefix + name
        for prefix in (*TEXT_PREFIXES, "")
        for name in ("embed_tokens.", "layers.", "norm.")
    ),
    "vae": ("decoder.", "post_quant_conv."),
}

# What can't be taken from another program, and what to do instead
NOT_TAKEN: dict[Kind, str] = {
    "lora": "LoRAs can't be used yet. Nothing was taken.",
    "controlnet": "ControlNets can't be used yet. Nothing was taken.",
    "vae": "Nothing need be done: `qit models download` links this file where it is the published"
    " one, and fetches that (a small one) where it is not.",
}

# Part of a key -> the format it gives away, and why it can't be read. The first match counts.
UNREADABLE = (
    (".comfy_quant", "ComfyUI's own quantisation (convrot, w4a8 or mixed fp8)"),
    ("convrot", "ComfyUI's convrot quantisation"),
    (".wscales", "Nunchaku's SVDQuant format, which needs its own engine"),
    (".smooth_factor", "Nunchaku's SVDQuant format, which needs its own engine"),
    (".encoded_exponent", "DFloat11's compressed format"),
    (".quant_state.", "the bitsandbytes 4-bit format"),
    (".absmax", "the bitsandbytes 4-bit format"),
    (".SCB", "the bitsandbytes 8-bit format"),
    ("scaled_fp8", "scaled fp8 as ComfyUI writes it"),
    (".scale_weight", "scaled fp8 as ComfyUI writes it"),
    (".weight_scale", "weights with scales of their own (scaled fp8 or int8)"),
    (".qweight", "a GPTQ, AWQ or Nunchaku quantisation"),
)


GET_AGAIN = "Get the file again from where it came."
HINTS: dict[FaultKind, str] = {  # what to do about a file of somebody else's
    "missing": "Check the path.",
    "unreadable": "Check who may read it.",
    "web page": "The browser saved the page about the file: download the file itself.",
    "pointer": "`git lfs pull` fetches the file that it stands for.",
    "header": "Take the safetensors or GGUF file of the same model.",
}


class Checkpoint(Value):
    """One weight file, as its header describes it.

    `prefix` stands before every key of the model; `fused`: Comfy's `gate_up` in place of
    `gate_layer` and `proj`; `unreadable`: why this version can't use it, if so.
    """

    path: Path
    kind: Kind
    family: Family
    container: Literal["safetensors", "gguf"]
    storage: str
    bytes: int
    prefix: str = ""
    fused: bool = False
    layered: bool = False
    zero_cond_t: bool = False
    unreadable: str = ""

    @property
    def unsupported(self) -> str:
        """Why this version can't run it, if so."""
        if self.unreadable:
            return f"It is in {self.unreadable}."
        if self.container == "gguf" or self.storage not in RUNNING:
            kind = f"{self.storage} (GGUF)" if self.container == "gguf" else self.storage
            return f"It is in {kind}, and this version runs bf16, fp16 and fp32 safetensors files."
        return ""


@dataclass(frozen=True, slots=True)
class Share:
    """Where a tensor of a model lies in a file: share `number` of `count` of the rows of `key`."""

    key: str
    number: int = 0
    count: int = 1


def model_keys(keys: Collection[str]) -> dict[str, Share]:
    """diffusers' name of every tensor -> where it is in a file with `keys`, in its own layout or in
    ComfyUI's: behind a prefix, and in the 2.1 family with the feed-forward's two projections as one
    matrix, the gate's rows first.

    Source: diffusers' convert_qwen_image21_transformer_checkpoint_to_diffusers.
    """
    prefix, found = _prefix(keys), {}
    for key in keys:
        name = key.removeprefix(prefix)
        if FUSED in name:
            found[name.replace(FUSED, GATE)] = Share(key, 0, 2)
            found[name.replace(FUSED, UP)] = Share(key, 1, 2)
        else:
            found[name] = Share(key)
    return found


def recognise(path: Path) -> Checkpoint:
    """What the file at `path` is.

    Raises ModelBroken (damaged, or no weight file) and ModelUnsupported (whole, but of no model of
    the family: the keys are unknown, or the layout of one family has the width of another).
    """
    if path.is_dir():
        raise ModelBroken(
            "unreadable",
            f"{path} is a folder.",
            "Name one safetensors or GGUF file. A whole model in a folder runs with --model.",
        )
    try:
        header = read_header(path)
    except ModelBroken as error:
        raise ModelBroken(error.kind, error.message, HINTS.get(error.kind, GET_AGAIN)) from error
    return describe(path, header)


def describe(path: Path, header: Header) -> Checkpoint:
    """Like `recognise`, of a header that has been read."""
    tensors = header.tensors
    prefix = _prefix(tensors)
    keys = {key.removeprefix(prefix): stored for key, stored in tensors.items()}
    kind, family = _identify(keys, path)
    return Checkpoint(
        path=path,
        kind=kind,
        family=family,
        container=header.container,
        storage=_storage(header),
        bytes=sum(stored.bytes for stored in tensors.values()),
        prefix=prefix,
        fused=any(FUSED in key for key in keys),
        layered="time_text_embed.addition_t_embedding.weight" in keys,
        zero_cond_t="__index_timestep_zero__" in keys,
        unreadable=_unreadable(keys),
    )


def check_whole(path: Path) -> None:
    """Raises ModelBroken where the transformer or text encoder in one file lacks a tensor that
    every one of its family has. How many blocks it has, its width says, else the last of them."""
    header = read_header(path)
    found = describe(path, header)
    is_text = found.kind == "text_encoder"
    lost = (_text_lacking if is_text else _transformer_lacking)(header, found.family)
    if lost:
        raise ModelBroken(
            "missing",
            f"{path} is not a whole {WORDS[found.kind]}: {len(lost)} tensors are missing, the first"
            f" is {lost[0]}.",
            GET_AGAIN,
        )


def _transformer_lacking(header: Header, family: Family) -> list[str]:
    names = model_keys(header.tensors)
    width = header.tensors[names["img_in.weight"].key].shape[0]
    return lacking(names, family, BLOCKS.get(width) or _count(names, "transformer_blocks."))


def _text_lacking(header: Header, family: Family) -> list[str]:
    """Under the names that the engine reads."""
    names = header.tensors
    prefix = next((p for p in TEXT_PREFIXES if f"{p}embed_tokens.weight" in names), "")
    shape = names[f"{prefix}embed_tokens.weight"].shape if prefix else ()
    width = shape[1] if len(shape) == 2 else 0
    count = TEXT_LAYERS.get(width) or _count(names, f"{prefix}layers.")
    wanted = [prefix + name for name in TEXT_OUTSIDE]
    layer = TEXT_PER_LAYER[family]
    wanted += [f"{prefix}layers.{number}.{name}" for number in range(count) for name in layer]
    return [name for name in wanted if name not in names]


def check_transformer(
    folder: Path, tensors: dict[str, Stored], family: Family, blocks: int, width: int
) -> None:
    """Raises ModelBroken where `tensors` are not the transformer that its configuration means:
    `blocks` blocks of `width`."""
    names = model_keys(tensors)
    for name in lacking(names, family, blocks):
        raise _foreign(folder, f"has no tensor {name}")
    shape = tensors[names["img_in.weight"].key].shape
    if shape[:1] != (width,):
        raise _foreign(folder, f"has img_in.weight of the shape {shape} and not {width} rows")


def check_shapes(folder: Path, tensors: dict[str, Stored], columns: dict[str, int]) -> None:
    """Raises ModelBroken where no tensor ends in a key of `columns`, or its second side is not
    that long."""
    for name, wanted in columns.items():
        found = _ending(tensors, name)
        if found is None:
            raise _foreign(folder, f"has no tensor {name}")
        if found.shape[1:2] != (wanted,):
            raise _foreign(
                folder, f"has {name} of the shape {found.shape} and not {wanted} columns"
            )


def check_dtypes(folder: Path, kind: Kind, files: Mapping[str, Header]) -> None:
    """Raises ModelUnsupported where this version can't compute from a tensor of the component in
    `folder`, whose files are `files`."""
    held = {key: (file, stored) for file in files for key, stored in files[file].tensors.items()}
    for name, share in model_keys(held).items():
        if name.startswith(COMPUTED[kind]):
            file, stored = held[share.key]
            check_dtype(folder / file, share.key, stored.dtype)


def check_dtype(path: Path, name: str, dtype: str) -> None:
    """Raises ModelUnsupported where this version can't compute from what is stored as `dtype`, as
    is the tensor `name` of the file at `path`: 8 bits need scales, whole numbers a rule of their
    own."""
    if dtype not in RUNNING:
        raise ModelUnsupported(
            f"{path}: {name} is in {dtype}, and this version runs bf16, fp16 and fp32 safetensors"
            " files.",
            "Use weights that are not quantised.",
        )


def _foreign(folder: Path, what: str) -> ModelBroken:
    return ModelBroken(
        "swapped",
        f"The files in {folder} do not fit its config.json: it {what}.",
        "They belong to another component or model: download it again.",
    )


def lacking(names: Collection[str], family: Family, blocks: int) -> list[str]:
    """What a transformer of `blocks` blocks needs, and `names` (diffusers') does not have."""
    numbered = (
        f"transformer_blocks.{number}.{name}"
        for number in range(min(blocks, len(names) + 1))  # a configuration may say any number
        for name in PER_BLOCK[family]
    )
    return [name for name in (*OUTSIDE[family], *numbered) if name not in names]


def _count(names: Iterable[str], start: str) -> int:
    """How many there are, up to the last; 1 where there is none, so that it is missed."""
    numbers = (name[len(start) :].split(".")[0] for name in names if name.startswith(start))
    return 1 + max((int(n) for n in numbers if n.isdecimal() and len(n) < 4), default=0)


def models_for(checkpoint: Checkpoint, catalog: Catalog) -> tuple[Model, ...]:
    """The catalogue's models that it fits: keys and shapes may fit several, because some
    differences (Edit-2511's `zero_cond_t`) leave no trace in a file."""
    return tuple(model for model in catalog.models if model.repo and fits(checkpoint, model))


@dataclass(frozen=True)
class Stranger:
    """A weight file of another program: what it is, the models that it may be used for, and why it
    can't be, where it can't."""

    path: Path
    checkpoint: Checkpoint | None
    models: tuple[Model, ...]
    why: str = ""


def survey(paths: Iterable[Path], catalog: Catalog) -> tuple[Stranger, ...]:
    """What these files are. Reads their headers alone."""
    return tuple(_stranger(path, catalog) for path in paths)


def _stranger(path: Path, catalog: Catalog) -> Stranger:
    try:
        found = recognise(path)
    except BadRequest as error:
        return Stranger(path, None, (), error.message)
    why = NOT_TAKEN.get(found.kind, found.unsupported)
    return Stranger(path, found, () if why else models_for(found, catalog), why)


def fits(checkpoint: Checkpoint, model: Model) -> bool:
    """Whether it may be weights of `model`: its family, and of transformers its configuration."""
    if checkpoint.family != model.family or checkpoint.kind not in model.components:
        return False
    config = model.transformer_config
    return checkpoint.kind != "transformer" or (
        checkpoint.layered == bool(config.get("use_additional_t_cond"))
        and (not checkpoint.zero_cond_t or bool(config.get("zero_cond_t")))
    )


def check_taken(checkpoint: Checkpoint) -> None:
    """Raises ModelUnsupported, with the reason and what to do, where this version takes no such
    file."""
    if checkpoint.kind in NOT_TAKEN:
        raise ModelUnsupported(
            f"{checkpoint.path} is a {WORDS[checkpoint.kind]} of the {checkpoint.family} family.",
            NOT_TAKEN[checkpoint.kind],
        )
    if checkpoint.kind == "text_encoder" and checkpoint.unsupported:
        raise ModelUnsupported(
            f"{checkpoint.path} can't be used. {checkpoint.unsupported}",
            "`qit models download` fetches the published text encoder.",
        )
    if checkpoint.unreadable:
        raise ModelUnsupported(
            f"{checkpoint.path} can't be read: it is in {checkpoint.unreadable}.",
            "Take the bf16 or a GGUF file of the same model: `qit models show` lists them.",
        )


def check_model(checkpoint: Checkpoint, model: Model) -> None:
    """Raises BadRequest where `checkpoint` can't be weights of `model`."""
    if not fits(checkpoint, model):
        raise BadRequest(
            f"{checkpoint.path} holds a {WORDS[checkpoint.kind]} of {checkpoint.family}, which does"
            f" not fit {model.name}.",
            "Its keys and shapes say so, whatever its name.",
        )


def _prefix(keys: Collection[str]) -> str:
    """The known prefix that the model's own keys stand behind."""
    return next((p for p in PREFIXES for sign in SIGNS if p + sign in keys), "")


def _identify(keys: dict[str, Stored], path: Path) -> tuple[Kind, Family]:
    if any(".lora_" in key or key.startswith("lora_") for key in keys):
        return "lora", _lora_family(keys, path)
    if "img_in.weight" in keys and "txt_norm.weight" in keys:
        _agree(keys["img_in.weight"], WIDTHS, "qwen-image", path)
        return ("controlnet" if _any(keys, "controlnet_blocks.") else "transformer"), "qwen-image"
    if "img_in.weight" in keys and "txt_in.text_norm.weight" in keys:
        _agree(keys["img_in.weight"], WIDTHS, "qwen-image-2.1", path)
        return "transformer", "qwen-image-2.1"
    if _any(keys, "controlnet_blocks.") or _any(keys, "control_img_in."):
        return "controlnet", _controlnet_family(keys, path)
    embedding = _ending(keys, "embed_tokens.weight") or keys.get("token_embd.weight")
    if embedding and len(embedding.shape) == 2:
        return "text_encoder", _text_family(embedding, keys, path)
    for name in ("decoder.conv_in.weight", "decoder.conv1.weight"):
        if name in keys:
            return "vae", _vae_family(keys[name], path)
    raise ModelUnsupported(
        f"{path} holds no part of a Qwen-Image model.", "Its tensors have names of another model."
    )


def _any(keys: Iterable[str], start: str) -> bool:
    return any(key.startswith(start) for key in keys)


def _ending(keys: dict[str, Stored], end: str) -> Stored | None:
    return next((stored for key, stored in keys.items() if key.endswith(end)), None)


def _agree(
    stored: Stored, widths: dict[int, Family], family: Family, path: Path, axis: int = 0
) -> None:
    """The layout says `family`; the shape of a matrix has to say the same."""
    width = stored.shape[axis] if len(stored.shape) == 2 else 0
    if widths.get(width) != family:
        wanted = next(size for size, name in widths.items() if name == family)
        raise ModelUnsupported(
            f"{path} is laid out like {family}, but is {width} wide where that is {wanted} wide.",
            "It belongs to a model that this version does not know.",
        )


def _lora_family(keys: dict[str, Stored], path: Path) -> Family:
    """By the width that its adapters go in and out of."""
    sizes = {size for stored in keys.values() for size in stored.shape}
    for width, family in WIDTHS.items():
        if width in sizes:
            return family
    raise ModelUnsupported(
        f"{path} is a LoRA of another model.", "Its widths are not Qwen-Image's."
    )


def _controlnet_family(keys: dict[str, Stored], path: Path) -> Family:
    sizes = {size for stored in keys.values() if len(stored.shape) == 2 for size in stored.shape}
    for width, family in reversed(WIDTHS.items()):
        if width in sizes:
            return family
    raise ModelUnsupported(
        f"{path} is a ControlNet of another model.", "Its widths are not Qwen-Image's."
    )


def _text_family(embedding: Stored, keys: dict[str, Stored], path: Path) -> Family:
    family: Family = (
        "qwen-image-2.1"
        if _ending(keys, ".self_attn.q_norm.weight") or _ending(keys, ".attn_q_norm.weight")
        else "qwen-image"
    )
    _agree(embedding, TEXT_WIDTHS, family, path, axis=1)
    return family


def _vae_family(conv_in: Stored, path: Path) -> Family:
    """By the latent's channels: 16 in the 20B family, 64 in 2.1."""
    channels = conv_in.shape[1] if len(conv_in.shape) > 1 else 0
    if channels == 16 and len(conv_in.shape) == 5:
        return "qwen-image"
    if channels == 64 and len(conv_in.shape) in (4, 5):
        return "qwen-image-2.1"
    raise ModelUnsupported(
        f"{path} is the VAE of another model ({channels} latent channels).",
        "Qwen-Image has 16, Qwen-Image-2.1 has 64.",
    )


def _storage(header: Header) -> str:
    """The dtype that most bytes are in: "BF16", "F8_E4M3", "Q4_K" ..."""
    total: dict[str, int] = {}
    for stored in header.tensors.values():
        total[stored.dtype] = total.get(stored.dtype, 0) + stored.bytes
    return max(total, key=lambda dtype: total[dtype], default="")


def _unreadable(keys: Iterable[str]) -> str:
    names = list(keys)
    for part, reason in UNREADABLE:
        if any(part in name for name in names):
            return reason
    return ""
