import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import QwenImage21Transformer2DModel, QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextDecoderLayer

import tiny
from qwen_image_tool.catalog import load_catalog
from qwen_image_tool.engine.weights import DTYPES
from qwen_image_tool.errors import BadRequest, ModelBroken, ModelMissing, ModelUnsupported
from qwen_image_tool.store import blocks_of, expect, locate, text_layers_of

CATALOG = load_catalog()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "tiny"))


def test_a_local_folder_takes_the_20b_settings(folder: Path, tmp_path: Path) -> None:
    found = locate(str(folder), CATALOG, tmp_path)
    assert found.model.name == "tiny"
    assert found.model.sampling == CATALOG.find("qwen-image").sampling
    assert found.model.sizes.multiple == 16
    assert found.bytes["transformer"] == sum(
        file.stat().st_size for file in (folder / "transformer").glob("*.safetensors")
    )
    assert found.bytes["scheduler"] == 0


def test_an_id_is_looked_up_in_the_models_folder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelMissing, match="is not on this computer"):
        locate("qwen-image", CATALOG, tmp_path / "models")
    folder.rename(folder.parent / "qwen-image")
    assert locate("Qwen/Qwen-Image", CATALOG, tmp_path).model.id == "qwen-image"


def test_a_missing_shard_is_named(folder: Path, tmp_path: Path) -> None:
    transformer = QwenImageTransformer2DModel.from_pretrained(
        folder / "transformer", dtype=torch.bfloat16
    )
    shutil.rmtree(folder / "transformer")
    transformer.save_pretrained(folder / "transformer", max_shard_size="30KB")
    shards = sorted((folder / "transformer").glob("*-of-*.safetensors"))
    assert len(shards) > 2
    assert locate(str(folder), CATALOG, tmp_path).bytes["transformer"] > 0
    shards[1].unlink()
    with pytest.raises(ModelMissing) as caught:
        locate(str(folder), CATALOG, tmp_path)
    assert str(shards[1]) in str(caught.value)


def write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def set_in(path: Path, **values: object) -> None:
    write(path, json.dumps(json.loads(path.read_text(encoding="utf-8")) | values))


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda f: (f / "model_index.json").unlink(), ModelMissing, "model_index.json is missing"),
        (lambda f: write(f / "model_index.json", "<html>"), ModelMissing, "can't be read"),
        (lambda f: write(f / "model_index.json", "[]"), ModelMissing, "not what it should be"),
        (lambda f: shutil.rmtree(f / "vae"), ModelMissing, "vae"),
        (lambda f: shutil.rmtree(f / "tokenizer"), ModelMissing, "'tokenizer' is missing"),
        (lambda f: shutil.rmtree(f / "text_encoder"), ModelMissing, "'text_encoder' is missing"),
        (
            lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").unlink(),
            ModelMissing,
            "safetensors is missing",
        ),
        (
            lambda f: set_in(f / "model_index.json", _class_name="QwenImageEditPlusPipeline"),
            ModelUnsupported,
            "QwenImageEditPlusPipeline",
        ),
        (
            lambda f: set_in(f / "transformer" / "config.json", zero_cond_t=True),
            ModelUnsupported,
            "edits or splits",
        ),
        *(
            (
                lambda f, part=part, values=values: set_in(f / part / "config.json", **values),
                ModelBroken,
                "is not what it should be",
            )
            for part, values in (
                ("transformer", {"num_layers": "many"}),
                ("transformer", {"num_attention_heads": None}),
                ("text_encoder", {"text_config": 3}),
                ("vae", {"temperal_downsample": 3}),
                ("vae", {"base_dim": "wide"}),
            )
        ),
    ],
)
def test_a_spoilt_folder_is_refused(
    folder: Path,
    tmp_path: Path,
    spoil: Callable[[Path], None],
    error: type[BadRequest],
    message: str,
) -> None:
    spoil(folder)
    with pytest.raises(error) as caught:
        locate(str(folder), CATALOG, tmp_path)
    assert message in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("qwen-imge", "Did you mean 'qwen-image'?"),
        ("/no/such/folder", "does not exist"),
        ("qwen-image-edit", "makes pictures from text alone"),
    ],
)
def test_what_is_not_there_is_said(reference: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadRequest) as caught:
        locate(reference, CATALOG, tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "place", "message"),
    [
        (lambda f: take_weights(f, "text_encoder", "transformer"), "transformer", "has no tensor"),
        (lambda f: take_weights(f, "vae", "text_encoder"), "text_encoder", "embed_tokens.weight"),
        (lambda f: take_weights(f, "transformer", "vae"), "vae", "decoder.conv_in.weight"),
        (
            lambda f: set_in(f / "transformer" / "config.json", num_layers=10**12),
            "transformer",
            "transformer_blocks.",
        ),
        (
            lambda f: set_in(f / "transformer" / "config.json", num_attention_heads=24),
            "transformer",
            "not 384 rows",
        ),
        (lambda f: set_in(f / "vae" / "config.json", z_dim=48), "vae", "not 48 columns"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "folder_21"])
