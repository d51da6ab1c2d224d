"""Denoising by confidence, without a cache: a forward over the whole text in every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Denoising:
    """Greedy denoising of ``new`` tokens in blocks of ``block``, ``at_once`` of them, with edits above ``editing`` if
    that is given. Blocks begin where position + ``offset`` is a multiple; the last one ends with the last token if
    ``short``.
    """

    mask: int
    new: int
    block: int = 4
    threshold: float = 0.35
    at_once: int = 1
    offset: int = 0
    short: bool = False
    editing: float | None = None
    post_steps: int = 0

    @torch.no_grad()
    def run(self, model: Any, prompt: Sequence[int]) -> tuple[list[int], int]:
        """The new tokens after ``prompt``, and the forwards it took."""
        size, total = self.block, len(prompt) + self.new
        stop = total if self.short else -(-(total + self.offset) // size) * size - self.offset
        canvas = [*prompt, *[self.mask] * (stop - len(prompt))]
        start, forwards = (len(prompt) + self.offset) // size * size - self.offset, 0
        while start < stop:
            own, after = range(max(start, 0), min(start + size, stop)), 0
            while True:
                filled = self.mask not in (canvas[at] for at in own)
                after += filled
                if filled and after > self.post_steps:
                    break
                changed = self._step(model, prompt, canvas, own, min(start + self.at_once * size, stop))
                forwards += 1
                if filled and not changed & {*own}:
                    break
            start += size
        return canvas[len(prompt) : total], forwards

    def _step(self, model: Any, prompt: Sequence[int], canvas: list[int], own: range, end: int) -> set[int]:
        """One step, written into ``canvas``; the places that were edited."""
        block = (torch.arange(end) + self.offset) // self.block
        visible = (block[:, None] >= block[None])[None, None]
        logits = model(input_ids=torch.tensor([canvas[:end]]), attention_mask=visible).logits[0]
        logits[:, self.mask] = -torch.inf
        confidence, best = logits.softmax(-1).max(-1)
        masks = {at for at in range(own.start, end) if canvas[at] == self.mask}
        chosen = {at for at in masks if confidence[at] > self.threshold}
        if masks & {*own} and not chosen & {*own}:
            chosen.add(max(sorted(masks & {*own}), key=lambda at: confidence[at].item()))
        edits: set[int] = set()
        if self.editing is not None:
            others = set(range(max(own.start, len(prompt)), end)) - masks
            edits = {at for at in others if best[at] != canvas[at] and confidence[at] > self.editing}
        for at in chosen | edits:
            canvas[at] = int(best[at])
        return edits
