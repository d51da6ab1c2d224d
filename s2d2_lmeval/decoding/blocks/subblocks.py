"""Sub-block decoding of shifted models (Fast-dLLM v2): a block is denoised part by part, left to right.

The logits of row t-1 predict token t. This makes three differences from block denoising:

* A block's first token is not denoised. It comes (as published, as the argmax) from the last row of the text before it,
  which must run first: the commit of the previous block, or the prompt's prefill. So a draft never commits the previous
  block, whatever the schedule. ``fused`` saves unneeded forwards: the commit of the last block, steps after the last
  requested token, and the prefill of a prompt that ends inside a block (the first draft runs it).
* A draft forwards the whole block but decides only in one sub-block: every mask above the threshold, and the most
  confident one. For :class:`Rows` and the routing policies the sub-block is the block.
* The verifier needs no mask queries: row t-1 of the drafted text gives the autoregressive distribution of token t.

A stop token ends the answer at the step that leaves no mask before it, not at the end of the block.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from s2d2_lmeval.decoding import reference
from s2d2_lmeval.decoding.blocks.denoising import DENOISING, BlockDenoiser
from s2d2_lmeval.decoding.blocks.planning import plan_subblocks
from s2d2_lmeval.decoding.blocks.rows import BlockState
from s2d2_lmeval.decoding.blocks.s2d2 import S2D2
from s2d2_lmeval.decoding.decoder import Decided, DecoderSetup
from s2d2_lmeval.decoding.generation import AUTOREGRESSIVE
from s2d2_lmeval.decoding.options.blocks import ConfidenceOption, SubblockOptions
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.options.windows import ThinkingOptions
from s2d2_lmeval.decoding.passes import Cells, Plan
from s2d2_lmeval.decoding.sampling import laws, random
from s2d2_lmeval.decoding.sampling.filters import draft_tokens, filtered
from s2d2_lmeval.decoding.state import COMMIT, DRAFT, KIND_OF_PHASE, PREFILL
from s2d2_lmeval.decoding.steps import Decisions, StepResult, StepTables
from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.registry import DECODERS


@DECODERS.register("static", "seeded", options=(*DENOISING, ThinkingOptions))
@DECODERS.register("dynamic", "seeded", options=(*DENOISING, ConfidenceOption, ThinkingOptions))
@DECODERS.register("dynamic", "subblock", options=(*DENOISING, ConfidenceOption, SubblockOptions))
class SubblockDenoiser(BlockDenoiser):
    """The decoders ``dynamic`` and ``static`` of shifted models. The rows' "block" is a sub-block here."""

    shifted = True
    notation = staticmethod(reference.order_of_subblocks)

    def __init__(self, setup: DecoderSetup, part: DecodingConfig | None = None) -> None:
        config = setup.config
        if config.schedule == "lookahead":
            raise ConfigError("schedule=lookahead is not available for sub-blocks; use schedule=fused.")
        length = config.small_block_size or config.block_length
        steps = None if config.small_block_size else config.denoising_steps
        part = dataclasses.replace(config, block_length=length, denoising_steps=steps, small_block_size=None)
        super().__init__(setup, part)
        self.rows.shifted_drafts = bool(setup.facts.draft_shift)
        seeded = setup.facts.scheme == "seeded"
        self.samples_first = config.sampled and (config.sample_first_token or seeded)
        self.limit = np.zeros(setup.slots, dtype=np.int64)
        """The end of the last requested token."""
        self.narrow = np.zeros(setup.slots, dtype=bool)
        """Rows whose next draft forwards its sub-block only, against keys of the rest of the block that lie after the
        prefix."""

    def admitted(self, slot: int) -> None:
        request = self.rows.requests[slot]
        assert request is not None
        self.limit[slot] = len(request.prompt) + request.max_new_tokens
        self.narrow[slot] = False
        if self._ends_thoughts(slot, int(self.rows.start[slot])):
            self.rows.begin_block(slot, int(self.rows.start[slot]))
        super().admitted(slot)

    def plan(self) -> Plan:
        self._plan = plan_subblocks(self.rows, self.config, self.whole, self.prefill_chunk, self.narrow)
        return self._plan

    # ---- device ----

    def _suppress_mask_token(self, logits: torch.Tensor, block: torch.Tensor) -> None:
        """As in the base class; also, a first token is never the mask, which could not be denoised."""
        super()._suppress_mask_token(logits, block)
        if self._sent.has("first"):
            masked = logits[:, self.rows.mask_token_id]
            masked.masked_fill_(self._sent["begins"].bool(), -torch.inf)

    def _decide(self, state: BlockState, logits: torch.Tensor) -> Decided:
        self._first_logits, self._state = logits[self._sent.part("first")], state
        return super()._decide(state, logits)

    def _read(
        self,
        verified: StepTables[torch.Tensor] | None,
        drafted: list[StepTables[torch.Tensor]],
        span: torch.Tensor,
        moved: torch.Tensor,
        made: torch.Tensor | None = None,
    ) -> Decided:
        """First tokens use the tables of the first step, because a row has one or the other."""
        if self._sent.has("first"):
            none = self._told(Decisions(self._state.block, self.rows.mask_token_id))
            drafted = [self._begin_blocks(drafted[0] if drafted else none), *drafted[1:]]
        return super()._read(verified, drafted, span, moved, made)

    def _begin_blocks(self, tables: StepTables[torch.Tensor]) -> StepTables[torch.Tensor]:
        """Write the first token of the rows that are due one, into ``tables``."""
        state, logits, at, cells = self._state, self._first_logits, self._sent.at("first"), self._sent.cells("first")
        if self.samples_first:
            key = state.draws(random.DRAFT).take(at)
            tokens, confidence = draft_tokens(logits, self.config, self.source, key)
        else:
            confidence, tokens = logits.max(-1)
        self.sound.logical_and_(~confidence.isnan().any())
        token, first = (Cells.like(tables.after) for _ in range(2))
        token.put(cells, tokens)
        begins = first.put(cells, torch.ones_like(cells)).bool()
        after = torch.where(begins, token.table, tables.after)
        if tables.laws is not None:
            law = filtered(logits, self.config) if self.samples_first else logits
            of_first = Cells.of_entries(begins, self.law_size)
            bits = laws.as_bits(of_first.put(cells, laws.entries(law, tokens, self.law_size)))
            tables = tables._replace(laws=bits.where(begins.repeat_interleave(self.law_size, 1), tables.laws))
        return tables._replace(
            draft=torch.where(begins.any(-1, keepdim=True), after, tables.draft),  # the rest is not drafted yet
            after=after,
            marks=tables.marks.masked_fill(begins, AUTOREGRESSIVE),
        )

    # ---- host ----

    def _synchronize(self, read: StepResult) -> np.ndarray:
        slots, rows = self._plan.layout.slots, self.rows
        start, narrow = rows.start[slots], self.narrow[slots]
        accepted = super()._synchronize(read)
        if self.config.use_block_cache:
            # Keys of the rest of the block stay after the prefix from one draft of a sub-block to its next, once the
            # sub-block's first token is there: no query inside it predicts that one.
            goes_on = (self._plan.phases == DRAFT) & (rows.phase[slots] == DRAFT) & ~rows.complete[slots]
            self.narrow[slots] = goes_on & (rows.start[slots] == start) & ~rows.masks[slots, 0]
            rest = self.whole.block_length - rows.block_length
            accepted += (self.narrow[slots].astype(np.int64) - narrow) * rest
        return accepted

    def _after_prefill(self, among: np.ndarray, slots: np.ndarray, read: StepResult, accepted: np.ndarray) -> None:
        first = self._plan.known["first"][among]
        self._begin(slots[first], read, PREFILL)
        self._enter_draft(slots[~first])

    def _after_commit(self, among: np.ndarray, slots: np.ndarray, read: StepResult, accepted: np.ndarray) -> None:
        """The first tokens of blocks have come in, or the last block is stored."""
        ended = self.rows.ended[slots]
        self.rows.complete[slots[ended]] = True
        self._begin(slots[~ended], read, COMMIT)

    def _begin(self, slots: np.ndarray, read: StepResult, phase: int) -> None:
        """The first tokens of blocks have come in, with a forward in ``phase``."""
        if len(slots):
            self._record(slots, read.drafted[0], KIND_OF_PHASE[phase])
            self._go_on(slots, begun=True)

    def _after_step(self, slots: np.ndarray) -> None:
        self.rows.step[slots] += 1
        self._go_on(slots)

    def _go_on(self, slots: np.ndarray, begun: bool = False) -> None:
        """The sub-blocks have changed: their answers are complete, or there is more to denoise, or the next begin."""
        drafting = [slot for slot in slots.tolist() if self._drafts_on(slot, begun)]
        self._enter_draft(np.array(drafting, dtype=np.int64))

    def _drafts_on(self, slot: int, begun: bool) -> bool:
        """Whether row ``slot`` is to draft again, in its sub-block or in the next, which this opens."""
        rows, part, start = self.rows, self.rows.block_length, int(self.rows.start[slot])
        tokens, stops = rows.block[slot].tolist(), self.config.stop_token_ids
        decided = tokens.index(rows.mask_token_id) if rows.mask_token_id in tokens else part
        given = max(int(rows.prompt[slot]) - start, 0)
        stop = next((place for place in range(given, decided) if tokens[place] in stops), None)
        if stop is not None and self.rules.commits_stopped_block:
            rows.extend(slot, tokens[: stop + 1], stops)
            self._begin_block(slot, start + part)
            rows.ended[slot], rows.phase[slot] = True, COMMIT
            return False
        if stop is not None:
            self._complete(slot, stop + 1)
        elif start + decided >= self.limit[slot] and (begun or not self.rules.finishes_blocks):
            self._complete(slot, decided)
        elif decided == part and rows.extend(slot, tokens, ()):
            self._complete(slot, 0)
        elif decided == part:
            self._begin_block(slot, start + part)
        return not rows.complete[slot]

    def _begin_block(self, slot: int, start: int) -> None:
        """Open the sub-block at ``start``."""
        self._ends_thoughts(slot, start)
        self.rows.begin_block(slot, start)
        self.rows.progress[slot].blocks += int(self.rows.begins_block(slot))

    def _ends_thoughts(self, slot: int, start: int) -> bool:
        """Put the token that ends thoughts into the sub-block at ``start`` where their budget ends in it, if there is
        one and the token has not come before; whether it did.
        """
        rows, budget, token = self.rows, self.whole.max_thinking_tokens, self.whole.end_think_token_id
        if budget is None or token is None:
            return False
        prompt = int(rows.prompt[slot])
        due = start <= prompt + budget < start + rows.block_length and token not in rows.tokens[slot][prompt:]
        if due:
            rows.store[slot, prompt + budget] = token
        return due

    def _complete(self, slot: int, decided: int) -> None:
        """Nothing more to run; the first ``decided`` tokens of the sub-block belong to the answer."""
        rows = self.rows
        if decided:
            rows.extend(slot, rows.block[slot, :decided].tolist(), self.config.stop_token_ids)
        begun = (len(rows.tokens[slot]) + int(rows.offset[slot])) % self.whole.block_length
        rows.progress[slot].blocks += begun > 1
        rows.ended[slot] = rows.complete[slot] = True

    def _enter_draft(self, slots: np.ndarray) -> None:
        """Draft next, or first run what the draft needs: text before the block, and from it the block's first token."""
        rows = self.rows
        before = rows.block_start(self.whole.block_length)[slots] - rows.cached[slots]
        drafts = np.where(before <= self.longest_ride, DRAFT, PREFILL)
        begins = rows.begins_block(slots) & rows.masks[slots, 0]
        first = np.where(rows.start[slots] == rows.prompt[slots], PREFILL, COMMIT)
        rows.phase[slots] = np.where(begins, first, drafts)
        rows.wanted[slots] = True if self.rules.drafts_whole_block else rows.masks[slots]


@DECODERS.register("s2d2", "subblock")
class SubblockS2D2(SubblockDenoiser, S2D2):
    """The decoder ``s2d2`` of shifted models: all of S2D2's quantities are those of the sub-block."""

    keeps_rejected = False

    def _draft_law(self, logits: torch.Tensor) -> torch.Tensor:
        """q is the draft's distribution: for an argmax the unfiltered softmax, whatever the verifier's filters."""
        return super()._draft_law(logits) if self.config.sampled else logits
