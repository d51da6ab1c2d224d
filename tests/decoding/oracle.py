"""An independent account of SDAR decoding: block denoising by every strategy, and S2D2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .oracle_inputs import Draws, FixedSource, Options, Result, Source, TorchSource
from .oracle_loop import Account, first_run
from .oracle_maths import by_confidence, causal, entropy, two_halves, wide

__all__ = ["Draws", "FixedSource", "Options", "Oracle", "Result", "Source", "TorchSource", "decode"]


class Oracle(Account[Options]):
    """Blocks that are denoised one after the other."""

    def __init__(self, model: Any, options: Options, draws: Draws, mask_id: int) -> None:
        if options.decoder == "ar":
            options = Options(**{**vars(options), "block_length": 1, "denoising_steps": 1})
        super().__init__(model, options, draws, mask_id)

    def commit_mask(self) -> Tensor:
        return self.rows if self.options.stale_rows and not self.options.cache_ver else super().commit_mask()

    # one block

    def decode_block(self, canvas: list[int], start: int) -> None:
        size, options = self.block, self.options
        steps = options.denoising_steps
        schedule = [size // steps + (1 if i < size % steps else 0) for i in range(steps)]
        rows = self.rows = torch.ones(size, size, dtype=torch.bool)  # who sees whom within the block, draft forwards
        begun = decoded_in_block = 0
        while self.mask_id in canvas[start : start + size]:
            tokens = canvas[start : start + size]
            first = tokens.index(self.mask_id)
            if options.draft_ver:
                rows[:first] = causal(size)[:first]
            planned = schedule[begun] if begun < steps else 1
            self.draws.step = begun
            chosen, order = self._step(tokens, start, rows, planned, decoded_in_block)
            for i, token in chosen.items():
                canvas[start + i] = token
            self.result.decoding_order.append((["|"] if decoded_in_block == 0 else []) + order)
            decoded_in_block += len(chosen)
            begun += 1

    def _step(
        self, tokens: list[int], start: int, rows: Tensor, planned: int, progress: int
    ) -> tuple[dict[int, int], list[Any]]:
        """One denoising step: the new tokens by index in the block, and the entry of the decoding order."""
        options, size = self.options, self.block
        masked = [i for i, token in enumerate(tokens) if token == self.mask_id]
        logits = self.forward("draft", tokens, range(start, start + size), rows)
        drafted, confidence = self.sample(logits, range(start, start + size))
        law = wide(logits).softmax(-1)
        chosen: dict[int, int] = {}
        order: list[Any] = []
        least = min(planned, len(masked))
        verified = False
        if options.decoder == "s2d2":
            span = first_run(masked)
            draft_law = self.law(logits)
            high = [i for i in masked if confidence[i] > options.confidence_threshold]
            verified = self.router.decide(draft_law, span, masked, high, progress, confidence)
            if verified:
                self._verify(tokens, start, span, masked, drafted, confidence, draft_law, chosen, order)
            if options.always_check_high_confidence:
                for i in by_confidence(high, confidence):
                    if i not in chosen:
                        chosen[i] = drafted[i]
                        order.append(-(start + i) - 0.4)
        if len(chosen) < least:
            left = [i for i in masked if i not in chosen]
            for i in self._remask(left, min(least - len(chosen), len(left)), confidence, law):
                chosen[i] = drafted[i]
                order.append(-(start + i) if options.decoder == "s2d2" else start + i)
        if options.decoder == "s2d2":
            self.router.reward(len(chosen), verified)
        return chosen, order

    # verification

    def _verify(
        self,
        tokens: list[int],
        start: int,
        span: list[int],
        masked: list[int],
        drafted: list[int],
        confidence: Tensor,
        draft_law: Tensor,
        chosen: dict[int, int],
        order: list[Any],
    ) -> None:
        options, size = self.options, self.block
        filled = [drafted[i] if token == self.mask_id else token for i, token in enumerate(tokens)]
        positions = list(range(start, start + size))
        logits = self.forward("verify", filled + [self.mask_id] * size, positions * 2, two_halves(size))[size:]
        target = self.law(logits)
        accepted, rejected, replacement = self.walk(start, span, drafted, confidence, draft_law, target)
        for i in accepted:
            chosen[i] = drafted[i]
            order.append(start + i)
        if rejected is not None:  # as published: a rejected draft that nothing replaces is committed as if accepted
            chosen[rejected] = drafted[rejected] if replacement is None else replacement
            order.append(start + rejected + 0.5 * (replacement is not None))
        if options.ssd_ratio_threshold >= 0:
            scope = masked if options.ssd_threshold_all_spans else span
            for i in scope:
                if i not in chosen and self.ratio(target[i], drafted[i], confidence[i]) >= options.ssd_ratio_threshold:
                    chosen[i] = drafted[i]
                    order.append(start + i + 0.2)

    # remasking

    def _remask(self, left: list[int], count: int, confidence: Tensor, law: Tensor) -> list[int]:
        """The positions that a step without (or beside) verification commits, in the order of their selection."""
        options = self.options
        best = by_confidence(left, confidence)
        if options.strategy == "sequential":
            return left[:count]
        if options.strategy == "low_confidence_static":
            return self.top(count, left, confidence)
        if options.strategy == "low_confidence_dynamic":
            high = [i for i in best if confidence[i] > options.confidence_threshold]
            return high if len(high) >= count else self.top(count, left, confidence)
        assert options.strategy == "entropy_bounded"
        assert options.eb_threshold is not None
        if options.collapse_entropy:
            one = float(-(confidence * confidence.log()).sum())
            entropies = dict.fromkeys(left, one)
        else:
            entropies = {i: float(entropy(law[i])) for i in left}
        ascending = sorted(left, key=lambda i: entropies[i])
        taken, total = 0, 0.0
        for i in ascending:
            total += entropies[i]
            if not total < options.eb_threshold:
                break
            taken += 1
        taken = max(1, taken)
        return ascending[: min(taken, count) if options.decoder == "s2d2" else taken]


def decode(model: Any, prompt: Sequence[int], options: Options, draws: Draws, *, mask_id: int) -> Result:
    """Decode one prompt by full recompute."""
    return Oracle(model, options, draws, mask_id).run(prompt)
