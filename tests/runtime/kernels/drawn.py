"""Arguments of kernels, of odd shapes."""

from __future__ import annotations

import torch


def logits(rows: int, vocabulary: int) -> torch.Tensor:
    """Logits (rows, vocabulary) with ties, tokens that are ruled out, a first part without any weight, far outliers."""
    x = 4 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    if vocabulary > 4:
        x[:, vocabulary // 2] = -torch.inf
        x[1:2] = 2.0
        x[2:3, [0, -1]] = 30.0
    if vocabulary > 70:
        x[3:4, :64] = -torch.inf
    return x
