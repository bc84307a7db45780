"""Weights on disk: which models are there, and whether they are whole.

A model is a folder in the diffusers layout: `model_index.json` and one sub-folder a component.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field

from qwen_image_tool.catalog import DEFAULT_MODEL, Catalog, Family, Model, did_you_mean
from qwen_image_tool.decoding import DECODINGS
from qwen_image_tool.errors import BadRequest, ModelBroken, ModelMissing, ModelUnsupported
from qwen_image_tool.store import verify
from qwen_image_tool.store.formats import (
    COMPUTED,
    LATENT_CHANNELS,
    check_dtypes,
    check_shapes,
    check_transformer,
    describe,
)
from qwen_image_tool.store.headers import Header, Stored
from qwen_image_tool.store.places import Elsewhere
from qwen_image_tool.store.record import OWN, Record, read_record, transformer_folder
from qwen_image_tool.types import Value

Parts = dict[str, verify.Component]  # by their sub-folder

# The catalogue rows whose settings an unlisted local folder takes
LOCAL_20B, LOCAL_21, LOCAL_TURBO = "qwen-image", "qwen-image-2.1", "qwen-image-2.1-turbo"


class Blocks(Value):
    """A model's repeated part: how many blocks, and the bytes of one in bfloat16, without and of
    its modulation. A token has `width` numbers and meets `token_bytes` of the weights."""

    count: int
    bytes: int
    modulation_bytes: int = 0
    width: int
    token_bytes: int


class Installed(Value):
    """A model that is on this computer. `folder` is absolute: where one was relative and is gone,
    diffusers and transformers would ask a hub for a model of that name. `bytes` maps each component
    to the size of its weights, the transformer's as it is held: in bfloat16."""

    model: Model
    folder: Path
    variant: str = Field(default=OWN, description="Of the transformer")
    bytes: dict[str, int]
    blocks: Blocks = Field(description="Of the transformer")
    text_layers: Blocks = Field(description="Of the text encoder's language model")
    decoder_parameters: int = Field(description="Of the VAE, what makes pixels")

    @property
    def transformer(self) -> Path:
        """The folder with the transformer's configuration and weights."""
        return self.folder / transformer_folder(self.variant)

    @property
    def weight_bytes(self) -> int:
        return sum(self.bytes.values())


def practice_folder() -> Path:
    """The practice model that the package carries."""
    return Path(__file__).parent.parent / "practice" / "weights"


def locate(
    reference: str, catalog: Catalog, models_folder: Path, elsewhere: Elsewhere | None = None
) -> Installed:
    """Find the model that `reference` names: a catalogue id, a repository, or a local folder; in
    the models folder, else whole in the Hugging Face cache of `elsewhere`.

    Raises BadRequest (no such model), ModelUnsupported (this version can't run it) or
    ModelMissing (the folder, a component or a file of it is not there).
    """
    model = catalog.get(reference)
    if model is None:
        folder = Path(reference).expanduser()
        if not folder.is_dir():
            raise _unknown(reference, catalog)
        return inspect(folder, _local_model(folder, catalog))
    if model.unsupported:
        raise ModelUnsupported(
            f"{model.name} can't run yet. {model.unsupported}", "`qit models list` shows what can."
        )
    folder = practice_folder() if model.id == DEFAULT_MODEL else models_folder / model.id
    if read_record(folder) or (folder / "model_index.json").is_file():
        return _inspect_own(folder, model)
    for snapshot in (elsewhere or Elsewhere()).snapshots(model.repo, model.revision):
        try:
            return inspect(snapshot, model)
        except BadRequest:  # half of it, or files of another kind: as good as nothing
            continue
    raise ModelMissing(
        f"{model.name} is not on this computer.",
        f"Get it with `qit models download {model.id}`, or give --model the folder it is in.",
    )


