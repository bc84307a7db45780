"""The engine as a whole, on a tiny model: what is said on the way, cancelling, the next plan."""

import functools
import gc
import mmap
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses import FakeTensor
from torch.nn import functional

import tiny
from async_gpu import Cudart
from qwen_image_tool.app import App
from qwen_image_tool.catalog import load_catalog
from qwen_image_tool.engine import (
    attention,
    compiled,
    families,
    fresh,
    host,
    placed,
    text,
    vae,
    weights,
)
from qwen_image_tool.engine import denoise as denoising
from qwen_image_tool.engine import engine as engines
from qwen_image_tool.engine.engine import Engine, Run, limit_memory
from qwen_image_tool.engine.weights import Checkpoint, Reader
from qwen_image_tool.errors import (
    BrokenPicture,
    Cancelled,
    ModelMissing,
    ModelUnsupported,
    OutOfMemory,
)
from qwen_image_tool.files import DiskMeter
from qwen_image_tool.settings import Settings
from qwen_image_tool.store import locate
from qwen_image_tool.types import (
    Event,
    Loading,
    Notice,
    PhaseNeed,
    PhaseStarted,
    Placement,
    Plan,
    Request,
    Size,
    Stepped,
)
from running import own_threads, wait

SIZE = Size(64, 48)
REQUEST = Request(
    model="tiny", prompt="a cat", negative_prompt=" ", cfg=3.0, size=SIZE, steps=3, seed=5, images=2
)
FROM_DISK = Placement(blocks=6, resident=2, slots=2, source="disk")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / "tiny", layers=6)


def plan(placement: Placement = FROM_DISK, **fields: Any) -> Plan:
    return Plan(
        device="cpu",
        dtype="float32",
        working_size=SIZE,
        forwards=1,
        placement=placement,
        text_placement=Placement(blocks=2, resident=1, slots=1, source="disk"),
        phases=(PhaseNeed(phase="load", ram_bytes=1),),
        disk_bytes=1,
        reasons=("Another way.",),
        **fields,
    )


def draw(engine: Engine, plans: list[Plan], events: list[Event], after: int = 10**9) -> Run:
    """`after`: how often the run may ask before it is cancelled."""
    asked = iter(range(10**9))
    return engine.run(REQUEST, plans, events.append, lambda: next(asked) >= after)


def live() -> int:
    """Bytes of all tensors."""
    gc.collect()
    everything = gc.get_objects()
    kinds = {kind for kind in set(map(type, everything)) if issubclass(kind, torch.Tensor)}
    kinds.discard(FakeTensor)
    tensors = [each for each in everything if type(each) in kinds and not each.is_meta]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors}
    return sum(each.nbytes() for each in storages.values())


def left(others: set[threading.Thread]) -> int:
    """Bytes of all tensors, once no thread of ours is there but `others`: each holds some until it
    ends."""
    gc.collect()
    wait(lambda: own_threads() <= others)
    return live()


def test_phases_and_steps_are_told_in_order(folder: Path, tmp_path: Path) -> None:
    engine = Engine(locate(str(folder), load_catalog(), Path()), tmp_path)
    for _known in (False, True):
        events: list[Event] = []
        run = draw(engine, [plan()], events)
        phases = [event.phase for event in events if isinstance(event, PhaseStarted)]
        assert phases == ["load", "encode", "load", "denoise", "decode"]
        assert [e.step for e in events if isinstance(e, Stepped)] == [1, 2, 3]
        assert set(run.seconds) == {"load", "encode", "denoise", "decode"}
    engine.release()


