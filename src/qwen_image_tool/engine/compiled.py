"""Blocks through torch.compile: within rounding of what they give without, and faster.

All blocks of a model run through one compiled function. A block's weights and modulation rows are
inputs of the graph, and the axes that count tokens have no fixed length in it: another block, a
slot that was filled anew, another step, prompt or picture size need no other graph. Any failure
costs the speed and nothing else.

Source of the idea: diffusers' ModelMixin.compile_repeated_blocks.
"""

import contextlib
import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from qwen_image_tool.errors import first_line

log = logging.getLogger(__name__)


class Lengths(Protocol):
    """Of the arguments of a block's call: each tensor that has an axis of tokens, and that axis.
    None where such a call is made once a picture and is not worth a graph."""

    def __call__(self, *args: Any, **kwargs: Any) -> Sequence[tuple[torch.Tensor, int]] | None: ...


def compile_blocks(
    blocks: Iterable[nn.Module],
    lengths: Lengths,
    cache: Path | None,
    on_failure: Callable[[str], None],
    backend: str = "inductor",
) -> "Compiled":
    """Let every call of `blocks`, all of one class, go through one compiled function.

    What was compiled is kept in the folder `cache`, so that the next process need not; None leaves
    it where torch puts it. Where compiling does not work, at the first call or later, the blocks
    run as they are from then on and `on_failure` is told why, once.
    """
    if cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)  # Triton's cache is put inside it
    blocks = list(blocks)
    kind = type(blocks[0])
    _turn_in_real_numbers(kind)
    run = Compiled(kind, lengths, on_failure, backend)
    for block in blocks:
        block.forward = functools.partial(run, block)
    return run


class Compiled:
    """The forward of block class `kind`, compiled at its first call. `works`: it has not failed."""

    def __init__(
        self,
        kind: type[nn.Module],
        lengths: Lengths,
        on_failure: Callable[[str], None],
        backend: str,
    ) -> None:
        self._eager, self._backend = kind.forward, backend
        self._lengths, self._on_failure = lengths, on_failure
        self.works = True
        self._fast: Any = None
        self._seconds = 0.0

    @property
    def rates(self) -> dict[str, Any]:
        """What it has shown of the device, by the names in Rates."""
        if not self.works:
            return {"compiler": False}
        return {"compile_seconds": self._seconds} if self._seconds else {}

    def __call__(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.works or self._lengths(*args, **kwargs) is None:
            return self._eager(block, *args, **kwargs)
        try:
            return self._run(block, *_real(args), **{k: _real(v) for k, v in kwargs.items()})
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001  compilers fail in any way
            self._give_up(error)
        return self._eager(block, *args, **kwargs)

    def _run(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for tensor, axis in self._lengths(*args, **kwargs) or ():
            torch._dynamo.maybe_mark_dynamic(tensor, axis)
        if self._fast:
            return self._fast(block, *args, **kwargs)
        started = time.perf_counter()
        # Not before: torch refuses at once where it has no compiler for this Python
        self._fast = torch.compile(self._eager, fullgraph=True, backend=self._backend)
        result = self._fast(block, *args, **kwargs)
        self._seconds = time.perf_counter() - started
        log.info("Blocks compiled in %.1f s.", self._seconds)
        return result

    def _give_up(self, error: Exception) -> None:
        self.works = False
        log.warning("Blocks run uncompiled from here on.", exc_info=error)
        self._on_failure(
            f"Compiling does not work here, so it runs uncompiled: {first_line(error)}"
        )


def rotate(
    x: torch.Tensor,
    freqs_cis: Any,
    use_real: bool = True,
    use_real_unbind_dim: int = -1,  # noqa: ARG001  diffusers' signature
) -> torch.Tensor:
    """diffusers' apply_rotary_emb_qwen in real numbers, for which the compiler makes one kernel.

    `x`: [1, tokens, heads, width]. `freqs_cis`: cosine and sine, [tokens, width / 2, 2].
    """
    if use_real:
        raise NotImplementedError("the blocks turn complex numbers")
    cos, sin = freqs_cis.unsqueeze(1).unbind(-1)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(3).type_as(x)


def _turn_in_real_numbers(kind: type[nn.Module]) -> None:
    """Complex products are no kernels of the compiler's: it would leave each to torch."""
    theirs = getattr(sys.modules[kind.__module__], "apply_rotary_emb_qwen", None)
    if theirs:
        with contextlib.suppress(ValueError):  # it is known from the model before
            torch.compiler.substitute_in_graph(theirs)(rotate)


def _real(value: Any) -> Any:
    """Complex tensors as real ones with one more axis, of two; the memory is the same."""
    if isinstance(value, tuple):
        return tuple(_real(item) for item in value)
    is_complex = isinstance(value, torch.Tensor) and value.is_complex()
    return torch.view_as_real(value) if is_complex else value
