"""Muon in float32: momentum, made orthogonal by a Newton–Schulz iteration, as the update of a matrix.

The version in torch iterates in bfloat16, which a CPU without such instructions has to emulate. Method: Keller Jordan
and others, "Muon: An optimizer for hidden layers in neural networks", 2024; scaled to the update size of AdamW as in
"Muon is Scalable for LLM Training", 2025.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_ADAMW_UPDATE_SIZE = 0.2


def orthogonalize(updates: Tensor) -> Tensor:
    """Matrices (count, m, n) with their singular values moved close to one."""
    a, b, c = _COEFFICIENTS
    tall = updates.shape[-2] > updates.shape[-1]
    x = updates.mT if tall else updates
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Optimizer of matrices; those of one shape are updated together."""

    def __init__(
        self, weights: Iterable[Tensor], lr: float, *, weight_decay: float = 0.05, momentum: float = 0.95
    ) -> None:
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape[weight.shape].append(weight)
            for shape, weights in by_shape.items():
                self._update(weights, group, scale=_ADAMW_UPDATE_SIZE * max(shape) ** 0.5)

    def _update(self, weights: list[Tensor], group: dict[str, float], scale: float) -> None:
        directions = []
        for weight in weights:
            state = self.state[weight]
            if not state:
                state["momentum"] = torch.zeros_like(weight)
            gradient = weight.grad
            assert gradient is not None
            state["momentum"].lerp_(gradient, 1 - group["momentum"])
            directions.append(torch.lerp(gradient, state["momentum"], group["momentum"]))
        for weight, direction in zip(weights, orthogonalize(torch.stack(directions)), strict=True):
            weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"] * scale)
