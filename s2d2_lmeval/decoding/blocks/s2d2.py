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
from s2d2_lmeval.decoding.decoder import Decided, DecoderSetup, Kept
from s2d2_lmeval.decoding.generation import ACCEPTED, HIGH_CONFIDENCE, KEPT, RATIO, RESAMPLED
from s2d2_lmeval.decoding.options.blocks import ConfidenceOption, EditingOptions, EntropyOptions, SubblockOptions
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.options.pipelined import PipelinedOptions, PipelinedVerifierOptions
from s2d2_lmeval.decoding.options.s2d2 import AcceptanceOption, RemaskingOption, RoutingOptions, VerifierOptions
from s2d2_lmeval.decoding.passes import Cells
from s2d2_lmeval.decoding.routing.estimators import acceptance_estimate, normalised
from s2d2_lmeval.decoding.routing.policies import DraftView, policy_of
from s2d2_lmeval.decoding.sampling import laws, random
from s2d2_lmeval.decoding.sampling.acceptance import acceptance_ratio, judge, residual
from s2d2_lmeval.decoding.sampling.filters import filtered
from s2d2_lmeval.decoding.sampling.row_statistics import arg_max, probability_of, row_statistics
from s2d2_lmeval.decoding.steps import Decisions, StepTables
from s2d2_lmeval.registry import DECODERS
from s2d2_lmeval.runtime.costs import MeasureCosts
from s2d2_lmeval.runtime.graphs import numbers


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
        self.policy = policy_of(config, "block", rows.count, rows.block_length, setup.tables)
        self.verify_all_masks = config.ssd_threshold_all_spans and config.ssd_ratio_threshold >= 0
        self.resamples = config.allow_resample or config.acceptance == "greedy"
        decides_one = self.resamples or self.keeps_rejected
        self.tops_up = not decides_one or int(scheduled_count(np.arange(config.steps), config).max()) > 1
        """Whether the schedule can require more tokens than the minimum that a verification decides."""
        # The inputs of routing at every place: estimated acceptance and normalised entropy.
        self._estimate, self._uncertainty = (self._cells(name) for name in ("estimate", "uncertainty"))
        self.statistics = row_statistics(torch.empty(0, 1, device=rows.device))
        # Draft logits wait here for the verification that follows at once; ``logit_of`` is where those of a place are.
        self.draft_logits = Kept(setup, "draft_logits", self.resamples and config.acceptance != "greedy")
        self.logit_of = self._cells("logit_of", torch.long)

    def calibrate_costs(self, measure_costs: MeasureCosts) -> None:
        self.policy.calibrate_costs(measure_costs, self.rows.block_length if self.config.schedule == "lookahead" else 0)

    def admitted(self, slot: int) -> None:
        super().admitted(slot)
        self.policy.reset(slot)

    def _decide(self, state: BlockState, logits: torch.Tensor) -> Decided:
        sent, mask = self._sent, self.rows.mask_token_id
        verified, drafted = None, []
        span = torch.zeros_like(state.block, dtype=torch.bool)
        moved = span[:, 0]
        if sent.has("verify"):
            decisions = Decisions(state.block, mask)
            self._verify(decisions, state, logits[sent.part("verify")])
            self._finish_step(decisions, state, sent["verifying"], verified=True)
            verified = self._told(decisions, logits[sent.part("verify")])
            state = replace(state, block=decisions.block)
            if self.config.schedule == "lookahead":
                as_drafted = (decisions.block == verified.draft).all(-1)
                moved = sent["carries"].bool() & as_drafted & ~decisions.masks.any(-1)
                state = state.next_block(moved, mask, int(scheduled_count(0, self.config)))
        if sent.has("fresh"):
            span, tables = self._draft(state, logits[sent.part("fresh")], sent["drafting"] | moved)
            drafted.append(tables)
        return self._read(verified, drafted, span, moved)

    def _draft(
        self, state: BlockState, logits: torch.Tensor, drafting: torch.Tensor
    ) -> tuple[torch.Tensor, StepTables[torch.Tensor]]:
        """Take the new drafts of the rows ``drafting`` (rows,); route them or finish their step."""
        at, cells = self._fresh()
        # The next block's draft counts only where the row has moved on to it.
        cells = cells.where(drafting[at[0]], self.rows.count * self.rows.block_length)
        self._observe(state, logits, at, cells)
        decisions = Decisions(state.block, self.rows.mask_token_id)
        self._revise(decisions, state, drafting)
        span = self._route(decisions.masks, state, logits, cells, drafting)
        if not self.policy.always:  # otherwise every row with masks waits for a verification
            self._finish_step(decisions, state, drafting & ~span.any(-1), verified=False)
        return span, self._told(decisions)

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
        cells: torch.Tensor,
        drafting: torch.Tensor,
    ) -> torch.Tensor:
        """The span (rows, B) of every drafting row that is to be verified; empty elsewhere."""
        config, vocabulary = self.config, logits.shape[1]
        if "acceptance" in self.policy.reads:
            estimate = acceptance_estimate(self.statistics, vocabulary, self._confidence[cells], config)
            self._estimate.put(cells, estimate)
        if "entropy" in self.policy.reads:
            self._uncertainty.put(cells, normalised(self.statistics.entropy, vocabulary))
        self.draft_logits.put(logits)
        self.logit_of.flat.zero_()
        self.logit_of.put(cells, numbers(len(logits), logits.device))
        span = first_run(masks)
        denoised = None
        if "denoised" in self.policy.reads:
            denoised = self._choose(masks, state.count, self.confidence)[0].sum(-1)
        view = DraftView(
            drafting=drafting,
            masks=masks,
            span=span,
            confidence=self.confidence,
            acceptance=self._estimate.table,
            entropy=self._uncertainty.table,
            decided=(~masks).sum(-1) - state.given,
            denoised=denoised,
            in_flight=self._sent["in_flight"],
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
        config, drafted, cells = self.config, self.drafted, self._sent.cells("verify")
        masks = decisions.masks & self._sent["verifying"].unsqueeze(1)
        span = first_run(masks)
        verifier = self._law(logits)
        p = probability_of(verifier, self._drafted[cells])
        self.sound.logical_and_(~p.isnan().any())
        ratio = acceptance_ratio(p, self._confidence[cells], config.ssd_ratio_tempering_factor)
        ratio = Cells.like(self.confidence).put(cells, ratio)
        if config.acceptance == "greedy":
            replacement = Cells.like(drafted).put(cells, arg_max(logits))
            verdict = judge(replacement == drafted, span)
        else:
            drawn = self.source.uniform(state.draws(random.ACCEPT), span).to(ratio.dtype)
            verdict = judge(drawn < ratio, span)
            replacement = self._resample(verifier, verdict.rejected, state) if self.resamples else drafted
        self.policy.judged(span, verdict.accepted, verdict.rejected)
        place = numbers(masks.shape[1], masks.device)
        rejected = masks & (place == verdict.rejected.unsqueeze(1))
        decisions.decide(verdict.accepted, drafted, ACCEPTED)
        if self.resamples or self.keeps_rejected:
            decisions.decide(rejected, replacement, RESAMPLED if self.resamples else KEPT)
        if config.ssd_ratio_threshold >= 0:
            scope = masks if config.ssd_threshold_all_spans else span
            extra = scope & decisions.masks & (ratio >= config.ssd_ratio_threshold)
            decisions.decide(extra, drafted, RATIO)

    def _laws(self, decisions: Decisions, verifier: torch.Tensor | None) -> torch.Tensor | None:
        drafts = super()._laws(decisions, verifier)
        if verifier is None or drafts is None:
            return drafts
        cells, tokens = self._sent.cells("verify"), decisions.block.flatten()
        entries = laws.entries(self._law(verifier), tokens[cells.clamp_max(len(tokens) - 1)], self.law_size)
        by_verifier = (decisions.marks == ACCEPTED) | (decisions.marks == RESAMPLED)
        of_verifier = Cells.of_entries(decisions.block, self.law_size).put(cells, entries)
        return of_verifier.where(by_verifier.unsqueeze(-1), drafts)

    def _resample(self, verifier: torch.Tensor, rejected: torch.Tensor, state: BlockState) -> torch.Tensor:
        """A token from the residual at the first rejected place of every verified row, in a table (rows, B).

        ``verifier`` (M, V) are the verifier's logits under the sampling options.
        """
        rows, length = self._sent["verify_slots"], self.rows.block_length
        rows = self.source.drawing(rows, rejected[rows] < length)
        at = rows, rejected[rows].clamp_max(length - 1)
        number = numbers(len(verifier), verifier.device)
        logit_of = Cells.like(self.drafted).put(self._sent.cells("verify"), number)
        p = verifier[logit_of[at]].softmax(-1)
        q = self._draft_law(self.draft_logits.values[self.logit_of.table[at]]).softmax(-1)
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
    return masks & ((begun > masks).cumsum(-1) == 0)  # begun and not