def _inspect_own(folder: Path, model: Model) -> Installed:
    record = read_record(folder)
    if record is None:
        return inspect(folder, model)
    parts = verify.read_components(folder, record, model.components)
    faults = verify.faults_of(folder, record, parts)
    variant = _running(folder, record, parts, faults)
    places = {name: f"{transformer_folder(name)}/" for name in record.variants}
    others = tuple(place for name, place in places.items() if variant not in ("", name))
    for fault in faults:
        if not fault.path.startswith(others):
            ending = "download" if fault.kind == "interrupted" else "repair"
            hint = f"`qit models {ending} {model.id}` fetches what is needed."
            raise ModelBroken(fault.kind, fault.message, hint)
    if not variant:
        raise _none_runs(folder, record, model, parts)
    return inspect(folder, model, variant, parts)


def _running(folder: Path, record: Record, parts: Parts, faults: tuple[verify.Fault, ...]) -> str:
    """The variant that runs: the model's own, else the first that this version can run; "" where
    none is whole and can. Another one may be on its way, or broken."""
    own_first = sorted(record.variants, key=lambda name: name != OWN)
    for name in own_first:
        place = f"{transformer_folder(name)}/"
        is_whole = not any(fault.path.startswith(place) for fault in faults)
        if is_whole and (name == OWN or not _unsupported(folder, name, parts)):
            return name
    return ""


def _unsupported(folder: Path, variant: str, parts: Parts) -> str:
    """Why this version can't run a variant that is one whole file, if so."""
    place = transformer_folder(variant)
    [(file, header)] = parts[place].weights.items()
    return describe(folder / place / file, header).unsupported


def _none_runs(folder: Path, record: Record, model: Model, parts: Parts) -> BadRequest:
    hint = f"`qit models download {model.id}` fetches what is needed."
    if not record.variants:
        here = record.taken or [name for name in model.components if record.weights(name)]
        return ModelMissing(f"Of {model.name} only {', '.join(here) or 'texts'} is here.", hint)
    why = _unsupported(folder, record.variants[0], parts)
    return ModelUnsupported(
        f"Of {model.name} only {', '.join(record.variants)} is here. {why}", hint
    )


def expect(
    reference: str, catalog: Catalog, models_folder: Path, elsewhere: Elsewhere | None = None
) -> Installed:
    """Like `locate`, but a model of the catalogue that is not here is taken as it is published."""
    try:
        return locate(reference, catalog, models_folder, elsewhere)
    except ModelMissing:
        model = catalog.get(reference)
        if model is None:
            raise
    return as_published(model)


def as_published(model: Model, transformer_bytes: int | None = None) -> Installed:
    """A catalogue model as if it were here, with a transformer of another size if one is given."""
    sizes = {name: part.bytes for name, part in model.components.items()}
    return Installed(
        model=model,
        folder=Path(),
        bytes=sizes if transformer_bytes is None else sizes | {"transformer": transformer_bytes},
        blocks=blocks_of({}, model.family),
        text_layers=text_layers_of({}, model.family),
        decoder_parameters=DECODINGS[model.family].parameters,
    )


def inspect(
    folder: Path, model: Model, variant: str = OWN, parts: Parts | None = None
) -> Installed:
    """Check that every component of `model` is whole in `folder`, without reading any tensor;
    `variant` says which transformer. `parts`: its components, where they have been read.

    A schedule of the folder's own takes the place of the model's. Raises ModelMissing that names
    the first file which is not there, ModelUnsupported where the folder holds another kind of
    model or a tensor that this version can't compute from, ModelBroken where a component's tensors
    are not those of its configuration.
    """
    index = verify.read_json(folder / "model_index.json")
    found = index.get("_class_name")
    if found != model.pipeline:
        raise ModelUnsupported(
            f"{folder} holds a {found}, and this version runs {model.pipeline} folders.",
            "Choose the folder of a text-to-image Qwen-Image model.",
        )
    places = {name: name for name in model.components}
    places["transformer"] = transformer_folder(variant)
    parts = parts or verify.read_components(folder, None, places.values())
    headers = {name: _headers(folder / at, name, parts.get(at)) for name, at in places.items()}
    sizes = {name: sum(header.size for header in found) for name, found in headers.items()}
    configs = {
        name: verify.read_json(folder / places[name] / "config.json")
        for name in ("transformer", "text_encoder", "vae")
    }
    with _configured(folder):
        blocks = blocks_of(configs["transformer"], model.family)
        text_layers = text_layers_of(configs["text_encoder"], model.family)
    check_transformer(
        folder / places["transformer"],
        _tensors(headers["transformer"]),
        model.family,
        blocks.count,
        blocks.width,
    )
    last = f"layers.{text_layers.count - 1}.self_attn.q_proj.weight"
    check_shapes(
        folder / "text_encoder",
        _tensors(headers["text_encoder"]),
        {"embed_tokens.weight": text_layers.width, last: text_layers.width},
    )
    channels = configs["vae"].get("z_dim", LATENT_CHANNELS[model.family])
    check_shapes(folder / "vae", _tensors(headers["vae"]), {"decoder.conv_in.weight": channels})
    for kind in COMPUTED:
        check_dtypes(folder / places[kind], kind, parts[places[kind]].weights)
    return Installed(
        model=_with_sigmas(model, index.get("sample_sigmas"), folder),
        folder=folder.absolute(),
        variant=variant,
        bytes=sizes | {"transformer": _as_bfloat16(headers["transformer"])},
        blocks=blocks,
        text_layers=text_layers,
        decoder_parameters=_parameters(headers["vae"], COMPUTED["vae"]),
    )


