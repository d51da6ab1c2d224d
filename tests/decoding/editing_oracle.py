"""An independent account of LLaDA2 decoding: one sequence, no cache, every forward recomputes everything it sees.

Block diffusion whose decided tokens may still be edited while their block is open, plain or with S2D2, written out in
the plainest way to test the engine against. Forwards and probabilities are those of the other oracles: full recompute
under one explicit mask in which every committed row sees what it saw when it was committed. The prompt is committed
block-causally.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .oracle_inputs import Draws, Options, Result
from .oracle_maths import NEVER, Context, Router, block_causal, by_confidence, residual, transformed, two_halves, wide


@dataclass(frozen=True)
class EditingOptions(Options):
    """The options of this scheme; those of :class:`Options` that it does not have stay at their defaults."""

    decoder: str = "s2d2"  # s2d2, editing
    block_length: int = 8
    denoising_steps: int = 8
    temperature: float = 0.0
    editing_threshold: float = 0.9
    max_post_steps: int = 0
    num_to_transfer: int = 1
    eos_early_stop: bool = False


class EditingRouter(Router):
    """A step without masks has nothing to verify; its score is minus infinity, which ends a hysteresis."""

    def decide(
        self, p: Tensor, span: list[int], masked: list[int], high: list[int], progress: int, confidence: Tensor
    ) -> bool:
        if span:
            return super().decide(p, span, masked, high, progress, confidence)
        self.on = False
        return False


class EditingOracle:
    """One call of ``run`` decodes one prompt. ``model`` is a plain causal language model in eval mode."""

    def __init__(self, model: Any, options: EditingOptions, draws: Draws, mask_id: int) -> None:
        self.options, self.draws, self.mask_id = options, draws, mask_id
        self.context = Context(model, mask_id)
        self.router = EditingRouter(options)
        self.block = options.block_length

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
            self._forward("prefill", prompt[:whole], range(whole), block_causal(whole, size), keep=True)
        for start in range(whole, blocks * size, size):
            self._decode_block(canvas, start)
            done = canvas[len(prompt) : start + size]
            if options.eos_early_stop and any(token in options.stop_token_ids for token in done):
                self.result.stopped = True
                break
            if start + size < blocks * size:
                everyone = torch.ones(size, size, dtype=torch.bool)
                window = range(start, start + size)
                self._forward("commit", canvas[start : start + size], window, everyone, keep=True)
        return self.result

    def _decode_block(self, canvas: list[int], start: int) -> None:
        self.draws.step = after = 0
        while True:
            tokens = canvas[start : start + self.block]
            masked = [i for i, token in enumerate(tokens) if token == self.mask_id]
            if not masked:
                after += 1
                if after > self.options.max_post_steps:
                    return
            edited = self._step(canvas, start, tokens, masked)
            self.draws.step += 1
            if not masked and not edited:
                return

    def _step(self, canvas: list[int], start: int, tokens: list[int], masked: list[int]) -> bool:
        """One step, written into ``canvas``; whether it edited anything."""
        options, size = self.options, self.block
        everyone = torch.ones(size, size, dtype=torch.bool)
        logits = self._forward("draft", tokens, range(start, start + size), everyone, keep=False)
        drafted, confidence = self._sample(logits, start)
        edits = {
            i: drafted[i]
            for i, token in enumerate(tokens)
            if token != self.mask_id
            and start + i >= self.result.prompt_length
            and drafted[i] not in (token, self.mask_id)
            and confidence[i] > options.editing_threshold
        }
        high = [i for i in masked if confidence[i] > options.confidence_threshold]
        chosen: dict[int, int] = {}
        order: list[float] = []
        verified = False
        if options.decoder == "s2d2":
            span = [i for n, i in enumerate(masked) if i == masked[0] + n]
            p = transformed(logits, options)
            progress = size - len(masked) - max(self.result.prompt_length - start, 0)
            verified = self.router.decide(p, span, masked, high, progress, confidence)
            if verified:
                seen = [edits.get(i, drafted[i] if i in masked else token) for i, token in enumerate(tokens)]
                self._verify(seen, start, span, drafted, confidence, p, chosen, order)
        missing = min(options.num_to_transfer, len(masked)) - len(chosen)
        if missing > 0:
            left = [i for i in masked if i not in chosen]
            above = [i for i in high if i not in chosen]
            take = above if len(above) >= missing else by_confidence(left, confidence)[:missing]
            for i in sorted(take):
                chosen[i] = drafted[i]
                order.append(start + i)
        if masked:
            self.router.reward(len(chosen), verified)
        changes = [(start + i, tokens[i], token) for i, token in edits.items()]
        self.result.decoding_order.append({"edit": changes, "unmask": order})  # type: ignore[arg-type]
        for i, token in {**edits, **chosen}.items():
            canvas[start + i] = token
        return bool(edits)

    def _sample(self, logits: Tensor, start: int) -> tuple[list[int], Tensor]:
        """Drafted tokens, and the confidence in each."""
        if not self.options.do_sample or self.options.temperature < NEVER:
            law = wide(logits).softmax(-1)
            drafted = logits.argmax(-1)
        else:
            law = transformed(logits, self.options)
            drafted = self.draws.draft(range(start, start + self.block), law)
        return drafted.tolist(), law.gather(-1, drafted[:, None])[:, 0]

    def _verify(
        self,
        seen: list[int],
        start: int,
        span: list[int],
        drafted: list[int],
        confidence: Tensor,
        p: Tensor,
        chosen: dict[int, int],
        order: list[float],
    ) -> None:
        """Accept a prefix of the span and replace what follows it; the verifier reads the edited block."""
        options, size = self.options, self.block
        window = list(range(start, start + size)) * 2
        logits = self._forward("verify", seen + [self.mask_id] * size, window, two_halves(size), keep=False)[size:]
        q = transformed(logits, options)
        if options.acceptance == "greedy":
            accepted = [int(q[i].argmax()) == drafted[i] for i in span]
        else:
            ratios = [(q[i, drafted[i]] / confidence[i].clamp_min(1e-12)) for i in span]
            powers = [ratio.pow(options.ssd_ratio_tempering_factor).clamp_max(1.0) for ratio in ratios]
            draws = self.draws.accept([start + i for i in span])
            accepted = [bool(u < power) for u, power in zip(draws, powers, strict=True)]
        reject = accepted.index(False) if False in accepted else len(span)
        for i in span[:reject]:
            chosen[i] = drafted[i]
            order.append(-(start + i))
        if reject < len(span):
            i = span[reject]
            greedy = options.acceptance == "greedy"
            chosen[i] = int(q[i].argmax()) if greedy else self.draws.resample(start + i, residual(p[i], q[i]))
            order.append(-(start + i) - 0.5)

    def _forward(
        self, kind: str, tokens: Sequence[int], positions: Sequence[int], visible: Tensor, *, keep: bool
    ) -> Tensor:
        self.result.nfe += 1
        self.result.forwards[kind] += 1
        logits = self.context.forward(tokens, positions, visible, keep=keep)
        late = self.draws.step >= self.block and self.mask_id in tokens
        if self.options.suppress_mask_token or late:
            logits = logits.clone()  # behind the schedule always, or a model that predicts its mask would never end
            logits[:, self.mask_id] = -math.inf
        return logits


def decode(model: Any, prompt: Sequence[int], options: EditingOptions, draws: Draws, *, mask_id: int) -> Result:
    """Decode one prompt by full recompute."""
    return EditingOracle(model, options, draws, mask_id).run(prompt)


def published_tokens(result: Result, options: EditingOptions) -> list[int]:
    """The new tokens as published: within the budget, up to the first stop token, inclusive."""
    new = result.canvas[result.prompt_length :][: options.max_new_tokens]
    stop = next((i for i, token in enumerate(new) if token in options.stop_token_ids), len(new))
    return new[: stop + 1]
