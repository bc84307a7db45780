"""Work goes on in another thread once memory of the GPU ran out."""

import threading
from collections.abc import Iterator

import pytest
import torch

from qwen_image_tool.engine import fresh
from qwen_image_tool.engine.fresh import FreshThread


@pytest.fixture
def thread() -> Iterator[FreshThread]:
    thread = FreshThread(torch.device("cpu"))
    yield thread
    thread.close()


@pytest.fixture
def ran_out(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often, in place of what a GPU's allocator counts."""
    times = [0]
    monkeypatch.setattr(fresh, "times_ran_out", lambda _: times[0])
    return times


def test_another_thread_each_time_memory_ran_out(thread: FreshThread, ran_out: list[int]) -> None:
    where = threading.current_thread
    used = [thread.run(where), thread.run(where)]
    for count in (1, 5):
        ran_out[0] = count
        used += [thread.run(where), thread.run(where)]
    own, again, second, same, third, last = used
    assert own == again == where()
    assert second == same
    assert third == last
    assert len({own, second, third}) == 3
    names = [each.name for each in threading.enumerate()]
    assert len([name for name in names if name.startswith("decoding")]) == 1


@pytest.mark.parametrize("times", [0, 1])
def test_it_is_as_in_the_caller_s(thread: FreshThread, ran_out: list[int], times: int) -> None:
    ran_out[0] = times
    assert thread.run(torch.is_inference_mode_enabled)
    with pytest.raises(ZeroDivisionError):
        thread.run(lambda: 1 // 0)


def test_a_cpu_runs_out_of_nothing() -> None:
    assert fresh.times_ran_out(torch.device("cpu")) == 0
