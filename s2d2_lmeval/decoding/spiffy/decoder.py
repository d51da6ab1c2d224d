"""Speculation over denoising states, without loss (Spiffy, arXiv 2509.18085).

A forward runs the current state of a block and, beside it, states that may follow. Then the base decoder's own step
(:meth:`~s2d2_lmeval.decoding.blocks.denoising.BlockDenoiser._step`) is made as often as its logits are there:

1. draft   from the latest distribution, the states that the draft graph names; a state may also finish the block and
           begin the next one
2. run     current state and draft states in one forward
3. step    the base decoder's step on the current state; if what comes out was drafted, its logits are there: go on
           from it without another forward, otherwise run it next

Every step is the base decoder's, from the logits of the state it would have run, with the randomness it would have
drawn: outputs and states are the same, and as many forwards are saved as drafted states came true.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from s2d2_lmeval.decoding.blocks.denoising import BlockDenoiser
from s2d2_lmeval.decoding.blocks.editing import EditingDenoiser
from s2d2_lmeval.decoding.blocks.planning import scheduled_count
from s2d2_lmeval.decoding.blocks.rows import DRAFT, Rows
from s2d2_lmeval.decoding.blocks.stages import Decisions, Stage, turn
from s2d2_lmeval.decoding.decoder import EXACT, Seating
from s2d2_lmeval.decoding.generation import EDITED
from s2d2_lmeval.decoding.options.blocks import ScheduleOption
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.options.spiffy import SpiffyOptions
from s2d2_lmeval.decoding.readback import Outcome, Readback, StepTables, fetch
from s2d2_lmeval.decoding.sampling import random
from s2d2_lmeval.decoding.sampling.filters import ranked_tokens
from s2d2_lmeval.decoding.spiffy.budget import DraftBudget, states_at_most
from s2d2_lmeval.decoding.spiffy.graph import DraftGraph, load_graph
from s2d2_lmeval.decoding.spiffy.planning import StatePlan, plan_states
from s2d2_lmeval.decoding.spiffy.states import Eligibility, RankTables, StateDrafter
from s2d2_lmeval.registry import DECODERS
from s2d2_lmeval.runtime.costs import MeasureCosts

if TYPE_CHECKING:
    from typing_extensions import Self

    from s2d2_lmeval.families import Facts


_COUNTS = ("steps", "states_drafted", "states_accepted")


@dataclass(frozen=True)
class ChainReadback(Readback):
    """What came back of a chain of steps: the tables of each, how many ``links`` (rows,) of it every row made, and
    ``crossed`` (rows,), one more than the number of the draft state with which a row finished its block and went on in
    the next; 0 where none did.
    """

    chain: list[StepTables[np.ndarray]]
    links: np.ndarray
    crossed: np.ndarray


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

    _plan: StatePlan
    revises = False
    """Whether a block without masks may need further steps."""

    def __init__(self, config: DecodingConfig, rows: Rows, prefill_chunk: int) -> None:
        super().__init__(config, rows, prefill_chunk)
        steps = np.arange(self.config.steps + 1)
        self.counts = torch.from_numpy(scheduled_count(steps, self.config)).to(rows.device)
        self.states = torch.zeros(rows.count, 0, rows.block_length, dtype=torch.long, device=rows.device)

    def draft_from(self, graph: DraftGraph, ranks: int = 0) -> None:
        """Draft the states that ``graph`` names; rank ``ranks`` tokens of each place after a step, or as many as it
        needs.
        """
        rows, length, device = self.rows, self.rows.block_length, self.rows.device
        self.drafter = StateDrafter(graph, length, self.revises, device)
        self.eligibility = Eligibility(graph, length, self.revises)
        self.budget = DraftBudget(graph, self.config.draft_nodes)
        self.ranks = ranks or (self.drafter.vocabulary_ranks if graph.nodes else 0)
        self.tables = RankTables.empty(rows.count, length, max(self.ranks, 1), device)

    @classmethod
    def seat(cls, seating: Seating) -> Self:
        graph = cls.graph_of(seating.config, seating.facts)
        rows = cls.rows_for(seating, states_at_most(graph, seating.config.draft_nodes))
        decoder = cls(seating.config, rows, seating.prefill_chunk)
        decoder.draft_from(graph)
        return decoder

    @classmethod
    def graph_of(cls, config: DecodingConfig, facts: Facts) -> DraftGraph:
        """The draft graph that the options name; warns if it is for something else."""
        graph = load_graph(config.draft_graph, config.base)
        warn_of_differences(graph, config, facts)
        return graph

    @property
    def capacity(self) -> int:
        return self.rows.length + self.rows.block_length + self.rows.draft_states * max(self.widths)

    @property
    def widths(self) -> tuple[int, int]:
        """Queries of a draft state that leaves a mask, and of one that does not."""
        return self.rows.block_length, 2 * self.rows.block_length

    def weigh(self, measure_costs: MeasureCosts) -> None:
        if self.budget.automatic:
            self.budget.costs = measure_costs(self.rows.block_length + self.rows.draft_states * self.widths[0])

    def admitted(self, slot: int) -> None:
        super().admitted(slot)
        for name in _COUNTS:
            self.rows.progress[slot].count(name, 0)

    def plan(self) -> StatePlan:
        self._plan = plan_states(self.rows, self.config, self.prefill_chunk, *self._offers(), self._write_states)
        return self._plan

    def _offers(self) -> tuple[np.ndarray, np.ndarray]:
        """(rows,) states that every row drafts now: those that leave a mask, and those that do not."""
        rows = self.rows
        masks = np.where(rows.phase == DRAFT, rows.masks.sum(1), 0)
        # Before a block's first step there is no distribution to draft from.
        masks = np.where(rows.step > 0, masks, 0)
        finishes = self._may_finish()
        heads = np.where(rows.phase == DRAFT, rows.start + rows.block_length - rows.cached, 0)
        most = self.budget.choose(self.eligibility, masks, finishes, heads.sum(), self.widths)
        inside, finishing = self.eligibility.drafts(masks, finishes, most)
        return inside.sum(1), finishing.sum(1)

    def _may_finish(self) -> np.ndarray:
        """(rows,) where a state that finishes the block is of use: the next block may begin in the same forward."""
        follows = self.rows.start + self.rows.block_length < self.rows.total
        return follows & (self.config.schedule == "fused")

    def _write_states(self, block: torch.Tensor, inside: torch.Tensor, finishing: torch.Tensor) -> torch.Tensor:
        """Put states that may follow ``block`` (rows, B) where passes read them; see :meth:`StateDrafter.draft`."""
        masks = block == self.rows.mask_token_id
        drafted = self.drafter.draft(block, masks, self.tables, inside, finishing)
        self.states = drafted[:, : self.rows.draft_states]
        self.rows.store[:, self.rows.states_at :] = self.states.flatten(1)
        return self.states

    # ---- device ----

    def _suppress_mask_token(self, logits: torch.Tensor, block: torch.Tensor) -> None:
        """As everywhere; what depends on how far a row is, is done as it gets there."""
        if self.config.suppress_mask_token:
            logits[:, self.rows.mask_token_id] = -torch.inf

    def _decide(self, stage: Stage, logits: torch.Tensor) -> Readback:
        """As many steps of every row as there are logits for."""
        plan = self._plan
        tables: list[StepTables[torch.Tensor]] = []
        links = state = crossed = torch.zeros_like(stage.count)
        alive = plan.draft_rows
        for _ in range(self._longest_chain()):
            decisions = self._step(stage, self._logits_of(state, stage, logits), plan.draft_at, alive)
            self._write(stage, decisions)
            tables.append(decisions.tables(self.draft.tokens))
            links = links + alive
            step = stage.step + alive.unsqueeze(1)
            count = self.counts[step.squeeze(1).clamp_max(len(self.counts) - 1)]
            stage = replace(stage, block=decisions.block, step=step, count=count)
            found, slot, ends = self._match(stage.block)
            # What was drafted belongs to the block in which the forward began.
            alive = alive & found & (crossed == 0) & (ends | self._open(decisions, alive))
            state = torch.where(alive, slot + 1, state)
            crossed = torch.where(alive & ends, state, crossed)
            stage = turn(stage, alive & ends, self.rows.mask_token_id, int(scheduled_count(0, self.config)))
        if tables and self.ranks:
            self._rank(stage, self._logits_of(state, stage, logits))
        return self._read_chain(tables, links, crossed)

    def _longest_chain(self) -> int:
        """Steps that may be made of one forward: from the current state, and from drafted states of rising size."""
        plan = self._plan
        if not plan.drafts:
            return 0
        if not plan.offered.shape[1]:
            return 1
        masks = self.rows.masks[plan.request.layout.slots[plan.inside + plan.finishing > 0]].sum(1)
        return 1 + min(self.drafter.widest, int(masks.max()))

    def _logits_of(self, state: torch.Tensor, stage: Stage, logits: torch.Tensor) -> torch.Tensor:
        """Logits (M, V) of every place that is read, in the ``state`` (rows,) of its row: 0 for the current one."""
        plan, mask = self._plan, self.rows.mask_token_id
        rows = plan.draft_at[0]
        chosen = logits[plan.lookup.gather(1, state[rows].unsqueeze(1)).squeeze(1)]
        if not self.config.suppress_mask_token:
            chosen[:, mask] = chosen[:, mask].masked_fill(self._overdue(stage.block, stage.step)[rows], -torch.inf)
        return chosen

    def _match(self, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Whether ``block`` (rows, B) was drafted, as which state, and whether that state ends it; all (rows,)."""
        plan = self._plan
        if not plan.offered.shape[1]:
            never = torch.zeros_like(plan.draft_rows)
            return never, never.long(), never
        # A drafted token may be the mask itself, where the model may predict it; then nothing ends.
        masked = (block == self.rows.mask_token_id).any(-1, keepdim=True)
        same = (self.states[:, : plan.offered.shape[1]] == block.unsqueeze(1)).all(-1) & plan.offered
        same = same & ~(plan.ends & masked)
        slot = same.long().argmax(-1)
        return same.any(-1), slot, plan.ends.gather(1, slot.unsqueeze(1)).squeeze(1)

    def _open(self, decisions: Decisions, alive: torch.Tensor) -> torch.Tensor:
        """(rows,) whose block needs a further step after ``decisions``."""
        return decisions.masks.any(-1)

    def _rank(self, stage: Stage, logits: torch.Tensor) -> None:
        """Take in what the latest ``logits`` (M, V) make of the next step: which places and tokens come first."""
        at, tables = self._plan.draft_at, self.tables
        key = stage.draws(random.DRAFT).take(at)
        tokens, log_p = ranked_tokens(logits, self.config, self.source, key, self.ranks)
        confidence = self.draft.confidence.index_put(at, log_p[:, 0].exp())
        _, order = self._choose(stage.block == self.rows.mask_token_id, torch.ones_like(stage.count), confidence)
        self.tables = RankTables(
            places=order.argsort(-1),
            tokens=tables.tokens.index_put(at, tokens),
            log_p=tables.log_p.to(log_p.dtype).index_put(at, log_p),
        )

    def _read_chain(
        self, tables: list[StepTables[torch.Tensor]], links: torch.Tensor, crossed: torch.Tensor
    ) -> ChainReadback:
        """The engine step's one read of the device."""
        sound = self.draft.sound.expand_as(links)
        flags = torch.stack([links, crossed, sound.long()], dim=1)
        flags_read, *read = fetch([flags, *(table for step in tables for table in step.all())])
        links_made, crossings, soundness = flags_read.T
        chain = [StepTables(*read[first : first + 5]) for first in range(0, len(read), 5)]
        nowhere = np.zeros((len(links), self.rows.block_length), dtype=bool)
        return ChainReadback(
            verified=None,
            drafted=chain[0] if chain else None,
            span=nowhere,
            moved=crossings > 0,
            sound=bool(soundness.all()),
            chain=chain,
            links=links_made,
            crossed=crossings,
        )

    # ---- host ----

    def _after_draft(self, row: int, slot: int, read: Readback, outcome: Outcome) -> None:
        """The steps of row ``slot`` that one forward gave: record each, and go on behind the last."""
        assert isinstance(read, ChainReadback)
        rows, plan, made = self.rows, self._plan, 0
        progress, begun = rows.progress[slot], int(rows.start[slot])
        while made < read.links[slot] and not rows.complete[slot]:
            self._record(slot, read.chain[made], "draft")
            self._after_step(slot)
            made += 1
        if read.crossed[slot] and rows.start[slot] > begun:
            self._keep_block(row, slot, int(read.crossed[slot]) - 1, outcome)
        self.budget.learn(made - 1)
        for name, count in zip(_COUNTS, (made, plan.inside[row] + plan.finishing[row], made - 1), strict=True):
            progress.count(name, int(count))

    def _keep_block(self, row: int, slot: int, state: int, outcome: Outcome) -> None:
        """The block before the current one of row ``slot`` came out as draft ``state``: its keys are there already."""
        rows, plan, length = self.rows, self._plan, self.rows.block_length
        beyond = state - int(plan.inside[row])
        first = int(plan.heads[row] - plan.request.keep[row]) + int(plan.inside[row]) * length + 2 * beyond * length
        outcome.kept[row] = length
        outcome.path[row] = first + np.arange(length)
        rows.cached[slot] += length