def blocks_of(config: dict[str, Any], family: Family = "qwen-image") -> Blocks:
    """Counted from the configuration of a QwenImageTransformer2DModel, or in the 2.1 family of a
    QwenImage21Transformer2DModel; what it does not say is as published."""
    head = config.get("attention_head_dim", 128)
    if family == "qwen-image-2.1":
        width = config.get("num_attention_heads", 32) * head
        matrices = (4 + 3 * config.get("mlp_ratio", 3)) * width * width
        size = 2 * (matrices + 2 * head)
        layers = config.get("num_layers", 32)
        return Blocks(count=layers, bytes=size, width=width, token_bytes=size)
    width = config.get("num_attention_heads", 24) * head
    attention = 8 * width * (width + 1) + 4 * head
    feed_forward = 2 * (8 * width * width + 5 * width)
    return Blocks(
        count=config.get("num_layers", 60),
        bytes=2 * (attention + feed_forward),
        modulation_bytes=2 * 2 * 6 * width * (width + 1),
        width=width,
        token_bytes=attention + feed_forward,  # half: image and text have weights of their own
    )


def text_layers_of(config: dict[str, Any], family: Family = "qwen-image") -> Blocks:
    """Counted from the configuration of a Qwen2_5_VLForConditionalGeneration, or in the 2.1 family
    of a Qwen3VLForConditionalGeneration; what it does not say is as published."""
    text = config.get("text_config", config)
    if family == "qwen-image-2.1":
        width, inner = text.get("hidden_size", 4096), text.get("intermediate_size", 12288)
        heads, groups = text.get("num_attention_heads", 32), text.get("num_key_value_heads", 8)
        head, layers = text.get("head_dim", 128), text.get("num_hidden_layers", 36)
        attention = 2 * (heads + groups) * head * width + 2 * head
    else:
        width, inner = text.get("hidden_size", 3584), text.get("intermediate_size", 18944)
        heads, groups = text.get("num_attention_heads", 28), text.get("num_key_value_heads", 4)
        shared, layers = width * groups // heads, text.get("num_hidden_layers", 28)
        attention = 2 * width * width + width + 2 * shared * (width + 1)
    size = 2 * (attention + 3 * width * inner + 2 * width)
    return Blocks(count=layers, bytes=size, width=width, token_bytes=size)


def _unknown(reference: str, catalog: Catalog) -> BadRequest:
    if Path(reference).is_absolute() or any(sep in reference for sep in ("/", "\\")):
        return ModelMissing(
            f"The model folder {reference} does not exist.", "Check the path given to --model."
        )
    hint = did_you_mean(reference, [m.id for m in catalog.models])
    return BadRequest(f"There is no model or folder {reference!r}.", hint)


