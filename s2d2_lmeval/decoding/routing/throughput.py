"""When to verify without thresholds: whenever that is expected to decode more tokens per second than it costs.

A verification takes a forward and decides the accepted prefix of the span and the token after it; without one the
remasking strategy decides what it would. So verifying gains G more tokens for a time c. Spent on anything else, the
same time would decode at this run's pace r (tokens decided so far over time spent). The policy verifies where G >= r c:
the rule of the marginal value (Charnov, 1976), under which no other mix of the two actions decodes faster.

* c is measured before the run, for the batch and for every length of the span (:class:`VerifyCosts`), or given as
  ``verify_cost_ratio``.
* G follows from the acceptance probability of each token of the span: the estimator's guess, corrected by how often
  tokens with such a guess were accepted so far (:class:`AcceptanceCurve`).
"""

from __future__ import annotations

import numpy as np
import torch

from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.routing.policies import ONE_BLOCK, DraftView, RoutingPolicy
from s2d2_lmeval.registry import POLICIES
from s2d2_lmeval.runtime.costs import CostCurve, MeasureCosts

BINS = 8
"""Ranges of the estimator's guess that are told apart."""

PRIOR = 2.0
"""Outcomes that the estimator's own guess counts for."""


class AcceptanceCurve:
    """How often the verifier accepts a token, by what the estimator says of it; of each row, or of the whole run.

    Counts are (rows, BINS). ``pooled`` curves know every outcome of the run; others only those of their own row's
    request, so that what is decided does not depend on the batch.
    """

    def __init__(self, rows: int, pooled: bool, device: torch.device) -> None:
        self.pooled = pooled
        self.tried = torch.zeros(rows, BINS, dtype=torch.float64, device=device)
        self.accepted = torch.zeros_like(self.tried)

    @staticmethod
    def bin(guess: torch.Tensor) -> torch.Tensor:
        """The range that each of ``guess`` falls into."""
        return (guess.nan_to_num().clamp(0, 1) * BINS).long().clamp_max(BINS - 1)

    def __call__(self, guess: torch.Tensor) -> torch.Tensor:
        """Probability of acceptance, from the estimator's ``guess`` (rows, L).

        A range that was hardly tried is given the benefit of the doubt, or nothing would ever be learned of it.
        """
        index = self.bin(guess)
        tried, accepted = (
            (counts.sum(0, keepdim=True).expand_as(counts) if self.pooled else counts).gather(1, index)
            for counts in (self.tried, self.accepted)
        )
        mean = (accepted + PRIOR * guess) / (tried + PRIOR)
        return (mean + 0.5 / (1 + tried).sqrt()).clamp(0, 1)

    def learn(self, index: torch.Tensor, judged: torch.Tensor, accepted: torch.Tensor) -> None:
        """Take outcomes over: of the places ``judged`` (rows, L), whose guesses lie in ``index``, the ``accepted``."""
        self.tried.scatter_add_(1, index, judged.double())
        self.accepted.scatter_add_(1, index, accepted.double())

    def reset(self, row: int) -> None:
        """Another request begins in ``row``."""
        if not self.pooled:
            self.tried[row] = 0
            self.accepted[row] = 0


class VerifyCosts:
    """What a verification costs, in drafts: (rows + 1, L + 1) by rows in flight and masks to verify."""

    def __init__(self, ratio: torch.Tensor) -> None:
        self.ratio = ratio

    @classmethod
    def fixed(cls, ratio: float, rows: int, length: int, device: torch.device) -> VerifyCosts:
        """The same for all."""
        return cls(torch.full((rows + 1, length + 1), ratio, dtype=torch.float64, device=device))

    @classmethod
    def measured(cls, seconds: CostCurve, rows: int, length: int, ahead: int, device: torch.device) -> VerifyCosts:
        """From what forwards take: a row drafts with ``length`` queries; it verifies k masks with k more, and brings
        ``ahead`` of the next block.
        """
        flight, masks = np.arange(rows + 1)[:, None], np.arange(length + 1)[None, :]
        ratio = seconds(flight * (length + masks + ahead)) / seconds(flight * np.full_like(masks, length))
        return cls(torch.from_numpy(ratio).to(device))


@POLICIES.register("throughput", *ONE_BLOCK)
class ThroughputPolicy(RoutingPolicy):
    """The policy ``throughput``."""

    reads = frozenset({"acceptance", "denoised"})

    def __init__(self, config: DecodingConfig, rows: int, length: int, device: torch.device) -> None:
        super().__init__(config, rows, length, device)
        self.lookahead = config.schedule == "lookahead"
        self.replaces = config.allow_resample or config.acceptance == "greedy"
        given = config.verify_cost_ratio
        # Measured costs are not reproducible, so statistics are pooled across rows.
        self.pooled = given is None
        self.costs = VerifyCosts.fixed(1.0 if given is None else given, rows, length, device)
        self.curve = AcceptanceCurve(rows, self.pooled, device)
        # The pace begins at a token per draft.
        self.decided = torch.ones(rows, dtype=torch.float64, device=device)
        self.spent = torch.ones_like(self.decided)
        self.index = torch.zeros(rows, length, dtype=torch.long, device=device)
        self.price = torch.zeros(rows, dtype=torch.float64, device=device)

    @property
    def pace(self) -> torch.Tensor:
        """(rows,) tokens decided in the time of a draft."""
        if self.pooled:
            return (self.decided.sum() / self.spent.sum()).expand_as(self.decided)
        return self.decided / self.spent

    def weigh(self, measure_costs: MeasureCosts, ahead: int) -> None:
        """Unless it is given, learn what a verification costs beside a draft, at this batch."""
        if self.pooled:
            rows, length = self.index.shape
            self.costs = VerifyCosts.measured(measure_costs(2 * length + ahead), rows, length, ahead, self.index.device)

    def decide(self, view: DraftView) -> torch.Tensor:
        assert view.denoised is not None
        asked = view.drafting & view.span.any(-1)
        chance = self.curve(view.acceptance)
        standing = torch.where(view.span, chance, 1).cumprod(-1)
        whole = standing[:, -1]
        gain = (standing * view.span).sum(-1) + (1 - whole) * self.replaces
        price = self.costs.ratio[view.in_flight].index_select(0, view.span.sum(-1))
        if self.lookahead:  # a block that is accepted whole saves the next one's draft
            price = price - whole * (view.span == view.masks).all(-1)
        self.index = torch.where(asked.unsqueeze(1), self.curve.bin(view.acceptance), self.index)
        self.price = torch.where(asked, price, self.price)
        return asked & (gain - view.denoised >= self.pace * price)

    def judged(self, span: torch.Tensor, accepted: torch.Tensor, rejected: torch.Tensor) -> None:
        place = torch.arange(span.shape[1], device=span.device)
        self.curve.learn(self.index, span & (place <= rejected.unsqueeze(1)), accepted)

    def reward(self, finished: torch.Tensor, verified: bool, decided: torch.Tensor) -> None:
        self.decided = self.decided + finished * decided
        self.spent = self.spent + finished * (1 + self.price if verified else 1)

    def reset(self, row: int) -> None:
        self.curve.reset(row)
        if not self.pooled:
            self.decided[row] = self.spent[row] = 1
