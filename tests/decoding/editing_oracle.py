"""An independent account of LLaDA2 decoding: decided tokens may still be edited while their block is open.

The prompt is committed block-causally.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .oracle_inputs import Draws, Options, Result
from .oracle_loop import Account, first_run
from .oracle_maths import Router, two_halves


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
        self, draft_law: Tensor, span: list[int], masked: list[int], high: list[int], progress: int, confidence: Tensor
    ) -> bool:
        if span:
            return super().decide(draft_law, span, masked, high, progress, confidence)
        self.on = False
        return False


class EditingOracle(Account[EditingOptions]):
    """Blocks that are edited while they are open. One that no other follows is not committed."""

    commits_last_block = False

    def __init__(self, model: Any, options: EditingOptions, draws: Draws, mask_id: int) -> None:
        super().__init__(model, options, draws, mask_id)
        self.router = EditingRouter(options)

    def stopped(self, new: list[int]) -> bool:
        return self.options.eos_early_stop and super().stopped(new)

    def overdue(self, tokens: Sequence[int]) -> bool:
        return self.draws.step >= self.block and self.mask_id in tokens

    def decode_block(self, canvas: list[int], start: int) -> None:
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
        logits = self.forward("draft", tokens, range(start, start + size), everyone)
        drafted, confidence = self.sample(logits, range(start, start + size))
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
            span = first_run(masked)
            draft_law = self.law(logits)
            progress = size - len(masked) - max(self.result.prompt_length - start, 0)
            verified = self.router.decide(draft_law, span, masked, high, progress, confidence)
            if verified:
                seen = [edits.get(i, drafted[i] if i in masked else token) for i, token in enumerate(tokens)]
                self._verify(seen, start, span, drafted, confidence, draft_law, chosen, order)
        missing = min(options.num_to_transfer, len(masked)) - len(chosen)
        if missing > 0:
            left = [i for i in masked if i not in chosen]
            above = [i for i in high if i not in chosen]
            take = above if len(above) >= missing else self.top(missing, left, confidence)
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

    def _verify(
        self,
        seen: list[int],
        start: int,
        span: list[int],
        drafted: list[int],
        confidence: Tensor,
        draft_law: Tensor,
        chosen: dict[int, int],
        order: list[float],
    ) -> None:
        """Accept a prefix of the span and replace what follows it; the verifier reads the edited block."""
        size, window = self.block, list(range(start, start + self.block)) * 2
        target = self.law(self.forward("verify", seen + [self.mask_id] * size, window, two_halves(size))[size:])
        accepted, rejected, replacement = self.walk(start, span, drafted, confidence, draft_law, target)
        for i in accepted:
            chosen[i] = drafted[i]
            order.append(-(start + i))
        if rejected is not None and replacement is not None:
            chosen[rejected] = replacement
            order.append(-(start + rejected) - 0.5)


def decode(model: Any, prompt: Sequence[int], options: EditingOptions, draws: Draws, *, mask_id: int) -> Result:
    """Decode one prompt by full recompute."""
    return EditingOracle(model, options, draws, mask_id).run(prompt)


def published_tokens(result: Result, options: EditingOptions) -> list[int]:
    """The new tokens as published: within the budget, up to the first stop token, inclusive."""
    new = result.canvas[result.prompt_length :][: options.max_new_tokens]
    stop = next((i for i, token in enumerate(new) if token in options.stop_token_ids), len(new))
    return new[: stop + 1]
