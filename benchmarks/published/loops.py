"""What the published loops do, step by step, on stock transformers: batch one, a cache that grows by concatenation, a
mask for every forward, the head on every row, decisions read by the host one by one.

Operations are those of the published code in number and kind; where that wastes much more than it needs to (masks of
the longest context, keys rotated anew in every forward, a read of the device per layer), these loops do less.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from s2d2_lmeval.runtime.cache import cache_argument


class GrowingCache(DynamicCache):
    """Keys and values, concatenated in every forward; kept only if ``stores``."""

    stores = True

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **more: Any) -> Any:
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if self.stores or layer is None or not layer.is_initialized:
            updated = super().update(key_states, value_states, layer_idx, *args, **more)
            if not self.stores:
                self.layers[layer_idx].reset()
            return updated
        return torch.cat([layer.keys, key_states], dim=-2), torch.cat([layer.values, value_states], dim=-2)


class Loop(ABC):
    """A model and its cache. The answers that are compared have no ``stop_id``, but loops look for it."""

    def __init__(self, model: PreTrainedModel, mask_id: int, stop_id: int) -> None:
        self.model, self.mask_id, self.stop_id = model, mask_id, stop_id
        self.cache = GrowingCache(config=model.config)
        self._cache_name = cache_argument(model)

    @abstractmethod
    def generate(self, prompt: list[int], new: int) -> list[int]:
        """``new`` tokens after ``prompt``, or a few more."""

    def forward(self, tokens: Tensor, positions: Tensor, visible: Tensor, stores: bool = False, **more: Any) -> Any:
        """A forward of ``tokens`` (1, n), which see of the cache and each other what ``visible`` (n, C + n) says."""
        self.cache.stores = stores
        given: dict[str, Any] = {"position_ids": positions, "attention_mask": visible[None, None], "use_cache": True}
        return self.model(input_ids=tokens, **given, **{self._cache_name: self.cache}, **more)


def block_causal(length: int, block: int) -> Tensor:
    """Who sees whom (length, length) in blocks from position 0."""
    number = torch.arange(length) // block
    return number[None] <= number[:, None]


def sample(logits: Tensor, temperature: float = 0.0) -> tuple[Tensor, Tensor]:
    """Tokens and their probabilities; the argmax, at temperature one, where there is none."""
    shape, logits = logits.shape[:-1], logits.reshape(-1, logits.shape[-1])
    if temperature > 0:
        p = (logits / temperature).float().softmax(-1)
        tokens = torch.multinomial(p, 1)
    else:
        tokens = logits.argmax(-1, keepdim=True)
        p = logits.float().softmax(-1)
    return tokens.view(shape), p.gather(-1, tokens).view(shape)


def transfer_counts(block: int, steps: int) -> Tensor:
    """How many tokens each of the ``steps`` decides."""
    counts = torch.zeros(steps, dtype=torch.long) + block // steps
    counts[: block % steps] += 1
    return counts


def most_confident(confidence: Tensor, masks: Tensor, count: int, threshold: float | None) -> Tensor:
    """The ``masks`` (1, B) that are decided: all above the ``threshold`` if there is one and they are enough, else the
    best ``count``.
    """
    among = torch.where(masks, confidence, -torch.inf)
    chosen = torch.zeros_like(masks)
    for row in range(len(among)):
        if threshold is not None:
            high = among[row] > threshold
            if high.sum() >= count:
                chosen[row] = high
                continue
        _, best = among[row].topk(count)
        chosen[row, best] = True
    return chosen


class Sdar(Loop):
    """SDAR: blocks one after the other, each committed by a forward of its own."""

    def __init__(
        self,
        *args: Any,
        block: int,
        threshold: float | None = 0.85,
        temperature: float = 0.0,
        causal: bool = False,
        verifies: bool = False,
    ) -> None:
        super().__init__(*args)
        self.block, self.threshold, self.temperature = block, threshold, temperature
        self.causal, self.verifies = causal, verifies

    def generate(self, prompt: list[int], new: int) -> list[int]:
        size, total = self.block, -(-(len(prompt) + new) // self.block) * self.block
        mask, positions = block_causal(total, size), torch.arange(total)[None]
        stored = torch.ones(total, total, dtype=torch.bool).tril() if self.causal else mask
        x = torch.full((1, total), self.mask_id)
        x[:, : len(prompt)] = torch.tensor(prompt)
        first = len(prompt) // size * size
        if first:
            self.forward(x[:, :first], positions[:, :first], stored[:first, :first], stores=True)
        counts = transfer_counts(size, size)
        for start in range(first, total, size):
            end = start + size
            block, where, drafts = x[:, start:end].clone(), positions[:, start:end], mask[start:end, :end].clone()
            for step in range(size + 1):
                masks = block == self.mask_id
                if masks.sum() == 0:
                    self.forward(block, where, stored[start:end, :end], stores=True)
                    break
                if self.verifies and self.causal:
                    decided = first_run(masks[0])[0]
                    drafts[:decided] = stored[start : start + decided, :end]
                logits = self.forward(block, where, drafts).logits
                tokens, confidence = sample(logits, self.temperature)
                self.step(block, masks, tokens, confidence, logits, int(counts[step]), where, start)
            x[:, start:end] = block
            if self.stop_id in x[:, len(prompt) :]:
                break
        return x[0, len(prompt) :].tolist()

    def step(
        self,
        block: Tensor,
        masks: Tensor,
        tokens: Tensor,
        confidence: Tensor,
        logits: Tensor,
        count: int,
        where: Tensor,
        start: int,
    ) -> None:
        """Decide some of the ``masks`` of ``block`` (1, B), in place."""
        decided = 0
        if self.verifies:
            decided = self.verify(block, masks, tokens, confidence, logits, where, start)
            masks = block == self.mask_id
        left = min(count, int((block == self.mask_id).sum()) + decided) - decided
        if left > 0:
            chosen = most_confident(confidence, masks, left, self.threshold)
            block[chosen] = tokens[chosen]

    def verify(
        self,
        block: Tensor,
        masks: Tensor,
        tokens: Tensor,
        confidence: Tensor,
        logits: Tensor,
        where: Tensor,
        start: int,
    ) -> int:
        """Verify the first run of masks at block size one; how many tokens that decided."""
        size, begin, end = self.block, *first_run(masks[0])
        filled = torch.where(masks, tokens, block)
        both = torch.cat([filled, torch.full_like(block, self.mask_id)], dim=1)
        visible = torch.zeros(2 * size, start + 2 * size, dtype=torch.bool)
        visible[:, :start] = True
        lower = torch.ones(size, size, dtype=torch.bool)
        visible[:size, start : start + size] = lower.tril()
        visible[size:, start : start + size] = lower.tril(-1)
        visible[size:, start + size :] = torch.eye(size, dtype=torch.bool)
        law = self.forward(both, torch.cat([where, where], dim=1), visible).logits[0, size + begin : size + end]
        q, drafted = law.float().softmax(-1), tokens[0, begin:end]
        ratio = (q.gather(-1, drafted[:, None])[:, 0] / confidence[0, begin:end].clamp_min(1e-12)).clamp_max(1.0)
        accepted = torch.rand(end - begin) < ratio
        refused = next((at for at in range(end - begin) if not accepted[at].item()), end - begin)
        block[0, begin : begin + refused] = drafted[:refused]
        if refused == end - begin:
            return refused
        p = logits[0, begin + refused].float().softmax(-1)
        residual = (q[refused] - p).clamp_min(0)
        mass = residual.sum().item()
        left = residual / mass if mass > 0 and math.isfinite(mass) else q[refused]
        block[0, begin + refused] = torch.multinomial(left, 1)[0]
        return refused + 1


def first_run(masks: Tensor) -> tuple[int, int]:
    """Where the first run of ``masks`` (B,) begins and ends, looked for place by place."""
    begin = next(at for at in range(len(masks)) if masks[at].item())
    return begin, next((at for at in range(begin, len(masks)) if not masks[at].item()), len(masks))


class FastDllm(Loop):
    """Fast-dLLM v2: shifted logits, blocks in sub-blocks; the last logits of a committed block begin the next."""

    def __init__(self, *args: Any, block: int, part: int, threshold: float) -> None:
        super().__init__(*args)
        self.block, self.part, self.threshold = block, part, threshold

    def run(self, tokens: Tensor, before: int, stores: bool) -> Tensor:
        """Logits of ``tokens`` (1, n) after ``before`` cached ones; the mask is made anew for every forward."""
        at = torch.arange(before, before + tokens.shape[1])
        visible = at[:, None] // self.block >= torch.arange(before + tokens.shape[1])[None] // self.block
        logits: Tensor = self.forward(tokens, at[None], visible, stores).logits
        return logits

    def generate(self, prompt: list[int], new: int) -> list[int]:
        size, mask, x = self.block, self.mask_id, torch.tensor([prompt])
        whole = len(prompt) // size * size
        if len(prompt) > size:
            logits = self.run(x[:, :whole], 0, stores=True)
            if len(prompt) % size == 0:
                x = torch.cat([x, logits[:, -1:].argmax(-1)], dim=1)
        for _ in range(new // size):
            if self.stop_id in x[:, len(prompt) :]:
                break
            start = x.shape[1] // size * size
            x = torch.cat([x, torch.full((1, start + size - x.shape[1]), mask)], dim=1)
            while True:
                masks = x[:, -size:] == mask
                if self.stop_id in x[:, len(prompt) :]:
                    break
                if masks.sum() == 0:
                    logits = self.run(x[:, -size:], start, stores=True)
                    x = torch.cat([x, logits[:, -1:].argmax(-1)], dim=1)
                    break
                for left in range(0, size, self.part):
                    places = slice(left - size, (left + self.part - size) or None)
                    while (x[:, places] == mask).sum() > 0 and self.stop_id not in x[:, len(prompt) :]:
                        self.denoise(x, places, start)
        return x[0, len(prompt) :].tolist()

    def denoise(self, x: Tensor, places: slice, start: int) -> None:
        """Decide every confident mask of the sub-block ``places``, and the most confident, in place."""
        logits = self.run(x[:, -self.block :], start, stores=False)
        logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)[:, places]
        p = logits.softmax(-1)
        tokens, masks = p.argmax(-1), x[:, places] == self.mask_id
        confidence = p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).where(masks, -torch.inf)
        chosen = confidence > self.threshold
        chosen[torch.arange(len(x)), confidence.argmax(-1)] = True
        chosen = chosen & masks
        x[:, places][chosen] = tokens[chosen]


class Llada2(Loop):
    """LLaDA2: masks are filled, and decided tokens edited, from the same forward."""

    def __init__(self, *args: Any, block: int, threshold: float, editing: float, posts: int) -> None:
        super().__init__(*args)
        self.block, self.threshold, self.editing, self.posts = block, threshold, editing, posts

    def generate(self, prompt: list[int], new: int) -> list[int]:
        size, total = self.block, -(-(len(prompt) + new) // self.block) * self.block
        mask, positions = block_causal(total, size), torch.arange(total)[None]
        x = torch.full((1, total), self.mask_id)
        x[:, : len(prompt)] = torch.tensor(prompt)
        first = len(prompt) // size * size
        given = torch.arange(total)[None] < len(prompt)
        if first:
            self.forward(x[:, :first], positions[:, :first], mask[:first, :first], stores=True)
        for start in range(first, total, size):
            end = start + size
            block, where, visible = x[:, start:end].clone(), positions[:, start:end], mask[start:end, :end]
            posts = 0
            while True:
                masks = block == self.mask_id
                filled = masks.sum() == 0
                posts += int(filled)
                if posts > self.posts:
                    break
                if not self.step(block, masks, where, visible, given[:, start:end]) and filled:
                    break
            x[:, start:end] = block
            if (x[:, len(prompt) : end] == self.stop_id).any():
                break
            if end < total:
                self.forward(block, where, visible, stores=True)
        return x[0, len(prompt) : len(prompt) + new].tolist()

    def step(self, block: Tensor, masks: Tensor, where: Tensor, visible: Tensor, given: Tensor) -> bool:
        """Fill and edit ``block`` (1, B) in place; whether anything was edited."""
        tokens, confidence = sample(self.forward(block, where, visible).logits)
        chosen = torch.zeros_like(masks)
        if masks.sum() > 0:
            chosen = most_confident(confidence, masks, 1, self.threshold)
        edited = (~masks & ~given) & (confidence > self.editing) & (tokens != block)
        anything = bool(edited.any())
        if chosen.any() or anything:
            every = chosen | edited
            block[every] = tokens[every]
        return anything


@dataclass
class Block:
    """A block of D2F's pipeline: its masks, and whether it may be forced on."""

    start: int
    end: int
    masks: int
    state: str
    forced: bool = False

    @property
    def decided(self) -> float:
        """The share of its tokens."""
        return 1 - self.masks / (self.end - self.start)


