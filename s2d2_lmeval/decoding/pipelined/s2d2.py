"""S2D2 on pipelined blocks: the verifier looks at the first run of masks, across blocks (arXiv 2603.25702).

An iteration of a row, with the verification as a second forward:

1. open    the next block, once the last one is decided far enough
2. draft   tokens and their confidence at every mask of every open block, which also commits decided blocks in front
3. route   decide whether the first run of masks (the span) is worth verifying
4. verify  score the span left to right in verifier blocks of ``target_block_size``; accept a prefix, replace the first
           rejected token, and optionally accept later runs
5. top up  blocks that may be forced on and were decided too little
"""

from __future__ import annotations

import torch

from s2d2_lmeval.decoding.blocks.s2d2 import first_run
from s2d2_lmeval.decoding.decoder import DecoderSetup, Kept
from s2d2_lmeval.decoding.generation import ACCEPTED, DENOISED, RESAMPLED
from s2d2_lmeval.decoding.passes import Cells
from s2d2_lmeval.decoding.pipelined.denoising import PipelinedDenoiser
from s2d2_lmeval.decoding.routing.estimators import acceptance_estimate
from s2d2_lmeval.decoding.routing.policies import DraftView, policy_of
from s2d2_lmeval.decoding.sampling import laws, random
from s2d2_lmeval.decoding.sampling.acceptance import Verdict, acceptance_ratio, judge, residual
from s2d2_lmeval.decoding.sampling.filters import filtered, probabilities
from s2d2_lmeval.decoding.sampling.row_statistics import row_statistics
from s2d2_lmeval.decoding.steps import Decisions
from s2d2_lmeval.registry import DECODERS
from s2d2_lmeval.runtime.graphs import numbers


