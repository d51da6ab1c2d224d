"""The convolutions of a DFlash 2 drafter: every sublayer's input and output also look at the queries just before.

Query t of a block becomes the sum over taps o of (k[o] + d[t, o]) ∘ x[t - o], where k has a factor for every channel, d
one for every group of channels, which depends on the sublayer's input, and x is 0 before the block. So a draft's places
know of each other within a sublayer too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer


def inside_blocks(offsets: torch.Tensor, queries: int) -> torch.Tensor:
    """Whether each of the packed ``queries`` has one before it in its block (N, 1), where blocks begin at ``offsets``
    (R,).
    """
    inside = torch.ones(queries, dtype=torch.bool, device=offsets.device)
    return inside.index_fill(0, offsets, False).unsqueeze(1)


class Convolution(nn.Module):
    """Both convolutions of a sublayer, with ``form`` taps and channels per group."""

    def __init__(self, hidden: int, form: tuple[int, int]) -> None:
        super().__init__()
        self.taps, self.group = form
        self.base_kernel = nn.Parameter(torch.zeros(2, self.taps, hidden))
        self.kernel_projection = nn.Linear(hidden, 2 * self.taps * hidden // self.group, bias=False)

    def kernels(self, x: torch.Tensor) -> torch.Tensor:
        """The factors (2, taps, N, H) for the input and the output of a sublayer that is given ``x`` (1, N, H)."""
        of_group = self.kernel_projection(x[0]).view(x.shape[1], 2, self.taps, -1)
        of_channel = of_group.permute(1, 2, 0, 3).repeat_interleave(self.group, dim=3)
        return of_channel + self.base_kernel.unsqueeze(2)

    def forward(self, x: torch.Tensor, kernels: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        """``x`` (1, N, H) by one side's ``kernels`` (taps, N, H); ``inside`` (N, 1) as of :func:`inside_blocks`."""
        found, before = kernels[0] * x[0], x[0]
        for kernel in kernels[1:]:
            before = nn.functional.pad(before[:-1], (0, 0, 1, 0)) * inside
            found = found + kernel * before
        return found.unsqueeze(0)


class ConvolvedLayer(Qwen3DecoderLayer):
    """A layer of the drafter, with convolutions of ``form`` around attention and feed-forward part."""

    def __init__(self, form: tuple[int, int], config: Qwen3Config, index: int) -> None:
        super().__init__(config, index)
        self.attention_conv, self.mlp_conv = (Convolution(config.hidden_size, form) for _ in range(2))

    def forward(self, hidden: torch.Tensor, inside: torch.Tensor, **told: Any) -> torch.Tensor:
        """As the base class, and told which queries are ``inside`` their blocks."""
        x = self.input_layernorm(hidden)
        kernels = self.attention_conv.kernels(x)
        x, _ = self.self_attn(self.attention_conv(x, kernels[0], inside), attention_mask=None, **told)
        hidden = hidden + self.attention_conv(x, kernels[1], inside)
        x = self.post_attention_layernorm(hidden)
        kernels = self.mlp_conv.kernels(x)
        return hidden + self.mlp_conv(self.mlp(self.mlp_conv(x, kernels[0], inside)), kernels[1], inside)
