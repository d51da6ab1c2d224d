"""Speculation over denoising states, without loss (Spiffy, arXiv 2509.18085).

A forward runs the current state of a block together with states that may follow. Then the base decoder's own step
(:meth:`~s2d2_lmeval.decoding.blocks.denoising.BlockDenoiser._step`) repeats as long as its logits are available:

1. draft   the states that the draft graph lists, from the latest distribution; a state may also finish the block and
           begin the next one
2. run     the current state and the draft states in one forward
3. step    the base decoder's step on the current state; if the resulting state was drafted, its logits are available:
           continue from it without another forward, otherwise run it next

Every step is the base decoder's, from the logits of the state it would have run, with the same draws. So outputs and
states are the same, and every drafted state that is reached saves a forward.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from s2d2_lmeval.decoding.blocks.denoising import BlockDenoiser
from s2d2_lmeval.decoding.blocks.editing import EditingDenoiser
from s2d2_lmeval.decoding.blocks.planning import scheduled_count
from s2d2_lmeval.decoding.blocks.rows import BlockState
from s2d2_lmeval.decoding.blocks.subblocks import SubblockDenoiser
from s2d2_lmeval.decoding.decoder import EXACT, Decided, DecoderSetup
from s2d2_lmeval.decoding.generation import EDITED
from s2d2_lmeval.decoding.options.blocks import ScheduleOption
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.options.spiffy import SpiffyOptions
from s2d2_lmeval.decoding.passes import Plan, Sent
from s2d2_lmeval.decoding.sampling import random
from s2d2_lmeval.decoding.sampling.filters import ranked_tokens
from s2d2_lmeval.decoding.spiffy.budget import DraftBudget
from s2d2_lmeval.decoding.spiffy.graph import DraftGraph, graph_for, states_at_most
from s2d2_lmeval.decoding.spiffy.planning import assemble_states, plan_states
from s2d2_lmeval.decoding.spiffy.states import Eligibility, RankTables, StateDrafter
from s2d2_lmeval.decoding.state import DRAFT
from s2d2_lmeval.decoding.steps import Decisions, StepResult, StepTables
from s2d2_lmeval.registry import DECODERS
from s2d2_lmeval.runtime.costs import MeasureCosts
from s2d2_lmeval.runtime.graphs import numbers
from s2d2_lmeval.runtime.shapes import power

if TYPE_CHECKING:
    from s2d2_lmeval.families import Facts


_COUNTS = ("steps", "states_drafted", "states_accepted")


@DECODERS.register(
    "spiffy",
    "block",
    promise=f"the output of the decoder that it accelerates, state by state, with the same seed{EXACT}",
    options=(ScheduleOption, SpiffyOptions),
    accelerates=True,
    unfit={
        "pipelined": "several blocks are open at once and see each other's unfinished text, so the state of one is not "
        "what its next step depends on, and drafts could be exact only against a frozen prefix and suffix, which no "
        "decoder of these checkpoints keeps here"
    },
)
class Spiffy(BlockDenoiser):
    """The decoder ``spiffy`` of blocks that are denoised one after the other."""

    @staticmethod
    def layout(config: DecodingConfig) -> str:
        return f"{config.base}, {BlockDenoiser.layout(config)}"

    @property
    def revises(self) -> bool:
        """Whether a block without masks may need further steps."""
        return self.edits and self.config.max_post_steps > 0

    least_ranks = 0
    """Tokens of each place that are ranked after a step, if the graph needs fewer."""

    def __init__(self, setup: DecoderSetup, part: DecodingConfig | None = None) -> None:
        super().__init__(setup, part)
        rows, config, length = self.rows, self.config, self.rows.block_length
        graph = self.graph_of(setup.config, setup.facts)
        rows.draft_states = states_at_most(graph, config.draft_nodes)
        self.drafter = StateDrafter(graph, length, self.revises, setup.tables)
        self.eligibility = Eligibility(graph, length, self.revises)
        self.budget = DraftBudget(graph, config.draft_nodes)
        self.ranks = max(self.least_ranks, self.drafter.vocabulary_ranks if graph.nodes else 0)
        self.tables = RankTables.empty(rows.count, length, max(self.ranks, 1), setup)
        counts = scheduled_count(np.arange(config.steps + 1), config)
        self.counts = setup.tables.put("counts", torch.from_numpy(counts))
        self.states = torch.zeros(rows.count, 0, length, dtype=torch.long, device=rows.device)

    @classmethod
    def graph_of(cls, config: DecodingConfig, facts: Facts) -> DraftGraph:
        """The draft graph that the options name; warns if it is for something else."""
        return graph_for(config, facts)

    @property
    def capacity(self) -> int:
        return self.rows.length + self.rows.block_length + self.rows.draft_states * max(self.widths)

    @property
    def most_logits(self) -> tuple[int, int]:
        return (1 + self.rows.draft_states) * self.rows.block_length, self.rows.block_length

    @property
    def widths(self) -> tuple[int, int]:
        """Queries of a draft state that leaves a mask, and of one that does not."""
        return self.rows.block_length, 2 * self.rows.block_length

    def calibrate_costs(self, measure_costs: MeasureCosts) -> None:
        if self.budget.automatic:
            self.budget.costs = measure_costs(self.rows.block_length + self.rows.draft_states * self.widths[0])

    def admitted(self, slot: int) -> None:
        super().admitted(slot)
        for name in _COUNTS:
            self.rows.progress[slot].count(name, 0)

    def plan(self) -> Plan:
        rows, offers, steady = self.rows, self._offers(), self._tables.keep
        drafts = offers[0] + offers[1] > 0
        chain = 1 + min(self.drafter.widest, int(rows.masks[drafts].sum(1).max())) if drafts.any() else 1
        self._plan = plan_states(
            *(rows, self.config, self.whole, self.shifted, self.prefill_chunk, offers),
            *(power(chain) if steady else chain, steady),
        )
        return self._plan.tell(**self._more_of_rows())

    def _more_of_rows(self) -> dict[str, np.ndarray]:
        """What else the device is told of every row (rows,)."""
        return {}

    def assemble(self, sent: Sent) -> tuple[torch.Tensor, torch.Tensor]:
        return assemble_states(self.rows, self.config, sent, self._draft_states)

    def _offers(self) -> tuple[np.ndarray, np.ndarray]:
        """(rows,) states that every row drafts now: those that leave a mask, and those that do not."""
        rows = self.rows
        masks = np.where(rows.phase == DRAFT, rows.masks.sum(1), 0)
        # Before a block's first step there is no distribution to draft from.
        masks = np.where(rows.step > 0, masks, 0)
        finishes = self._may_finish()
        text = np.where(rows.phase == DRAFT, rows.start + rows.block_length - rows.cached, 0)
        most = self.budget.choose(self.eligibility, masks, finishes, text.sum(), self.widths)
        inside, finishing = self.eligibility.drafts(masks, finishes, most)
        return inside.sum(1), finishing.sum(1)

    def _may_finish(self) -> np.ndarray:
        """(rows,) where a state that finishes the block is useful: the next block may begin in the same forward."""
        follows = self.rows.start + self.rows.block_length < self.rows.total
        return follows & (self.config.schedule == "fused")

    def _draft_states(self, block: torch.Tensor, inside: torch.Tensor, finishing: torch.Tensor) -> torch.Tensor:
        """States that may follow ``block`` (rows, B); see :meth:`StateDrafter.draft`."""
        masks = block == self.rows.mask_token_id
        drafted = self.drafter.draft(block, masks, self.tables, inside, finishing)
        self.states = drafted[:, : self.rows.draft_states]
        return self.states

    # ---- device ----

    def _fresh(self) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Each place is read in several states."""
        slots, places = self._sent["slots_read"], self._sent["places_read"]
        return (slots, places), slots * self.rows.block_length + places

    def _suppress_mask_token(self, logits: torch.Tensor, block: torch.Tensor) -> None:
        """As in the base class; schedule-dependent suppression happens as each row reaches its step."""
        if self.config.suppress_mask_token:
            logits[:, self.rows.mask_token_id] = -torch.inf

    def _decide(self, state: BlockState, logits: torch.Tensor) -> Decided:
        """As many steps of every row as have logits."""
        sent = self._sent
        tables: list[StepTables[torch.Tensor]] = []
        # The draft state that each row is in, counted from 1 (0: where it began), and the one that ended its block.
        made = at = crossed = torch.zeros_like(state.count)
        alive = sent["drafting"]
        for _ in range(sent.fixed[1] if sent.has("fresh") else 0):
            decisions = self._step(state, self._logits_of(at, state, logits), alive)
            tables.append(self._told(decisions))
            made = made + alive
            step = state.step + alive.unsqueeze(1)
            count = self.counts[step.squeeze(1).clamp_max(len(self.counts) - 1)]
            state = replace(state, block=decisions.block, step=step, count=count)
            found, slot, ends = self._match(state.block)
            # What was drafted belongs to the block in which the forward began.
            alive = alive & found & (crossed == 0) & (ends | self._open(decisions, alive))
            at = torch.where(alive, slot + 1, at)
            crossed = torch.where(alive & ends, at, crossed)
            state = state.next_block(alive & ends, self.rows.mask_token_id, int(scheduled_count(0, self.config)))
        if tables and self.ranks:
            self._rank(state, self._logits_of(at, state, logits))
        decided = self._read(None, tables, torch.zeros_like(state.block, dtype=torch.bool), crossed, made)
        return replace(decided, path=self._kept_block(crossed)) if sent.moves else decided

    def _kept_block(self, crossed: torch.Tensor) -> torch.Tensor:
        """(rows, B) the queries of the draft state ``crossed`` (rows,), counted from 1, as which the previous block
        ended: its keys are already in the cache.
        """
        sent, length = self._sent, self.rows.block_length
        first = sent["text_after"] + (2 * (crossed - 1) - sent["inside"]) * length
        queries = first.unsqueeze(1) + numbers(length, crossed.device)
        return torch.where(crossed.unsqueeze(1) > 0, queries, -1)

    def _logits_of(self, at: torch.Tensor, state: BlockState, logits: torch.Tensor) -> torch.Tensor:
        """Logits (M, V) of every place that is read, in the draft state ``at`` (rows,) of its row, 0 the first."""
        mask, rows = self.rows.mask_token_id, self._sent["slots_read"]
        chosen = logits[self._sent["lookup"].gather(0, at[rows].unsqueeze(0)).squeeze(0)]
        if not self.config.suppress_mask_token:
            overdue = ((state.step >= self.config.steps) & (state.block == mask)).any(-1)
            chosen[:, mask] = chosen[:, mask].masked_fill(overdue[rows], -torch.inf)
        return chosen

    def _match(self, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Whether ``block`` (rows, B) was drafted, as which state, and whether that state ends it; all (rows,)."""
        sent = self._sent
        if not sent.fixed[0]:
            never = torch.zeros_like(sent["drafting"])
            return never, never.long(), never
        # A drafted token may be the mask itself, where the model may predict it; then nothing ends.
        masked = (block == self.rows.mask_token_id).any(-1, keepdim=True)
        offered, ends = sent["offered"].bool(), sent["ends"].bool()
        same = (self.states[:, : offered.shape[1]] == block.unsqueeze(1)).all(-1) & offered
        same = same & ~(ends & masked)
        slot = same.long().argmax(-1)
        return same.any(-1), slot, ends.gather(1, slot.unsqueeze(1)).squeeze(1)

    def _open(self, decisions: Decisions, alive: torch.Tensor) -> torch.Tensor:
        """(rows,) whose block needs a further step after ``decisions``."""
        return decisions.masks.any(-1)

    def _rank(self, state: BlockState, logits: torch.Tensor) -> None:
        """Take in what the latest ``logits`` (M, V) make of the next step: which places and tokens come first."""
        (at, _), tables = self._fresh(), self.tables
        key = state.draws(random.DRAFT).take(at)
        tokens, log_p = ranked_tokens(logits, self.config, self.source, key, self.ranks)
        confidence = self.confidence.index_put(at, log_p[:, 0].exp())
        _, order = self._choose(state.block == self.rows.mask_token_id, torch.ones_like(state.count), confidence)
        tables.places.copy_(order.argsort(-1))
        tables.tokens.index_put_(at, tokens)
        tables.log_p.index_put_(at, log_p)

    # ---- host ----

    def _after_draft(self, among: np.ndarray, slots: np.ndarray, read: StepResult, accepted: np.ndarray) -> None:
        for row, slot in zip(among.tolist(), slots.tolist(), strict=True):
            self._after_steps(row, slot, read, accepted)

    def _after_steps(self, row: int, slot: int, read: StepResult, accepted: np.ndarray) -> None:
        """The steps of row ``slot`` that one forward gave: record each, and go on after the last."""
        rows, plan, made = self.rows, self._plan, 0
        progress, begun = rows.progress[slot], int(rows.start[slot])
        while made < read.made[slot] and not rows.complete[slot]:
            self._record(np.array([slot]), read.drafted[made], "draft")
            self._after_step(np.array([slot]))
            made += 1
        if read.moved[slot] and rows.start[slot] > begun:
            self._keep_block(row, slot, accepted)
        self.budget.learn(made - 1)
        for name, count in zip(
            _COUNTS, (made, plan.known["inside"][row] + plan.known["finishing"][row], made - 1), strict=True
        ):
            progress.count(name, int(count))

    def _keep_block(self, row: int, slot: int, accepted: np.ndarray) -> None:
        """The previous block of row ``slot`` ended as a draft state."""
        accepted[row] = self.rows.block_length
        self.rows.cached[slot] += self.rows.block_length


@DECODERS.register("spiffy", "editing")
class EditingSpiffy(Spiffy, EditingDenoiser):
    """The decoder ``spiffy`` where decided tokens may be edited: the state is the whole block."""

    def _decide(self, state: BlockState, logits: torch.Tensor) -> Decided:
        self._posted = self._sent["post_steps"]
        return super()._decide(state, logits)

    def _more_of_rows(self) -> dict[str, np.ndarray]:
        return {"post_steps": self.post_steps}

    def _open(self, decisions: Decisions, alive: torch.Tensor) -> torch.Tensor:
        """As :meth:`EditingDenoiser._block_finished` counts on the host."""
        masked, posted = decisions.masks.any(-1), self._posted
        settled = (posted > 0) & ~(decisions.marks == EDITED).any(-1)
        over = ~masked & (settled | (posted == self.config.max_post_steps))
        self._posted = torch.where(alive & ~masked, posted + 1, posted)
        return ~over


@DECODERS.register("spiffy", "subblock")
class SubblockSpiffy(SubblockDenoiser, Spiffy):
    """The decoder ``spiffy`` of shifted models (Fast-dLLM v2). The rows' "block" is a sub-block here, and a draft state
    brings the whole block around it, because every query of it sees all others. The end of a block is a forward of its
    own in this scheme, so no state goes beyond it.
    """

    plan, assemble = Spiffy.plan, Spiffy.assemble

    @property
    def widths(self) -> tuple[int, int]:
        return self.whole.block_length, self.whole.block_length

    def _may_finish(self) -> np.ndarray:
        """(rows,) where another sub-block of the same block follows and will be decoded."""
        end = self.rows.start + self.rows.block_length
        return (end % self.whole.block_length != 0) & ((end < self.limit) | self.rules.finishes_blocks)

    def _keep_block(self, row: int, slot: int, accepted: np.ndarray) -> None:
        """The block is still open: no keys are kept."""
