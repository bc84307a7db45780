"""Work goes on in another thread where memory of the GPU ran out before."""

import threading
from contextlib import closing

import pytest
import torch

from qwen_image_tool.engine.fresh import FreshThread, times_ran_out

GPU = torch.device("cuda")


@pytest.fixture(params=[0, 3], ids=["never", "three times"])
def ran_out(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """What a GPU's allocator counts."""
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda _: {"num_ooms": request.param})
    return int(request.param)


def test_a_thread_of_its_own_where_memory_ran_out(ran_out: int) -> None:
    with closing(FreshThread(GPU)) as thread:
        used = thread.run(threading.current_thread)
        assert thread.run(threading.current_thread) is used, "what it learned is kept"
    assert (used is threading.current_thread()) == (not ran_out)
    assert used.is_alive() == (not ran_out), "it ends with what it was made for"


@pytest.mark.usefixtures("ran_out")
def test_it_works_as_the_caller_would() -> None:
    with closing(FreshThread(GPU)) as thread:
        assert thread.run(torch.is_inference_mode_enabled)
        with pytest.raises(ZeroDivisionError):
            thread.run(lambda: 1 // 0)
    assert not torch.is_inference_mode_enabled()


def test_a_gpu_that_is_not_in_use_yet_ran_out_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert times_ran_out(GPU) == 0


@pytest.mark.parametrize("device", ["cpu", "mps", "xpu"])
def test_other_devices_have_no_such_kernels(device: str) -> None:
    assert times_ran_out(torch.device(device)) == 0
