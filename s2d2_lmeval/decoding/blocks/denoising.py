"""Block denoising: draft every mask of the block, decide some of them, repeat (SDAR and its remasking strategies).

One object decodes all rows in flight. :meth:`BlockDenoiser.plan` says what to forward, :meth:`BlockDenoiser.advance`
takes the logits. A step of a row:

1. draft   tokens and their confidence at every mask of the block
2. choose  by the remasking strategy which masks to decide
3. decide  write them into the block; a finished block is committed and the next begins

The device part (:mod:`~s2d2_lmeval.decoding.blocks.stages`) works on all rows at once. It never waits; the host learns
what happened from one read at the end and moves every row to its next phase.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from s2d2_lmeval.decoding.blocks.planning import BlockPlan, plan_blocks
from s2d2_lmeval.decoding.blocks.remasking import Undecided, choose
from s2d2_lmeval.decoding.blocks.rows import COMMIT, DRAFT, KIND_OF_PHASE, PREFILL, VERIFY, Rows
from s2d2_lmeval.decoding.blocks.stages import Decisions, Draft, Stage
from s2d2_lmeval.decoding.decoder import AUTOREGRESSIVE, Decoder, Seating
from s2d2_lmeval.decoding.generation import DENOISED
from s2d2_lmeval.decoding.options.blocks import (
    BlockOption,
    ConfidenceOption,
    EntropyOptions,
    ScheduleOption,
    StepOptions,
)
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.readback import Outcome, Readback, StepTables, as_step, read_back, record_step
from s2d2_lmeval.decoding.sampling import random
from s2d2_lmeval.decoding.sampling.filters import draft_tokens
from s2d2_lmeval.errors import NumericalError
from s2d2_lmeval.registry import DECODERS
from s2d2_lmeval.runtime.costs import MeasureCosts

if TYPE_CHECKING:
    from typing_extensions import Self


DENOISING = (ScheduleOption, BlockOption, StepOptions)
"""Options of every decoder of whole blocks."""


@DECODERS.register("ar", "block", "editing", **AUTOREGRESSIVE)
@DECODERS.register(
    "entropy_bounded",
    "block",
    promise="the definition of entropy-bounded remasking",
    options=(*DENOISING, EntropyOptions),
    strategy="entropy_bounded",
    accelerable=True,
)
@DECODERS.register(
    "sequential",
    "block",
    promise="the definition of sequential block denoising",
    options=DENOISING,
    strategy="sequential",
    accelerable=True,
)
@DECODERS.register(
    "static",
    "block",
    promise="the definition of static low-confidence remasking",
    options=DENOISING,
    strategy="low_confidence_static",
    accelerable=True,
)
@DECODERS.register(
    "dynamic",
    "block",
    promise="the definition of dynamic (confidence-threshold) remasking",
    options=(*DENOISING, ConfidenceOption),
    strategy="low_confidence_dynamic",
    accelerable=True,
)
class BlockDenoiser(Decoder[Rows]):
    """The decoders ``sequential``, ``static``, ``dynamic``, ``entropy_bounded`` and, at block length one, ``ar``."""

    verifies = False
    """Whether a verifier may look at a draft before it is decided."""
    commits_last_block = True
    """Whether the reference schedule commits a block even if none follows, as most published code does."""

    def __init__(self, config: DecodingConfig, rows: Rows, prefill_chunk: int) -> None:
        self.config = config
        self.rows = rows
        self.prefill_chunk = prefill_chunk
        self.source = random.source_of(config.random_source, config.seed)
        self.draft = Draft.empty((rows.count, rows.block_length), rows.device)
        # The published code draws for every place of the block, decided ones too; its collapsed entropy sums over all.
        self.read_whole_block = (self.source.sequential and config.sampled) or config.collapse_entropy
        self.verify_all_masks = False

    @classmethod
    def seat(cls, seating: Seating) -> Self:
        """A decoder with seats for a run."""
        return cls(seating.config, cls.rows_for(seating), seating.prefill_chunk)

    @classmethod
    def rows_for(cls, seating: Seating, draft_states: int = 0) -> Rows:
        """Rows of the run, each with room for so many drafted states."""
        length, mask = seating.config.block_length, seating.facts.mask_token_id
        return Rows(seating.slots, seating.longest, length, mask, seating.device, draft_states)

    @property
    def capacity(self) -> int:
        """Positions that a row may write to in the cache."""
        return self.rows.length + self.margin(self.rows.block_length)

    @staticmethod
    def margin(block_length: int) -> int:
        """How far a pass may write behind the last block."""
        return block_length

    def weigh(self, measure_costs: MeasureCosts) -> None:
        """Nothing here depends on what forwards cost."""

    def admitted(self, slot: int) -> None:
        """A request has been seated in ``slot``."""
        self._enter_draft(slot)

    def plan(self) -> BlockPlan:
        """Lay out the next forward of all active rows."""
        self._plan = plan_blocks(self.rows, self.config, self.prefill_chunk)
        return self._plan

    def advance(self, logits: torch.Tensor) -> Outcome:
        """Take the wanted logits (M, V) of the planned forward; move every row to its next phase. Reads the device
        once.

        :raises NumericalError: when the logits are not numbers.
        """
        rows, facts = self.rows, self._plan.facts
        block = rows.store.view(-1)[facts["block"]]
        self._suppress_mask_token(logits, block)
        position, step, given = facts["position"], facts["step"], facts["given"]
        stage = Stage(block, facts["block"], position, step, facts["count"], given, facts["key"])
        return self._settle(self._decide(stage, logits))

    def _suppress_mask_token(self, logits: torch.Tensor, block: torch.Tensor) -> None:
        """Never predict the mask token; where the options allow it, not for masks behind the end of their schedule.

        Without that end a model that keeps predicting the mask would loop for ever.
        """
        plan, masked = self._plan, logits[:, self.rows.mask_token_id]
        if self.config.suppress_mask_token:
            masked.fill_(-torch.inf)
        else:
            overdue = self._overdue(block, plan.facts["step"])
            # The next block's draft, behind the others, is at its first step.
            current = torch.cat([overdue[plan.verify_at[0]], overdue[plan.draft_at[0]]])
            masked[: len(current)].masked_fill_(current, -torch.inf)

    def _overdue(self, block: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """Rows (rows,) whose ``block`` (rows, B) has masks although all steps of its schedule are over."""
        return ((step >= self.config.steps) & (block == self.rows.mask_token_id)).any(-1)

    def _decide(self, stage: Stage, logits: torch.Tensor) -> Readback:
        """The device part of a step: here, of rows that drafted."""
        plan = self._plan
        nobody = torch.zeros_like(plan.draft_rows)
        drafted, span = None, torch.zeros_like(stage.block, dtype=torch.bool)
        if plan.drafts:
            decisions = self._step(stage, logits, plan.draft_at, plan.draft_rows)
            self._write(stage, decisions)
            drafted = decisions.tables(self.draft.tokens)
        return self._read(None, drafted, span, nobody)

    def _step(
        self, stage: Stage, logits: torch.Tensor, at: tuple[torch.Tensor, ...], drafting: torch.Tensor
    ) -> Decisions:
        """One denoising step, without verification, of the rows ``drafting`` (rows,) from the ``logits`` (M, V) of
        the places ``at``: a function of the blocks in ``stage``, whoever put them there.
        """
        self._observe(stage, logits, at)
        decisions = Decisions(stage.block, self.rows.mask_token_id)
        self._revise(decisions, stage, drafting)
        self._denoise(decisions, stage.count, drafting)
        return decisions

    def _read(
        self,
        verified: StepTables[torch.Tensor] | None,
        drafted: StepTables[torch.Tensor] | None,
        span: torch.Tensor,
        moved: torch.Tensor,
    ) -> Readback:
        """The engine step's one read of the device."""
        return read_back(verified, drafted, span, moved, self.draft.sound)

    def _observe(
        self,
        stage: Stage,
        logits: torch.Tensor,
        at: tuple[torch.Tensor, ...],
        valid: torch.Tensor | None = None,
    ) -> None:
        """Draft a token at the places ``at`` from their ``logits``.

        Where ``valid`` (M,) is false, leave things alone.
        """
        draft = self.draft

        def put(table: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            table = table.to(values.dtype)
            return table.index_put(at, values if valid is None else torch.where(valid, values, table[at]))

        tokens, confidence = self._draw(logits, stage.draws(random.DRAFT).take(at))
        draft.tokens = put(draft.tokens, tokens)
        draft.confidence = put(draft.confidence, confidence)
        draft.sound = draft.sound & ~confidence.isnan().any()
        if self.config.strategy == "entropy_bounded" and not self.config.collapse_entropy:
            p = logits.softmax(-1)
            draft.entropy = put(draft.entropy, -torch.special.xlogy(p, p).sum(-1))

    def _draw(self, logits: torch.Tensor, key: random.Key) -> tuple[torch.Tensor, torch.Tensor]:
        """A token (M,) and its probability (M,) from each row of ``logits`` (M, V)."""
        return draft_tokens(logits, self.config, self.source, key)

    def _revise(self, decisions: Decisions, stage: Stage, drafting: torch.Tensor) -> None:
        """Change decided tokens of the rows ``drafting`` (rows,), in schemes that do: here what is decided stays."""

    def _denoise(self, decisions: Decisions, count: torch.Tensor, among: torch.Tensor) -> None:
        """Decide by the remasking strategy ``count`` (rows,) tokens or more in the rows ``among`` (rows,)."""
        chosen, order = self._choose(decisions.masks, count * among, self.draft.confidence)
        decisions.decide(chosen, self.draft.tokens, DENOISED, order)

    def _choose(
        self, masks: torch.Tensor, count: torch.Tensor, confidence: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Which ``masks`` (rows, B) the remasking strategy decides, and in which order."""
        step = Undecided(masks, count, confidence, self.draft.entropy, self.config, at_most_count=self.verifies)
        return choose(self.config.strategy, step)

    def _write(self, stage: Stage, decisions: Decisions) -> None:
        """Put the block where passes read it: into the canvas, and with every mask drafted behind it."""
        rows = self.rows
        rows.store.view(-1)[stage.index] = decisions.block
        rows.store[:, rows.length : rows.length + rows.block_length] = torch.where(
            decisions.masks, self.draft.tokens, decisions.block
        )

    # ---- host ----

    def _settle(self, read: Readback) -> Outcome:
        """Bring the host's mirror up to date and move every active row to its next phase."""
        rows, slots = self.rows, self._plan.request.layout.slots
        if not read.sound:
            raise NumericalError
        rows.cached[slots] += self._plan.request.keep
        outcome = Outcome.zeros(len(slots))
        for row, slot in enumerate(slots.tolist()):
            phase = rows.phase[slot]
            rows.progress[slot].forwards[KIND_OF_PHASE[phase]] += 1
            if phase == PREFILL:
                self._after_prefill(row, slot, read, outcome)
            elif phase == COMMIT:
                self._after_commit(row, slot, read, outcome)
            elif phase == VERIFY:
                self._after_verify(row, slot, read, outcome)
            else:
                self._after_draft(row, slot, read, outcome)
        return outcome

    def _after_prefill(self, row: int, slot: int, read: Readback, outcome: Outcome) -> None:
        """A piece of the prompt of row ``slot`` is in the cache."""
        self._enter_draft(slot)

    def _after_commit(self, row: int, slot: int, read: Readback, outcome: Outcome) -> None:
        """A finished block of row ``slot`` is in the cache."""
        self._next_block(slot)

    def _after_draft(self, row: int, slot: int, read: Readback, outcome: Outcome) -> None:
        """A draft of row ``slot`` has come in: verify it, or its step is over."""
        rows = self.rows
        assert read.drafted is not None
        self._record(slot, read.drafted, "draft")
        rows.progress[slot].drafts += self.verifies
        if read.span[slot].any():
            rows.progress[slot].routed_drafts += 1
            rows.phase[slot] = VERIFY
            rows.span[slot] = read.span[slot]
            rows.wanted[slot] = rows.masks[slot] if self.verify_all_masks else read.span[slot]
        else:
            self._after_step(slot)

    def _after_verify(self, row: int, slot: int, read: Readback, outcome: Outcome) -> None:
        """A verification of row ``slot`` has come in: its step is over."""
        rows, length = self.rows, self.rows.block_length
        assert read.verified is not None
        fed = read.verified.draft[slot]
        self._record(slot, read.verified, "verify")
        if self.config.schedule == "lookahead":
            # What was fed token-causally and stands is prefix, up to the first that is open or came out another.
            standing = int(np.append((rows.block[slot] == fed) & ~rows.masks[slot], False).argmin())
            end = min(rows.start[slot] + min(standing, length), rows.cached[slot] + self._plan.heads[row])
            outcome.kept[row] = max(end - rows.cached[slot], 0)
            rows.cached[slot] += outcome.kept[row]
        self._after_step(slot)
        if read.moved[slot] and not rows.complete[slot]:
            self._after_draft(row, slot, read, outcome)

    def _record(self, slot: int, step: StepTables[np.ndarray], kind: str) -> None:
        rows = self.rows
        done = as_step(step, slot, kind, int(rows.start[slot]), rows.span[slot])
        record_step(rows.progress[slot], done, step.order[slot], bool(rows.step[slot] == 0), self.verifies)
        rows.block[slot] = step.after[slot]

    def _after_step(self, slot: int) -> None:
        """A denoising step of row ``slot`` is over: go on in the block, or with the next."""
        rows = self.rows
        rows.step[slot] += 1
        if not self._block_finished(slot):
            self._enter_draft(slot)
            return
        rows.end_block(slot, self.config.stop_token_ids, self.config.eos_early_stop)
        if self.config.schedule == "reference" and (self.commits_last_block or not rows.ended[slot]):
            rows.phase[slot] = COMMIT
        else:
            self._next_block(slot)

    def _block_finished(self, slot: int) -> bool:
        """Whether the block of row ``slot``, at the end of a step, needs no other."""
        return not self.rows.masks[slot].any()

    def _next_block(self, slot: int) -> None:
        """Turn to the next block, or be complete."""
        rows = self.rows
        if rows.ended[slot]:
            rows.complete[slot] = True
            return
        rows.begin_block(slot, int(rows.start[slot]) + rows.block_length)
        self._enter_draft(slot)

    def _enter_draft(self, slot: int) -> None:
        """Draft next, or first run what has to be in the cache and cannot ride along."""
        rows = self.rows
        waiting = rows.start[slot] - rows.cached[slot]
        most = 0 if self.config.schedule == "reference" else max(self.prefill_chunk, rows.block_length)
        rows.phase[slot] = DRAFT if waiting <= most else PREFILL
        rows.wanted[slot] = True if self.read_whole_block else rows.masks[slot]