def test_new_prompts_are_read_in_whole_tiles_where_cudnn_makes_a_plan_for_each_length(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an H100; on another device as they are. The embeddings are the same."""
    plain, lengths = functional.scaled_dot_product_attention, set()

    def attend(queries: torch.Tensor, *others: Any, **how: Any) -> torch.Tensor:
        if how.get("is_causal"):
            lengths.add(queries.shape[2])
        return plain(queries, *others, **how)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", attend)
    assert attention.for_prompts(torch.device("cpu")) == "sdpa"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    assert attention.for_prompts(torch.device("cuda")) == "sdpa"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    tiles = attention.for_prompts(torch.device("cuda"))

    def embed() -> list[torch.Tensor]:
        lengths.clear()
        model = families.family("qwen-image")
        encoder = text.TextEncoder(
            model.TEXT_MODEL,
            model.TEXT_NORMED,
            folder / "text_encoder",
            Placement(blocks=2, resident=2),
            torch.device("cpu"),
            torch.float32,
            Reader(),
        )
        with torch.inference_mode():
            return encoder.encode([list(range(37)), list(range(3, 150))], Reader())

    as_they_are = embed()
    assert lengths == {37, 147}
    monkeypatch.setattr(attention, "for_prompts", lambda _: tiles)
    in_tiles = embed()
    assert lengths == {128, 256}
    for one, other in zip(in_tiles, as_they_are, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_words_in_whole_numbers_are_no_words(folder: Path, tmp_path: Path) -> None:
    """The rows of the table are read by themselves."""
    where = Path(shutil.copytree(folder / "text_encoder", tmp_path / "text_encoder"))
    [path] = where.glob("*.safetensors")
    tensors = load_file(path)
    [words] = (name for name in tensors if name.endswith("embed_tokens.weight"))
    save_file(tensors | {words: tensors[words].to(torch.int8)}, path)
    model, placement = families.family("qwen-image"), Placement(blocks=2, resident=2)
    device, reader = torch.device("cpu"), Reader()
    with pytest.raises(ModelUnsupported, match=f"{words} is in I8, and this version runs bf16"):
        text.TextEncoder(model.TEXT_MODEL, True, where, placement, device, torch.float32, reader)


def test_the_transformer_is_read_while_the_prompts_are(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is read is told in bytes."""
    engine = Engine(locate(str(folder), load_catalog(), Path()), tmp_path)
    encode, read = text.TextEncoder.encode, Reader.__call__
    encoded, told = threading.Event(), threading.Event()

    def encoding(*given: Any) -> Any:
        assert engine._parts
        assert not engine._parts.transformer.loading.done()
        encoded.set()
        return encode(*given)

    def reading(reader: Reader, pairs: Any, *rest: Any) -> None:
        """Of the transformer's blocks not before the prompts, and what is left was told."""
        pairs = list(pairs)
        if "transformer_blocks" in pairs[0][0].name:
            assert encoded.wait(60)
            assert told.wait(60)
        read(reader, pairs, *rest)

    def emit(event: Event) -> None:
        events.append(event)
        if isinstance(event, Loading):
            told.set()

    monkeypatch.setattr(text.TextEncoder, "encode", encoding)
    monkeypatch.setattr(Reader, "__call__", reading)
    events: list[Event] = []
    engine.run(REQUEST, [plan()], emit, lambda: False)
    sizes = [(e.done_bytes, e.total_bytes) for e in events if isinstance(e, Loading)]
    assert sizes
    assert sizes == sorted(sizes)
    assert 0 < sizes[0][0] < sizes[0][1]
    engine.release()


def test_what_could_not_be_loaded_is_loaded_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(locate(str(folder), load_catalog(), Path()))
    read = Reader.__call__

    def reading(reader: Reader, pairs: Any, *rest: Any) -> None:
        pairs = list(pairs)
        if "transformer_blocks" in pairs[0][0].name:
            raise ModelMissing("The disk is away.")
        read(reader, pairs, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Reader, "__call__", reading)
        with pytest.raises(ModelMissing, match="disk is away"):
            draw(engine, [plan()], [])
    assert engine._parts is None, "half a model is not kept"
    assert draw(engine, [plan()], []).images
    engine.release()


def test_cancelling_at_any_time_leaves_the_memory_as_it_was(folder: Path) -> None:
    others = own_threads()
    engine = Engine(locate(str(folder), load_catalog(), Path()))
    draw(engine, [plan()], [])  # after it, what libraries keep for good is there
    engine.release()
    before = left(others)
    after, cancelled = 0, True
    tried = 0
    while cancelled:
        try:
            draw(engine, [plan()], [], after)
        except Cancelled:
            pass  # with the error go the frames that hold tensors
        else:
            cancelled = False
        if engine._parts is not None:  # what was half loaded is given back without that
            engine.release()
        assert left(others) == before, f"after {after} questions"
        after += max(1, after // 2)
        tried += 1
    assert tried > 7


IN_RAM = Placement(blocks=6, resident=2, slots=2, source="pageable")
PARTLY_IN_RAM = Placement(blocks=6, resident=1, slots=2, source="pageable", disk=3)


@pytest.mark.parametrize(
    ("family", "placement"),
    [("qwen-image", FROM_DISK), ("qwen-image-2.1", IN_RAM), ("qwen-image", PARTLY_IN_RAM)],
)
def test_a_run_can_be_cancelled_at_every_stage(
    family: str, placement: Placement, tmp_path: Path
) -> None:
    """After whatever it said last; and the memory is as it was."""
    others = own_threads()
    save = tiny.save if family == "qwen-image" else tiny.save_21
    engine = Engine(locate(str(save(tmp_path, layers=6)), load_catalog(), Path()))
    layers = Placement(blocks=engine.installed.text_layers.count, resident=1, slots=1)
    way = plan(placement).model_copy(
        update={
            "working_size": Size(64, 64),
            "text_placement": layers.model_copy(update={"source": placement.source}),
        }
    )

    def stages(last: int) -> list[str]:
        """Cancelled once it has said `last` things, beside how much is read."""
        said: list[str] = []

        def emit(event: Event) -> None:
            if isinstance(event, PhaseStarted | Stepped):
                said.append(event.phase if isinstance(event, PhaseStarted) else str(event.step))

        engine.run(REQUEST, [way], emit, lambda: len(said) >= last)
        return said

    whole = stages(10**9)  # after it, what libraries keep for good is there
    assert whole == ["load", "encode", "load", "denoise", "1", "2", "3", "decode"]
    engine.release()
    before = left(others)
    for last in range(len(whole) + 1):
        with pytest.raises(Cancelled):
            stages(last)
        engine.release()
        assert left(others) == before, f"after {whole[:last]}"


@pytest.mark.parametrize("part", ["text_encoder", "modulation"])
def test_what_is_walked_once_ends_within_a_block(
    folder: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    walked: list[int] = []
    plain = placed.Blocks.walk

    def walk(*given: Any, **how: Any) -> Any:
        for number, module in plain(*given, **how):
            walked.append(number)
            yield number, module

    monkeypatch.setattr(placed.Blocks, "walk", walk)
    reader, float32 = Reader(lambda: bool(walked)), (torch.device("cpu"), torch.float32)
    model = families.family("qwen-image")

    @torch.inference_mode()
    def read_prompt() -> None:
        where, resident = folder / part, Placement(blocks=2, resident=2)
        kind, normed = model.TEXT_MODEL, model.TEXT_NORMED
        encoder = text.TextEncoder(kind, normed, where, resident, *float32, reader)
        encoder.encode([[1, 2, 3]], reader)

    @torch.inference_mode()
    def make_table() -> None:
        where, resident = folder / "transformer", Placement(blocks=6, resident=6)
        transformer = model.Transformer(where, resident, *float32, reader)
        model.Forward(transformer, torch.tensor([900.0]), (2, 2), reader)

    with pytest.raises(Cancelled):
        (read_prompt if part == "text_encoder" else make_table)()
    assert walked == [0]


def walks_from_disk(folder: Path, part: str, disk: DiskMeter) -> Callable[[Reader], object]:
    """Of what is walked once, a call that reads all of it by a Reader, and nothing else by that."""
    model, bfloat16 = families.family("qwen-image"), (torch.device("cpu"), torch.bfloat16)
    loader = Reader(disk=disk)
    if part == "text_encoder":
        where, streamed = folder / part, Placement(blocks=2, resident=0, slots=1, source="disk")
        kind, normed = model.TEXT_MODEL, model.TEXT_NORMED
        encoder = text.TextEncoder(kind, normed, where, streamed, *bfloat16, loader)
        return lambda reader: encoder.encode([[1, 2, 3]], reader)
    where, resident = folder / "transformer", Placement(blocks=6, resident=6)
    transformer = model.Transformer(where, resident, *bfloat16, loader)
    transformer.loading.result()
    schedules = (torch.tensor([timestep]) for timestep in (900.0, 500.0))
    return lambda reader: model.Forward(transformer, next(schedules), (2, 2), reader)


@pytest.mark.parametrize("part", ["text_encoder", "modulation"])
@torch.inference_mode()
def test_what_is_walked_once_is_counted_and_metered(
    folder: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time that it comes from the disk."""
    pattern = r"\blayers\." if part == "text_encoder" else "_mod"
    where = folder / ("text_encoder" if part == "text_encoder" else "transformer")
    stored = Checkpoint(where).tensors.values()
    size = sum(each.bytes for each in stored if re.search(pattern, each.name))
    monkeypatch.setattr(weights, "is_cached", lambda *_: False)
    walk = walks_from_disk(folder, part, DiskMeter())
    for _ in range(2):
        disk = DiskMeter()
        reader = Reader(disk=disk)
        walk(reader)
        assert reader.done == reader.expected == disk._bytes == size


@pytest.mark.parametrize("part", ["text_encoder", "modulation"])
@torch.inference_mode()
def test_what_is_walked_once_ends_within_a_piece(
    folder: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "PIECE", 500)
    walk = walks_from_disk(folder, part, DiskMeter())
    reader = Reader(lambda: reader.done >= 2000)
    with pytest.raises(Cancelled):
        walk(reader)
    block = reader.expected // (2 if part == "text_encoder" else 6)
    assert 2000 <= reader.done <= 2000 + weights.READERS * weights.PIECE < block


def test_all_that_a_run_reads_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is read, also by what keeps the run waiting; never more than is expected."""

    def slowly(reader: Reader, size: int) -> None:
        time.sleep(0.01)
        counted(reader, size)

    def emit(event: Event) -> None:
        if isinstance(event, PhaseStarted):
            phases.append((event.phase, []))
        elif isinstance(event, Loading):
            phases[-1][1].append((event.done_bytes, event.total_bytes))

    counted = Reader._count
    monkeypatch.setattr(Reader, "_count", slowly)
    monkeypatch.setattr(engines, "READING_SECONDS", 0.002)
    phases: list[tuple[str, list[tuple[int, int]]]] = []
    engine = Engine(locate(str(folder), load_catalog(), Path()))
    way = plan(Placement(blocks=6, resident=6)).model_copy(
        update={"text_placement": Placement(blocks=2, resident=0, slots=1, source="disk")}
    )
    engine.run(REQUEST, [way], emit, lambda: False)
    engine.release()
    assert [phase for phase, sizes in phases if sizes] == ["encode", "load"]
    encoding, loading = (sizes for _, sizes in phases if sizes)
    told = [*encoding, *loading]
    assert all(done <= total for done, total in told)
    assert told == sorted(set(told))
    assert [total for _, total in told] == sorted(total for _, total in told)
    text_encoder, transformer = (
        Checkpoint(folder / name).tensors.values() for name in ("text_encoder", "transformer")
    )
    layers = sum(s.bytes for s in text_encoder if re.search(r"\blayers\.|\bnorm\.", s.name))
    whole = layers + sum(stored.bytes for stored in transformer)
    assert told[-1] == (whole, whole)
    modulation = sum(stored.bytes for stored in transformer if "_mod" in stored.name)
    assert encoding[-1][1] == whole - modulation
    assert len(encoding) > 2
    assert any(whole - modulation < done < whole for done, _ in loading)


@pytest.mark.parametrize(("disk", "refuses"), [(0, 0), (0, 3), (2, 1)])
def test_pages_that_the_system_does_not_lock_are_said(
    folder: Path, disk: int, refuses: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the picture is drawn from them, all the same way."""
    engine = Engine(locate(str(folder), load_catalog(), Path()))
    expected = draw(engine, [plan()], [])
    runtime = Cudart(refuses)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(host, "take_error", lambda: None)
    events: list[Event] = []
    pinned = Placement(blocks=6, resident=2, slots=2, source="pinned", disk=disk)
    run = draw(engine, [plan(pinned)], events)
    [notice] = [event.text for event in events if isinstance(event, Notice)]
    assert notice.startswith(
        f"The system does not page-lock {4 - disk - refuses} of the blocks, so"
    )
    assert all(map(np.array_equal, pixels(run), pixels(expected)))
    assert len(runtime.locked) == refuses
    engine.release()
    assert not runtime.locked


def test_the_picture_is_decoded_in_the_memory_of_the_slots(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next prompt is read there; also where a run was cancelled while it drew."""
    engine = Engine(locate(str(folder), load_catalog(), Path()))
    plain, seen = vae.decode, []

    def slots() -> list[bool]:
        assert engine._parts
        blocks = engine._parts.transformer.blocks
        return [next(block.parameters()).is_meta for block in blocks]

    def decode(*args: Any) -> Any:
        seen.append(slots())
        return plain(*args)

    monkeypatch.setattr(vae, "decode", decode)
    first = draw(engine, [plan()], [])
    assert seen == [[False, False, True, True]] * 2, "two residents, two slots, two pictures"
    steps: list[Event] = []
    with pytest.raises(Cancelled):
        engine.run(
            REQUEST, [plan()], steps.append, lambda: any(isinstance(e, Stepped) for e in steps)
        )
    assert slots() == [False, False, True, True]
    again = draw(engine, [plan()], [])
    assert [i.tobytes() for i in again.images] == [i.tobytes() for i in first.images]
    engine.release()


def test_a_prompt_that_is_not_read_to_its_end_leaves_no_slots(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the model stays loaded, the next run's picture needs their memory."""
    engine = Engine(locate(str(folder), load_catalog(), Path()))
    draw(engine, [plan()], [])
    asked = iter([False])
    monkeypatch.setattr(Reader, "check", lambda _: next(asked))
    other = REQUEST.model_copy(update={"prompt": "a dog"})
    with pytest.raises(StopIteration):
        engine.run(other, [plan()], lambda _: None, lambda: False)
    parts = engine._parts
    assert parts
    assert parts._text_encoder
    layers = parts._text_encoder._layers.modules
    assert [next(layer.parameters()).is_meta for layer in layers] == [False, True]
    wait(lambda: not [each for each in own_threads() if each.name.startswith("ring")])
    engine.release()


def test_what_reads_pixels_is_not_kept(folder: Path) -> None:
    engine = Engine(locate(str(folder), load_catalog(), Path()))
    draw(engine, [plan().model_copy(update={"single_frame": False})], [])
    assert engine._parts
    kept = sum(weight.numel() for weight in engine._parts.vae.parameters())
    assert kept == engine.installed.decoder_parameters
    engine.release()


def decoding(folder: Path, single_frame: bool) -> tuple[Engine, Plan, list[nn.Module]]:
    """An engine that has drawn, by which plan, and its decoder's layers."""
    engine = Engine(locate(str(folder), load_catalog(), Path()))
    way = plan().model_copy(update={"single_frame": single_frame})
    draw(engine, [way], [])
    assert engine._parts
    parts = engine._parts.vae.decoder.modules()
    return engine, way, [each for each in parts if not [*each.children()]]


@pytest.mark.parametrize("single_frame", [True, False], ids=["ours", "diffusers'"])
def test_a_number_of_the_picture_that_is_none_is_found(folder: Path, single_frame: bool) -> None:
    """Where all is plain already another plan would compute the same, so none is tried."""
    engine, way, layers = decoding(folder, single_frame)

    def spoil(_: Any, __: Any, frame: torch.Tensor) -> torch.Tensor:
        frame[..., -1, -1] = torch.nan
        return frame

    hook = layers[-1].register_forward_hook(spoil)
    events: list[Event] = []
    with pytest.raises(BrokenPicture, match="left their range"):
        draw(engine, [way, plan(strips=2)], events)
    assert not [event for event in events if isinstance(event, Notice)]
    hook.remove()
    draw(engine, [way], [])
    engine.release()


@pytest.mark.parametrize("single_frame", [True, False], ids=["ours", "diffusers'"])
def test_a_run_is_cancelled_within_a_layer_of_decoding(folder: Path, single_frame: bool) -> None:
    engine, way, layers = decoding(folder, single_frame)
    begun: list[int] = []
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, number=number: begun.append(number))
    draw(engine, [way], [])
    whole, begun[:] = begun[:], []
    with pytest.raises(Cancelled):
        engine.run(REQUEST, [way], lambda _: None, lambda: len(begun) >= 5)
    assert begun == whole[:5]
    engine.release()


def test_nothing_is_read_for_a_model_that_is_gone_before_it_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(locate(str(folder), load_catalog(), Path()), tmp_path)
    transformer = families.family("qwen-image").Transformer
    began: list[bool] = []

    def gone(component: Path) -> list[str]:
        raise FileNotFoundError(2, "No such file or directory", str(component))

    def begin(*given: Any) -> Any:
        began.append(True)
        monkeypatch.setattr("qwen_image_tool.engine.engine.checkpoint_identity", gone)
        return transformer(*given)

    monkeypatch.setattr(families.family("qwen-image"), "Transformer", begin)
    draw(engine, [plan()], [])
    engine.release()
    with pytest.raises(ModelMissing, match="can't be loaded"):
        draw(engine, [plan()], [])
    assert len(began) == 1
    engine.release()


@pytest.mark.parametrize(
    "component", ["tokenizer", "scheduler", "text_encoder", "transformer", "vae"]
)
def test_a_folder_that_is_gone_is_not_looked_for_at_a_hub(
    folder: Path, tmp_path: Path, component: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative one has the form of a hub's name."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "tiny")
    engine = Engine(locate("tiny", load_catalog(), Path()))
    shutil.rmtree(Path("tiny") / component)
    asked: list[object] = []

    def ask(*where: object, **_: object) -> None:
        asked.append(where)
        raise httpx.ConnectError("There is no network.")

    monkeypatch.setattr(httpx.Client, "send", ask)
    with pytest.raises(ModelMissing, match="can't be loaded"):
        draw(engine, [plan()], [])
    assert not asked
    engine.release()


def test_a_model_whose_files_were_replaced_is_loaded_anew(tmp_path: Path) -> None:
    """Sizes and names are the same; only some of the blocks would be read again."""
    model = tiny.save(tmp_path / "model", layers=6)
    other = tiny.save(tmp_path / "other", seed=1, layers=6)
    settings = Settings(output=tmp_path / "out", cache=tmp_path / "cache")
    request = Request(model=str(model), prompt="x", cfg=1, size=Size(64, 64), steps=2, seed=1)

    def drawn(app: App) -> bytes:
        [image] = app.generate(request, lambda _: None).images
        return Image.open(image.path).tobytes()

    app = App(settings)
    before = drawn(app)
    engine = app._engine
    assert drawn(app) == before
    assert app._engine is engine
    for component in ("transformer", "text_encoder"):
        shutil.rmtree(model / component)
        (other / component).rename(model / component)
    after = drawn(app)
    assert after != before
    assert after == drawn(App(settings))


def test_the_next_plan_follows_when_the_memory_runs_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(locate(str(folder), load_catalog(), Path()))
    expected = draw(engine, [plan()], [])
    plain = denoising.denoise
    held: list[int] = []

    def denoise(forward: Any, latents: torch.Tensor, *rest: Any) -> torch.Tensor:
        held.append(live())
        if len(held) < 3:
            ballast = torch.zeros(5_000_000)
            raise torch.OutOfMemoryError(f"CUDA out of memory.\n{len(ballast)}")
        return plain(forward, latents, *rest)

    monkeypatch.setattr("qwen_image_tool.engine.engine.denoise", denoise)
    events: list[Event] = []
    resident = Placement(blocks=6, resident=6)
    plans = [plan(resident), plan(), plan(Placement(blocks=6, resident=0, slots=3, source="disk"))]
    run = draw(engine, plans, events)
    assert run.plan == plans[2]
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert notices == ["The memory ran out. CUDA out of memory. Trying again: Another way."] * 2
    assert held[0] > held[2], "the failed runs' memory is given back first"
    for ours, theirs in zip(run.images, expected.images, strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    engine.release()


def test_memory_that_runs_out_while_the_libraries_are_imported_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory() -> None:
        raise ImportError("libtorch_cpu.so: failed to map segment from shared object")

    monkeypatch.setattr("qwen_image_tool.engine.probe.torch_facts", no_memory)
    app = App(Settings(output=tmp_path / "out", cache=tmp_path / "cache"))
    with pytest.raises(OutOfMemory, match=r"libtorch_cpu.* Close other programs"):
        app.generate(Request(model=str(folder), prompt="x"), lambda _: None)


def test_where_decoding_ran_out_of_memory_it_goes_on_in_another_thread(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(locate(str(folder), load_catalog(), Path()))
    expected = draw(engine, [plan()], [])
    plain = vae.decode
    threads: list[str] = []
    held: list[int] = []

    def decode(*given: Any) -> Any:
        threads.append(threading.current_thread().name)
        held.append(live())
        if len(threads) < 3:
            ballast = torch.zeros(5_000_000)
            raise torch.OutOfMemoryError(f"CUDA out of memory.\n{len(ballast)}")
        return plain(*given)

    monkeypatch.setattr(vae, "decode", decode)
    monkeypatch.setattr(fresh, "times_ran_out", lambda _: len(threads))
    plans = [plan(), plan(Placement(blocks=6, resident=0, slots=3)), plan()]
    runs = [draw(engine, plans, []), draw(engine, plans[2:], [])]
    own, *others = threads
    assert own == threading.current_thread().name
    assert others == ["decoding_0"] * (1 + 2 * len(expected.images))
    assert max(held) < held[0] + 5_000_000, "the failed runs' memory is given back first"
    for run in runs:
        for ours, theirs in zip(run.images, expected.images, strict=True):
            assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    engine.release()
    assert "decoding_0" not in [thread.name for thread in threading.enumerate()]


NO_MEMORY: dict[str, Callable[[], object]] = {
    "torch": lambda: torch.empty(1 << 50, dtype=torch.uint8),
    "the system": lambda: mmap.mmap(-1, 1 << 50),
    "cuBLAS": lambda: fail("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
    "CUDA": lambda: fail("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
    "Apple": lambda: fail("MPS backend out of memory (MPS allocated: 20 GB, max allowed: 21 GB)."),
    "Intel": lambda: fail("level_zero backend failed (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    "diffusers": lambda: wrapped(ValueError("Unable to load weights from checkpoint file")),
}


def fail(text: str) -> None:
    raise RuntimeError(text)


def wrapped(error: Exception) -> None:
    raise error from MemoryError()


@pytest.mark.parametrize("who", NO_MEMORY)
@pytest.mark.parametrize("when", ["load", "denoise"])
def test_memory_that_runs_out_is_known_in_any_words(
    folder: Path, who: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own class is raised by some of its allocators alone."""
    engine = Engine(locate(str(folder), load_catalog(), Path()))
    place, name = {
        "load": (placed.Blocks, "_device_memory"),
        "denoise": (families.family("qwen-image").Forward, "__call__"),
    }[when]
    plain: Any = getattr(place, name)
    tried: list[int] = []

    def once(*given: Any) -> Any:
        tried.append(1)
        if len(tried) == 1:
            NO_MEMORY[who]()
        return plain(*given)

    monkeypatch.setattr(place, name, once)
    events: list[Event] = []
    need = PhaseNeed(phase="load", ram_bytes=10)
    first = plan(attention="_native_math").model_copy(update={"phases": (need,)})
    run = draw(engine, [first, plan()], events)
    assert run.plan == plan()
    [notice] = [event.text for event in events if isinstance(event, Notice)]
    assert notice.startswith("The memory ran out.")
    engine.release()


def test_the_last_plan_s_failure_is_the_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(locate(str(folder), load_catalog(), Path()))

    def denoise(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("qwen_image_tool.engine.engine.denoise", denoise)
    with pytest.raises(OutOfMemory, match="memory ran out"):
        draw(engine, [plan(), plan(compiled=True)], [])
    engine.release()


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_every_gpu_is_capped_and_gives_its_memory_back(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU that isn't here: what torch's module of its name is told."""
    told: list[Any] = []
    gpu = SimpleNamespace(
        get_device_properties=lambda _: SimpleNamespace(total_memory=16 << 30),
        recommended_max_memory=lambda: 16 << 30,
        set_per_process_memory_fraction=told.append,
        empty_cache=lambda: told.append("emptied"),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda *_: gpu)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for limit in (4 << 30, 0, 20 << 30):
        limit_memory(torch.device(kind), limit)
    assert told == [0.25, 1.0, 1.0]
    Engine(locate(str(folder), load_catalog(), Path())).release()
    assert told.pop() == "emptied"
    limit_memory(torch.device("cpu"), 1 << 30)
    assert len(told) == 3


def pixels(run: Run) -> list[Any]:
    return [np.asarray(image) for image in run.images]


def test_what_is_no_picture_is_answered_by_the_next_plan(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(locate(str(folder), load_catalog(), Path()))
    expected = draw(engine, [plan()], [])
    plain = denoising.denoise
    changes = iter([torch.nan, torch.inf, 1, torch.nan])
    monkeypatch.setattr(
        "qwen_image_tool.engine.engine.denoise", lambda *given: plain(*given) * next(changes)
    )
    events: list[Event] = []
    plans = [plan(compiled=False, attention=name) for name in ("native", "_native_math", "")]
    run = draw(engine, plans, events)
    assert run.plan == plans[2]
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert len(notices) == 2
    assert all("left their range" in text for text in notices)
    assert all(map(np.array_equal, pixels(run), pixels(expected)))
    with pytest.raises(BrokenPicture, match="--mode exact"):
        draw(engine, plans[2:], [])
    engine.release()


def test_a_picture_of_one_colour_is_answered_by_the_next_plan(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In exact mode it is what diffusers gives, and stays."""
    engine = Engine(locate(str(folder), load_catalog(), Path()))
    plain = vae.decode
    tried: list[int] = []

    def decode(*given: Any) -> Image.Image:
        tried.append(1)
        return plain(*given) if len(tried) > 2 else Image.new("RGB", (64, 48))

    monkeypatch.setattr(vae, "decode", decode)
    events: list[Event] = []
    run = draw(engine, [plan(attention="_native_math"), plan(strips=2)], events)
    assert run.plan.strips == 2
    [notice] = [event.text for event in events if isinstance(event, Notice)]
    assert notice.startswith("The picture came out in one single colour. Trying again:")
    tried.clear()
    exact = plan(mode="exact", single_frame=False)
    assert [len(image.getcolors() or ()) for image in draw(engine, [exact], []).images] == [1, 1]
    engine.release()


def test_blocks_that_do_not_compile_draw_uncompiled(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(locate(str(folder), load_catalog(), Path()))
    expected = draw(engine, [plan()], [])
    compile_blocks = functools.partial(compiled.compile_blocks, backend="no such compiler")
    monkeypatch.setattr(compiled, "compile_blocks", compile_blocks)
    events: list[Event] = []
    run = draw(engine, [plan(compiled=True)], events)
    [notice] = [event.text for event in events if isinstance(event, Notice)]
    assert "runs uncompiled" in notice
    assert not run.plan.compiled, "the picture says what it was made by"
    assert run.rates == {"compiler": False}
    assert all(map(np.array_equal, pixels(run), pixels(expected)))
    engine.release()


def test_compiled_blocks_give_their_memory_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = own_threads()
    engine = Engine(locate(str(folder), load_catalog(), Path()))
    expected = draw(engine, [plan()], [])
    engine.release()
    compile_blocks = functools.partial(compiled.compile_blocks, backend="eager")
    monkeypatch.setattr(compiled, "compile_blocks", compile_blocks)
    draw(engine, [plan(compiled=True)], [])  # after it, what the compiler keeps for good is there
    engine.release()
    before = left(others)
    events: list[Event] = []
    run = draw(engine, [plan(compiled=True)], events)
    assert not [event for event in events if isinstance(event, Notice)]
    assert run.rates["compile_seconds"] > 0
    assert all(map(np.array_equal, pixels(run), pixels(expected)))
    engine.release()
    assert left(others) == before


@pytest.mark.parametrize(
    "error",
    [RuntimeError("No available kernel.\nAborting."), TypeError("'NoneType' is not callable")],
    ids=["refused", "its package is gone"],
)
def test_attention_that_fails_is_answered_by_the_next_plan(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    engine = Engine(locate(str(folder), load_catalog(), Path()))
    plain = denoising.denoise
    tried: list[int] = []

    def denoise(*given: Any) -> torch.Tensor:
        tried.append(1)
        if len(tried) == 1:
            raise error
        return plain(*given)

    monkeypatch.setattr("qwen_image_tool.engine.engine.denoise", denoise)
    events: list[Event] = []
    run = draw(engine, [plan(attention="_native_flash"), plan()], events)
    assert not run.plan.attention
    [notice] = [event.text for event in events if isinstance(event, Notice)]
    assert notice.startswith("Attention by _native_flash does not work here. ")
    assert str(error).partition("\n")[0] in notice
    assert run.rates == {"attention_backend": ""}, "it is not taken again"
    engine.release()
