"""The real worker over torch and a system that fail as the prompt says: what they raise or say on
such a machine is raised and said at the place where they would."""

import warnings
from typing import Any
from unittest import mock

import psutil

from qwen_image_tool import worker
from qwen_image_tool.messages import Run

MIB = 1 << 20
OLD_DRIVER = (
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040)."
    " Please update your GPU driver by downloading and installing a new version"
)
NO_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.78 GiB of"
    " which 1.02 GiB is free."
)
NO_ACCESS = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be"


def faults(words: str) -> list[Any]:
    """Patches of torch and of the system, for one run."""
    import torch

    def attention(*_: object, **__: object) -> None:
        if "out of memory" in words:
            raise torch.OutOfMemoryError(NO_MEMORY)
        raise torch.AcceleratorError(NO_ACCESS)

    def no_gpu() -> bool:
        """As torch: a warning, and no GPU."""
        warnings.warn(OLD_DRIVER, stacklevel=1)
        return False

    found: list[Any] = []
    if "attention" in words:
        found += [mock.patch("torch.nn.functional.scaled_dot_product_attention", attention)]
    if "old driver" in words:
        found += [
            mock.patch("torch.version.cuda", "13.0"),
            mock.patch("torch.cuda.is_available", no_gpu),
        ]
    if "CPU build" in words:
        found += [mock.patch("torch.version.cuda", None), mock.patch("torch.version.hip", None)]
    if "little RAM" in words:
        ram = psutil.virtual_memory()._replace(available=300 * MIB)
        found += [mock.patch("psutil.virtual_memory", return_value=ram)]
    return found


class FaultyWorker(worker.Worker):
    def run(self, run: Run) -> None:
        patches = faults(run.request.prompt)
        for patch in patches:
            patch.start()
        try:
            super().run(run)
        finally:
            for patch in patches:
                patch.stop()


if __name__ == "__main__":
    worker.Worker = FaultyWorker  # type: ignore[misc]
    worker.main()
