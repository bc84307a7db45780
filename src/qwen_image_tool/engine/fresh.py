"""A thread for convolutions, and another one once memory ran out."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


class FreshThread:
    """Runs work in a thread in which no memory of the GPU has run out yet: in the caller's own as
    long as that may be.

    A convolution that gets no memory to work in is done by another kernel, which is slower and adds
    in another order. torch keeps that choice, by the thread and the shape, also for when there is
    memory again. Source: aten/src/ATen/native/cudnn/Conv_v8.cpp.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._thread: ThreadPoolExecutor | None = None
        self._seen = 0

    def run(self, work: Callable[[], Result]) -> Result:
        """What `work` returns or raises, in inference mode."""
        found = times_ran_out(self._device)
        if found > self._seen:
            self.close()
            self._thread, self._seen = ThreadPoolExecutor(1, "decoding"), found
        work = torch.inference_mode()(work)
        return self._thread.submit(work).result() if self._thread else work()

    def close(self) -> None:
        if self._thread:
            self._thread.shutdown()


def times_ran_out(device: torch.device) -> int:
    """How often this process got no memory of the GPU, kernels' own tries with it."""
    return int(torch.cuda.memory_stats(device)["num_ooms"]) if device.type == "cuda" else 0