@DECODERS.register("s2d2", "pipelined")
class PipelinedS2D2(PipelinedDenoiser):
    """The decoder ``s2d2`` on pipelined blocks."""

    verifies = True

    def __init__(self, setup: DecoderSetup) -> None:
        super().__init__(setup)
        rows = self.rows
        self.policy = policy_of(self.config, "pipelined", rows.count, rows.places, setup.tables)
        self.scores = "acceptance" in self.policy.reads
        # Draft logits wait here for the verification that follows at once; ``slot`` says which of them is of a place.
        keeps = self.config.allow_resample and self.config.acceptance != "greedy"
        self.draft_logits = Kept(setup, "draft_logits", keeps)
        self.draft_slot = setup.tables.full("draft_slot", (rows.count, rows.places + 1))

    @property
    def capacity(self) -> int:
        # The verifier's masks come after the drafted window.
        return self.rows.length + (1 if self.token_shift else self.rows.places)

    def admitted(self, slot: int) -> None:
        super().admitted(slot)
        self.policy.reset(slot)

    def _decide(self, decisions: Decisions, verify: torch.Tensor, draft: torch.Tensor) -> torch.Tensor:
        span, sent = first_run(decisions.masks), self._sent
        if len(verify):
            self._verify(decisions, span & sent["verifying"].unsqueeze(1), verify)
        route = torch.zeros_like(span)
        if len(draft):
            self.draft_logits.put(draft)
            number = numbers(len(draft), draft.device)
            self.draft_slot.zero_().view(-1).index_copy_(0, self._draft_at.generated, number)
            route = self._route(decisions.masks, span, draft)
        self._top_up(decisions, ~route.any(-1, keepdim=True))
        return route

    def _route(self, masks: torch.Tensor, span: torch.Tensor, draft: torch.Tensor) -> torch.Tensor:
        """The span (count, W) of every drafting row that is to be verified; empty elsewhere."""
        confidence, at, sent = self._of(self.confidence), self._draft_at, self._sent
        estimate = torch.zeros_like(confidence)
        if self.scores:
            config = self.config
            law = filtered(draft, config)
            guess = acceptance_estimate(row_statistics(law), draft.shape[1], confidence[at.index], config)
            estimate = self._window(at, guess)
        decided = (sent["open"] & ~masks).sum(-1)
        view = DraftView(sent["drafting"], masks, span, confidence, estimate, None, decided)
        return span & (self.policy.decide(view) & sent["drafting"]).unsqueeze(1)

    def _verify(self, decisions: Decisions, span: torch.Tensor, logits: torch.Tensor) -> None:
        """Decide from the verifier's ``logits`` the accepted prefix of each ``span`` (count, W), a replacement for the
        first rejected token, and later runs.
        """
        config, at = self.config, self._verify_at
        tokens, confidence = self._of(self.tokens), self._of(self.confidence)
        verifier = probabilities(logits, config)
        p = verifier.gather(-1, tokens[at.index].unsqueeze(-1)).squeeze(-1)
        self.sound.logical_and_(~p.isnan().any())
        greedy = config.acceptance == "greedy"
        if greedy:
            replacement = self._window(at, verifier.argmax(-1), -1)
            passes = replacement == tokens
        else:
            tempered = acceptance_ratio(p, confidence[at.index], config.ssd_ratio_tempering_factor)
            ratio = self._window(at, tempered)
            passes = self.source.uniform(self._draws(random.ACCEPT), span).to(ratio.dtype) < ratio
        if config.ssd_threshold_draft_confidence:
            bar = config.draft_confidence_threshold
            passes = passes & (confidence > (config.confidence_threshold if bar is None else bar))
        verdict = judge(passes, span)
        decisions.decide(verdict.accepted, tokens, ACCEPTED)
        place = numbers(span.shape[1], span.device)
        if config.allow_resample:
            rejected = span & (place == verdict.rejected.unsqueeze(1))
            if config.verify_confidence_threshold is not None:
                believed = self._window(at, p)
                rejected = rejected & (believed >= config.verify_confidence_threshold)
            if not greedy:
                replacement = self._resample(verifier, verdict, rejected)
            decisions.decide(rejected, replacement, RESAMPLED)
        if config.ssd_partial_ar_span:
            later = span & passes & (place > verdict.rejected.unsqueeze(1)) & (self._sent["step"] > 0)
            decisions.decide(runs_of(later, config.ssd_partial_ar_span), tokens, ACCEPTED)

    def _laws(self, decisions: Decisions, verify: torch.Tensor) -> torch.Tensor | None:
        drafts, at = super()._laws(decisions, verify), self._verify_at
        if drafts is None:
            return None
        entries = laws.entries(filtered(verify, self.config), decisions.block[at.index], self.law_size)
        by_verifier = (decisions.marks == ACCEPTED) | (decisions.marks == RESAMPLED)
        of_verifier = Cells.of_entries(decisions.block, self.law_size).put(at.cells, entries)
        return of_verifier.where(by_verifier.unsqueeze(-1), drafts)

    def _resample(self, verifier: torch.Tensor, verdict: Verdict, rejected: torch.Tensor) -> torch.Tensor:
        """A token from the residual at the first rejected place of every verified row, in a table (count, W)."""
        rows, tokens = self._sent["verify_slots"], self._of(self.tokens)
        rows = self.source.drawing(rows, rejected[rows].any(-1))
        places = verdict.rejected[rows].clamp_max(rejected.shape[1] - 1)
        index = numbers(len(verifier), verifier.device)
        slot_of = self._window(self._verify_at, index)
        draft = probabilities(self.draft_logits.values[self._of(self.draft_slot)[rows, places]], self.config)
        leftover = residual(verifier[slot_of[rows, places]], draft)
        drawn = self.source.categorical(leftover, self._draws(random.RESAMPLE).take((rows, places)))
        return tokens.index_put((rows, places), drawn)

    def _top_up(self, decisions: Decisions, among: torch.Tensor) -> None:
        """Give blocks that may be forced on their minimum of tokens, or all confident ones where these are enough."""
        least = max(self.config.min_tokens_per_step, 1)
        score = self._of(self.score)
        left = decisions.masks & self._sent["forced"] & among
        decided = self._per_block(decisions.masked_before & ~decisions.masks).sum(-1, keepdim=True)
        high = left & (score >= self.config.confidence_threshold)
        due = torch.minimum(least - decided, self._per_block(left).sum(-1, keepdim=True))
        confident = self._per_block(high).sum(-1, keepdim=True)
        count = torch.where((due > 0) & (confident > due), confident, due)
        order = self._ranks(score, left)
        chosen = (self._per_block(order) < count).view(order.shape) & left
        decisions.decide(chosen, self._of(self.tokens), DENOISED, order)


def runs_of(places: torch.Tensor, least: int) -> torch.Tensor:
    """The contiguous runs of ``places`` (R, W) that are at least ``least`` long."""
    begins = places & ~torch.nn.functional.pad(places, (1, 0))[:, :-1]
    run = begins.long().cumsum(-1) * places
    length = torch.zeros(places.shape[0], places.shape[1] + 1, dtype=torch.long, device=places.device)
    length = length.scatter_add(1, run, places.long())
    return places & (length.gather(1, run) >= least)
