"""Plain loops with transformers alone, as baselines for speed.

Batch one, eager, ``DynamicCache``, a mask built for every forward, decisions read on the host token by token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import DynamicCache, PreTrainedModel

from s2d2_lmeval.runtime.cache import cache_argument

Logits = Callable[[torch.Tensor, torch.Tensor, bool, int], torch.Tensor]
"""(logits (n, V), positions (n,), whether these are drafts, cached length) -> logits: the script, or what came in."""


class PlainS2D2:
    """S2D2 that verifies every draft and accepts while the verifier's argmax agrees, with token-causal caching."""

    def __init__(self, model: PreTrainedModel, mask_token_id: int, block_length: int, logits: Logits) -> None:
        self.model = model
        self.mask_token_id = mask_token_id
        self.block_length = block_length
        self.logits = logits
        self.forwards = 0

    def _forward(self, tokens: list[int], positions: list[int], visible: torch.Tensor, keep: bool) -> torch.Tensor:
        """Logits (n, V) of ``tokens``, which see the cache and what ``visible`` (n, n) says of each other."""
        self.forwards += 1
        device = self.model.device
        cached = self.cache.get_seq_length()
        mask = torch.cat([torch.ones(len(tokens), cached, dtype=torch.bool), visible], dim=1)
        out = self.model(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=torch.tensor([positions], device=device),
            attention_mask=mask[None, None].to(device),
            use_cache=True,
            **{cache_argument(self.model): self.cache},
        )
        if not keep:
            self.cache.crop(-len(tokens))
        return out.logits[0].float()

    @torch.inference_mode()
    def generate(self, prompt: list[int], new_tokens: int) -> list[int]:
        """Whole blocks of new tokens until there are ``new_tokens``."""
        length, mask = self.block_length, self.mask_token_id
        self.cache = DynamicCache(config=self.model.config)
        text, start = list(prompt), len(prompt) // length * length
        causal = torch.ones(2 * length, 2 * length, dtype=torch.bool).tril()
        if start:
            whole = torch.ones(start, start, dtype=torch.bool).tril()
            self._forward(text[:start], list(range(start)), whole, keep=True)
        verifier = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
        verifier[:length, :length] = causal[:length, :length]
        verifier[length:, :length] = causal[:length, :length].tril(-1)
        verifier[length:, length:] = torch.eye(length, dtype=torch.bool)
        while start < len(prompt) + new_tokens:
            block = text[start:] + [mask] * (start + length - len(text))
            positions = list(range(start, start + length))
            where = torch.tensor(positions, device=self.model.device)
            while mask in block:
                first = block.index(mask)
                visible = torch.ones(length, length, dtype=torch.bool)
                visible[:first] = causal[:first, :length]
                draft = self.logits(self._forward(block, positions, visible, keep=False), where, True, start)
                filled = [int(new) if old == mask else old for old, new in zip(block, draft.argmax(-1), strict=True)]
                both = self._forward(filled + [mask] * length, positions * 2, verifier, keep=False)
                checked = self.logits(both[length:], where, False, start).argmax(-1)
                for place in range(first, length):
                    if block[place] != mask:
                        break
                    block[place] = int(checked[place])
                    if block[place] != filled[place]:
                        break
            self._forward(block, positions, causal[:length, :length], keep=True)
            text = text[:start] + block
            start += length
        return text[len(prompt) :]
