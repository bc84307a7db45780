"""Weights on disk: which models are there, and whether they are whole.

A model is a folder in the diffusers layout: `model_index.json` and one sub-folder a component.
"""

from pathlib import Path
from typing import Any

from qwen_image_tool.catalog import DEFAULT_MODEL, Catalog, Model, did_you_mean
from qwen_image_tool.errors import BadRequest, ModelBroken, ModelMissing, ModelUnsupported
from qwen_image_tool.store import verify
from qwen_image_tool.store.places import Elsewhere
from qwen_image_tool.store.record import read_record
from qwen_image_tool.types import Value

LOCAL_FAMILY = "qwen-image"  # the catalogue row whose settings an unlisted local folder takes


class Blocks(Value):
    """The transformer's repeated part: how many blocks, and the bytes of one in bfloat16, without
    and of its modulation."""

    count: int
    bytes: int
    modulation_bytes: int


class Installed(Value):
    """A model that is on this computer. `bytes` maps each component to the size of its weights."""

    model: Model
    folder: Path
    bytes: dict[str, int]
    blocks: Blocks

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
    faults = verify.quick(folder, record, model.components) if record else ()
    for fault in faults:
        hint = f"`qit models {'download' if fault.kind == 'interrupted' else 'repair'} {model.id}`"
        raise ModelBroken(fault.kind, fault.message, f"{hint} fetches what is needed.")
    if record and "bf16" not in record.variants:
        raise ModelUnsupported(
            f"Of {model.name} only {', '.join(record.variants)} is here, and this version runs"
            " bf16.",
            f"`qit models download {model.id}` adds it.",
        )
    return inspect(folder, model)


def inspect(folder: Path, model: Model) -> Installed:
    """Check that every component of `model` is whole in `folder`, without reading any tensor.

    Raises ModelMissing that names the first file which is not there, ModelUnsupported where the
    folder holds another kind of model.
    """
    index = verify.read_json(folder / "model_index.json")
    found = index.get("_class_name")
    if found != model.pipeline:
        raise ModelUnsupported(
            f"{folder} holds a {found}, and this version runs {model.pipeline} folders.",
            "Choose the folder of a text-to-image Qwen-Image model.",
        )
    return Installed(
        model=model,
        folder=folder,
        bytes={name: _component_bytes(folder / name, name) for name in model.components},
        blocks=blocks_of(verify.read_json(folder / "transformer" / "config.json")),
    )


def blocks_of(config: dict[str, Any]) -> Blocks:
    """Counted from the configuration of a QwenImageTransformer2DModel."""
    head = config.get("attention_head_dim", 128)
    width = config.get("num_attention_heads", 24) * head
    attention = 8 * width * (width + 1) + 4 * head
    feed_forward = 2 * (8 * width * width + 5 * width)
    return Blocks(
        count=config.get("num_layers", 60),
        bytes=2 * (attention + feed_forward),
        modulation_bytes=2 * 2 * 6 * width * (width + 1),
    )


def _unknown(reference: str, catalog: Catalog) -> BadRequest:
    if Path(reference).is_absolute() or any(sep in reference for sep in ("/", "\\")):
        return ModelMissing(
            f"The model folder {reference} does not exist.", "Check the path given to --model."
        )
    hint = did_you_mean(reference, [m.id for m in catalog.models])
    return BadRequest(f"There is no model or folder {reference!r}.", hint)


def _local_model(folder: Path, catalog: Catalog) -> Model:
    """A catalogue row for a folder the catalogue doesn't know: the 20B text-to-image settings, with
    the size multiple that the folder's VAE needs."""
    base = catalog.find(LOCAL_FAMILY)
    vae = verify.read_json(folder / "vae" / "config.json")
    levels = len(vae.get("temperal_downsample", (False, True, True)))
    transformer = verify.read_json(folder / "transformer" / "config.json")
    if transformer.get("zero_cond_t") or transformer.get("use_additional_t_cond"):
        raise ModelUnsupported(
            f"The transformer in {folder} is one that edits or splits pictures.",
            "Choose the folder of a text-to-image Qwen-Image model.",
        )
    multiple = 2 ** (levels + 1)
    sizes = base.sizes.model_copy(update={"multiple": multiple})
    width = vae.get("base_dim", 96)
    return base.model_copy(
        update={
            "id": str(folder),
            "name": folder.name,
            "repo": "",
            "sizes": sizes,
            "decode_bytes_per_pixel": base.decode_bytes_per_pixel * width // 96,
        }
    )


def _component_bytes(folder: Path, name: str) -> int:
    """Bytes of a component's weights; 0 where it has none (tokenizer, scheduler)."""
    if not folder.is_dir():
        raise ModelMissing(
            f"The component {name!r} is missing: there is no folder {folder}.", verify.AGAIN
        )
    config = {
        "scheduler": "scheduler_config.json",
        "tokenizer": "tokenizer_config.json",
        "processor": "preprocessor_config.json",
    }
    verify.read_json(folder / config.get(name, "config.json"))
    if name in config:
        return 0
    for fault in verify.check_component(folder):
        raise ModelBroken(fault.kind, fault.message, verify.AGAIN)
    files = sorted(_weight_files(folder))
    for file in files:
        if not file.is_file():
            raise ModelMissing(f"The file {file} is missing.", verify.AGAIN)
    return sum(file.stat().st_size for file in files)


def _weight_files(folder: Path) -> set[Path]:
    """The safetensors files of a component: what its index names, else the single file."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        names = set(verify.read_json(indexes[0])["weight_map"].values())
        return {folder / Path(name).name for name in names}
    return set(folder.glob("*.safetensors")) or {folder / "model.safetensors"}
