"""A thread for convolutions."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

Result = TypeVar("Result")


class FreshThread:
    """Runs work in a thread in which no memory of the GPU ran out before this was made: in the
    caller's own, unless it did so in this process.

    A convolution that gets no memory to work in is done by another kernel, which is slower and adds
    in another order. torch keeps that choice, by the thread and the shape, also for when there is
    memory again. Source: aten/src/ATen/native/cudnn/Conv_v8.cpp.
    """

    def __init__(self, device: torch.device) -> None:
        own = not times_ran_out(device)
        self._thread = None if own else ThreadPoolExecutor(1, "decoding")

    def run(self, work: Callable[[], Result]) -> Result:
        """What `work` returns or raises, in inference mode."""
        work = torch.inference_mode()(work)
        if self._thread is None:
            return work()
        future = self._thread.submit(work)
        while not future.done():
            wait([future], timeout=0.2)  # Windows hears Ctrl-C only between two waits
        return future.result()

    def close(self) -> None:
        if self._thread:
            self._thread.shutdown()


def times_ran_out(device: torch.device) -> int:
    """How often this process got no memory of the GPU, kernels' own tries with it; torch counts
    from the GPU's first use on."""
    return torch.cuda.memory_stats(device).get("num_ooms", 0) if device.type == "cuda" else 0
