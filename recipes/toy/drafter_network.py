"""The DFlash drafter as a training network: many blocks of a text at once; weights carry the published names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.toy.network import Attention, Layer, Network, RMSNorm, Shape, rotate


class BlockAttention(Attention):
    """Attention of the queries ``x`` (rows, M, hidden) to a context (rows, L, hidden) and to themselves."""

    def over(self, context: Tensor, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> Tensor:
        """``cos`` and ``sin`` (rows, 1, L + M, head size) and ``visible`` (rows, 1, M, L + M) count context first."""
        rows, length, _ = x.shape
        split, source = (rows, -1, self.shape.head_size), torch.cat((context, x), 1)

        def heads(projected: Tensor) -> Tensor:
            return projected.view(rows, projected.shape[1], *split[1:]).transpose(1, 2)

        query = rotate(self.q_norm(heads(self.q_proj(x))), cos[:, :, -length:], sin[:, :, -length:])
        key, value = rotate(self.k_norm(heads(self.k_proj(source))), cos, sin), heads(self.v_proj(source))
        groups = self.shape.heads // self.shape.key_value_heads
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        return self.o_proj(mixed.transpose(1, 2).reshape(rows, length, -1))


class BlockLayer(Layer):
    """A layer whose attention reads a context that is the same for every layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.self_attn: BlockAttention = BlockAttention(shape)

    def over(self, context: Tensor, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> Tensor:
        """As :meth:`BlockAttention.over`, with norms before it and residual connections."""
        x = x + self.self_attn.over(context, self.input_layernorm(x), cos, sin, visible)
        return x + self.mlp(self.post_attention_layernorm(x))


class DrafterNetwork(nn.Module):
    """The drafter; embedding and head are the target's, which is not trained."""

    def __init__(self, shape: Shape, target_layer_ids: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.target_layer_ids = shape, target_layer_ids
        self.fc = nn.Linear(len(target_layer_ids) * shape.hidden, shape.hidden, bias=False)
        self.hidden_norm = RMSNorm(shape.hidden, shape.epsilon)
        self.layers = nn.ModuleList(BlockLayer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, shape.epsilon)

    @torch.no_grad()
    def start_from(self, target: Network, layer_ids: tuple[int, ...]) -> None:
        """Begin as some of the target's own layers, which have learned to fill masks, and with its mean feature as
        context.
        """
        for layer, index in zip(self.layers, layer_ids, strict=True):
            layer.load_state_dict(target.model.layers[index].state_dict())
        norms = [target.model.layers[index].get_submodule("input_layernorm").weight for index in layer_ids]
        self.hidden_norm.weight.copy_(torch.stack(norms).mean(0))  # type: ignore[arg-type]
        self.norm.load_state_dict(target.model.norm.state_dict())
        count, size = len(self.target_layer_ids), self.shape.hidden
        self.fc.weight.copy_(torch.eye(size).repeat(1, count) / count)

    def forward(self, target: Network, tokens: Tensor, blocks: Tensor, starts: Tensor, wanted: Tensor) -> Tensor:
        """Logits (number of wanted, vocabulary) of blocks that begin inside a text.

        Args:
            target: the model whose features are read.
            tokens: (rows, L) text.
            blocks: (rows, K, B) a token of the text and masks after it.
            starts: (rows, K) position of that token; the block sees what comes before, and itself.
            wanted: (rows, K, B) bool, where logits are read.
        """
        rows, length = tokens.shape
        count, size = blocks.shape[1:]
        with torch.no_grad():
            features = hidden_states(target, tokens, self.target_layer_ids)
            x = target.model.embed_tokens(blocks.view(rows, -1))
        context = self.hidden_norm(self.fc(features))
        text = torch.arange(length)
        own = starts.repeat_interleave(size, 1)
        place = (starts[:, :, None] + torch.arange(size)).view(rows, -1)
        angles = torch.cat((text.expand(rows, -1), place), 1)[:, None, :, None].float() * target.frequencies
        angles = torch.cat((angles, angles), -1)
        block = torch.arange(count).repeat_interleave(size)
        visible = torch.cat(
            (text < own[:, :, None], (block[:, None] == block).expand(rows, count * size, count * size)), 2
        )
        for layer in self.layers:
            x = layer.over(context, x, angles.cos(), angles.sin(), visible[:, None])  # type: ignore[operator]
        return F.linear(self.norm(x[wanted.view(rows, -1)]), target.model.embed_tokens.weight)


@torch.no_grad()
def hidden_states(target: Network, tokens: Tensor, layer_ids: tuple[int, ...]) -> Tensor:
    """Outputs of the layers ``layer_ids`` of ``target`` on text (rows, L) read token by token, side by side."""
    rows, length = tokens.shape
    angles = torch.arange(length)[None, None, :, None].float() * target.frequencies
    angles = torch.cat((angles, angles), -1).expand(rows, 1, -1, -1)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    x, seen = target.model.embed_tokens(tokens), []
    for layer in target.model.layers:
        x = layer(x, angles.cos(), angles.sin(), causal)
        seen.append(x)
    return torch.cat([seen[index] for index in layer_ids], -1)
