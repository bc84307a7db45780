import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import QwenImageTransformer2DModel

import tiny
from qwen_image_tool.catalog import load_catalog
from qwen_image_tool.errors import BadRequest, ModelMissing, ModelUnsupported
from qwen_image_tool.store import locate

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
