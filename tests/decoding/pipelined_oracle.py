"""An independent account of pipelined decoding (D2F): several blocks after the prompt in the making at once.

A block sees the prompt and every block up to itself, so what is decided never depends on how far the pipeline reaches.
Nothing is committed: every forward recomputes the whole text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .oracle_inputs import Draws, Options, Result
from .oracle_loop import Account
from .oracle_maths import drafts as drafted_from


@dataclass(frozen=True)
class PipelinedOptions(Options):
    """The options of the pipelined scheme; those of :class:`Options` that it does not have stay at their defaults."""

    decoder: str = "s2d2"  # or pipelined
    block_add_threshold: float = 0.1
    decoded_token_threshold: float = 0.5
    confidence_threshold: float = 0.9  # published as skip_threshold
    margin_confidence: bool = False
    neg_entropy: bool = False
    temperature: float = 0.0
    target_block_size: int = 1
    min_tokens_per_step: int = 1
    ssd_partial_ar_span: int = 0
    ssd_threshold_draft_confidence: bool = False
    draft_confidence_threshold: float | None = None
    verify_confidence_threshold: float | None = None


@dataclass
class Drafted:
    """A draft at one masked position: the token, its probability, the score it is ranked by, and what it came from."""

    token: int
    probability: Tensor
    score: Tensor
    logits: Tensor


class PipelinedOracle(Account[PipelinedOptions]):
    """Blocks side by side; ``shifted``: the model's row t-1 predicts position t."""

    def __init__(self, model: Any, options: PipelinedOptions, draws: Draws, mask_id: int, shifted: bool) -> None:
        super().__init__(model, options, draws, mask_id)
        self.shifted = shifted

    def overdue(self, tokens: Sequence[int]) -> bool:
        return self.stalled

    def run(self, prompt: Sequence[int]) -> Result:
        options = self.options
        self.tokens, self.prompt = list(prompt), len(prompt)
        self.result = Result(self.tokens, self.prompt)
        self.ready: set[int] = set()  # blocks that may be forced on
        self.stalled = False  # the mask was predicted where something had to be decided
        limit = math.ceil(options.max_new_tokens / self.block)
        ended = False
        while True:
            opened = len(self.blocks())
            if opened < limit and not ended and self.share(opened - 1) >= options.block_add_threshold:
                self.tokens += [self.mask_id] * self.block
            for block in range(-1, len(self.blocks()) - 1):
                if self.share(block) >= options.decoded_token_threshold:
                    self.ready.add(block + 1)
            if self.mask_id not in self.tokens:
                return self.result
            self.draws.step = len(self.result.decoding_order)
            decided, order = self.step()
            for position, token in decided.items():
                self.tokens[position] = token
                ended = ended or token in options.stop_token_ids
            self.result.decoding_order.append(order)
            self.stalled = self.stalled or all(token == self.mask_id for token in decided.values())

    # where things stand

    def blocks(self) -> list[range]:
        return [range(start, start + self.block) for start in range(self.prompt, len(self.tokens), self.block)]

    def share(self, block: int) -> float:
        """Decided share of a block; the prompt, block -1, is decided."""
        if block < 0:
            return 1.0
        return sum(self.tokens[i] != self.mask_id for i in self.blocks()[block]) / self.block

    # one iteration

    def step(self) -> tuple[dict[int, int], list[Any]]:
        first_open = self.first_undecided_block()  # what is decided in front of it is committed by this draft
        masked = [[i for i in block if self.tokens[i] == self.mask_id] for block in self.blocks()]
        rows = self.draft_forward()
        if self.options.decoder == "pipelined":
            drafts: dict[int, Drafted] = {}
            for places in masked:
                drafts.update(self.draft(places, rows))
            return self.denoise(masked, drafts)
        drafts = self.draft([i for places in masked for i in places], rows)
        span: list[int] = []
        for i in range(self.blocks()[first_open].start, len(self.tokens)):
            if i in drafts:
                span.append(i)
            elif span:
                break
        decided: dict[int, int] = {}
        order: list[Any] = []
        if self.routed(span, drafts):
            decided, order = self.verify(span, drafts, self.blocks()[first_open].start)
        self.top_up(masked, drafts, decided, order)
        return decided, order

    def routed(self, span: list[int], drafts: dict[int, Drafted]) -> bool:
        """Whether the span is worth verifying; the span comes first among the drafts."""
        confidence = torch.stack([draft.probability for draft in drafts.values()])
        high = [i for i in drafts if drafts[i].probability > self.options.confidence_threshold]
        laws = torch.stack([self.law(draft.logits) for draft in drafts.values()])
        return self.router.decide(laws, list(range(len(span))), list(drafts), high, 0, confidence)

    def first_undecided_block(self) -> int:
        return next(n for n in range(len(self.blocks())) if self.share(n) < 1)

    def denoise(self, masked: list[list[int]], drafts: dict[int, Drafted]) -> tuple[dict[int, int], list[Any]]:
        """Without a verifier: everything confident, and in a block that may be forced on the best if nothing is."""
        decided: dict[int, int] = {}
        order: list[Any] = []
        for block, places in enumerate(masked):
            high = [i for i in places if drafts[i].probability > self.options.confidence_threshold]
            if not high and places and block in self.ready:
                best = max(places, key=lambda i: float(drafts[i].score))
                decided[best] = drafts[best].token
                order.append(-best)
            for i in high:
                decided[i] = drafts[i].token
                order.append(i)
        return decided, order

    def top_up(
        self, masked: list[list[int]], drafts: dict[int, Drafted], decided: dict[int, int], order: list[Any]
    ) -> None:
        """Blocks that may be forced on get their minimum of tokens, or all that are confident if these are enough."""
        least = max(self.options.min_tokens_per_step, 1)
        for block, places in enumerate(masked):
            left = [i for i in places if i not in decided]
            need = min(least - (len(places) - len(left)), len(left))
            if block not in self.ready or need <= 0:
                continue
            ranked = sorted(left, key=lambda i: -float(drafts[i].score))
            high = [i for i in ranked if drafts[i].score >= self.options.confidence_threshold]
            for i in high if len(high) >= need else ranked[:need]:
                decided[i] = drafts[i].token
                order.append(-i)

    def verify(self, span: list[int], drafts: dict[int, Drafted], start: int) -> tuple[dict[int, int], list[Any]]:
        options = self.options
        draft_law, target = [self.law(drafts[i].logits) for i in span], self.verifier_laws(span, drafts, start)
        token = [drafts[i].token for i in span]
        passes = self.passes(span, token, [drafts[i].probability for i in span], target)
        if options.ssd_threshold_draft_confidence:
            given = options.draft_confidence_threshold
            bar = options.confidence_threshold if given is None else given
            passes = [ok and bool(drafts[i].probability > bar) for i, ok in zip(span, passes, strict=True)]
        rejected = passes.index(False) if False in passes else len(span)
        decided = {i: drafts[i].token for i in span[:rejected]}
        order: list[Any] = list(decided)
        if rejected == len(span):
            return decided, order
        place, bar = span[rejected], options.verify_confidence_threshold
        if options.allow_resample and (bar is None or float(target[rejected][token[rejected]]) >= bar):
            replacement = self.replacement(place, draft_law[rejected], target[rejected])
            assert replacement is not None
            decided[place] = replacement
            order.append(place + 0.5)
        if options.ssd_partial_ar_span and self.result.forwards["draft"] > 1:
            run: list[int] = []
            for ok, i in [*zip(passes[rejected:], span[rejected:], strict=True), (False, -1)]:
                if ok:
                    run.append(i)
                    continue
                if len(run) >= options.ssd_partial_ar_span:
                    decided.update({j: drafts[j].token for j in run})
                    order += run
                run = []
        return decided, order

    # forwards

    def draft_forward(self) -> Tensor:
        group = torch.tensor(
            [-1 if i < self.prompt else (i - self.prompt) // self.block for i in range(len(self.tokens))]
        )
        return self.forward("draft", self.tokens, range(len(self.tokens)), group[:, None] >= group[None, :])

    def verifier_laws(self, span: list[int], drafts: dict[int, Drafted], start: int) -> list[Tensor]:
        """The verifier's law at every place of the span, blocks of ``target_block_size`` counted from the prompt."""
        filled = [drafts[i].token if i in drafts else token for i, token in enumerate(self.tokens)]
        n, target = len(filled), self.options.target_block_size
        group = torch.tensor([-1 if i < self.prompt else (i - self.prompt) // self.block for i in range(n)])
        visible = group[:, None] >= group[None, :]
        fine = torch.div(torch.arange(n) - self.prompt, target, rounding_mode="floor")
        visible[start:] = fine[start:, None] >= fine[None, :]
        visible[start:, : self.prompt] = True
        if self.shifted:
            rows = self.forward("verify", filled, range(n), visible)
            return [self.law(rows[i - 1]) for i in span]
        both = torch.zeros(2 * n - start, 2 * n - start, dtype=torch.bool)
        both[:n, :n] = visible
        both[n:, :n] = fine[start:, None] > fine[None, :]
        both[n:, : self.prompt] = True
        both[n:, n:] = fine[start:, None] == fine[None, start:]
        masks = [self.mask_id] * (n - start)
        rows = self.forward("verify", filled + masks, [*range(n), *range(start, n)], both)
        return [self.law(rows[n + i - start]) for i in span]

    # probabilities

    def draft(self, places: list[int], rows: Tensor) -> dict[int, Drafted]:
        """Draft a token at every place, in one draw."""
        if not places:
            return {}
        logits = rows[[i - 1 if self.shifted else i for i in places]]
        tokens, probability = self.sample(logits, places)
        law, score = drafted_from(logits, self.options)[0], probability
        if self.options.margin_confidence:
            top = law.topk(2, dim=-1).values
            score = top[:, 0] - top[:, 1]
        if self.options.neg_entropy:
            score = (law * (law + 1e-10).log()).sum(-1)
        return {i: Drafted(tokens[n], probability[n], score[n], logits[n]) for n, i in enumerate(places)}


def decode_pipelined(
    model: Any, prompt: Sequence[int], options: PipelinedOptions, draws: Draws, *, mask_id: int, shifted: bool
) -> Result:
    """Decode one prompt by full recompute."""
    return PipelinedOracle(model, options, draws, mask_id, shifted).run(prompt)
