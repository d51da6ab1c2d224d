"""S2D2: one model drafts a block by diffusion and verifies it autoregressively at block size one (arXiv 2603.25702).

A denoising step of a row, with the verification as a second forward:

1. draft    tokens and their confidence at every mask of the block
2. route    decide whether the first run of masks (the span) is worth verifying
3. verify   score the drafted span left to right in the model's block-size-one mode; accept a prefix, replace the first
            rejected token
4. extend   optionally decide further places by ratio or by confidence
5. top up   by the remasking strategy, if the schedule asks for more tokens than were decided

Under the lookahead schedule a verification also carries the next block's masks. If it finishes the block exactly as
drafted, the next block's draft is already available and goes through steps 2, 4 and 5 immediately.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from s2d2_lmeval.decoding.blocks.denoising import DENOISING, BlockDenoiser
from s2d2_lmeval.decoding.blocks.planning import scheduled_count
from s2d2_lmeval.decoding.blocks.remasking import ranks
from s2d2_lmeval.decoding.blocks.rows import BlockState
from s2d2_lmeval.decoding.decoder import DecoderSetup
from s2d2_lmeval.decoding.generation import ACCEPTED, HIGH_CONFIDENCE, KEPT, RATIO, RESAMPLED
from s2d2_lmeval.decoding.options.blocks import ConfidenceOption, EditingOptions, EntropyOptions, SubblockOptions
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.options.pipelined import PipelinedOptions, PipelinedVerifierOptions
from s2d2_lmeval.decoding.options.s2d2 import AcceptanceOption, RemaskingOption, RoutingOptions, VerifierOptions
from s2d2_lmeval.decoding.routing.estimators import acceptance_estimate, normalised
from s2d2_lmeval.decoding.routing.policies import DraftView, policy_of
from s2d2_lmeval.decoding.sampling import random
from s2d2_lmeval.decoding.sampling.acceptance import acceptance_ratio, judge, residual
from s2d2_lmeval.decoding.sampling.filters import filtered
from s2d2_lmeval.decoding.sampling.row_statistics import arg_max, probability_of, row_statistics
from s2d2_lmeval.decoding.steps import Decisions, StepResult, StepTables
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
    """Whether a rejected token that is not resampled is decided anyway."""

    def __init__(self, setup: DecoderSetup, part: DecodingConfig | None = None) -> None:
        super().__init__(setup, part)
        config, rows = self.config, self.rows
        self.policy = policy_of(config, "block", rows.count, rows.block_length, rows.device)
        self.verify_all_masks = config.ssd_threshold_all_spans and config.ssd_ratio_threshold >= 0
        self.resamples = config.allow_resample or config.acceptance == "greedy"
        decides_one = self.resamples or self.keeps_rejected
        self.tops_up = not decides_one or int(scheduled_count(np.arange(config.steps), config).max()) > 1
        """Whether the schedule can require more tokens than the minimum that a verification decides."""
        # The inputs of routing at every place: estimated acceptance and normalised entropy.
        self.estimate = self.uncertainty = torch.zeros((rows.count, rows.block_length), device=rows.device)
        self.statistics = row_statistics(torch.empty(0, 1, device=rows.device))
        # Draft logits wait here for the verification that follows at once; ``logit_of`` is where those of a place are.
        self.draft_logits = torch.empty(0, device=rows.device)
        self.logit_of = torch.zeros_like(self.drafted)

    def calibrate_costs(self, measure_costs: MeasureCosts) -> None:
        self.policy.calibrate_costs(measure_costs, self.rows.block_length if self.config.schedule == "lookahead" else 0)

    def admitted(self, slot: int) -> None:
        super().admitted(slot)
        self.policy.reset(slot)

    def _decide(self, state: BlockState, logits: torch.Tensor) -> StepResult:
        plan, mask = self._plan, self.rows.mask_token_id
        verifies, aheads = plan.count("verify"), plan.count("ahead")
        verified, drafted = None, []
        span = torch.zeros_like(state.block, dtype=torch.bool)
        moved = span[:, 0]
        if verifies:
            decisions = Decisions(state.block, mask)
            self._verify(decisions, state, logits[:verifies])
            self._finish_step(decisions, state, plan.sent["verifying"], verified=True)
            self._write(state, decisions)
            verified = decisions.tables(self.drafted)
            state = replace(state, block=decisions.block)
            if aheads:
                as_drafted = (decisions.block == verified.draft).all(-1)
                moved = moved.index_fill(0, plan.at("ahead")[0], True) & as_drafted & ~decisions.masks.any(-1)
                state = state.next_block(moved, mask, int(scheduled_count(0, self.config)))
        if plan.count("draft") or aheads:
            span, tables = self._draft(state, logits[verifies:], plan.sent["drafting"] | moved)
            drafted.append(tables)
        return self._read(verified, drafted, span, moved)

    def _draft(
        self, state: BlockState, logits: torch.Tensor, drafting: torch.Tensor
    ) -> tuple[torch.Tensor, StepTables[torch.Tensor]]:
        """Take the new drafts of the rows ``drafting`` (rows,); route them or finish their step."""
        at = self._plan.at("draft", "ahead")
        self._observe(state, logits, at, drafting[at[0]])
        decisions = Decisions(state.block, self.rows.mask_token_id)
        self._revise(decisions, state, drafting)
        span = self._route(decisions.masks, state, logits, at, drafting)
        if not self.policy.always:  # otherwise every row with masks waits for a verification
            self._finish_step(decisions, state, drafting & ~span.any(-1), verified=False)
        self._write(state, decisions)
        return span, decisions.tables(self.drafted)

    def _draw(self, logits: torch.Tensor, key: random.Key) -> tuple[torch.Tensor, torch.Tensor]:
        """Also caches the row statistics that routing needs; free if they are those of the raw logits."""
        if not self.policy.reads & {"acceptance", "entropy"}:
            return super()._draw(logits, key)
        law = self._law(logits)
        self.statistics = row_statistics(law)
        if law is logits and not self.config.sampled:
            return self.statistics.token, self.statistics.first
        return super()._draw(logits, key)

    def _route(
        self,
        masks: torch.Tensor,
        state: BlockState,
        logits: torch.Tensor,
        at: tuple[torch.Tensor, ...],
        drafting: torch.Tensor,
    ) -> torch.Tensor:
        """The span (rows, B) of every drafting row that is to be verified; empty elsewhere."""
        config, vocabulary = self.config, logits.shape[1]
        if "acceptance" in self.policy.reads:
            estimate = acceptance_estimate(self.statistics, vocabulary, self.confidence[at], config)
            self.estimate = self.estimate.to(estimate.dtype).index_put(at, estimate)
        if "entropy" in self.policy.reads:
            uncertainty = normalised(self.statistics.entropy, vocabulary)
            self.uncertainty = self.uncertainty.to(uncertainty.dtype).index_put(at, uncertainty)
        self.draft_logits = logits
        number = torch.arange(len(logits), device=logits.device)
        self.logit_of = torch.zeros_like(self.logit_of).index_put(at, number)
        span = first_run(masks)
        denoised = None
        if "denoised" in self.policy.reads:
            denoised = self._choose(masks, state.count, self.confidence)[0].sum(-1)
        view = DraftView(
            drafting=drafting,
            masks=masks,
            span=span,
            confidence=self.confidence,
            acceptance=self.estimate,
            entropy=self.uncertainty,
            decided=(~masks).sum(-1) - state.given,
            denoised=denoised,
            in_flight=len(self._plan.phases),
        )
        return span & (self.policy.decide(view) & drafting).unsqueeze(1)

    def _finish_step(self, decisions: Decisions, state: BlockState, finished: torch.Tensor, verified: bool) -> None:
        """Extend and top up in the rows whose step is ``finished``; tell the policy how it went."""
        if self.config.always_check_high_confidence:
            confident = decisions.masks & (self.confidence > self.config.confidence_threshold) & finished.unsqueeze(1)
            decisions.decide(confident, self.drafted, HIGH_CONFIDENCE, ranks(self.confidence, confident))
        if self.tops_up or not verified:
            due = torch.minimum(state.count, decisions.masked_before.sum(-1))
            self._denoise(decisions, (due - decisions.count).clamp_min(0), finished)
        # A step without masks, which only edits, teaches nothing about verification.
        self.policy.reward(finished & decisions.masked_before.any(-1), verified, decisions.count)

    def _verify(self, decisions: Decisions, state: BlockState, logits: torch.Tensor) -> None:
        """Decide the accepted prefix of each verified span and the token after it, from the verifier's ``logits``."""
        config, drafted, at = self.config, self.drafted, self._plan.at("verify")
        masks = decisions.masks & self._plan.sent["verifying"].unsqueeze(1)
        span = first_run(masks)
        verifier = self._law(logits)
        p = probability_of(verifier, drafted[at])
        self.sound = self.sound & ~p.isnan().any()
        ratio = acceptance_ratio(p, self.confidence[at], config.ssd_ratio_tempering_factor)
        ratio = torch.zeros_like(self.confidence).index_put(at, ratio)
        if config.acceptance == "greedy":
            replacement = torch.zeros_like(drafted).index_put(at, arg_max(logits))
            verdict = judge(replacement == drafted, span)
        else:
            drawn = self.source.uniform(state.draws(random.ACCEPT), span).to(ratio.dtype)
            verdict = judge(drawn < ratio, span)
            replacement = self._resample(verifier, verdict.rejected, state) if self.resamples else drafted
        self.policy.judged(span, verdict.accepted, verdict.rejected)
        place = torch.arange(masks.shape[1], device=masks.device)
        rejected = masks & (place == verdict.rejected.unsqueeze(1))
        decisions.decide(verdict.accepted, drafted, ACCEPTED)
        if self.resamples or self.keeps_rejected:
            decisions.decide(rejected, replacement, RESAMPLED if self.resamples else KEPT)
        if config.ssd_ratio_threshold >= 0:
            scope = masks if config.ssd_threshold_all_spans else span
            extra = scope & decisions.masks & (ratio >= config.ssd_ratio_threshold)
            decisions.decide(extra, drafted, RATIO)

    def _resample(self, verifier: torch.Tensor, rejected: torch.Tensor, state: BlockState) -> torch.Tensor:
        """A token from the residual at the first rejected place of every verified row, in a table (rows, B).

        ``verifier`` (M, V) are the verifier's logits under the sampling options.
        """
        rows, length = self._plan.sent["verify_slots"], self.rows.block_length
        rows = self.source.drawing(rows, rejected[rows] < length)
        at = rows, rejected[rows].clamp_max(length - 1)
        number = torch.arange(len(verifier), device=verifier.device)
        logit_of = torch.zeros_like(self.logit_of).index_put(self._plan.at("verify"), number)
        p = verifier[logit_of[at]].softmax(-1)
        q = self._draft_law(self.draft_logits[self.logit_of[at]]).softmax(-1)
        tokens = self.source.categorical(residual(p, q), state.draws(random.RESAMPLE).take(at))
        return self.drafted.index_put(at, tokens)

    def _draft_law(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of the distribution q of (p - q)+, from draft ``logits`` (M, V)."""
        return self._law(logits)

    def _law(self, logits: torch.Tensor) -> torch.Tensor:
        """``logits`` (M, V) under the sampling options."""
        return filtered(logits, self.config)


def first_run(masks: torch.Tensor) -> torch.Tensor:
    """The first contiguous run (R, L) of ``masks`` (R, L)."""
    begun = masks.cumsum(-1) > 0
    return masks & ((begun & ~masks).cumsum(-1) == 0)
