"""Weights in one file, as ComfyUI has them: the same bits as from diffusers' folder."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImage21Transformer2DModel, QwenImageTransformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_qwen_image21_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import load_file, save_file

import tiny
from hub import Fault, LocalHub, is_lfs, serve
from qwen_image_tool import logs
from qwen_image_tool.catalog import Model, load_catalog
from qwen_image_tool.cli.commands import run
from qwen_image_tool.engine import vae
from qwen_image_tool.engine.cache import checkpoint_identity
from qwen_image_tool.engine.engine import Engine
from qwen_image_tool.engine.weights import Checkpoint, read
from qwen_image_tool.errors import (
    BadRequest,
    Cancelled,
    DownloadFailed,
    ModelBroken,
    ModelMissing,
    ModelUnsupported,
)
from qwen_image_tool.store import formats, inspect, locate
from qwen_image_tool.store.hub import Hub
from qwen_image_tool.store.library import Library
from qwen_image_tool.store.places import Elsewhere
from qwen_image_tool.types import Event, Notice, PhaseNeed, Placement, Plan, Request, Size

CATALOG = load_catalog()
T2I, BASE21 = CATALOG.find("qwen-image"), CATALOG.find("qwen-image-2.1")
MODELS = [T2I, BASE21]
COMFY = "model.diffusion_model."
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def repos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each family, whose transformer has the same numbers in half precision."""
    root = tmp_path_factory.mktemp("repos")
    for model, save, kind in (
        (T2I, tiny.save, QwenImageTransformer2DModel),
        (BASE21, tiny.save_21, QwenImage21Transformer2DModel),
    ):
        folder = save(root / model.id) / "transformer"
        transformer = kind.from_pretrained(folder, dtype=torch.bfloat16)
        for parameter in transformer.parameters():
            parameter.data = parameter.data.half().bfloat16()
        shutil.rmtree(folder)
        transformer.save_pretrained(folder, max_shard_size="40KB")
    return root


@pytest.fixture(params=MODELS, ids=lambda model: model.family)
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Model:
    """Tiny ones are as wide in both families: told by their layout alone."""
    found: Model = request.param
    monkeypatch.setitem(formats.WIDTHS, 32, found.family)
    monkeypatch.setitem(formats.TEXT_WIDTHS, 32, found.family)
    return found


def published(repos: Path, model: Model, part: str = "transformer") -> Tensors:
    tensors: Tensors = {}
    for shard in (repos / model.id / part).glob("*.safetensors"):
        tensors |= load_file(shard)
    return tensors


def plain(tensors: Tensors) -> Tensors:
    return tensors


def prefixed(tensors: Tensors) -> Tensors:
    return {COMFY + name: tensor for name, tensor in tensors.items()}


def fused(tensors: Tensors) -> Tensors:
    """As ComfyUI saves 2.1: gate and projection in one matrix."""
    rest = {name: t for name, t in tensors.items() if "img_mlp." not in name}
    for name, gate in tensors.items():
        if name.endswith("img_mlp.gate_layer.weight"):
            up = tensors[name.replace("gate_layer", "proj")]
            rest[name.replace("gate_layer", "gate_up")] = torch.cat([gate, up])
        elif name.endswith("img_mlp.proj.weight"):
            continue
        elif "img_mlp." in name:
            rest[name] = gate
    return prefixed(rest)


def write(path: Path, tensors: Tensors, dtype: torch.dtype = torch.bfloat16) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, path)
    return path


PLACEMENTS = {  # of the blocks and of the text encoder's layers
    T2I.family: (Placement(blocks=2, resident=2), Placement(blocks=2, resident=2)),
    BASE21.family: (
        Placement(blocks=4, resident=2, slots=2, source="disk"),
        Placement(blocks=3, resident=3),
    ),
}


def plan(model: Model) -> Plan:
    blocks, layers = PLACEMENTS[model.family]
    return Plan(
        device="cpu",
        dtype="bfloat16",
        working_size=Size(64, 64),
        mode="exact",
        single_frame=False,
        forwards=1,
        placement=blocks,
        text_placement=layers,
        phases=(PhaseNeed(phase="load", ram_bytes=1),),
        disk_bytes=1,
    )


