"""S2D2: one model drafts a block by diffusion and verifies it autoregressively at block size one (arXiv 2603.25702).

A denoising step of a row, with the verification as a second forward:

1. draft    tokens and their confidence at every mask of the block
2. route    decide whether the first run of masks (the span) is worth verifying
3. verify   score the drafted span left to right in the model's block-size-one mode; accept a prefix, replace the first
rejected token 4. extend   optionally decide further places by ratio or by confidence 5. top up   by the remasking
strategy, if the schedule asks for more tokens than were decided
"""

from __future__ import annotations

import torch

from s2d2_lmeval.decoding import random
from s2d2_lmeval.decoding.acceptance import acceptance_ratio, judge, residual
from s2d2_lmeval.decoding.config import DecodingConfig
from s2d2_lmeval.decoding.denoising import BlockDenoiser, Decisions
from s2d2_lmeval.decoding.estimators import acceptance_estimate, normalised_entropy
from s2d2_lmeval.decoding.generation import ACCEPTED, HIGH_CONFIDENCE, KEPT, RATIO, RESAMPLED
from s2d2_lmeval.decoding.planning import BlockPlan
from s2d2_lmeval.decoding.remasking import ranks
from s2d2_lmeval.decoding.routing import DraftView, policy_of
from s2d2_lmeval.decoding.rows import Rows
from s2d2_lmeval.decoding.sampling import probabilities


