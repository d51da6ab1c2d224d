"""An independent account of pipelined decoding (D2F): one sequence, no cache, every forward recomputes the whole text.

Blocks stand behind the prompt, several of them in the making at once. A block sees the prompt and every block up to
itself, so what is decided never depends on how far the pipeline reaches. The engine is tested against this file, so
nothing is shared with it: the rules are written out once more, position by position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .oracle_inputs import Draws
from .oracle_maths import Router

NEVER = 1.0e-6  # a temperature below this means "take the arg-max"


@dataclass(frozen=True)
class PipelinedOptions:
    """The options of the pipelined scheme under their published names, or the nearest of this package."""

    decoder: str = "s2d2"  # or pipelined
    max_new_tokens: int = 32
    block_length: int = 4
    block_add_threshold: float = 0.1
    decoded_token_threshold: float = 0.5
    confidence_threshold: float = 0.9  # published as skip_threshold
    margin_confidence: bool = False
    neg_entropy: bool = False
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    do_sample: bool = False
    filter_as_published: bool = False  # nucleus before top-k, and both at temperature zero too
    stop_token_ids: tuple[int, ...] = ()
    suppress_mask_token: bool = True
    acceptance: str = "stochastic"
    allow_resample: bool = True
    ssd_ratio_tempering_factor: float = 1.0
    do_verify_policy: str = "mask_span_length"
    min_ssd_span_length: int = 1
    legacy_ssd_span_strategy: bool = False
    do_verify_score_threshold: float = -1.0
    hysteresis_threshold_on: float = 0.0
    hysteresis_threshold_off: float = -1.0
    do_verify_score_type: str = "difference_dynamic"
    score_penalty_coef: float = 2.0
    token_acceptance_estimator: str = "hard_margin_threshold"
    ssd_confidence_margin_threshold: float = 0.05
    ssd_entropy_temperature: float = 1.0
    ssd_entropy_threshold: float = 0.5
    ssd_confidence_power: float = 1.0
    ssd_confidence_margin_coef: float = 1.0
    target_block_size: int = 1
    min_tokens_per_step: int = 1
    ssd_partial_ar_span: int = 0
    ssd_threshold_draft_confidence: bool = False
    draft_confidence_threshold: float | None = None
    verify_confidence_threshold: float | None = None


@dataclass
class PipelinedResult:
    """What a run produced; ``canvas`` is the prompt and every block that was opened."""

    canvas: list[int]
    prompt_length: int
    drafts: int = 0
    verifies: int = 0
    decoding_order: list[list[Any]] = field(default_factory=list)

    @property
    def nfe(self) -> int:
        return self.drafts + self.verifies

    def new_tokens(self, stop_token_ids: Sequence[int], limit: int | None = None) -> list[int]:
        """The new tokens before the first stop id, at most ``limit`` of them."""
        new = self.canvas[self.prompt_length :][:limit]
        return new[: next((i for i, token in enumerate(new) if token in stop_token_ids), len(new))]


@dataclass
class Drafted:
    """A draft at one masked position: the token, its probability, the score it is ranked by, and what it came from."""

    token: int
    probability: Tensor
    score: Tensor
    logits: Tensor


class PipelinedOracle:
    """``model`` is a plain causal language model in eval mode; ``shifted``: its row t-1 predicts position t."""

    def __init__(self, model: Any, options: PipelinedOptions, draws: Draws, mask_id: int, shifted: bool) -> None:
        self.model, self.options, self.draws = model, options, draws
        self.mask_id, self.shifted = mask_id, shifted
        self.size = options.block_length

    def run(self, prompt: Sequence[int]) -> PipelinedResult:
        options = self.options
        self.tokens, self.prompt = list(prompt), len(prompt)
        self.result = PipelinedResult(self.tokens, self.prompt)
        self.router = Router(options)  # type: ignore[arg-type]  # reads the routing options only
        self.ready: set[int] = set()  # blocks that may be forced on
        self.stalled = False  # the mask was predicted where something had to be decided
        limit = math.ceil(options.max_new_tokens / self.size)
        ended = False
        while True:
            opened = len(self.blocks())
            if opened < limit and not ended and self.share(opened - 1) >= options.block_add_threshold:
                self.tokens += [self.mask_id] * self.size
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
        return [range(start, start + self.size) for start in range(self.prompt, len(self.tokens), self.size)]

    def share(self, block: int) -> float:
        """Decided share of a block; the prompt, block -1, is decided."""
        if block < 0:
            return 1.0
        return sum(self.tokens[i] != self.mask_id for i in self.blocks()[block]) / self.size

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
        p, q = [self.law(drafts[i].logits) for i in span], self.verifier_laws(span, drafts, start)
        token = [drafts[i].token for i in span]
        if options.acceptance == "greedy":
            passes = [int(row.argmax()) == t for row, t in zip(q, token, strict=True)]
        else:
            ratio = [
                (new[t] / drafts[i].probability.clamp_min(1e-12)).pow(options.ssd_ratio_tempering_factor).clamp_max(1.0)
                for i, t, new in zip(span, token, q, strict=True)
            ]
            passes = [bool(u < r) for u, r in zip(self.draws.accept(span), ratio, strict=True)]
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
        if options.allow_resample and (bar is None or float(q[rejected][token[rejected]]) >= bar):
            if options.acceptance == "greedy":
                decided[place] = int(q[rejected].argmax())
            else:
                decided[place] = self.draws.resample(place, leftover(p[rejected], q[rejected]))
            order.append(place + 0.5)
        if options.ssd_partial_ar_span and self.result.drafts > 1:
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
        self.result.drafts += 1
        group = torch.tensor(
            [-1 if i < self.prompt else (i - self.prompt) // self.size for i in range(len(self.tokens))]
        )
        return self.forward(self.tokens, range(len(self.tokens)), group[:, None] >= group[None, :])

    def verifier_laws(self, span: list[int], drafts: dict[int, Drafted], start: int) -> list[Tensor]:
        """The verifier's law at every place of the span, blocks of ``target_block_size`` counted from the prompt."""
        self.result.verifies += 1
        filled = [drafts[i].token if i in drafts else token for i, token in enumerate(self.tokens)]
        n, target = len(filled), self.options.target_block_size
        group = torch.tensor([-1 if i < self.prompt else (i - self.prompt) // self.size for i in range(n)])
        visible = group[:, None] >= group[None, :]
        fine = torch.div(torch.arange(n) - self.prompt, target, rounding_mode="floor")
        visible[start:] = fine[start:, None] >= fine[None, :]
        visible[start:, : self.prompt] = True
        if self.shifted:
            rows = self.forward(filled, range(n), visible)
            return [self.law(rows[i - 1]) for i in span]
        both = torch.zeros(2 * n - start, 2 * n - start, dtype=torch.bool)
        both[:n, :n] = visible
        both[n:, :n] = fine[start:, None] > fine[None, :]
        both[n:, : self.prompt] = True
        both[n:, n:] = fine[start:, None] == fine[None, start:]
        masks = [self.mask_id] * (n - start)
        rows = self.forward(filled + masks, [*range(n), *range(start, n)], both)
        return [self.law(rows[n + i - start]) for i in span]

    def forward(self, tokens: Sequence[int], positions: Sequence[int], visible: Tensor) -> Tensor:
        where = torch.tensor([list(positions)])
        with torch.no_grad():
            answer = self.model(
                input_ids=torch.tensor([list(tokens)]), position_ids=where, attention_mask=visible[None, None]
            )
        rows = answer.logits[0].clone()
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if self.options.suppress_mask_token or self.stalled:
            rows[:, self.mask_id] = -math.inf
        return rows

    # probabilities

    def draft(self, places: list[int], rows: Tensor) -> dict[int, Drafted]:
        """Draft a token at every place, in one draw."""
        if not places:
            return {}
        logits = rows[[i - 1 if self.shifted else i for i in places]]
        sampled = self.options.do_sample and self.options.temperature >= NEVER
        if sampled:
            law = self.law(logits)
            tokens = self.draws.draft(places, law)
        else:
            law = self.law(logits) if self.options.filter_as_published else logits.softmax(-1)
            tokens = logits.argmax(-1)
        probability = law.gather(-1, tokens[:, None])[:, 0]
        score = probability
        if self.options.margin_confidence:
            top = law.topk(2, dim=-1).values
            score = top[:, 0] - top[:, 1]
        if self.options.neg_entropy:
            score = (law * (law + 1e-10).log()).sum(-1)
        return {i: Drafted(int(tokens[n]), probability[n], score[n], logits[n]) for n, i in enumerate(places)}

    def law(self, logits: Tensor) -> Tensor:
        """Probabilities after temperature and filters."""
        options = self.options
        if options.temperature < NEVER:
            if not options.filter_as_published:
                return logits.softmax(-1)
        else:
            logits = logits / options.temperature
        for cut in ("nucleus", "top") if options.filter_as_published else ("top", "nucleus"):
            if cut == "top" and options.top_k > 0:
                smallest = logits.topk(min(options.top_k, logits.shape[-1]), dim=-1).values[..., -1:]
                logits = logits.masked_fill(logits < smallest, -math.inf)
            if cut == "nucleus" and options.top_p < 1.0:
                ordered, index = logits.sort(dim=-1, descending=True)
                over = ordered.softmax(-1).cumsum(-1) > options.top_p
                drop = torch.cat([torch.zeros_like(over[..., :1]), over[..., :-1]], -1)
                logits = logits.masked_fill(torch.zeros_like(over).scatter(-1, index, drop), -math.inf)
        return logits.softmax(-1)


def leftover(p: Tensor, q: Tensor) -> Tensor:
    """What is left of the verifier's law where it exceeds the drafter's, normalised."""
    excess = (q - p).clamp_min(0.0)
    mass = excess.sum()
    return excess / mass if bool(torch.isfinite(mass)) and float(mass) > 1e-6 else q  # less is rounding


def decode_pipelined(
    model: Any, prompt: Sequence[int], options: PipelinedOptions, draws: Draws, *, mask_id: int, shifted: bool
) -> PipelinedResult:
    """Decode one prompt by full recompute."""
    return PipelinedOracle(model, options, draws, mask_id, shifted).run(prompt)
