"""An independent account of SDAR decoding: one sequence, no cache, every forward recomputes everything it sees.

The engine is tested against this file, so nothing is shared with it: the rules are written out once more, in the
plainest way. Two differences to any practical decoder make it easy to trust. It keeps no keys and values; a forward
gets the committed tokens and the window together, under one explicit mask in which every committed row sees what it saw
when it was committed. And randomness is an argument (``Draws``), so that a run can be replayed, fixed or enumerated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .oracle_inputs import Draws, FixedSource, Options, Result, Source, TorchSource
from .oracle_maths import (
    NEVER,
    Context,
    Router,
    block_causal,
    by_confidence,
    causal,
    entropy,
    residual,
    transformed,
    two_halves,
    wide,
)

__all__ = ["Draws", "FixedSource", "Options", "Oracle", "Result", "Source", "TorchSource", "decode"]


class Oracle:
    """One call of ``run`` decodes one prompt. ``model`` is a plain causal language model in eval mode."""

    def __init__(self, model: Any, options: Options, draws: Draws, mask_id: int) -> None:
        if options.decoder == "ar":
            options = Options(**{**vars(options), "block_length": 1, "denoising_steps": 1})
        self.options, self.draws, self.mask_id = options, draws, mask_id
        self.context = Context(model, mask_id)
        self.router = Router(options)
        self.block = options.block_length
        self.watch: Callable[[str, list[int], Tensor], None] = lambda kind, tokens, logits: None

    def run(self, prompt: Sequence[int]) -> Result:
        size, options = self.block, self.options
        blocks = math.ceil((len(prompt) + options.max_new_tokens) / size)
        canvas = list(prompt) + [self.mask_id] * (blocks * size - len(prompt))
        self.result = Result(canvas, len(prompt))
        if not options.max_new_tokens:
            canvas[len(prompt) :] = []
            return self.result
        whole = len(prompt) // size * size
        if whole:
            mask = causal(whole) if options.cache_ver else block_causal(whole, size)
            self._forward("prefill", prompt[:whole], range(whole), mask, keep=True)
        for start in range(whole, blocks * size, size):
            self._decode_block(canvas, start)
            if any(token in options.stop_token_ids for token in canvas[len(prompt) :]):
                self.result.stopped = True
                break
        return self.result

    # one block

    def _decode_block(self, canvas: list[int], start: int) -> None:
        size, options = self.block, self.options
        steps = options.denoising_steps
        schedule = [size // steps + (1 if i < size % steps else 0) for i in range(steps)]
        rows = torch.ones(size, size, dtype=torch.bool)  # who sees whom within the block, draft forwards
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
        mask = causal(size) if options.cache_ver else rows if options.stale_rows else torch.ones(size, size).bool()
        self._forward("commit", canvas[start : start + size], range(start, start + size), mask, keep=True)

    def _step(
        self, tokens: list[int], start: int, rows: Tensor, planned: int, progress: int
    ) -> tuple[dict[int, int], list[Any]]:
        """One denoising step: the new tokens by index in the block, and the entry of the decoding order."""
        options, size = self.options, self.block
        masked = [i for i, token in enumerate(tokens) if token == self.mask_id]
        logits = self._forward("draft", tokens, range(start, start + size), rows, keep=False)
        drafted, confidence = self._sample(logits, start)
        law = wide(logits).softmax(-1)
        chosen: dict[int, int] = {}
        order: list[Any] = []
        least = min(planned, len(masked))
        verified = False
        if options.decoder == "s2d2":
            span = [i for n, i in enumerate(masked) if i == masked[0] + n]  # the first run of masks
            p = transformed(logits, options)
            high = [i for i in masked if confidence[i] > options.confidence_threshold]
            verified = self.router.decide(p, span, masked, high, progress, confidence)
            if verified:
                self._verify(tokens, start, span, masked, drafted, confidence, p, chosen, order)
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

    def _sample(self, logits: Tensor, start: int) -> tuple[list[int], Tensor]:
        """Drafted tokens, and the confidence in each."""
        if not self.options.do_sample or self.options.temperature < NEVER:
            law = wide(logits).softmax(-1)
            drafted = logits.argmax(-1)
        else:
            law = transformed(logits, self.options)
            drafted = self.draws.draft(range(start, start + self.block), law)
        return drafted.tolist(), law.gather(-1, drafted[:, None])[:, 0]

    # verification

    def _verify(
        self,
        tokens: list[int],
        start: int,
        span: list[int],
        masked: list[int],
        drafted: list[int],
        confidence: Tensor,
        p: Tensor,
        chosen: dict[int, int],
        order: list[Any],
    ) -> None:
        options, size = self.options, self.block
        filled = [drafted[i] if token == self.mask_id else token for i, token in enumerate(tokens)]
        positions = list(range(start, start + size))
        logits = self._forward("verify", filled + [self.mask_id] * size, positions * 2, two_halves(size), keep=False)[
            size:
        ]
        q = transformed(logits, options)

        def ratio(i: int) -> Tensor:
            plain = q[i, drafted[i]] / confidence[i].clamp_min(1e-12)
            return plain.pow(options.ssd_ratio_tempering_factor).clamp_max(1.0)

        if options.acceptance == "greedy":
            accepted = [int(q[i].argmax()) == drafted[i] for i in span]
        else:
            draws = self.draws.accept([start + i for i in span])
            accepted = [bool(u < ratio(i)) for u, i in zip(draws, span, strict=True)]
        reject = accepted.index(False) if False in accepted else len(span)
        for i in span[:reject]:
            chosen[i] = drafted[i]
            order.append(start + i)
        if reject < len(span):
            i = span[reject]
            if options.acceptance == "greedy":
                chosen[i] = int(q[i].argmax())
            elif options.allow_resample:
                chosen[i] = self.draws.resample(start + i, residual(p[i], q[i]))
            else:
                chosen[i] = drafted[i]  # as published: the rejected draft is committed, and recorded as if accepted
            replaced = options.allow_resample or options.acceptance == "greedy"
            order.append(start + i + 0.5 if replaced else start + i)
        if options.ssd_ratio_threshold >= 0:
            scope = masked if options.ssd_threshold_all_spans else span
            for i in scope:
                if i not in chosen and ratio(i) >= options.ssd_ratio_threshold:
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
            return best[:count]
        if options.strategy == "low_confidence_dynamic":
            high = [i for i in best if confidence[i] > options.confidence_threshold]
            return high if len(high) >= count else best[:count]
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

    def _forward(
        self, kind: str, tokens: Sequence[int], positions: Sequence[int], visible: Tensor, *, keep: bool
    ) -> Tensor:
        self.result.nfe += 1
        self.result.forwards[kind] += 1
        logits = self.context.forward(tokens, positions, visible, keep=keep)
        self.watch(kind, list(tokens), logits)
        if self.options.suppress_mask_token or self.draws.step >= self.options.denoising_steps:
            logits = logits.clone()  # behind the schedule always, or a model that predicts its mask would never end
            logits[:, self.mask_id] = -math.inf
        return logits


def decode(model: Any, prompt: Sequence[int], options: Options, draws: Draws, *, mask_id: int) -> Result:
    """Decode one prompt by full recompute."""
    return Oracle(model, options, draws, mask_id).run(prompt)
