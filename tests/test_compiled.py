"""Compiled blocks: one graph for every block, slot, step, prompt and size; none where it fails."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import tiny
from qwen_image_tool.engine import attention, compiled, families
from qwen_image_tool.engine.weights import Reader
from qwen_image_tool.types import Placement

STEPS, BLOCKS = 3, 4
RESIDENT = Placement(blocks=BLOCKS, resident=BLOCKS)
STREAMED = Placement(blocks=BLOCKS, resident=1, slots=2, source="disk")
SLOTS = Placement(blocks=BLOCKS, resident=0, slots=3, source="disk")
# Grid of tokens, tokens of each prompt, pictures
SHAPES = [((4, 6), (31, 9), 1), ((4, 6), (12, 40), 2), ((6, 6), (20, 7), 1), ((2, 4), (5,), 3)]


@pytest.fixture(scope="module", params=["qwen-image", "qwen-image-2.1"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A family and the folder of a tiny transformer of it."""
    folder = tmp_path_factory.mktemp("model")
    if request.param == "qwen-image":
        tiny.pipeline(layers=BLOCKS).transformer.to(torch.bfloat16).save_pretrained(folder)
    else:
        folder = tiny.save_21(folder, layers=BLOCKS) / "transformer"
    return families.family(request.param), folder


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A compiler that knows nothing yet; its cache goes where the test says, and back."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


class Model:
    """A placed transformer in bfloat16 on the CPU."""

    def __init__(self, model: Any, placement: Placement = RESIDENT) -> None:
        self.family, folder = model
        self.reader = Reader(lambda: False)
        with torch.inference_mode():
            self.transformer = self.family.Transformer(
                folder, placement, torch.device("cpu"), torch.bfloat16, self.reader
            )

    def compile(self, cache: Path, on_failure: Any, backend: str = "aot_eager") -> None:
        compiled.compile_blocks(
            self.transformer.blocks, self.family.lengths, cache, on_failure, backend
        )

    @torch.inference_mode()
    def rehearse(self, shape: Any) -> None:
        forward, latents, conditions = self.prepare(shape)
        forward.rehearse(latents, conditions)

    def prepare(self, shape: Any) -> tuple[Any, torch.Tensor, list[Any]]:
        grid, lengths, pictures = shape
        draw = torch.Generator().manual_seed(0)
        timesteps = torch.tensor([1000.0, 700.0, 300.0])
        forward = self.family.Forward(self.transformer, timesteps, grid, self.reader)
        prompts = [torch.randn(1, n, 32, generator=draw).bfloat16() for n in lengths]
        conditions = [forward.condition(prompt) for prompt in prompts]
        latents = torch.randn(pictures, grid[0] * grid[1], 64, generator=draw).bfloat16()
        return forward, latents, conditions

    @torch.inference_mode()
    def run(self, shape: Any) -> torch.Tensor:
        """The predicted velocities of all steps."""
        forward, latents, conditions = self.prepare(shape)
        steps = [forward(latents, step, conditions) for step in range(STEPS)]
        return torch.cat([velocity for step in steps for each in step for velocity in each], 1)


def fails(text: str) -> None:
    raise AssertionError(text)


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("placement", [RESIDENT, STREAMED], ids=["resident", "streamed"])
def test_one_graph_serves_all(model: Any, placement: Placement, tmp_path: Path) -> None:
    eager, fast = Model(model, placement), Model(model, placement)
    before = eager.run(SHAPES[0])
    fast.compile(tmp_path, fails)
    for shape in SHAPES:
        error = fast.run(shape).float() - eager.run(shape).float()
        assert error.norm() < 0.01 * eager.run(shape).float().norm()
        assert graphs() == 1
    assert torch.equal(eager.run(SHAPES[0]), before), "what is not compiled keeps its bits"
    eager.transformer.close()
    fast.transformer.close()


@pytest.mark.parametrize("backend", ["_native_math", "_native_flash"])
def test_attention_by_another_backend_is_in_the_graph(
    model: Any, backend: str, tmp_path: Path
) -> None:
    said: list[str] = []
    eager, fast = Model(model), Model(model)
    expected = eager.run(SHAPES[0]).float()
    attention.use(fast.transformer.blocks, backend)
    fast.compile(tmp_path, said.append, "eager")
    error = (fast.run(SHAPES[0]).float() - expected).norm() / expected.norm()
    assert error < 0.02
    assert graphs() == 1
    assert not said


@pytest.mark.parametrize("placement", [RESIDENT, STREAMED, SLOTS], ids=["all", "some", "none"])
def test_a_rehearsal_leaves_nothing_to_compile(
    model: Any, placement: Placement, tmp_path: Path
) -> None:
    eager, fast = Model(model, placement), Model(model, placement)
    fast.compile(tmp_path, fails, "eager")
    fast.rehearse(SHAPES[0])
    assert graphs() == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(fast.run(SHAPES[1]), eager.run(SHAPES[1]))
    for each in (eager, fast):
        each.transformer.close()


def test_a_second_model_of_a_family_finds_the_graph(model: Any, tmp_path: Path) -> None:
    first, second = Model(model), Model(model, STREAMED)
    for each in (first, second):
        each.compile(tmp_path, fails)
        each.run(SHAPES[0])
    assert graphs() == 1
    second.transformer.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, at its import
def test_a_real_compiler_is_within_rounding_and_remembers(model: Any, tmp_path: Path) -> None:
    said: list[str] = []
    eager, fast = Model(model), Model(model)
    fast.compile(tmp_path, said.append, "inductor")
    expected = eager.run(SHAPES[0]).float()
    error = (fast.run(SHAPES[0]).float() - expected).norm() / expected.norm()
    assert error < 0.02
    if said:  # no C++ compiler on this machine
        return
    assert error > 0
    assert counters["aot_autograd"]["autograd_cache_saved"] == 1
    assert any(tmp_path.rglob("*"))
    torch.compiler.reset()  # now it knows what another process would
    fast.run(SHAPES[0])
    assert counters["aot_autograd"]["autograd_cache_hit"] == 1


def test_what_fails_at_once_runs_as_it_is(model: Any, tmp_path: Path) -> None:
    said: list[str] = []
    eager, fast = Model(model), Model(model)
    fast.compile(tmp_path, said.append, "no_such_compiler")
    assert torch.equal(fast.run(SHAPES[0]), eager.run(SHAPES[0]))
    assert len(said) == 1
    assert "uncompiled" in said[0]


def test_what_fails_later_runs_as_it_is(model: Any, tmp_path: Path) -> None:
    said: list[str] = []
    calls = 0

    def compiler(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 5:
                raise RuntimeError("Triton Error: no more shared memory\nat line 7")
            return graph.forward(*args)

        return run

    eager, fast = Model(model), Model(model)
    fast.compile(tmp_path, said.append, compiler)  # type: ignore[arg-type]
    assert torch.equal(fast.run(SHAPES[0]), eager.run(SHAPES[0]))
    assert [text for text in said if text.endswith("Triton Error: no more shared memory")] == said
    assert len(said) == 1


def test_running_out_of_memory_is_no_failure_of_the_compiler(model: Any, tmp_path: Path) -> None:
    def compiler(_graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        def run(*_: Any) -> Any:
            raise torch.OutOfMemoryError("out of memory")

        return run

    fast = Model(model)
    fast.compile(tmp_path, fails, compiler)  # type: ignore[arg-type]
    with pytest.raises(torch.OutOfMemoryError):
        fast.run(SHAPES[0])
