"""Pipelined block denoising (D2F, arXiv 2508.09192): several blocks of a sequence are in the making at once.

An iteration of a row:

1. open    the next block, once the last one is decided far enough
2. draft   tokens and their confidence at every mask of every open block; decided blocks in front of them are committed
           by the same forward
3. decide  every confident token; where there is none in a block that may be forced on, the best one

A block sees the prompt and every block up to itself. Once a stop token is decided no further block opens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from s2d2_lmeval.decoding.blocks.remasking import ranks
from s2d2_lmeval.decoding.decoder import Decoder, Seating
from s2d2_lmeval.decoding.generation import DENOISED, HIGH_CONFIDENCE, NOTHING, RESAMPLED, Step
from s2d2_lmeval.decoding.options.blocks import BlockOption, ConfidenceOption, ScheduleOption
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.options.pipelined import PipelinedOptions
from s2d2_lmeval.decoding.pipelined.planning import PipelinePlan, Wanted, Window, plan_pipeline
from s2d2_lmeval.decoding.pipelined.rows import PipelineRows
from s2d2_lmeval.decoding.sampling import random
from s2d2_lmeval.decoding.sampling.filters import probabilities
from s2d2_lmeval.decoding.state import KIND_OF_PHASE, VERIFY
from s2d2_lmeval.decoding.steps import Decisions, Outcome, StepResult, StepTables, read_back
from s2d2_lmeval.errors import ConfigError, NumericalError
from s2d2_lmeval.registry import DECODERS
from s2d2_lmeval.runtime.costs import MeasureCosts

if TYPE_CHECKING:
    from typing_extensions import Self


@DECODERS.register(
    "pipelined",
    "pipelined",
    promise="the definition of pipelined block denoising (D2F)",
    options=(ScheduleOption, BlockOption, ConfidenceOption, PipelinedOptions),
)
class PipelinedDenoiser(Decoder[PipelineRows]):
    """The decoder ``pipelined``."""

    verifies = False
    """Whether a verifier may look at a draft before it is decided."""

    def __init__(self, config: DecodingConfig, rows: PipelineRows, token_shift: bool, prefill_chunk: int) -> None:
        self.config = config
        self.rows = rows
        self.token_shift = token_shift
        self.prefill_chunk = prefill_chunk
        self.source = random.source_of(config.random_source, config.seed)
        # The latest draft at every generated place; the last column takes what belongs nowhere.
        shape = (rows.count, rows.places + 1)
        self.tokens = torch.zeros(shape, dtype=torch.long, device=rows.device)
        self.confidence = torch.zeros(shape, device=rows.device)
        self.score = torch.zeros(shape, device=rows.device)
        self.sound = torch.ones((), dtype=torch.bool, device=rows.device)
        # Token shift: logits of the place behind the keys, which the last forward that committed has given.
        self.kept_logits = torch.empty(0, device=rows.device)

    @classmethod
    def seat(cls, seating: Seating) -> Self:
        """A decoder with seats for a run.

        :raises ConfigError: for a schedule that there is none of here.
        """
        config, facts = seating.config, seating.facts
        if config.schedule == "lookahead":
            raise ConfigError("schedule=lookahead commits token-causally, which pipelined blocks are not; use fused.")
        rows = PipelineRows(seating.slots, seating.requests, config.block_length, facts.mask_token_id, seating.device)
        return cls(config, rows, facts.token_shift, seating.prefill_chunk)

    @property
    def capacity(self) -> int:
        """Positions that a row may write to in the cache."""
        return self.rows.length

    def weigh(self, measure_costs: MeasureCosts) -> None:
        """Nothing here depends on what forwards cost."""

    def admitted(self, slot: int) -> None:
        """A request has been seated in ``slot``."""
        self.rows.begin_iteration(np.array([slot]), self.config)

    def plan(self) -> PipelinePlan:
        """Lay out the next forward.

        A prompt sees all of itself, so it cannot be split; a long one does not share its forward with other phases,
        which would be padded to its width.
        """
        rows, slots = self.rows, self.rows.active()
        long = (rows.cached[slots] == 0) & (rows.prompt[slots] > self.prefill_chunk)
        if long.any() and not long.all():
            verifying = rows.phase[slots] == VERIFY
            slots = slots[verifying if verifying.any() else long]
        self._plan = plan_pipeline(rows, self.config, self.token_shift, slots)
        return self._plan

    def advance(self, logits: torch.Tensor) -> Outcome:
        """Take the wanted logits (M, V) of the planned forward; move every row on. Reads the device once.

        :raises NumericalError: when the logits are not numbers.
        """
        plan, mask = self._plan, self.rows.mask_token_id
        if self.config.suppress_mask_token:
            logits[:, mask] = -torch.inf
        else:
            rows = torch.cat([wanted.at[0][len(wanted.kept) :] for wanted in (plan.verify, plan.draft)])
            # Else a model that keeps predicting the mask would loop for ever.
            logits[:, mask].masked_fill_(plan.stalled[rows], -torch.inf)
        verify, draft = logits.split([plan.verify.count, plan.draft.count])
        verify = self._with_kept(verify, plan.verify)
        if self.token_shift and len(plan.save_rows):
            if not len(self.kept_logits):
                self.kept_logits = draft.new_zeros(self.rows.count, draft.shape[1])
            self.kept_logits[plan.save_rows] = draft[plan.save_from]
        draft = self._with_kept(draft, plan.draft)
        decisions = Decisions(plan.window.block, mask)
        if len(draft):
            self._observe(draft, plan)
        span = self._decide(decisions, plan.window, verify, draft)
        self._write(plan.window, decisions)
        tables = decisions.tables(self._of(plan.window, self.tokens))
        nobody = torch.zeros_like(plan.window.drafting)
        return self._settle(read_back(None, [tables], span, nobody, self.sound))

    # ---- device ----

    def _with_kept(self, logits: torch.Tensor, wanted: Wanted) -> torch.Tensor:
        """This forward's logits behind those that were kept from an earlier one."""
        if not len(wanted.kept):
            return logits
        mask, kept = self.rows.mask_token_id, self.kept_logits[wanted.kept]
        kept[:, mask].masked_fill_(self._plan.stalled[wanted.kept], -torch.inf)
        return torch.cat([kept, logits])

    def _of(self, window: Window, table: torch.Tensor) -> torch.Tensor:
        """The window (count, W) of a table (count, G + 1)."""
        return table.gather(1, window.column)

    def _law(self, logits: torch.Tensor) -> torch.Tensor:
        """Distributions under the sampling options."""
        config = self.config
        return probabilities(logits, config)

    def _observe(self, logits: torch.Tensor, plan: PipelinePlan) -> None:
        """Draft a token at every mask of the drafting rows: its probability, and the score by which it is ranked."""
        config, at = self.config, plan.draft.at
        key = plan.window.draws(random.DRAFT).take(at)
        if config.sampled:
            law = self._law(logits)
            # Without a verifier, published code draws block by block.
            parts = plan.groups if not config.keyed and not self.verifies else [len(law)]
            places = torch.arange(len(law), device=law.device).split(parts)
            drawn = [self.source.categorical(law[part], key.take((part,))) for part in places]
            tokens = torch.cat(drawn)
        else:
            law = self._law(logits) if config.nucleus_first else logits.softmax(-1)
            tokens = logits.argmax(-1)
        confidence = score = law.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        if config.neg_entropy:
            score = (law * (law + 1e-10).log()).sum(-1)
        elif config.margin_confidence:
            first, second = law.topk(2, dim=-1).values.unbind(-1)
            score = first - second
        self.sound = self.sound & ~confidence.isnan().any()
        where = (at[0], plan.window.column[at])
        self.tokens = self.tokens.index_put(where, tokens)
        self.confidence = self.confidence.to(confidence.dtype).index_put(where, confidence)
        self.score = self.score.to(score.dtype).index_put(where, score)

    def _decide(self, decisions: Decisions, window: Window, verify: torch.Tensor, draft: torch.Tensor) -> torch.Tensor:
        """Decide tokens in the rows whose iteration ends here; the span (count, W) that goes on to the verifier."""
        tokens, masks = self._of(window, self.tokens), decisions.masks
        high = masks & (self._of(window, self.confidence) > self.config.confidence_threshold)
        best = self._ranks(self._of(window, self.score), masks) == 0
        unsure = ~self._per_block(high).any(-1, keepdim=True)
        forced = masks & window.forced & (self._per_block(best) & unsure).view(best.shape)
        decisions.decide(high, tokens, HIGH_CONFIDENCE)
        decisions.decide(forced, tokens, DENOISED)
        return torch.zeros_like(masks)

    def _per_block(self, table: torch.Tensor) -> torch.Tensor:
        """(count, W) as (count, W / B, B): windows begin with a block."""
        return table.view(table.shape[0], -1, self.rows.block_length)

    def _ranks(self, scores: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
        """Rank (count, W) of each place by descending ``scores`` within its block."""
        return ranks(self._per_block(scores), self._per_block(among)).view(scores.shape)

    def _write(self, window: Window, decisions: Decisions) -> None:
        """Put the window where passes read it: into the canvas, and with every mask drafted behind it."""
        flat, mask = self.rows.store.view(-1), self.rows.mask_token_id
        filled = torch.where(decisions.masks, self._of(window, self.tokens), decisions.block)
        flat[window.cell] = decisions.block.masked_fill(~window.open, mask)
        flat[window.drafted] = filled.masked_fill(~window.open, mask)

    # ---- host ----

    def _settle(self, read: StepResult) -> Outcome:
        """Bring the host's mirror up to date and move every row of the pass on."""
        rows, plan = self.rows, self._plan
        slots = plan.request.layout.slots
        if not read.sound:
            raise NumericalError
        rows.cached[slots] += plan.request.keep
        outcome = Outcome.zeros(len(slots))
        over = []
        for slot in slots.tolist():
            width, progress = int(plan.widths[slot]), rows.progress[slot]
            progress.forwards[KIND_OF_PHASE[rows.phase[slot]]] += 1
            step = StepTables(*(table[slot, :width] for table in read.drafted[0]))
            self._record(slot, step)
            span = read.span[slot, :width]
            if rows.phase[slot] == VERIFY:
                rows.span[slot] = False
            else:
                progress.drafts += self.verifies
            if span.any():
                progress.routed_drafts += 1
                rows.phase[slot] = VERIFY
                rows.span[slot, rows.base[slot] : rows.base[slot] + width] = span
            else:
                self._end_iteration(slot, step)
                over.append(slot)
        if over:
            rows.begin_iteration(np.array(over), self.config)
        for slot in over:
            self._maybe_complete(slot)
        return outcome

    def _record(self, slot: int, step: StepTables[np.ndarray]) -> None:
        """Add the step of row ``slot`` to its request's record."""
        rows = self.rows
        base, verified = int(rows.base[slot]), rows.phase[slot] == VERIFY
        rows.progress[slot].steps.append(
            Step(
                kind=KIND_OF_PHASE[rows.phase[slot]],
                start=int(rows.prompt[slot]) + base,
                before=step.before.tolist(),
                draft=step.draft.tolist(),
                tokens=step.after.tolist(),
                marks=step.marks.tolist(),
                drafted=(int(rows.prompt[slot]) + np.flatnonzero(rows.span[slot])).tolist() if verified else [],
            )
        )
        rows.generated[slot, base : base + len(step.after)] = step.after

    def _end_iteration(self, slot: int, step: StepTables[np.ndarray]) -> None:
        """An iteration of row ``slot`` is over: see what it decided, and whether the answer ends."""
        rows, config = self.rows, self.config
        decided, base = step.marks != NOTHING, int(rows.base[slot])
        rows.step[slot] += 1
        rows.progress[slot].decoding_order.append(self._published_order(step, int(rows.prompt[slot]) + base))
        fresh = step.after[decided]
        rows.stalled[slot] |= not (fresh != rows.mask_token_id).any()
        rows.ended[slot] |= bool(np.isin(fresh, config.stop_token_ids).any())
        rows.hand_over(slot, config.stop_token_ids)

    def _maybe_complete(self, slot: int) -> None:
        """See whether row ``slot`` has nothing left to run."""
        rows = self.rows
        kept = rows.kept[slot]
        struck = kept is not None and (kept[1] != "stop" or self.config.schedule != "reference")
        # Published code finishes the open blocks behind a stop token.
        rows.complete[slot] |= struck
        if rows.complete[slot]:
            prompt = int(rows.prompt[slot])
            rows.progress[slot].blocks = int(rows.base[slot]) // rows.block_length
            if not struck:
                rows.tokens[slot] = rows.tokens[slot][:prompt] + rows.generated[slot, : rows.end[slot]].tolist()

    def _published_order(self, step: StepTables[np.ndarray], start: int) -> list[int | float | str]:
        """Positions decided in an iteration in the published notation: p confident or accepted, p + 0.5 resampled, -p
        forced.
        """
        places = np.flatnonzero(step.marks != NOTHING)
        forced = (step.marks[places] == DENOISED) & self.verifies
        block = places // self.rows.block_length
        # Position by position; with a verifier what was topped up comes last, block by block and best first.
        order = np.lexsort((places, np.where(forced, step.order[places], 0), np.where(forced, block, 0), forced))
        entries: list[int | float | str] = []
        for place in places[order].tolist():
            mark, position = step.marks[place], start + place
            entries.append(-position if mark == DENOISED else position + 0.5 if mark == RESAMPLED else position)
        return entries