@DECODERS.register("spiffy", "editing")
class EditingSpiffy(Spiffy, EditingDenoiser):
    """The decoder ``spiffy`` where decided tokens may be edited: the state is the whole block."""

    def __init__(self, config: DecodingConfig, rows: Rows, prefill_chunk: int) -> None:
        super().__init__(config, rows, prefill_chunk)
        self.revises = config.max_post_steps > 0

    def _decide(self, stage: Stage, logits: torch.Tensor) -> Readback:
        self._posted = torch.from_numpy(self.post_steps).to(stage.block.device)
        return super()._decide(stage, logits)

    def _open(self, decisions: Decisions, alive: torch.Tensor) -> torch.Tensor:
        """As :meth:`EditingDenoiser._block_finished` counts on the host."""
        masked, posted = decisions.masks.any(-1), self._posted
        settled = (posted > 0) & ~(decisions.marks == EDITED).any(-1)
        over = ~masked & (settled | (posted == self.config.max_post_steps))
        self._posted = torch.where(alive & ~masked, posted + 1, posted)
        return ~over


def warn_of_differences(graph: DraftGraph, config: DecodingConfig, facts: Facts) -> None:
    """Warn where ``graph`` was calibrated for another model or another way of decoding."""
    model, decoding = signature(config, facts)
    found = graph.differences(model, decoding)
    if graph.block_length != config.block_length:
        found.append(f"block_length={config.block_length} here, {graph.block_length} there")
    if found:
        warnings.warn(
            f"The draft graph {config.draft_graph} was calibrated for something else ({'; '.join(found)}). The output "
            "is the same, but fewer forwards may be saved: `s2d2-lmeval calibrate` makes a graph of your own.",
            stacklevel=2,
        )


def signature(config: DecodingConfig, facts: Facts) -> tuple[dict[str, object], dict[str, object]]:
    """What a draft graph depends on: of the model, and of how the base decoder decodes."""
    model: dict[str, object] = {"family": facts.family, "vocab_size": facts.vocab_size}
    known = config.to_dict()
    names = [*_DEPENDS_ON, *(_DEPENDS_ON_SAMPLING if config.sampled else ())]
    decoding = {name: known[name] for name in names if name in known}
    return model, {**decoding, "sampled": config.sampled}


_DEPENDS_ON = (
    "base",
    "denoising_steps",
    "confidence_threshold",
    "eb_threshold",
    "collapse_entropy",
    "editing_threshold",
    "max_post_steps",
    "num_to_transfer",
    "cache_ver",
    "draft_ver",
)
_DEPENDS_ON_SAMPLING = ("temperature", "top_k", "top_p")