def latents(installed: Any, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """What goes into the VAE for one picture."""
    kept: list[torch.Tensor] = []
    decode = vae.decode

    def keep(model: Any, cells: torch.Tensor, *rest: Any) -> Any:
        kept.append(cells)
        return decode(model, cells, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(vae, "decode", keep)
        request = Request(model="tiny", prompt="a red cat", size=Size(64, 64), steps=2, seed=7)
        resolved = installed.model.resolve(request, 0)
        engine = Engine(installed)
        engine.run(resolved, [plan(installed.model)], lambda _: None, lambda: False)
        engine.release()
    return torch.cat(kept)


LAYOUTS: list[tuple[Callable[[Tensors], Tensors], torch.dtype]] = [
    (plain, torch.bfloat16),
    (prefixed, torch.bfloat16),
    (fused, torch.bfloat16),
    (prefixed, torch.float16),
    (fused, torch.float32),
]


@pytest.mark.parametrize(("layout", "dtype"), LAYOUTS)
def test_one_file_gives_the_bits_of_the_folder(
    repos: Path,
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layout: Callable[[Tensors], Tensors],
    dtype: torch.dtype,
) -> None:
    if model is T2I and layout is fused:
        layout = prefixed  # the 20B family has nothing to fuse
    folder = Path(shutil.copytree(repos / model.id, tmp_path / "model"))
    place = folder / "variants" / "one"
    write(place / "any name.safetensors", layout(published(repos, model)), dtype)
    shutil.move(folder / "transformer" / "config.json", place)
    shutil.rmtree(folder / "transformer")
    whole = inspect(repos / model.id, model)
    single = inspect(folder, model, "one")
    assert single.blocks == whole.blocks
    assert abs(single.bytes["transformer"] - whole.bytes["transformer"]) < 10_000
    assert torch.equal(latents(single, monkeypatch), latents(whole, monkeypatch))


def test_every_tensor_is_where_diffusers_has_it(repos: Path, tmp_path: Path) -> None:
    tensors = fused(published(repos, BASE21))
    write(tmp_path / "model.safetensors", tensors)
    checkpoint = Checkpoint(tmp_path)
    theirs = convert_qwen_image21_transformer_checkpoint_to_diffusers(dict(tensors))
    assert set(checkpoint.tensors) == set(theirs)
    for name, tensor in theirs.items():
        target = torch.empty_like(tensor)
        read([(checkpoint.check(name, target), target)])
        assert torch.equal(target, tensor), name


# -- from a file of another program to a picture -----------------------------------------------


@pytest.fixture
def hub(repos: Path) -> Iterator[LocalHub]:
    with serve() as hub:
        for model in MODELS:
            hub.add_folder(model.repo, repos / model.id)
        yield hub


def library_of(hub: LocalHub, models: Path, elsewhere: Elsewhere | None = None) -> Library:
    reached = Hub(hub.endpoint, local=True)
    return Library(CATALOG, models, lambda: reached, elsewhere)


def weights_sent(hub: LocalHub) -> set[str]:
    return {name for name in hub.sent if is_lfs(name)}


def test_an_imported_file_is_completed_and_runs(
    hub: LocalHub, repos: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "x.safetensors", fused(published(repos, model)))
    library = library_of(hub, tmp_path / "models")
    library.import_file(path, model)
    with pytest.raises(ModelMissing, match="only imported-BF16 is here") as caught:
        locate(model.id, CATALOG, library.models)
    assert f"qit models download {model.id}" in caught.value.hint
    assert library.to_fetch(model) < model.weight_bytes - model.components["transformer"].bytes + 1
    library.download(model, accept_licence=True)
    assert not [name for name in hub.sent if name.startswith("transformer/") and is_lfs(name)]
    assert library.verify(model, full=True) == ()
    found = locate(model.id, CATALOG, library.models)
    assert found.variant == "imported-BF16"
    whole = inspect(repos / model.id, model)
    assert torch.equal(latents(found, monkeypatch), latents(whole, monkeypatch))

    library.download(model, "bf16")
    assert locate(model.id, CATALOG, library.models).variant == "bf16"
    assert library.remove(model, "bf16") > 100_000
    assert locate(model.id, CATALOG, library.models).variant == "imported-BF16"
    hub.sent.clear()
    library.download(model, again=True)
    assert not [name for name in hub.sent if name.startswith("transformer/") and is_lfs(name)]
    assert locate(model.id, CATALOG, library.models).variant == "imported-BF16"
    library.remove(model, "imported-BF16")
    with pytest.raises(ModelMissing, match="only text_encoder, vae is here"):
        locate(model.id, CATALOG, library.models)
    hub.sent.clear()
    library.download(model)
    fetched = {name.split("/")[0] for name in hub.sent if is_lfs(name)}
    assert fetched == {"transformer"}, "the rest had stayed"
    assert path.is_file()


@pytest.mark.parametrize("lost", ["proj_out.weight", "transformer_blocks.1.attn.to_k.weight", ""])
def test_half_a_transformer_is_refused(
    hub: LocalHub, repos: Path, tmp_path: Path, model: Model, lost: str
) -> None:
    """A tensor, a block in the middle, or all blocks are missing."""
    tensors = fused(published(repos, model))
    lost = lost or "transformer_blocks."
    kept = {name: tensor for name, tensor in tensors.items() if lost not in name}
    assert len(kept) < len(tensors)
    library = library_of(hub, tmp_path / "models")
    path = write(tmp_path / "x.safetensors", kept)
    with pytest.raises(ModelBroken, match="not a whole transformer") as caught:
        library.import_file(path, model)
    assert lost in caught.value.message
    assert not library.folder(model).exists()


def test_what_an_imported_file_still_needs_is_said(
    hub: LocalHub, repos: Path, tmp_path: Path, model: Model
) -> None:
    library = library_of(hub, tmp_path / "models")
    library.import_file(write(tmp_path / "x.safetensors", plain(published(repos, model))), model)
    missing = {fault.path for fault in library.verify(model)}
    assert missing == set(model.components) - {"transformer"}
    assert {fault.path for fault in library.verify(model, full=True)} == missing
    with pytest.raises(ModelMissing, match="is missing") as caught:
        library.repair(model)
    assert f"qit models download {model.id}" in caught.value.hint
    library.download(model, accept_licence=True)
    assert library.verify(model) == ()


def test_importing_again_replaces(hub: LocalHub, repos: Path, tmp_path: Path, model: Model) -> None:
    library = library_of(hub, tmp_path / "models")
    tensors = published(repos, model)
    first = library.import_file(write(tmp_path / "a.safetensors", prefixed(tensors)), model)
    second = library.import_file(write(tmp_path / "b.safetensors", plain(tensors)), model)
    assert not first.exists()
    assert [path.name for path in second.parent.iterdir()] == ["b.safetensors"]


@pytest.mark.parametrize("name", ["a.sft", "A.SAFETENSORS", "0123abcd"])
def test_a_file_of_any_name_is_imported(
    hub: LocalHub, repos: Path, tmp_path: Path, model: Model, name: str
) -> None:
    library = library_of(hub, tmp_path / "models")
    kept = library.import_file(write(tmp_path / name, plain(published(repos, model))), model)
    assert kept.name == f"{name}.safetensors"
    library.download(model, accept_licence=True)
    assert locate(model.id, CATALOG, library.models).variant == "imported-BF16"
    kept.unlink()
    assert [fault.kind for fault in library.verify(model)] == ["missing"]


def test_importing_what_was_imported_keeps_it(
    hub: LocalHub, repos: Path, tmp_path: Path, model: Model
) -> None:
    library = library_of(hub, tmp_path / "models")
    path = write(tmp_path / "a.safetensors", plain(published(repos, model)))
    kept = library.import_file(path, model)
    data = path.read_bytes()
    path.unlink()
    assert library.import_file(kept, model) == kept
    assert kept.read_bytes() == data


def test_an_import_that_is_stopped_changes_nothing(
    hub: LocalHub, repos: Path, tmp_path: Path, model: Model
) -> None:
    library = library_of(hub, tmp_path / "models")
    hub.faults = [Fault("404", 99, where="cdn", match="transformer/diffusion_pytorch_model-00001")]
    with pytest.raises(DownloadFailed):
        library.download(model, accept_licence=True)
    before = sorted(library.folder(model).glob("transformer/*"))
    path = write(tmp_path / "a.safetensors", plain(published(repos, model)))
    with pytest.raises(Cancelled, match="Nothing was changed"):
        library.import_file(path, model, is_cancelled=lambda: True)
    assert sorted(library.folder(model).glob("transformer/*")) == before
    library.import_file(path, model)
    assert not list(library.folder(model).glob("transformer/*"))


def test_a_second_file_beside_an_import_is_not_read(
    hub: LocalHub, repos: Path, tmp_path: Path, model: Model
) -> None:
    library = library_of(hub, tmp_path / "models")
    path = write(tmp_path / "a.safetensors", plain(published(repos, model)))
    kept = library.import_file(path, model)
    library.download(model, accept_licence=True)
    shutil.copy(path, kept.with_name("b.safetensors"))
    with pytest.raises(ModelBroken, match="move it away"):
        locate(model.id, CATALOG, library.models)


def test_a_file_found_in_another_program_is_linked_and_runs(
    hub: LocalHub, repos: Path, tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ComfyUI's own bf16 file: its hash is the hub's, so no byte of it is fetched."""
    monkeypatch.setattr("qwen_image_tool.store.places.SMALLEST", 1)
    comfy = tmp_path / "ComfyUI" / "models"
    path = write(comfy / "diffusion_models" / "x.safetensors", fused(published(repos, model)))
    variant = model.variant("comfy-bf16")
    assert variant
    hub.repos[variant.repo] = {variant.file: path.read_bytes()}
    library = library_of(hub, tmp_path / "models", Elsewhere(None, (comfy,)))
    library.download(model, "comfy-bf16", accept_licence=True)
    assert variant.file not in weights_sent(hub)
    found = locate(model.id, CATALOG, library.models)
    assert found.variant == "comfy-bf16"
    whole = inspect(repos / model.id, model)
    assert torch.equal(latents(found, monkeypatch), latents(whole, monkeypatch))


def test_a_lost_import_is_said(hub: LocalHub, repos: Path, tmp_path: Path, model: Model) -> None:
    path = write(tmp_path / "x.safetensors", plain(published(repos, model)))
    library = library_of(hub, tmp_path / "models")
    kept = library.import_file(path, model)
    library.download(model, accept_licence=True)
    kept.unlink()
    library.repair(model)  # from where it was imported
    assert kept.read_bytes() == path.read_bytes()
    path.unlink()
    kept.write_bytes(b"<html>")
    with pytest.raises(DownloadFailed, match="Import it again"):
        library.repair(model)


# -- text encoders, and where nothing can be linked ---------------------------------------------


def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, where the models are on another drive than ComfyUI."""

    def refuse(*_: object) -> None:
        raise OSError("not here")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "symlink", refuse)


def comfy_files(repos: Path, model: Model, folder: Path) -> tuple[Path, Path]:
    """A transformer and a text encoder as ComfyUI has them."""
    transformer = write(folder / "unet" / "a.safetensors", fused(published(repos, model)))
    tensors = published(repos, model, "text_encoder")
    return transformer, write(folder / "text_encoders" / "b.safetensors", tensors)


@pytest.mark.parametrize("linked", [True, False], ids=["linked", "by a note"])
def test_nothing_large_is_fetched_beside_files_of_comfyui(
    hub: LocalHub,
    repos: Path,
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    linked: bool,
) -> None:
    """They are used where they lie, and give the bits of the published ones."""
    files = comfy_files(repos, model, tmp_path / "ComfyUI")
    if not linked:
        no_links(monkeypatch)
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    library = library_of(hub, tmp_path / "models")
    for path in files:
        target = library.import_file(path, model)
        assert target.exists() == linked
    library.download(model, accept_licence=True)
    assert {name.split("/")[0] for name in weights_sent(hub)} == {"vae"}
    assert library.to_fetch(model) == 0
    assert library.verify(model, full=True) == ()
    found = locate(model.id, CATALOG, library.models)
    whole = inspect(repos / model.id, model)
    assert torch.equal(latents(found, monkeypatch), latents(whole, monkeypatch))
    own = {path.parent.name for path in library.folder(model).rglob("*.safetensors")}
    assert linked or own == {"vae"}, "there is no second copy"
    library.remove(model)
    assert before == [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]


def test_a_file_that_the_other_program_deleted_is_named(
    hub: LocalHub, repos: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_links(monkeypatch)
    transformer, encoder = comfy_files(repos, model, tmp_path / "ComfyUI")
    library = library_of(hub, tmp_path / "models")
    library.import_file(transformer, model)
    library.import_file(encoder, model)
    library.download(model, accept_licence=True)
    encoder.rename(tmp_path / "moved.safetensors")
    [fault] = library.verify(model)
    assert fault.kind == "missing"
    assert str(encoder) in fault.message
    with pytest.raises(ModelBroken, match="is missing"):
        locate(model.id, CATALOG, library.models)
    with pytest.raises(DownloadFailed, match="was imported from") as caught:
        library.repair(model)
    assert "--variant imported-text_encoder" in caught.value.hint
    library.remove(model, "imported-text_encoder")
    library.download(model)
    assert any(name.startswith("text_encoder/") for name in weights_sent(hub))
    assert not any(name.startswith("transformer/") for name in weights_sent(hub))
    assert locate(model.id, CATALOG, library.models).variant == "imported-BF16"
    transformer.write_bytes(transformer.read_bytes()[:-9])
    [fault] = library.verify(model)
    assert (fault.kind, str(transformer) in fault.message) == ("truncated", True)


def test_known_prompts_are_those_of_the_file_that_is_there(
    hub: LocalHub, repos: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another text encoder under the same foreign name is another one."""
    no_links(monkeypatch)
    _, encoder = comfy_files(repos, model, tmp_path / "ComfyUI")
    target = library_of(hub, tmp_path / "models").import_file(encoder, model)
    before = checkpoint_identity(target.parent)
    os.utime(encoder, ns=(1, 1))
    assert checkpoint_identity(target.parent) != before


def test_a_published_text_encoder_is_not_replaced(
    hub: LocalHub, repos: Path, model: Model, tmp_path: Path
) -> None:
    _, encoder = comfy_files(repos, model, tmp_path / "ComfyUI")
    library = library_of(hub, tmp_path / "models")
    library.download(model, accept_licence=True)
    with pytest.raises(BadRequest, match="is here already"):
        library.import_file(encoder, model)
    assert library.verify(model, full=True) == ()


@pytest.mark.parametrize("lost", ["norm.weight", "layers.0.mlp.up_proj.weight", "layers."])
def test_half_a_text_encoder_is_refused(
    hub: LocalHub, repos: Path, model: Model, tmp_path: Path, lost: str
) -> None:
    tensors = published(repos, model, "text_encoder")
    gone = [name for name in tensors if name.removeprefix("model.language_model.") == lost]
    gone = gone or [name for name in tensors if name.removeprefix("model.") == lost]
    gone = gone or [name for name in tensors if lost in name and ".layernorm" not in name]
    kept = {name: tensor for name, tensor in tensors.items() if name not in gone}
    if model is BASE21:  # what tells the families apart
        kept |= {name: tensors[name] for name in tensors if "layers.0.self_attn.q_norm" in name}
    path = write(tmp_path / "x.safetensors", kept)
    with pytest.raises(ModelBroken, match="not a whole text encoder"):
        library_of(hub, tmp_path / "models").import_file(path, model)


def test_what_other_programs_have_is_pointed_out(
    hub: LocalHub, repos: Path, model: Model, tmp_path: Path
) -> None:
    """Its hash is not known, so it is for the user to say whether it is the model's."""
    transformer, encoder = comfy_files(repos, model, tmp_path / "ComfyUI")
    write(tmp_path / "ComfyUI" / "vae" / "v.safetensors", published(repos, model, "vae"))
    library = library_of(hub, tmp_path / "models", Elsewhere(None, (tmp_path / "ComfyUI",)))
    assert {found.path for found in library.usable(model)} == {transformer, encoder}
    events: list[Event] = []
    library.download(model, emit=events.append, accept_licence=True)
    said = "".join(event.text for event in events if isinstance(event, Notice))
    for path in (transformer, encoder):
        assert f'`qit models import "{path}" --as {model.id}`' in said


def test_a_download_that_was_stopped_goes_on_around_an_import(
    hub: LocalHub, repos: Path, model: Model, tmp_path: Path
) -> None:
    """As the notice says: stop it, import, and go on."""
    library = library_of(hub, tmp_path / "models")
    hub.faults = [Fault("404", 99, where="cdn")]
    with pytest.raises(DownloadFailed):
        library.download(model, accept_licence=True)
    hub.faults.clear()
    hub.sent.clear()
    for path in comfy_files(repos, model, tmp_path / "ComfyUI"):
        library.import_file(path, model)
    library.download(model)
    assert {name.split("/")[0] for name in weights_sent(hub)} == {"vae"}
    assert library.verify(model, full=True) == ()
    assert locate(model.id, CATALOG, library.models).variant == "imported-BF16"
    assert library.variants(model) == ("imported-BF16", "imported-text_encoder")


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="mounting takes root on Linux"
)
def test_files_on_another_volume_are_not_copied(
    hub: LocalHub, repos: Path, tmp_path: Path, model: Model
) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(volume)], check=True)
    try:
        transformer, _ = comfy_files(repos, model, volume)
        target = library_of(hub, tmp_path / "models").import_file(transformer, model)
        assert target.is_symlink()
        assert target.resolve() == transformer
    finally:
        subprocess.run(["umount", str(volume)], check=True)


def test_what_can_not_run_is_refused(hub: LocalHub, repos: Path, tmp_path: Path) -> None:
    formats_known = {32: T2I.family} | formats.WIDTHS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "WIDTHS", formats_known)
        library = library_of(hub, tmp_path / "models")
        tensors = published(repos, T2I)
        path = write(tmp_path / "x.safetensors", tensors, torch.float8_e4m3fn)
        library.import_file(path, T2I)
        with pytest.raises(ModelMissing, match="only imported-F8_E4M3 is here"):
            locate(T2I.id, CATALOG, library.models)
        library.download(T2I, "imported-F8_E4M3")
        with pytest.raises(ModelUnsupported, match="F8_E4M3, and this version runs bf16"):
            locate(T2I.id, CATALOG, library.models)
        library.download(T2I)
        assert locate(T2I.id, CATALOG, library.models).variant == "bf16"
        with pytest.raises(BadRequest, match="no variant"):
            library.download(T2I, "imported-F16")


def test_from_the_command_line(
    hub: LocalHub,
    repos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(formats.WIDTHS, 32, T2I.family)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("QIT_LOCAL_HUB", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    path = write(tmp_path / "x.safetensors", prefixed(published(repos, T2I)))
    assert run(["models", "import", str(path), "--as", "qwen-image"]) == 0
    assert "qit models download qwen-image" in capsys.readouterr().err
    assert run(["models", "download", "qwen-image"]) == 0
    command = ["generate", "a cat", "--model", "qwen-image", "--size", "64x64", "--steps", "2"]
    assert run([*command, "--out", str(tmp_path / "pictures")]) == 0, capsys.readouterr().err
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1
    logs.tear_down()
