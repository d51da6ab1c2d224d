"""Block denoising: draft every mask of the block, decide some of them, repeat (SDAR and its remasking strategies).

One object decodes all rows in flight. A step of a row:

1. draft   tokens and their confidence at every mask of the block
2. choose  which masks to decide, by the remasking strategy
3. decide  write them into the block; a finished block is committed and the next one begins

The device part works on all rows at once and never synchronizes; one read at the end tells the host what happened, and
the host moves every row to its next phase.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from s2d2_lmeval.decoding import reference
from s2d2_lmeval.decoding.blocks.planning import plan_blocks
from s2d2_lmeval.decoding.blocks.remasking import Undecided, choose, ranks
from s2d2_lmeval.decoding.blocks.rows import BlockState, Rows
from s2d2_lmeval.decoding.decoder import Decided, Decoder, DecoderSetup
from s2d2_lmeval.decoding.generation import DENOISED
from s2d2_lmeval.decoding.options.blocks import (
    BlockOption,
    ConfidenceOption,
    EntropyOptions,
    MultiBlockOption,
    ScheduleOption,
    StepOptions,
)
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.options.general import LogprobsOption
from s2d2_lmeval.decoding.passes import Cells, Plan, Sent
from s2d2_lmeval.decoding.sampling import laws, random
from s2d2_lmeval.decoding.sampling.filters import draft_tokens, filtered
from s2d2_lmeval.decoding.state import COMMIT, DRAFT, KIND_OF_PHASE, PREFILL, VERIFY
from s2d2_lmeval.decoding.steps import Decisions, StepResult, StepTables, as_step, columns_of, step_result
from s2d2_lmeval.errors import NumericalError
from s2d2_lmeval.registry import DECODERS
from s2d2_lmeval.runtime.visibility import by_reach

DENOISING = (ScheduleOption, BlockOption, StepOptions, LogprobsOption)
"""Options of every decoder of whole blocks."""


def _remasking(name: str, strategy: str, what: str, *options: type) -> Callable[[Any], Any]:
    """Register the decoder ``name``, which always uses one remasking ``strategy``."""
    return DECODERS.register(
        name,
        "block",
        promise=f"the definition of {what}",
        options=(*DENOISING, *options),
        strategy=strategy,
        plain=True,
    )


@_remasking("entropy_bounded", "entropy_bounded", "entropy-bounded remasking", EntropyOptions)
@_remasking("sequential", "sequential", "sequential block denoising")
@_remasking("static", "low_confidence_static", "static low-confidence remasking")
@_remasking(
    "dynamic", "low_confidence_dynamic", "dynamic (confidence-threshold) remasking", ConfidenceOption, MultiBlockOption
)
class BlockDenoiser(Decoder[Rows]):
    """The decoders ``sequential``, ``static``, ``dynamic`` and ``entropy_bounded``."""

    verifies = False
    """Whether a verifier may check a draft before it is decided."""
    edits = False
    """Whether decided tokens may be replaced."""
    notation = staticmethod(reference.order_of_blocks)
    """Makes the published decoding order."""

    shifted = False
    """Whether the logits of a token predict the next one; then the rows' "block" is a sub-block."""

    def __init__(self, setup: DecoderSetup, part: DecodingConfig | None = None) -> None:
        """``part`` is the configuration of sub-blocks, if blocks are denoised in sub-blocks."""
        self.whole, self.config = setup.config, part or setup.config
        config, block = self.config, self.whole.block_length
        # Of shifted models, room for the first token after the last block too.
        length = -(-setup.longest // block) * block + self.shifted * config.block_length
        absolute = setup.facts.block_alignment == "absolute"
        self.rows = rows = Rows(
            setup.slots,
            length + (not absolute) * block,
            config.block_length,
            setup.facts.mask_token_id,
            setup.device,
            absolute=absolute,
            short_last=self.whole.short_last_block,
            whole_length=block,
            blocks=config.multi_block,
        )
        self._tables, self._dtype = setup.tables, setup.dtype
        rows.prefix_grain = block if absolute else 1 if self.whole.token_causal else None
        rows.published_order = partial(self.notation, verifies=self.verifies)
        self.prefill_chunk = setup.prefill_chunk
        self.source = random.source_of(config.random_source, config.seed)
        self.rules = reference.rules_of(config, setup.facts)
        self.longest_ride = 0 if self.rules.commits_apart else max(setup.prefill_chunk, block)
        """Tokens without keys that a draft may also commit."""
        self.verify_all_masks = False
        # The latest draft of every row: tokens, their probability, and the entropy (nats) of their distribution if the
        # strategy asks for it. ``sound`` is false once logits were not numbers.
        self._drafted = self._cells("drafted", torch.long)
        self._confidence, self._entropy = (self._cells(name) for name in ("confidence", "entropy"))
        self.drafted, self.confidence, self.entropy = (
            cells.table for cells in (self._drafted, self._confidence, self._entropy)
        )
        self.law_size = laws.entry_size(config)
        self._law_of_draft = self._cells("law", torch.double, self.law_size) if self.law_size else None
        self.sound = setup.tables.full("sound", (), True, torch.bool)

    def _cells(self, name: str, dtype: torch.dtype | None = None, *entry: int) -> Cells:
        """A table of every place of the blocks, of the logits' type if not given; of an ``entry`` each."""
        size = self.rows.count * self.rows.width + 1
        return Cells(self._tables.full(name, (size, *entry), 0, dtype or self._dtype), self.rows.width)

    @staticmethod
    def layout(config: DecodingConfig) -> str:
        several = f", {config.multi_block} at once, so not the output of one after the other"
        return super(BlockDenoiser, BlockDenoiser).layout(config) + several * (config.multi_block > 1)

    @property
    def capacity(self) -> int:
        """Positions that a row may write to in the cache: a pass may write a block, or its verifier, after the last."""
        return self.rows.length + (1 + self.verifies) * self.rows.block_length

    @property
    def most_logits(self) -> tuple[int, int]:
        # Under lookahead a verifier brings the next block's draft.
        blocks = 2 if self.verifies and self.config.schedule == "lookahead" else 1
        return (blocks * self.rows.width,) * 2

    def admitted(self, slot: int) -> None:
        """A request has been admitted to ``slot``."""
        self._enter_draft(np.array([slot]))

    def plan(self) -> Plan:
        """Lay out the next forward of all active rows."""
        self._plan = plan_blocks(self.rows, self.config, self.prefill_chunk)
        return self._plan

    # ---- device ----

    def assemble(self, sent: Sent) -> tuple[torch.Tensor, torch.Tensor]:
        return sent["tokens"], by_reach(sent["rank"], sent["reach"])

    def decide(self, sent: Sent, logits: torch.Tensor) -> Decided:
        self._sent = sent
        sent["drafting"], sent["verifying"] = sent["drafting"].bool(), sent["verifying"].bool()
        if len(logits):
            self._suppress_mask_token(logits, sent["block"])
        facts = (sent[name] for name in ("block", "position", "step", "count", "given", "key"))
        return self._decide(BlockState(*facts), logits)

    def _suppress_mask_token(self, logits: torch.Tensor, block: torch.Tensor) -> None:
        """Suppress the mask token: always or, if the options allow predicting it, once a block's schedule is over.

        Otherwise a model that keeps predicting the mask would loop forever.
        """
        masked = logits[:, self.rows.mask_token_id]
        if self.config.suppress_mask_token:
            masked.fill_(-torch.inf)
        else:
            masked.masked_fill_(self._sent["overdue"].bool(), -torch.inf)

    def _decide(self, state: BlockState, logits: torch.Tensor) -> Decided:
        """The device part of a step of the rows that drafted."""
        sent, drafted = self._sent, []
        if sent.has("fresh"):
            decisions = self._step(state, logits[sent.part("fresh")], sent["drafting"])
            drafted.append(self._told(decisions))
        nowhere = torch.zeros_like(state.block, dtype=torch.bool)
        return self._read(None, drafted, nowhere, nowhere[:, 0])

    def _step(self, state: BlockState, logits: torch.Tensor, drafting: torch.Tensor) -> Decisions:
        """One denoising step, without verification, of the rows ``drafting`` (rows,) from the fresh ``logits`` (M, V):
        a function of the blocks in ``state``, whoever put them there.
        """
        self._observe(state, logits, *self._fresh())
        decisions = Decisions(state.block, self.rows.mask_token_id)
        self._revise(decisions, state, drafting)
        self._denoise(decisions, state.count, drafting)
        return decisions

    def _told(self, decisions: Decisions, verifier: torch.Tensor | None = None) -> StepTables[torch.Tensor]:
        """The tables of a step for the host; ``verifier`` (M, V) are the logits of the verification that ended it."""
        return decisions.tables(self.drafted, self._laws(decisions, verifier))

    def _laws(self, decisions: Decisions, verifier: torch.Tensor | None) -> torch.Tensor | None:
        """(rows, W, size) entries of the decided tokens under the laws that decided them, if they are kept."""
        return None if self._law_of_draft is None else self._law_of_draft.table

    def _read(
        self,
        verified: StepTables[torch.Tensor] | None,
        drafted: list[StepTables[torch.Tensor]],
        span: torch.Tensor,
        moved: torch.Tensor,
        made: torch.Tensor | None = None,
    ) -> Decided:
        """What the host is to read."""
        return Decided(columns_of(verified, drafted, span, moved, self.sound, made))

    def _fresh(self) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """(slots, places) and cells of the fresh logits."""
        return self._sent.at("fresh"), self._sent.cells("fresh")

    def _observe(
        self, state: BlockState, logits: torch.Tensor, at: tuple[torch.Tensor, torch.Tensor], cells: torch.Tensor
    ) -> None:
        """Draft a token from each of the fresh ``logits`` (M, V) of the places ``at``, into ``cells`` (M,)."""
        tokens, confidence = self._draw(logits, state.draws(random.DRAFT).take(at))
        self._drafted.put(cells, tokens)
        self._confidence.put(cells, confidence)
        if self._law_of_draft is not None:
            law = filtered(logits, self.config) if self.config.sampled else logits
            self._law_of_draft.put(cells, laws.entries(law, tokens, self.law_size))
        self.sound.logical_and_(confidence.eq(confidence).all())
        if self.config.strategy == "entropy_bounded" and not self.config.collapse_entropy:
            p = logits.softmax(-1)
            self._entropy.put(cells, -torch.special.xlogy(p, p).sum(-1))

    def _draw(self, logits: torch.Tensor, key: random.Key) -> tuple[torch.Tensor, torch.Tensor]:
        """A token (M,) and its probability (M,) from each row of ``logits`` (M, V)."""
        return draft_tokens(logits, self.config, self.source, key)

    def _revise(self, decisions: Decisions, state: BlockState, drafting: torch.Tensor) -> None:
        """Edit decided tokens of the rows ``drafting`` (rows,), in schemes with editing; here they stay."""

    def _denoise(self, decisions: Decisions, count: torch.Tensor, among: torch.Tensor) -> None:
        """Decide by the remasking strategy ``count`` (rows,) tokens or more in the rows ``among`` (rows,); in blocks
        ahead those above the threshold, however many.
        """
        masks, length = decisions.masks, self.rows.block_length
        if self.rows.width > length:
            ahead = masks & among.unsqueeze(1) & (self.confidence > self.config.confidence_threshold)
            ahead[:, :length] = False
            decisions.decide(ahead, self.drafted, DENOISED, ranks(self.confidence, ahead))
            masks = masks.clone()
            masks[:, length:] = False
        chosen, order = self._choose(masks, count * among, self.confidence)
        decisions.decide(chosen, self.drafted, DENOISED, order)

    def _choose(
        self, masks: torch.Tensor, count: torch.Tensor, confidence: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The ``masks`` (rows, B) that the remasking strategy decides, and their order."""
        bound, breaks_ties = self.verifies, self.rules.breaks_ties
        step = Undecided(masks, count, confidence, self.entropy, self.config, bound, breaks_ties)
        return choose(self.config.strategy, step)

    # ---- host ----

    def settle(self, table: np.ndarray | None) -> np.ndarray:
        assert table is not None
        # The steps that are recorded outlive the table, which the next step overwrites.
        return self._synchronize(
            step_result(table.copy(), self.rows.width, self._plan.count("verify") > 0, self.law_size)
        )

    def _synchronize(self, read: StepResult) -> np.ndarray:
        """Bring the host's mirror up to date and move every active row to its next phase."""
        rows, slots = self.rows, self._plan.layout.slots
        if not read.sound:
            raise NumericalError
        rows.cached[slots] += self._plan.keep
        accepted = np.zeros(len(slots), dtype=np.int64)
        phases, present = self._plan.phases, self._plan.phases.tolist()
        for slot, phase in zip(slots.tolist(), present, strict=True):
            rows.progress[slot].forwards[KIND_OF_PHASE[phase]] += 1
        after = {
            PREFILL: self._after_prefill,
            COMMIT: self._after_commit,
            DRAFT: self._after_draft,
            VERIFY: self._after_verify,
        }
        for phase in sorted(set(present)):
            among = (phases == phase).nonzero()[0]
            after[phase](among, slots[among], read, accepted)
        return accepted

    # What follows is about the rows ``slots`` (K,), which are ``among`` (K,) the active ones.

    def _after_prefill(self, among: np.ndarray, slots: np.ndarray, read: StepResult, accepted: np.ndarray) -> None:
        """A piece of their prompts is in the cache."""
        self._enter_draft(slots)

    def _after_commit(self, among: np.ndarray, slots: np.ndarray, read: StepResult, accepted: np.ndarray) -> None:
        """Their finished blocks are in the cache."""
        self._next_block(slots)

    def _after_draft(self, among: np.ndarray, slots: np.ndarray, read: StepResult, accepted: np.ndarray) -> None:
        """Their drafts have come in: verify them, or their step is over."""
        rows, span = self.rows, read.span[slots]
        self._record(slots, read.drafted[0], "draft")
        routed = span.any(1)
        if self.verifies:
            for slot, verified in zip(slots.tolist(), routed.tolist(), strict=True):
                rows.progress[slot].drafts += 1
                rows.progress[slot].routed_drafts += verified
            span, verifying = span[routed], slots[routed]
            rows.phase[verifying], rows.span[verifying] = VERIFY, span
            rows.wanted[verifying] = rows.masks[verifying] if self.verify_all_masks else span
        if not routed.all():
            self._after_step(slots[~routed])

    def _after_verify(self, among: np.ndarray, slots: np.ndarray, read: StepResult, accepted: np.ndarray) -> None:
        """Their verifications have come in: their step is over."""
        rows = self.rows
        assert read.verified is not None
        self._record(slots, read.verified, "verify")
        if self.config.schedule == "lookahead":
            # Accepted tokens that were fed token-causally become prefix, up to the first that is open or was replaced.
            stands = (rows.block[slots] == read.verified.draft[slots]) & ~rows.masks[slots]
            standing = rows.start[slots] - rows.cached[slots] + stands.cumprod(1).sum(1)
            accepted[among] = np.maximum(np.minimum(standing, self._plan.known["text"][among]), 0)
            rows.cached[slots] += accepted[among]
        self._after_step(slots)
        moved = (read.moved[slots] > 0) & ~rows.complete[slots]
        if moved.any():
            self._after_draft(among[moved], slots[moved], read, accepted)

    def _record(self, slots: np.ndarray, step: StepTables[np.ndarray], kind: str) -> None:
        """Take in a step of theirs."""
        rows, block = self.rows, step.after[slots]
        for slot, start, span in zip(slots.tolist(), rows.start[slots].tolist(), rows.span[slots], strict=True):
            rows.progress[slot].record(partial(as_step, step, slot, kind, start, span), verified=kind == "verify")
        rows.write(slots, block, np.where(block == rows.mask_token_id, step.draft[slots], block))

    def _after_step(self, slots: np.ndarray) -> None:
        """A denoising step of theirs is over."""
        self.rows.step[slots] += 1
        self._follow(slots)

    def _follow(self, slots: np.ndarray) -> None:
        """Go on in the block, or with the next."""
        rows, finished = self.rows, self._block_finished(slots)
        if finished.any():
            over = slots[finished]
            for slot in over.tolist():
                rows.end_block(slot, self.config.stop_token_ids, self.config.eos_early_stop)
            apart = np.array([self._commits_apart(slot) for slot in over.tolist()])
            rows.phase[over[apart]] = COMMIT
            self._next_block(over[~apart])
        if not finished.all():
            self._enter_draft(slots[~finished])

    def _commits_apart(self, slot: int) -> bool:
        """Whether the finished block of row ``slot`` is committed by a forward of its own."""
        if not self.rows.ended[slot]:
            return self.rules.commits_apart
        stopped = self.rows.kept[slot] is not None
        return self.rules.commits_stopped_block if stopped else self.rules.commits_last_block

    def _block_finished(self, slots: np.ndarray) -> np.ndarray:
        """Whether their blocks need no further step (K,)."""
        return np.asarray(~self.rows.masks[slots, : self.rows.block_length].any(1))

    def _next_block(self, slots: np.ndarray) -> None:
        """Begin the next block, or be complete."""
        rows, ended = self.rows, self.rows.ended[slots]
        rows.complete[slots[ended]] = True
        for slot in slots[~ended].tolist():
            rows.begin_block(slot, int(rows.start[slot]) + rows.block_length)
        if not ended.all():
            self._follow(slots[~ended])  # it may have been decided ahead

    def _enter_draft(self, slots: np.ndarray) -> None:
        """Draft next, or first run what must be in the cache and cannot share the draft's forward."""
        rows = self.rows
        rides = rows.start[slots] - rows.cached[slots] <= self.longest_ride
        rows.phase[slots], rows.wanted[slots] = np.where(rides, DRAFT, PREFILL), rows.masks[slots]
        if self.rules.drafts_whole_block:
            rows.wanted[slots] = np.arange(rows.width) < (rows.total - rows.start)[slots, None]