class S2D2(BlockDenoiser):
    """The decoder ``s2d2``."""

    verifies = True

    def __init__(self, config: DecodingConfig, rows: Rows, prefill_chunk: int) -> None:
        super().__init__(config, rows, prefill_chunk)
        self.policy = policy_of(config, rows.count, rows.device)
        self.verify_all_masks = config.ssd_threshold_all_spans and config.ssd_ratio_threshold >= 0
        self.scores = config.do_verify_policy in ("score_threshold", "score_hysteresis")
        self.watches_entropy = config.do_verify_policy == "contextual_bandit_ucb"
        self.estimate = torch.zeros((rows.count, rows.block_length), device=rows.device)
        self.entropy = torch.zeros_like(self.estimate)
        # Draft logits wait here for the verification that follows at once; ``slot`` says which of them belongs to a
        # place.
        self.draft_logits = torch.empty(0, device=rows.device)
        self.draft_slot = torch.zeros((rows.count, rows.block_length), dtype=torch.long, device=rows.device)

    @staticmethod
    def margin(block_length: int) -> int:
        return 2 * block_length

    def admitted(self, slot: int) -> None:
        super().admitted(slot)
        self.policy.reset(slot)

    def _step(self, step: Decisions, logits: torch.Tensor, plan: BlockPlan) -> None:
        draft, config, masks = self.draft, self.config, step.masks
        span = first_run(masks)
        if plan.verifies:
            self._verify(step, span, logits[plan.drafts :], plan)
        if plan.drafts:
            step.verify = self._route(masks, span, logits[: plan.drafts], plan)
            step.finished = step.finished & ~step.verify.any(-1)
        if config.always_check_high_confidence:
            confident = step.masks & (draft.confidence > config.confidence_threshold) & step.finished.unsqueeze(1)
            step.decide(confident, draft.tokens, HIGH_CONFIDENCE, ranks(draft.confidence, confident))
        due = torch.minimum(plan.facts["count"], masks.sum(-1))
        self._denoise(step, (due - (masks & ~step.masks).sum(-1)).clamp_min(0), plan)
        self.policy.reward(step.finished, plan.verify_rows, (masks & ~step.masks).sum(-1))

    def _route(self, masks: torch.Tensor, span: torch.Tensor, logits: torch.Tensor, plan: BlockPlan) -> torch.Tensor:
        """The span (rows, B) of every drafting row that is to be verified; empty elsewhere."""
        at, config = plan.draft_at, self.config
        if self.scores or self.watches_entropy:
            distribution = probabilities(logits, config.temperature, config.top_k, config.top_p)
            if self.scores:
                estimate = acceptance_estimate(distribution, self.draft.confidence[at], config)
                self.estimate = self.estimate.to(estimate.dtype).index_put(at, estimate)
            else:
                entropy = normalised_entropy(distribution)
                self.entropy = self.entropy.to(entropy.dtype).index_put(at, entropy)
        self.draft_logits = logits
        self.draft_slot = torch.zeros_like(self.draft_slot).index_put(
            at, torch.arange(plan.drafts, device=logits.device)
        )
        decided = (~masks).sum(-1) - plan.facts["given"]
        view = DraftView(plan.draft_rows, masks, span, self.draft.confidence, self.estimate, self.entropy, decided)
        return span & (self.policy.decide(view) & plan.draft_rows).unsqueeze(1)

    def _verify(self, step: Decisions, span: torch.Tensor, logits: torch.Tensor, plan: BlockPlan) -> None:
        """Decide the accepted prefix of each verified span and the token after it, from the verifier's ``logits``."""
        config, draft, at = self.config, self.draft, plan.verify_at
        masks = step.masks & plan.verify_rows.unsqueeze(1)
        span = span & plan.verify_rows.unsqueeze(1)
        verifier = probabilities(logits, config.temperature, config.top_k, config.top_p)
        drafted = draft.tokens[at]
        q = verifier.gather(-1, drafted.unsqueeze(-1)).squeeze(-1)
        draft.sound = draft.sound & ~q.isnan().any()
        ratio = torch.zeros_like(draft.confidence).index_put(
            at, acceptance_ratio(q, draft.confidence[at], config.ssd_ratio_tempering_factor)
        )
        resamples = config.allow_resample or config.acceptance == "greedy"
        if config.acceptance == "greedy":
            best = torch.zeros_like(draft.tokens).index_put(at, logits.argmax(-1))
            verdict = judge(best == draft.tokens, span)
            replacement = best
        else:
            drawn = self.source.uniform(self._key(random.ACCEPT, plan), span).to(ratio.dtype)
            verdict = judge(drawn < ratio, span)
            replacement = draft.tokens
            if resamples:
                replacement = self._resample(verifier, verdict.rejected, plan)
        place = torch.arange(masks.shape[1], device=masks.device)
        rejected = masks & (place == verdict.rejected.unsqueeze(1))
        step.decide(verdict.accepted, draft.tokens, ACCEPTED)
        step.decide(rejected, replacement, RESAMPLED if resamples else KEPT)
        if config.ssd_ratio_threshold >= 0:
            scope = masks if config.ssd_threshold_all_spans else span
            step.decide(scope & step.masks & (ratio >= config.ssd_ratio_threshold), draft.tokens, RATIO)

    def _resample(self, verifier: torch.Tensor, rejected: torch.Tensor, plan: BlockPlan) -> torch.Tensor:
        """A token from the residual at the first rejected place of every verified row, in a table (rows, B)."""
        length = self.rows.block_length
        rows = plan.facts["verify_slots"]
        if self.source.sequential:
            # Published code draws only where something was rejected; one row at a time, so this read is the order
            # itself.
            rows = rows[(rejected[rows] < length)]
            if not len(rows):
                return self.draft.tokens
        places = rejected[rows].clamp_max(length - 1)
        slot_of = torch.zeros_like(self.draft.tokens).index_put(
            plan.verify_at, torch.arange(plan.verifies, device=verifier.device)
        )
        config = self.config
        draft = probabilities(
            self.draft_logits[self.draft_slot[rows, places]], config.temperature, config.top_k, config.top_p
        )
        leftover = residual(verifier[slot_of[rows, places]], draft)
        tokens = self.source.categorical(leftover, self._key(random.RESAMPLE, plan).take((rows, places)))
        return self.draft.tokens.index_put((rows, places), tokens)


def first_run(masks: torch.Tensor) -> torch.Tensor:
    """The first contiguous run (R, L) of ``masks`` (R, L)."""
    begun = masks.long().cumsum(-1) > 0
    over = (begun & ~masks).long().cumsum(-1) > 0
    return masks & ~over