def _with_sigmas(model: Model, sigmas: Any, folder: Path) -> Model:
    """The model with the schedule that its folder fixes, if it does: so diffusers knows a Turbo."""
    if sigmas is None:
        return model
    numbers = isinstance(sigmas, list) and all(isinstance(s, int | float) for s in sigmas)
    if not numbers or not sigmas:
        raise ModelMissing(f"{folder / 'model_index.json'} has a broken schedule.", verify.AGAIN)
    sampling = {"sigmas": tuple(sigmas), "steps": len(sigmas)}
    return model.model_copy(update={"sampling": model.sampling.model_copy(update=sampling)})


def _local_model(folder: Path, catalog: Catalog) -> Model:
    """A catalogue row for a folder the catalogue doesn't know: the text-to-image settings of its
    family, with the size multiple that the folder's VAE needs."""
    index = verify.read_json(folder / "model_index.json")
    base = catalog.find(_local_row(index))
    vae = verify.read_json(folder / "vae" / "config.json")
    width, published = vae.get("base_dim", 96), 96
    if base.family == "qwen-image-2.1":
        width, published = vae.get("decoder_base_dim") or width, 144
    with _configured(folder):
        levels = len(vae.get("temperal_downsample", (False, True, True)))
        decode_bytes = int(base.decode_bytes_per_pixel * width // published)
    transformer = verify.read_json(folder / "transformer" / "config.json")
    if transformer.get("zero_cond_t") or transformer.get("use_additional_t_cond"):
        raise ModelUnsupported(
            f"The transformer in {folder} is one that edits or splits pictures.",
            "Choose the folder of a text-to-image Qwen-Image model.",
        )
    multiple = 2 ** (levels + 1)
    sizes = base.sizes.model_copy(update={"multiple": multiple})
    return base.model_copy(
        update={
            "id": str(folder),
            "name": folder.name,
            "repo": "",
            "sizes": sizes,
            "decode_bytes_per_pixel": decode_bytes,
        }
    )


@contextmanager
def _configured(folder: Path) -> Iterator[None]:
    """Raises ModelBroken where a configuration has something else than a number in its place."""
    try:
        yield
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise ModelBroken(
            "unreadable", f"A config.json in {folder} is not what it should be.", verify.AGAIN
        ) from error


def _local_row(index: dict[str, Any]) -> str:
    if index.get("_class_name") != "QwenImage21Pipeline":
        return LOCAL_20B
    return LOCAL_TURBO if index.get("sample_sigmas") else LOCAL_21


def _headers(folder: Path, name: str, found: verify.Component | None) -> list[Header]:
    """Of a component's weight files; none for the tokenizer, the processor and the scheduler.

    Raises ModelMissing and ModelBroken.
    """
    if found is None:
        raise ModelMissing(
            f"The component {name!r} is missing: there is no folder {folder}.", verify.AGAIN
        )
    verify.read_json(folder / verify.CONFIGS.get(name, "config.json"))
    if name in ("tokenizer", "processor"):
        _check_vocabulary(folder)
    if name in verify.CONFIGS:
        return []
    for fault in found.faults:
        raise ModelBroken(fault.kind, fault.message, verify.AGAIN)
    if not found.weights:
        raise ModelMissing(f"The file {folder / 'model.safetensors'} is missing.", verify.AGAIN)
    return list(found.weights.values())


def _check_vocabulary(folder: Path) -> None:
    for files in verify.VOCABULARIES:
        if all((folder / name).is_file() for name in files):
            return
    names = " nor ".join(" with ".join(files) for files in verify.VOCABULARIES)
    raise ModelMissing(f"{folder} has no vocabulary: neither {names} is there.", verify.AGAIN)


def _tensors(headers: list[Header]) -> dict[str, Stored]:
    """Of all files of a component."""
    return {name: stored for header in headers for name, stored in header.tensors.items()}


def _parameters(headers: list[Header], prefixes: tuple[str, ...] = ("",)) -> int:
    """Of the tensors whose names begin so."""
    tensors = (named for header in headers for named in header.tensors.items())
    return sum(math.prod(tensor.shape) for name, tensor in tensors if name.startswith(prefixes))


def _as_bfloat16(headers: list[Header]) -> int:
    """Bytes of the files if all they hold were in bfloat16."""
    stored = sum(t.bytes for header in headers for t in header.tensors.values())
    return sum(header.size for header in headers) - stored + 2 * _parameters(headers)
