"""Muon for the matrices of a network, AdamW for everything else, behind one step()."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

WEIGHT_DECAY = 0.02  # of the learning rate a step: long runs at a constant rate grow no matrix


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal by Newton-Schulz steps (https://kellerjordan.github.io/posts/muon).

    Convolution kernels count as (out, in * height * width) matrices. All parameters of one shape
    are updated together, so a step is a few dozen large operations.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = {}
            for param in group["params"]:
                alike.setdefault(param.shape, []).append(param)
            for params in alike.values():
                self._step(params, group["lr"], group["momentum"])

    def _step(self, params: list[Tensor], lr: float, momentum: float) -> None:
        for param in params:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            if not self.state[param]:
                self.state[param]["momentum"] = torch.zeros_like(param)
        gradients = [param.grad for param in params if param.grad is not None]
        averages = [self.state[param]["momentum"] for param in params]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        updates = torch.stack(torch._foreach_lerp(gradients, averages, momentum))
        matrices = _orthogonal(updates.flatten(2))
        scale = max(1.0, matrices.shape[1] / matrices.shape[2]) ** 0.5
        torch._foreach_mul_(params, 1 - lr * WEIGHT_DECAY)
        torch._foreach_add_(params, matrices.view_as(updates).unbind(), alpha=-lr * scale)


def _orthogonal(matrices: Tensor) -> Tensor:
    """(N, rows, columns), each with all its singular values near one."""
    x: Tensor = matrices.bfloat16()
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    made: Tensor = (x if wide else x.mT).to(matrices.dtype).contiguous()
    return made


class Optimizers:
    """Muon on hidden matrices; AdamW on the rest (embeddings, first and last layers, gains)."""

    def __init__(
        self, module: nn.Module, muon_lr: float, adam_lr: float, adam_only: tuple[str, ...]
    ):
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        hidden = {n for n, p in named if p.ndim >= 2 and not any(part in n for part in adam_only)}
        self.params = [p for _, p in named]
        self.parts: list[torch.optim.Optimizer] = [
            Muon([p for n, p in named if n in hidden], lr=muon_lr),
            torch.optim.AdamW(
                [p for n, p in named if n not in hidden],
                lr=adam_lr,
                betas=(0.9, 0.98),
                weight_decay=0.0,
                fused=True,
            ),
        ]
        self.peaks = [muon_lr, adam_lr]

    def step(self, factor: float) -> None:
        """One update with each learning rate at `factor` of its peak.

        Gradients are clipped to a norm of 1 before and cleared afterwards.
        """
        nn.utils.clip_grad_norm_(self.params, 1.0)
        for part, peak in zip(self.parts, self.peaks, strict=True):
            for group in part.param_groups:
                group["lr"] = peak * factor
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, object]]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, object]]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)
