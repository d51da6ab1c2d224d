"""What the published DFlash loop does: a drafter and a target with growing caches, one after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from s2d2_lmeval.runtime.cache import cache_argument
from s2d2_lmeval.runtime.drafting.dflash import DFlash


class DFlashLoop:
    """An autoregressive target and its ``drafter``, whose weights are run by the published arithmetic."""

    def __init__(self, target: PreTrainedModel, drafter: DFlash, stop_id: int) -> None:
        self.target, self.drafter, self.stop_id = target, drafter, stop_id
        self.cache, self.drafts = DynamicCache(config=target.config), DynamicCache()
        self._cache_name = cache_argument(target)

    def generate(self, prompt: list[int], new: int) -> list[int]:
        """``new`` tokens; every round drafts a block after the newest token, and verifies it."""
        shape, start = self.drafter.shape, len(prompt)
        size, limit = shape.block_length, len(prompt) + new
        x = torch.full((1, limit + size), shape.mask_token_id)
        x[:, :start] = torch.tensor(prompt)
        positions = torch.arange(limit + size)[None]
        logits, features = self.verify(x[:, :start], positions[:, :start], 1)
        x[:, start] = logits.argmax(-1)[0]
        while start < limit:
            block = x[:, start : start + size].clone()
            at = positions[:, self.drafts.get_seq_length() : start + size]
            hidden = self.draft(block, features, at)
            self.drafts.crop(start - self.drafts.get_seq_length())
            block[:, 1:] = self.target.get_output_embeddings()(hidden[:, 1:]).argmax(-1)
            logits, features = self.verify(block, positions[:, start : start + size], 0)
            chosen = logits.argmax(-1)
            accepted = int((block[:, 1:] == chosen[:, :-1]).cumprod(-1).sum(-1)[0].item())
            x[:, start : start + accepted + 1] = block[:, : accepted + 1]
            x[:, start + accepted + 1] = chosen[:, accepted]
            start += accepted + 1
            self.cache.crop(start - self.cache.get_seq_length())
            features = features[:, : accepted + 1]
            if self.stop_id in x[:, len(prompt) : start + 1]:
                break
        return x[0, len(prompt) : limit].tolist()

    def verify(self, tokens: Tensor, positions: Tensor, last: int) -> tuple[Tensor, Tensor]:
        """The target's logits, of the ``last`` rows only unless 0, and the features of ``tokens`` (1, n)."""
        given: dict[str, Any] = {"position_ids": positions, "use_cache": True, "logits_to_keep": last}
        answer = self.target(input_ids=tokens, output_hidden_states=True, **given, **{self._cache_name: self.cache})
        read = [answer.hidden_states[layer + 1] for layer in self.drafter.shape.layer_ids]
        return answer.logits, torch.cat(read, dim=-1)

    def draft(self, block: Tensor, features: Tensor, positions: Tensor) -> Tensor:
        """Hidden states (1, B, hidden size) of ``block``; the text's ``features`` since the last draft come before."""
        drafter: Any = self.drafter
        hidden = self.target.get_input_embeddings()(block)
        context = drafter.hidden_norm(drafter.fc(features))
        cos, sin = drafter.rotary_emb(hidden, positions)
        for layer in drafter.layers:
            own: Any = layer.self_attn
            normed = layer.input_layernorm(hidden)
            both = torch.cat([own.k_proj(context), own.k_proj(normed)], dim=1)
            values = torch.cat([own.v_proj(context), own.v_proj(normed)], dim=1)
            heads = (1, -1, own.head_dim)
            q = own.q_norm(own.q_proj(normed).view(1, block.shape[1], -1, own.head_dim)).transpose(1, 2)
            k = own.k_norm(both.view(1, both.shape[1], *heads[1:])).transpose(1, 2)
            v = values.view(1, values.shape[1], *heads[1:]).transpose(1, 2)
            q, _ = apply_rotary_pos_emb(q, q, cos[:, -block.shape[1] :], sin[:, -block.shape[1] :])
            k, _ = apply_rotary_pos_emb(k, k, cos, sin)
            k, v = self.drafts.update(k, v, own.layer_idx)
            out = scaled_dot_product_attention(q, k, v, scale=own.scaling, enable_gqa=True)
            hidden = hidden + own.o_proj(out.transpose(1, 2).reshape(*block.shape, -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        answer: Tensor = drafter.norm(hidden)
        return answer
