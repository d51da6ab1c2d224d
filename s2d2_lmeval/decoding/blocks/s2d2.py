"""S2D2: one model drafts a block by diffusion and verifies it autoregressively at block size one (arXiv 2603.25702).

A denoising step of a row, with the verification as a second forward:

1. draft    tokens and their confidence at every mask of the block
2. route    decide whether the first run of masks (the span) is worth verifying
3. verify   score the drafted span left to right in the model's block-size-one mode; accept a prefix, replace the first
            rejected token
4. extend   optionally decide further places by ratio or by confidence
5. top up   by the remasking strategy, if the schedule asks for more tokens than were decided

Under the lookahead schedule a verification also carries the next block's masks. Where it finishes the block exactly as
drafted, the next block's draft is there already and goes through steps 2, 4 and 5 at once.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from s2d2_lmeval.decoding.blocks.denoising import DENOISING, BlockDenoiser
from s2d2_lmeval.decoding.blocks.planning import BlockPlan, scheduled_count
from s2d2_lmeval.decoding.blocks.remasking import ranks
from s2d2_lmeval.decoding.blocks.rows import Rows
from s2d2_lmeval.decoding.blocks.stages import Decisions, Stage, turn
from s2d2_lmeval.decoding.generation import ACCEPTED, HIGH_CONFIDENCE, KEPT, RATIO, RESAMPLED
from s2d2_lmeval.decoding.options.blocks import ConfidenceOption, EditingOptions, EntropyOptions, SubblockOptions
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.options.pipelined import PipelinedOptions, PipelinedVerifierOptions
from s2d2_lmeval.decoding.options.s2d2 import AcceptanceOption, RemaskingOption, RoutingOptions, VerifierOptions
from s2d2_lmeval.decoding.readback import Readback, StepTables
from s2d2_lmeval.decoding.routing.estimators import acceptance_estimate, normalised
from s2d2_lmeval.decoding.routing.policies import DraftView, policy_of
from s2d2_lmeval.decoding.sampling import random
from s2d2_lmeval.decoding.sampling.acceptance import acceptance_ratio, judge, residual
from s2d2_lmeval.decoding.sampling.filters import filtered
from s2d2_lmeval.decoding.sampling.row_statistics import arg_max, probability_of, row_statistics
from s2d2_lmeval.registry import DECODERS
from s2d2_lmeval.runtime.costs import MeasureCosts


@DECODERS.register(
    "s2d2",
    "block",
    promise="the published S2D2 algorithm; the AR law exactly when every draft is sampled and verified under AR-like "
    "caching (in sub-blocks the first tokens too, with sample_first_token), otherwise neither the AR nor the diffusion "
    "law",
    options=(
        *DENOISING,
        *(AcceptanceOption, ConfidenceOption, RemaskingOption, EntropyOptions, VerifierOptions, RoutingOptions),
        *(SubblockOptions, EditingOptions, PipelinedOptions, PipelinedVerifierOptions),
    ),
    acceptances=("stochastic", "greedy"),
)
class S2D2(BlockDenoiser):
    """The decoder ``s2d2``."""

    verifies = True
    keeps_rejected = True
    """Whether a rejected token that is not resampled is decided all the same."""

    def __init__(self, config: DecodingConfig, rows: Rows, prefill_chunk: int) -> None:
        super().__init__(config, rows, prefill_chunk)
        self.policy = policy_of(config, "block", rows.count, rows.block_length, rows.device)
        self.verify_all_masks = config.ssd_threshold_all_spans and config.ssd_ratio_threshold >= 0
        self.resamples = config.allow_resample or config.acceptance == "greedy"
        decides_one = self.resamples or self.keeps_rejected
        self.tops_up = not decides_one or int(scheduled_count(0, config)) > 1
        """Whether the schedule can ask for more tokens than a verification decides at least."""
        self.scores = "acceptance" in self.policy.reads
        self.watches_entropy = "entropy" in self.policy.reads
        self.estimate = torch.zeros((rows.count, rows.block_length), device=rows.device)
        self.entropy = torch.zeros_like(self.estimate)
        self.statistics = row_statistics(torch.empty(0, 1, device=rows.device))
        # Draft logits wait here for the verification that follows at once; ``slot`` says which of them is of a place.
        self.draft_logits = torch.empty(0, device=rows.device)
        self.draft_slot = torch.zeros((rows.count, rows.block_length), dtype=torch.long, device=rows.device)

    @staticmethod
    def margin(block_length: int) -> int:
        return 2 * block_length

    def weigh(self, measure_costs: MeasureCosts) -> None:
        """A policy may want to know what a verification costs beside a draft, at this batch."""
        self.policy.weigh(measure_costs, self.rows.block_length if self.config.schedule == "lookahead" else 0)

    def admitted(self, slot: int) -> None:
        super().admitted(slot)
        self.policy.reset(slot)

    def _decide(self, stage: Stage, logits: torch.Tensor) -> Readback:
        plan, draft = self._plan, self.draft
        verified = drafted = None
        moved = torch.zeros_like(plan.draft_rows)
        span = torch.zeros_like(stage.block, dtype=torch.bool)
        if plan.verifies:
            decisions = Decisions(stage.block, self.rows.mask_token_id)
            self._verify(decisions, stage, logits[: plan.verifies], plan)
            self._finish_step(decisions, stage, plan.verify_rows, verified=True)
            self._write(stage, decisions)
            verified = decisions.tables(draft.tokens)
            stage = replace(stage, block=decisions.block)
            if plan.aheads:
                as_drafted = (decisions.block == verified.draft).all(-1)
                moved = plan.ahead_rows & as_drafted & ~decisions.masks.any(-1)
                stage = turn(stage, moved, self.rows.mask_token_id, int(scheduled_count(0, self.config)))
        if plan.drafts or plan.aheads:
            span, drafted = self._draft(stage, logits[plan.verifies :], moved)
        return self._read(verified, drafted, span, moved)

    def _draft(
        self, stage: Stage, logits: torch.Tensor, moved: torch.Tensor
    ) -> tuple[torch.Tensor, StepTables[torch.Tensor]]:
        """Take in fresh drafts, of rows that drafted and of those that ``moved``; route or finish their step."""
        plan = self._plan
        drafting = plan.draft_rows | moved
        at = plan.fresh_at
        self._observe(stage, logits, at, drafting[at[0]])
        decisions = Decisions(stage.block, self.rows.mask_token_id)
        self._revise(decisions, stage, drafting)
        span = self._route(decisions.masks, stage, logits, at, drafting)
        if not self.policy.always:  # else no row with masks is through without a verification
            self._finish_step(decisions, stage, drafting & ~span.any(-1), verified=False)
        self._write(stage, decisions)
        return span, decisions.tables(self.draft.tokens)

    def _draw(self, logits: torch.Tensor, key: random.Key) -> tuple[torch.Tensor, torch.Tensor]:
        """Also caches the row statistics that routing needs; free where they are the logits' own."""
        if not (self.scores or self.watches_entropy):
            return super()._draw(logits, key)
        law = self._law(logits)
        self.statistics = row_statistics(law)
        if law is logits and not self.config.sampled:
            return self.statistics.token, self.statistics.first
        return super()._draw(logits, key)

    def _route(
        self,
        masks: torch.Tensor,
        stage: Stage,
        logits: torch.Tensor,
        at: tuple[torch.Tensor, ...],
        drafting: torch.Tensor,
    ) -> torch.Tensor:
        """The span (rows, B) of every drafting row that is to be verified; empty elsewhere."""
        config = self.config
        if self.scores or self.watches_entropy:
            statistics = self.statistics
            if self.scores:
                estimate = acceptance_estimate(statistics, logits.shape[1], self.draft.confidence[at], config)
                self.estimate = self.estimate.to(estimate.dtype).index_put(at, estimate)
            else:
                entropy = normalised(statistics.entropy, logits.shape[1])
                self.entropy = self.entropy.to(entropy.dtype).index_put(at, entropy)
        self.draft_logits = logits
        self.draft_slot = torch.zeros_like(self.draft_slot).index_put(
            at, torch.arange(len(logits), device=logits.device)
        )
        span = first_run(masks)
        decided = (~masks).sum(-1) - stage.given
        denoised = None
        if "denoised" in self.policy.reads:
            denoised = self._choose(masks, stage.count, self.draft.confidence)[0].sum(-1)
        view = DraftView(
            drafting,
            masks,
            span,
            self.draft.confidence,
            self.estimate,
            self.entropy,
            decided,
            denoised,
            len(self._plan.phases),
        )
        return span & (self.policy.decide(view) & drafting).unsqueeze(1)

    def _finish_step(self, decisions: Decisions, stage: Stage, finished: torch.Tensor, verified: bool) -> None:
        """Extend and top up in the rows whose step is ``finished``; tell the policy how it went."""
        config, draft = self.config, self.draft
        if config.always_check_high_confidence:
            confident = decisions.masks & (draft.confidence > config.confidence_threshold) & finished.unsqueeze(1)
            decisions.decide(confident, draft.tokens, HIGH_CONFIDENCE, ranks(draft.confidence, confident))
        if self.tops_up or not verified:
            due = torch.minimum(stage.count, decisions.masked_before.sum(-1))
            self._denoise(decisions, (due - decisions.count).clamp_min(0), finished)
        # A step without masks, which only edits, teaches nothing about verification.
        self.policy.reward(finished & decisions.masked_before.any(-1), verified, decisions.count)

    def _verify(self, decisions: Decisions, stage: Stage, logits: torch.Tensor, plan: BlockPlan) -> None:
        """Decide the accepted prefix of each verified span and the token after it, from the verifier's ``logits``."""
        config, draft, at = self.config, self.draft, plan.verify_at
        masks = decisions.masks & plan.verify_rows.unsqueeze(1)
        span = first_run(masks)
        verifier = self._law(logits)
        q = probability_of(verifier, draft.tokens[at])
        draft.sound = draft.sound & ~q.isnan().any()
        ratio = torch.zeros_like(draft.confidence).index_put(
            at, acceptance_ratio(q, draft.confidence[at], config.ssd_ratio_tempering_factor)
        )
        if config.acceptance == "greedy":
            replacement = torch.zeros_like(draft.tokens).index_put(at, arg_max(logits))
            verdict = judge(replacement == draft.tokens, span)
        else:
            drawn = self.source.uniform(stage.draws(random.ACCEPT), span).to(ratio.dtype)
            verdict = judge(drawn < ratio, span)
            replacement = self._resample(verifier, verdict.rejected, stage) if self.resamples else draft.tokens
        self.policy.judged(span, verdict.accepted, verdict.rejected)
        place = torch.arange(masks.shape[1], device=masks.device)
        rejected = masks & (place == verdict.rejected.unsqueeze(1))
        decisions.decide(verdict.accepted, draft.tokens, ACCEPTED)
        if self.resamples or self.keeps_rejected:
            decisions.decide(rejected, replacement, RESAMPLED if self.resamples else KEPT)
        if config.ssd_ratio_threshold >= 0:
            scope = masks if config.ssd_threshold_all_spans else span
            extra = scope & decisions.masks & (ratio >= config.ssd_ratio_threshold)
            decisions.decide(extra, draft.tokens, RATIO)

    def _resample(self, verifier: torch.Tensor, rejected: torch.Tensor, stage: Stage) -> torch.Tensor:
        """A token from the residual at the first rejected place of every verified row, in a table (rows, B).

        ``verifier`` (M, V) are the verifier's logits under the sampling options.
        """
        plan, length = self._plan, self.rows.block_length
        rows = plan.facts["verify_slots"]
        if self.source.sequential:
            # Published code draws only where something was rejected; one row at a time, so reading it here is no loss.
            rows = rows[rejected[rows] < length]
            if not len(rows):
                return self.draft.tokens
        places = rejected[rows].clamp_max(length - 1)
        slot_of = torch.zeros_like(self.draft.tokens).index_put(
            plan.verify_at, torch.arange(plan.verifies, device=verifier.device)
        )
        drafted = self._draft_law(self.draft_logits[self.draft_slot[rows, places]]).softmax(-1)
        leftover = residual(verifier[slot_of[rows, places]].softmax(-1), drafted)
        tokens = self.source.categorical(leftover, stage.draws(random.RESAMPLE).take((rows, places)))
        return self.draft.tokens.index_put((rows, places), tokens)

    def _draft_law(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of the distribution p of (q - p)+, from draft ``logits`` (M, V)."""
        return self._law(logits)

    def _law(self, logits: torch.Tensor) -> torch.Tensor:
        """``logits`` (M, V) under the sampling options."""
        config = self.config
        return filtered(logits, config)


def first_run(masks: torch.Tensor) -> torch.Tensor:
    """The first contiguous run (R, L) of ``masks`` (R, L)."""
    begun = masks.cumsum(-1) > 0
    return masks & ((begun & ~masks).cumsum(-1) == 0)
