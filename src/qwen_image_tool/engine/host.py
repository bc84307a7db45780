"""Host memory for weights: as large as asked for, page-locked where a GPU copies from it."""

import contextlib
import logging
import mmap

import torch

log = logging.getLogger(__name__)


class HostMemory:
    """`size` bytes, uint8, in pages that the system gives as they are written and takes back when
    the tensor goes. torch's own page-locked memory is rounded up to a power of two and kept for
    good."""

    def __init__(self, size: int) -> None:
        self.tensor = _pages(size)
        self.locked = False

    def lock(self) -> None:
        """Lock the pages, so that CUDA copies from them without a detour; quick once they are
        written. Where the system refuses, they stay as they are."""
        code = torch.cuda.cudart().cudaHostRegister(self.tensor.data_ptr(), self.tensor.nbytes, 0)
        self.locked = int(code) == 0
        if not self.locked:
            log.info("The system does not lock %d bytes: CUDA error %d", len(self.tensor), code)
            take_error()

    def close(self) -> None:
        """Unlock the pages."""
        if self.locked:
            torch.cuda.cudart().cudaHostUnregister(self.tensor.data_ptr())
            self.locked = False


def take_error() -> None:
    """CUDA keeps the error of a refused call for the thread's next kernel: this one takes it."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")


def _pages(size: int) -> torch.Tensor:
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # fewer pages to fetch and to lock
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
