"""What a device does: products, attention, copies, and whether torch.compile works on it.

A GPU is asked in processes of their own, where a kernel or a compiler that crashes takes nothing
with it: `python -m qwen_image_tool.engine.measure DEVICE` prints its Rates, with `compiler` behind
it, whether it compiles.
"""

import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import nn

from qwen_image_tool.types import Device, Rates

log = logging.getLogger(__name__)

CHILD_SECONDS = 120  # the first import of torch from a hard disk takes a minute
WIDTH, HEADS, HEAD = 3072, 24, 128  # of the 20B family's blocks; 2.1's are a third wider
MIB = 2**20
LEAD = 1.03  # how much faster than torch's choice a backend must be; less is noise


def measure(device: Device, cache: Path) -> Rates:
    """The rates of `device`; zeros for what can't be measured. About 8 s for a GPU, 1 s for a CPU.

    `cache`: folder for what is compiled. The disk is not measured here: loading a model does that.
    """
    if device.kind == "cpu":
        return speeds(torch.device("cpu"))
    children = {"speeds": _child(device, cache)}
    if device.kind != "mps":  # torch calls its compiler for Metal a prototype
        children["compiler"] = _child(device, cache, "compiler")
    said = {name: _answer(child) for name, child in children.items()}
    try:
        rates = Rates.from_json(said["speeds"])
    except ValidationError:
        rates = Rates()
    return rates.model_copy(update={"compiler": said.get("compiler") == "works"})


def speeds(device: torch.device) -> Rates:
    """Products, attention and copies of `device`, in this process."""
    from qwen_image_tool.engine import attention  # with diffusers, which the compiler needs not

    clock = _Clock(device)
    _rate(clock, _wake)
    candidates = attention.CANDIDATES if device.type == "cuda" else ()
    backends = {name: _rate(clock, _attention, name) for name in ("", *candidates)}
    fastest = max(backends, key=lambda name: backends[name])
    chosen = fastest if backends[fastest] > LEAD * backends[""] else ""
    bus = _rate(clock, _bus)
    return Rates(
        matmul=_rate(clock, _matmul),
        attention=backends[chosen],
        memory=_rate(clock, _memory),
        bus=bus,
        pageable=min(bus, _rate(clock, _staging)),
        attention_backend=chosen,
    )


def _rate(clock: "_Clock", measured: Callable[..., float], *given: str) -> float:
    """What `measured` gives; 0 where it fails."""
    try:
        return measured(clock, *given)
    except Exception as error:  # noqa: BLE001  not there, no memory, or a driver in its way
        log.info("%s can't be measured: %s", " ".join((measured.__name__, *given)), error)
        return 0


class _Clock:
    """Times work on `device`, repeated until `seconds` have passed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type != "cpu"
        self.seconds = 0.1

    def __call__(self, work: Callable[[], object]) -> float:
        """Seconds of one `work`, once it has run before."""
        self._time(work, 1)
        times = 1
        while (taken := self._time(work, times)) < self.seconds:
            times = 1 + int(times * min(10.0, 1.2 * self.seconds / max(taken, 1e-6)))
        return taken / times

    def _time(self, work: Callable[[], object], times: int) -> float:
        started = time.perf_counter()
        for _ in range(times):
            work()
        if self.on_gpu:
            torch.accelerator.synchronize()
        return time.perf_counter() - started

    def random(self, *shape: int) -> torch.Tensor:
        """bfloat16, the same values at every call."""
        generator = torch.Generator(self.device).manual_seed(0)
        return torch.randn(shape, generator=generator, device=self.device, dtype=torch.bfloat16)


def _wake(clock: _Clock) -> float:
    """Work for a second: a GPU that was at rest takes as long to reach its speed."""
    x = clock.random(4096, 4096)
    until = time.perf_counter() + (1 if clock.on_gpu else 0)
    while time.perf_counter() < until:
        torch.mm(x, x).sum().item()
    return 0


def _matmul(clock: _Clock) -> float:
    """FLOP/s of an MLP's first product."""
    rows = 4096 if clock.on_gpu else 256
    columns = 4 * WIDTH if clock.on_gpu else WIDTH
    x, weight = clock.random(rows, WIDTH), clock.random(columns, WIDTH)
    return 2 * rows * WIDTH * columns / clock(lambda: nn.functional.linear(x, weight))


def _attention(clock: _Clock, backend: str) -> float:
    """FLOP/s of all on all, as in the 20B family. 2.1 asks for fewer queries than keys. The length
    is odd, as those of text and picture together are."""
    from qwen_image_tool.engine import attention

    tokens = 4096 + 187 if clock.on_gpu else 512
    states = clock.random(3, 1, tokens, HEADS, HEAD).unbind()
    queries, *others = states
    for asked in (queries, queries[:, :-187]):
        if not attention.agrees(backend, (asked, *others)):
            raise ValueError("it gives something else than torch")
    return 4 * tokens * tokens * WIDTH / clock(lambda: attention.attend(backend, *states))


def _memory(clock: _Clock) -> float:
    """Bytes/s of a copy within the device, read plus written."""
    source = torch.empty(128 * MIB, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / clock(lambda: target.copy_(source))


def _bus(clock: _Clock) -> float:
    """Bytes/s from page-locked memory to the GPU; 0 where there is no bus."""
    if clock.device.type not in ("cuda", "xpu"):
        return 0
    source = torch.empty(128 * MIB, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device=clock.device)
    return source.nbytes / clock(lambda: target.copy_(source, non_blocking=True))


def _staging(clock: _Clock) -> float:
    """Bytes/s from pageable memory into a page-locked buffer: the way to the GPU from there, on
    which a buffer is filled while the one before is sent on."""
    if clock.device.type not in ("cuda", "xpu"):
        return 0
    source = torch.ones(128 * MIB, dtype=torch.uint8)
    staging = torch.empty_like(source).pin_memory()
    return source.nbytes / clock(lambda: staging.copy_(source))


def try_compiler(device: torch.device) -> None:
    """Compile a small function for any number of rows, and run it. Raises what goes wrong."""

    def modulated(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return nn.functional.gelu(nn.functional.layer_norm(x, (64,)) * (1 + scale))

    x = torch.linspace(-1, 1, 16 * 64, device=device).view(16, 64)
    torch._dynamo.maybe_mark_dynamic(x, 0)
    with torch.inference_mode():
        result = torch.compile(modulated, fullgraph=True)(x, x[0])
    torch.testing.assert_close(result, modulated(x, x[0]), atol=1e-3, rtol=1e-3)


def _child(device: Device, cache: Path, *arguments: str) -> subprocess.Popen[str]:
    own = {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-P", "-X", "utf8", "-m", __name__, device.torch_name, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        env=os.environ | own,
        creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
    )


def _answer(child: subprocess.Popen[str]) -> str:
    """The child's last line; "" where it failed, and why in the log."""
    try:
        out, err = child.communicate(timeout=CHILD_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the driver: leave it
            child.communicate(timeout=5)
        log.warning("Measuring the device took more than %d s.", CHILD_SECONDS)
        return ""
    if child.returncode:
        last = " ".join(err.strip().splitlines()[-3:])
        log.warning("Measuring the device ended with code %d: %s", child.returncode, last)
        return ""
    return (out.strip().splitlines() or [""])[-1]


def _main(name: str, *arguments: str) -> None:
    device = torch.device(name)
    if arguments:
        try_compiler(device)
        sys.stdout.write("works\n")
    else:
        sys.stdout.write(speeds(device).to_json() + "\n")


if __name__ == "__main__":
    _main(*sys.argv[1:])
