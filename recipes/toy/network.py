"""A compact Qwen3 decoder for training on a CPU; its weights carry the names of transformers' ``Qwen3ForCausalLM``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of the network."""

    vocabulary: int = 640
    hidden: int = 160
    layers: int = 4
    heads: int = 6
    key_value_heads: int = 3
    head_size: int = 32
    intermediate: int = 448
    rope_theta: float = 10_000.0
    epsilon: float = 1e-6


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.epsilon)


class Attention(nn.Module):
    """Grouped-query attention with normed queries and keys, and rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        queries, keys = shape.heads * shape.head_size, shape.key_value_heads * shape.head_size
        self.q_proj = nn.Linear(shape.hidden, queries, bias=False)
        self.k_proj = nn.Linear(shape.hidden, keys, bias=False)
        self.v_proj = nn.Linear(shape.hidden, keys, bias=False)
        self.o_proj = nn.Linear(queries, shape.hidden, bias=False)
        self.q_norm = RMSNorm(shape.head_size, shape.epsilon)
        self.k_norm = RMSNorm(shape.head_size, shape.epsilon)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> Tensor:
        rows, length, _ = x.shape
        split = (rows, length, -1, self.shape.head_size)
        value = self.v_proj(x).view(split).transpose(1, 2)
        query = rotate(self.q_norm(self.q_proj(x).view(split)).transpose(1, 2), cos, sin).to(value.dtype)
        key = rotate(self.k_norm(self.k_proj(x).view(split)).transpose(1, 2), cos, sin).to(value.dtype)
        groups = self.shape.heads // self.shape.key_value_heads
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        return self.o_proj(mixed.transpose(1, 2).reshape(rows, length, -1))


class FeedForward(nn.Module):
    """Gated feed-forward layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and feed-forward, each with a norm before it and a residual connection."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = FeedForward(shape)
        self.input_layernorm = RMSNorm(shape.hidden, shape.epsilon)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.epsilon)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, visible)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, shape.epsilon)


class Network(nn.Module):
    """The language model; input and output embeddings are tied."""

    frequencies: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Backbone(shape)
        half = torch.arange(0, shape.head_size, 2).float() / shape.head_size
        self.register_buffer("frequencies", shape.rope_theta**-half, persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                writes_residual = "o_proj" in name or "down_proj" in name
                nn.init.normal_(weight, std=0.02 / (math.sqrt(2 * shape.layers) if writes_residual else 1.0))

    def forward(self, tokens: Tensor, positions: Tensor, visible: Tensor, wanted: Tensor) -> Tensor:
        """Logits (number of wanted, vocabulary).

        Args:
            tokens: (rows, length) token ids.
            positions: (rows, length) rotary positions.
            visible: (rows, 1, length, length) bool, which keys a query sees.
            wanted: (rows, length) bool, where logits are read.
        """
        angles = positions[:, None, :, None].float() * self.frequencies
        angles = torch.cat((angles, angles), -1)
        x = self.model.embed_tokens(tokens)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.model.layers:
            x = layer(x, cos, sin, visible)
        return F.linear(self.model.norm(x[wanted]), self.model.embed_tokens.weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of ``x`` (rows, heads, length, head size)."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin
