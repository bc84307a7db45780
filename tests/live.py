"""How many bytes of tensors live at a time, counted by watching every operation."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(work: Callable[[], object], known: Iterable[torch.Tensor] = ()) -> int:
    """The most that the tensors made by `work` take together; those of `known` don't count. Works
    on "meta" tensors too, which have sizes only. What one operation takes inside is not seen."""
    live = _Live(known)
    with live:
        work()
    return live.peak


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: int = 0
        self._known = {_reference(tensor).cdata for tensor in known}
        self._living: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        self._living = {k: v for k, v in self._living.items() if not v[0].expired()}
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                reference = _reference(tensor)
                if reference.cdata not in self._known:
                    self._living[reference.cdata] = reference, tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._living.values()))
        return made


def _reference(tensor: torch.Tensor) -> Any:
    make: Any = StorageWeakRef
    return make(tensor.untyped_storage())
