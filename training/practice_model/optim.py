"""Muon for the matrices of a network, AdamW for everything else, behind one step()."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal by Newton-Schulz steps (https://kellerjordan.github.io/posts/muon).

    Convolution kernels count as (out, in * height * width) matrices.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        workers, rank = world_size(), dist.get_rank() if dist.is_initialized() else 0
        for group in self.param_groups:
            updates = []
            for index, param in enumerate(group["params"]):
                if param.grad is None:
                    param.grad = torch.zeros_like(param)
                state = self.state[param]
                if not state:
                    state["momentum"] = torch.zeros_like(param)
                average: Tensor = state["momentum"]
                average.lerp_(param.grad, 1 - group["momentum"])
                update = param.grad.lerp(average, group["momentum"])
                if index % workers == rank:
                    matrix = update.reshape(len(update), -1)
                    scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
                    update.copy_((_orthogonal(matrix) * scale).view_as(update))
                else:
                    update.zero_()
                updates.append(update)
            _sum_over_workers(updates)
            for param, update in zip(group["params"], updates, strict=True):
                param.add_(update, alpha=-group["lr"])


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _sum_over_workers(tensors: list[Tensor]) -> None:
    """In place, in one message."""
    if world_size() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    begin = 0
    for tensor in tensors:
        tensor.copy_(flat[begin : begin + tensor.numel()].view_as(tensor))
        begin += tensor.numel()


def _orthogonal(matrix: Tensor) -> Tensor:
    x: Tensor = matrix.bfloat16()
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x if wide else x.T).to(matrix.dtype)


class Optimizers:
    """Muon on hidden matrices; AdamW on the rest (embeddings, first and last layers, gains)."""

    def __init__(
        self, module: nn.Module, muon_lr: float, adam_lr: float, adam_only: tuple[str, ...]
    ):
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        hidden = {n for n, p in named if p.ndim >= 2 and not any(part in n for part in adam_only)}
        self.parts: list[torch.optim.Optimizer] = [
            Muon([p for n, p in named if n in hidden], lr=muon_lr),
            torch.optim.AdamW(
                [p for n, p in named if n not in hidden],
                lr=adam_lr,
                betas=(0.9, 0.98),
                weight_decay=0.0,
            ),
        ]
        self.peaks = [muon_lr, adam_lr]

    def step(self, factor: float) -> None:
        """One update with each learning rate at `factor` of its peak.

        Gradients are averaged over the workers, clipped to a norm of 1, and cleared afterwards.
        """
        params = [p for part in self.parts for group in part.param_groups for p in group["params"]]
        params = [p for p in params if p.grad is not None]
        gradients = [p.grad for p in params if p.grad is not None]
        _sum_over_workers(gradients)
        for gradient in gradients:
            gradient.div_(world_size())
        nn.utils.clip_grad_norm_(params, 1.0)
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