class D2f(Loop):
    """D2F on LLaDA: a pipeline of blocks after the prompt."""

    def __init__(self, *args: Any, block: int, threshold: float, add: float, decoded: float) -> None:
        super().__init__(*args)
        self.block, self.threshold, self.add, self.decoded = block, threshold, add, decoded

    def generate(self, prompt: list[int], new: int) -> list[int]:
        size, mask, length = self.block, self.mask_id, len(prompt)
        total = length + new
        number = (torch.arange(total) - length).div(size, rounding_mode="floor").clamp_min(-1)
        everything = number[None] <= number[:, None]
        x = torch.tensor([prompt])
        blocks = [Block(0, length, 0, "to_cache")]
        while True:
            if len(blocks) - 1 < new // size and blocks[-1].decided >= self.add:
                x = torch.cat([x, torch.full((1, size), mask)], dim=1)
                blocks.append(Block(x.shape[1] - size, x.shape[1], size, "active"))
            for before, after in pairwise(blocks):
                after.forced |= before.decided >= self.decoded
            if (x == mask).sum() == 0 or self.stop_id in x[:, length:]:
                return x[0, length:].tolist()
            ready = [one for one in blocks if one.state == "to_cache"]
            start = ready[0].start if ready else next(one.start for one in blocks if one.state == "active")
            stored = sum(one.end - one.start for one in ready)
            at = torch.arange(start, x.shape[1])[None]
            visible = everything[start : x.shape[1], : x.shape[1]]
            logits = self.forward(x[:, start:], at, visible, stores=bool(stored)).logits
            if stored:
                self.cache.crop(-(x.shape[1] - start - stored))
                for one in ready:
                    one.state = "in_cache"
            for one in blocks:
                if one.state == "active":
                    self.decide(x, one, logits, start)
            for place, one in enumerate(blocks):
                over = one.state == "active" and one.masks == 0
                if over and all(earlier.state != "active" for earlier in blocks[:place]):
                    one.state = "to_cache"

    def decide(self, x: Tensor, one: Block, logits: Tensor, start: int) -> None:
        """Decide the confident masks of a block; of none the best, if the block may be forced on."""
        masks = (x[0, one.start : one.end] == self.mask_id).nonzero().squeeze(-1)
        if not len(masks):
            return
        law = logits[0, one.start - start : one.end - start][masks].float().softmax(-1)
        confidence, tokens = law.max(-1)
        chosen = (confidence > self.threshold).nonzero().squeeze(-1)
        if not len(chosen) and one.forced:
            _, chosen = confidence.topk(1)
        if len(chosen):
            x[0, one.start + masks[chosen]] = tokens[chosen]
            one.masks -= len(chosen)
