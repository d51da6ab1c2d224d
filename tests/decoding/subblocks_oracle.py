"""An independent account of Fast-dLLM v2 decoding: blocks in parts, by a model whose logits are shifted.

The row of token t-1 predicts token t. A block is decoded sub-block by sub-block, its first token being the argmax of
the last row of what was committed before it (the "AR token").
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .oracle_inputs import Draws, Options, Result
from .oracle_loop import Account, first_run
from .oracle_maths import NEVER, Router, block_causal, causal


@dataclass(frozen=True)
class SubblockOptions(Options):
    """The options of this scheme; those of :class:`Options` that it does not have stay at their defaults."""

    decoder: str = "s2d2"  # s2d2, dynamic, ar
    block_length: int = 8
    small_block_size: int = 4
    use_block_cache: bool = False
    sample_first_token: bool = False


def published_budget(prompt: int, max_new_tokens: int, block_length: int) -> int:
    """New tokens of the published loop: whole blocks only, less the prompt's part of the first, and an AR token."""
    return max(0, max_new_tokens // block_length * block_length + 1 - prompt % block_length)


class SubblockOracle(Account[SubblockOptions]):
    """Blocks that are decoded sub-block by sub-block."""

    def __init__(self, model: Any, options: SubblockOptions, draws: Draws, mask_id: int) -> None:
        super().__init__(model, options, draws, mask_id)
        size = options.small_block_size
        self.router = Router(dataclasses.replace(options, block_length=size))  # all its quantities are the sub-block's
        self.stale: list[int] | None = None  # the block as of its last whole forward, while its keys are still in use

    def run(self, prompt: Sequence[int]) -> Result:
        """Decode ``max_new_tokens`` or more: the last block is finished, and committed."""
        options = self.options
        self.prompt = len(prompt)
        self.result = Result(list(prompt), len(prompt))
        if not options.max_new_tokens:
            return self.result
        if options.decoder == "ar":
            return self._autoregressive()
        canvas, size = self.result.canvas, options.block_length
        whole = len(canvas) // size * size
        if whole:
            mask = causal(whole) if options.cache_ver else block_causal(whole, size)
            logits = self.forward("prefill", canvas[:whole], range(whole), mask, keep=True)
            if whole == len(canvas):
                self._append(logits[-1])
        while len(canvas) < self.prompt + options.max_new_tokens and not self._stopped_in(canvas[self.prompt :]):
            if not self._next_block(canvas):
                break
        self.result.stopped = self._stopped_in(canvas[self.prompt :])
        return self.result

    def new_tokens(self) -> list[int]:
        """The answer: up to the first stop token, which is part of it, and to the budget."""
        new = self.result.canvas[self.prompt :]
        stop = next((i for i, token in enumerate(new) if token in self.options.stop_token_ids), len(new))
        return new[: min(stop + 1, self.options.max_new_tokens)]

    def _autoregressive(self) -> Result:
        """A token per forward, from the last token's own row."""
        canvas, kind = self.result.canvas, "prefill"
        while len(canvas) < self.prompt + self.options.max_new_tokens:
            self._append(self.forward(kind, canvas, range(len(canvas)), causal(len(canvas)))[-1])
            kind = "commit"
            if canvas[-1] in self.options.stop_token_ids:
                self.result.stopped = True
                break
        return self.result

    # one block

    def _next_block(self, canvas: list[int]) -> bool:
        """Decode the block that the canvas ends in. False: a stop token struck, and the block is left as it is."""
        size, part = self.options.block_length, self.options.small_block_size
        start = len(self.context.tokens)
        begun = len(canvas) - start
        block = canvas[start:] + [self.mask_id] * (size - begun)
        self.stale = None
        for first in range(0, size, part):
            self.draws.step = 0
            while self.mask_id in block[first : first + part] and not self._stopped_in(block[begun:]):
                self._step(block, start, first)
                self.draws.step += 1
        canvas[start:] = block
        if self._stopped_in(block[begun:]):
            return False
        logits = self.forward("commit", block, range(start, start + size), self.commit_mask(), keep=True)
        self._append(logits[-1])
        return True

    def _append(self, row: Tensor) -> None:
        """The AR token: published, the argmax even where drafts are sampled. It is never the mask."""
        row, place = row.clone(), len(self.result.canvas)
        row[self.mask_id] = -math.inf
        token = int(row.argmax())
        sampled = self.options.do_sample and self.options.temperature >= NEVER
        if sampled and (self.options.decoder == "ar" or self.options.sample_first_token):
            self.draws.step = 0
            token = int(self.draws.draft([place], self.law(row[None]))[0])
        self.result.decoding_order.append([-place - 0.5])
        self.result.canvas.append(token)

    def _stopped_in(self, tokens: Sequence[int]) -> bool:
        """Whether a stop token is among ``tokens`` and everything before the first of them is decided."""
        stop = next((i for i, token in enumerate(tokens) if token in self.options.stop_token_ids), None)
        return stop is not None and self.mask_id not in tokens[:stop]

    # one step

    def _step(self, block: list[int], start: int, first: int) -> None:
        """Draft the sub-block that begins at ``first``, and decide some of its masks."""
        options, part = self.options, self.options.small_block_size
        logits = self._draft_logits(block, start, first)
        drafted, confidence = self.sample(logits, range(start + first, start + first + part))
        here = block[first : first + part]
        masked = [i for i, token in enumerate(here) if token == self.mask_id]
        chosen: dict[int, int] = {}
        order: list[Any] = []
        verified = False
        if options.decoder == "s2d2":
            span = first_run(masked)
            draft_law = self.law(logits)
            high = [i for i in masked if confidence[i] > options.confidence_threshold]
            verified = self.router.decide(draft_law, span, masked, high, part - len(masked), confidence)
            if verified:
                self._verify(block, start, first, span, drafted, confidence, draft_law, chosen, order)
                self.stale = None
        if not chosen:
            best = max(masked, key=lambda i: float(confidence[i]))
            for i in masked:
                if confidence[i] > options.confidence_threshold or i == best:
                    chosen[i] = drafted[i]
                    order.append(-(start + first + i))
        if options.decoder == "s2d2":
            self.router.reward(len(chosen), verified)
        for i, token in chosen.items():
            block[first + i] = token
        self.result.decoding_order.append(order)

    def _draft_logits(self, block: list[int], start: int, first: int) -> Tensor:
        """A row per place of the sub-block: that of the token before it (its own for the first of a window)."""
        size, part = self.options.block_length, self.options.small_block_size
        places = range(start, start + size)
        if self.stale is None or block[first] == self.mask_id or not self.options.use_block_cache:
            mask = torch.ones(size, size, dtype=torch.bool)
            if self.options.draft_ver:
                decided = block.index(self.mask_id)
                mask[:decided] = causal(size)[:decided]
            logits = self.forward("draft", block, places, mask)
            self.stale = list(block)
            return torch.cat([logits[:1], logits[:-1]])[first : first + part]
        # Only the sub-block goes in; the rest of the block is seen as it was in the last whole forward.
        mask = torch.ones(size + part, size + part, dtype=torch.bool)
        mask[:size, size:] = False
        mask[size:, first : first + part] = False
        tokens = self.stale + block[first : first + part]
        positions = [*places, *places[first : first + part]]
        logits = self.forward("draft", tokens, positions, mask)[size:]
        return torch.cat([logits[:1], logits[:-1]])

    def _verify(
        self,
        block: list[int],
        start: int,
        first: int,
        span: list[int],
        drafted: list[int],
        confidence: Tensor,
        draft_law: Tensor,
        chosen: dict[int, int],
        order: list[Any],
    ) -> None:
        """Score the drafted span left to right; take its accepted prefix and what replaces the first rejection."""
        end = first + self.options.small_block_size
        filled = list(block[:end])
        for i, token in enumerate(drafted):
            if filled[first + i] == self.mask_id:
                filled[first + i] = token
        logits = self.forward("verify", filled, range(start, start + end), causal(end))
        target = self.law(torch.cat([logits[:1], logits[:-1]])[first:])
        accepted, rejected, replacement = self.walk(start + first, span, drafted, confidence, draft_law, target)
        for i in accepted:
            chosen[i] = drafted[i]
            order.append(start + first + i)
        if rejected is not None and replacement is not None:  # otherwise the rejected token stays a mask
            chosen[rejected] = replacement
            order.append(start + first + rejected + 0.5)

    def overdue(self, tokens: Sequence[int]) -> bool:
        return self.draws.step >= self.options.small_block_size