def test_files_of_another_component_are_refused(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    kind: str,
    spoil: Callable[[Path], None],
    place: str,
    message: str,
) -> None:
    """Whole files, each of them, but not those that the configuration means."""
    folder = request.getfixturevalue(kind)
    spoil(folder)
    with pytest.raises(ModelBroken) as caught:
        locate(str(folder), CATALOG, tmp_path)
    assert caught.value.kind == "swapped"
    assert str(folder / place) in caught.value.message
    assert message in caught.value.message


def take_weights(folder: Path, source: str, target: str) -> None:
    for path in (folder / target).glob("*.safetensors*"):
        path.unlink()
    for path in (folder / source).glob("*.safetensors*"):
        shutil.copy(path, folder / target)


def store_as(component: Path, pattern: str, dtype: torch.dtype) -> list[str]:
    """Write the tensors of such names in another dtype; their names."""
    found = []
    for path in component.glob("*.safetensors"):
        tensors = load_file(path)
        names = [name for name in tensors if re.search(pattern, name)]
        save_file(tensors | {name: tensors[name].to(dtype) for name in names}, path)
        found += names
    assert found
    return found


@pytest.mark.parametrize("name", ["I8", "U8", "I64", "BOOL", "F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize(
    ("component", "pattern"),
    [
        ("transformer", r"^img_in\.weight$"),
        ("transformer", r"^transformer_blocks\.1\.attn\.to_q\.weight$"),
        ("transformer", ""),
        ("text_encoder", r"\bembed_tokens\.weight$"),
        ("text_encoder", r"\blayers\.1\.input_layernorm\.weight$"),
        ("text_encoder", r"model\.norm\.weight$"),
        ("text_encoder", ""),
        ("vae", r"^decoder\.conv_in\.weight$"),
        ("vae", r"^post_quant_conv\.bias$"),
        ("vae", ""),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "folder_21"])
def test_numbers_that_nothing_computes_from_are_refused(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    kind: str,
    component: str,
    pattern: str,
    name: str,
) -> None:
    """A component's or one tensor's: cast to bfloat16 they would draw another picture."""
    folder = request.getfixturevalue(kind)
    spoilt = store_as(folder / component, pattern, DTYPES[name])
    for ask in (locate, expect):
        with pytest.raises(ModelUnsupported) as caught:
            ask(str(folder), CATALOG, tmp_path)
        said = caught.value.message
        assert said.startswith(str(folder / component))
        assert f" is in {name}, and this version runs bf16, fp16 and fp32" in said
        assert said.split(": ")[1].split(" is in ")[0] in spoilt
        assert caught.value.hint == "Use weights that are not quantised."


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["folder", "folder_21"])
def test_floats_of_any_precision_run(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    folder = request.getfixturevalue(kind)
    for component in ("transformer", "text_encoder", "vae"):
        store_as(folder / component, "", dtype)
    assert locate(str(folder), CATALOG, tmp_path)


@pytest.mark.parametrize("kind", ["folder", "folder_21"])
def test_what_no_run_reads_may_be_of_any_kind(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    """The vision tower, the head, what encodes pictures, and what other programs leave."""
    folder = request.getfixturevalue(kind)
    store_as(folder / "text_encoder", r"visual\.|lm_head", torch.int8)
    store_as(folder / "vae", r"^(encoder|quant_conv)\.", torch.int8)
    mark = {"__index_timestep_zero__": torch.zeros(1, dtype=torch.int64)}
    if kind == "folder":  # one file, without an index
        [path] = (folder / "transformer").glob("*.safetensors")
        save_file(load_file(path) | mark, path)
    assert locate(str(folder), CATALOG, tmp_path)


# Qwen-Image-2.1


@pytest.fixture(scope="module")
def whole_21(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_21(tmp_path_factory.mktemp("models") / "tiny-2.1")


@pytest.fixture
def folder_21(whole_21: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole_21, tmp_path / "tiny-2.1"))


def test_a_local_2_1_folder_takes_the_2_1_settings(folder_21: Path, tmp_path: Path) -> None:
    found = locate(str(folder_21), CATALOG, tmp_path)
    row = CATALOG.find("qwen-image-2.1")
    assert found.model.family == "qwen-image-2.1"
    assert found.model.sampling == row.sampling
    assert found.model.sizes.multiple == 32
    assert found.model.decode_bytes_per_pixel == row.decode_bytes_per_pixel * 8 // 144
    assert (found.blocks.count, found.text_layers.count) == (4, 3)
    assert found.bytes["processor"] == 0
    in_blocks = found.blocks.count * found.blocks.bytes
    assert 0.5 * found.bytes["transformer"] < in_blocks < found.bytes["transformer"]


def test_a_turbo_takes_the_schedule_of_its_folder(folder_21: Path, tmp_path: Path) -> None:
    set_in(folder_21 / "model_index.json", sample_sigmas=[1.0, 0.7, 0.2])
    found = locate(str(folder_21), CATALOG, tmp_path).model
    assert (found.sampling.steps, found.sampling.sigmas) == (3, (1.0, 0.7, 0.2))
    assert found.scheduler == CATALOG.find("qwen-image-2.1-turbo").scheduler


@pytest.mark.parametrize("sigmas", [[], [1.0, "0.5"], "fast", {"a": 1}])
def test_a_broken_schedule_is_refused(folder_21: Path, tmp_path: Path, sigmas: object) -> None:
    set_in(folder_21 / "model_index.json", sample_sigmas=sigmas)
    with pytest.raises(ModelMissing, match="broken schedule"):
        locate(str(folder_21), CATALOG, tmp_path)


def test_a_processor_without_its_tokenizer_is_named(folder_21: Path, tmp_path: Path) -> None:
    (folder_21 / "processor" / "tokenizer_config.json").unlink()
    with pytest.raises(ModelMissing, match=r"processor.tokenizer_config.json is missing"):
        locate(str(folder_21), CATALOG, tmp_path)


@pytest.mark.parametrize("left", [(), ("vocab.json",), ("merges.txt",)])
def test_a_tokenizer_without_its_words_is_refused(
    folder_21: Path, tmp_path: Path, left: tuple[str, ...]
) -> None:
    """It would read every prompt as the same few tokens."""
    words = folder_21 / "processor"
    whole = (words / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    for name in left:
        (words / name).write_bytes(whole.read_bytes())
    with pytest.raises(ModelMissing, match=r"has no vocabulary.* vocab.json with merges.txt"):
        locate(str(folder_21), CATALOG, tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (words / name).write_bytes(whole.read_bytes())
    assert locate(str(folder_21), CATALOG, tmp_path)


def test_block_sizes_are_those_of_the_real_classes(folder_21: Path, tmp_path: Path) -> None:
    """Counted on the meta device, at full size, and on a tiny model."""
    with torch.device("meta"):
        block = QwenImage21Transformer2DModel(num_layers=1).transformer_blocks[0]
        published = Qwen3VLTextConfig(intermediate_size=12288, num_key_value_heads=8)
        layer = Qwen3VLTextDecoderLayer(published, 0)
    full = expect("qwen-image-2.1", CATALOG, tmp_path)
    assert full.blocks == blocks_of({}, "qwen-image-2.1")
    assert (full.blocks.count, full.text_layers.count) == (32, 36)
    assert full.blocks.bytes == 2 * sum(p.numel() for p in block.parameters())
    assert full.text_layers.bytes == 2 * sum(p.numel() for p in layer.parameters())
    config = json.loads((folder_21 / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    tiny_layer = tiny.text_encoder_21(300).model.language_model.layers[0]
    counted = text_layers_of(config, "qwen-image-2.1")
    assert counted.bytes == 2 * sum(p.numel() for p in tiny_layer.parameters())
