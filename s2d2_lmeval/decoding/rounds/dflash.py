"""DFlash: a block-diffusion drafter proposes a chain for an autoregressive target (arXiv 2602.06036).

Rounds are those of :mod:`~s2d2_lmeval.decoding.rounds.target`. Between two of a row, from the last decided token:

a. draft   the drafter fills the block after that token in one pass; it has read the target's features of all text
b. plant   the argmax of every place gives a chain of nodes

Rows that wait for a draft share the drafter's forward, all others that of the target; a draft stays on the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from s2d2_lmeval.decoding.decoder import EXACT, Decided, DecoderSetup
from s2d2_lmeval.decoding.options.blocks import ScheduleOption
from s2d2_lmeval.decoding.options.general import LogprobsOption
from s2d2_lmeval.decoding.options.rounds import DrafterOptions
from s2d2_lmeval.decoding.passes import PassBuilder, Plan, Sent
from s2d2_lmeval.decoding.rounds import trees
from s2d2_lmeval.decoding.rounds.acceptance import Keyed
from s2d2_lmeval.decoding.rounds.hints import Hints
from s2d2_lmeval.decoding.rounds.rows import RoundRows
from s2d2_lmeval.decoding.rounds.target import Target
from s2d2_lmeval.decoding.state import KIND_OF_PHASE, PREFILL, PROPOSE, VERIFY
from s2d2_lmeval.registry import DECODERS
from s2d2_lmeval.runtime.graphs import numbers
from s2d2_lmeval.runtime.passes import DRAFTER
from s2d2_lmeval.runtime.visibility import NOBODY, NOTHING, by_reach

if TYPE_CHECKING:
    from s2d2_lmeval.decoding.options.config import DecodingConfig
    from s2d2_lmeval.families import Facts
    from s2d2_lmeval.families.facts import DrafterFacts

TARGETS_LAW = f"the target's own autoregressive law, token for token the output of ar with the same seed{EXACT}"


def plan_draft(rows: RoundRows, drafter: DrafterFacts, depths: int) -> Plan:
    """Lay out the drafter's next forward, of all rows that wait for a draft: the last token and masks after it, as many
    as say the next ``depths`` tokens.
    """
    slots, lengths = np.flatnonzero(rows.phase == PROPOSE), rows.lengths()
    builder, unread = PassBuilder(slots), int(not drafter.shifted)
    queries = builder.span(lengths[slots] - 1, np.full(len(slots), depths + unread))
    last = np.array([rows.tokens[slot][-1] for slot in slots])
    queries.set(token=np.where(queries.local > 0, drafter.mask_token_id, last[queries.row]))
    builder.lay_out()
    read = queries.local >= unread
    builder.read("draft", queries.row[read], queries.local[read] - unread, queries.query[read])
    return builder.plan(
        rows.phase[slots],
        np.zeros_like(slots),
        depths + unread,
        queries={"token": builder.column("token")},
        tables={"rank": (0, NOBODY), "reach": (0, NOTHING)},
        rows={"waiting_rows": np.array([len(slots)])},
        lists={
            "waiting": (slots, 0),
            "base": (np.arange(len(slots)) * depths, 0),
            "length": (lengths[slots], 0),
            "key": (rows.key[slots], 0),
        },
        model=DRAFTER,
    )


@DECODERS.register(
    "dflash",
    *("autoregressive", "block"),
    promise=TARGETS_LAW,
    options=(ScheduleOption, DrafterOptions, LogprobsOption),
    needs_drafter=True,
)
class DFlash(Target):
    """The decoder ``dflash``."""

    @staticmethod
    def layout(config: DecodingConfig) -> str:
        return "chain of a block"

    feeds_drafter = True

    def __init__(self, setup: DecoderSetup) -> None:
        super().__init__(setup)
        config = self.config
        self.after_token = None if config.schedule == "reference" else setup.after_token
        if self.after_token is not None:
            self.hints = Hints(setup, self.depths, False, self.after_token)
        # Only keyed noise is known before it is drawn.
        coupled = config.sampled and config.couple_drafts and config.keyed
        self.acceptance = Keyed(config, self.source, self.depths, self.choices, coupled)

    @property
    def choices(self) -> int:
        """Tokens per position of the block that a draft may choose from."""
        return 1 if self.after_token is None else self.after_token.choices

    @property
    def most_logits(self) -> tuple[int, int]:
        return (max(self.rows.most_nodes + 1, self.depths),) * 2

    @staticmethod
    def most_depths(config: DecodingConfig, facts: Facts) -> int:
        assert facts.drafter is not None
        return (config.draft_block_size or facts.drafter.block_length) - 1

    @classmethod
    def most_nodes(cls, config: DecodingConfig, facts: Facts, slots: int) -> int:
        return cls.most_depths(config, facts)

    def plan(self) -> Plan:
        """Lay out the drafter's forward if any row waits for a draft, else the target's."""
        if not (self.rows.phase == PROPOSE).any():
            return super().plan()
        assert self.facts.drafter is not None
        self._plan = self._hinted(plan_draft(self.rows, self.facts.drafter, self.depths))
        return self._plan

    def assemble(self, sent: Sent) -> tuple[torch.Tensor, torch.Tensor]:
        if sent.model != DRAFTER:
            return super().assemble(sent)
        return sent["token"], by_reach(sent["rank"], sent["reach"])

    def decide(self, sent: Sent, logits: torch.Tensor) -> Decided:
        """After the drafter's forward plant its draft, without a read of the device; after the target's judge it."""
        if sent.model != DRAFTER:
            return super().decide(sent, logits)
        if self.hints is not None:
            self.hints.read(sent["fresh"])
        self.sound.logical_and_(~logits.isnan().any())
        ahead = numbers(self.depths, logits.device)
        position, read = (sent[name].unsqueeze(1) + ahead for name in ("length", "base"))
        log_p, token = self.acceptance.candidates(logits[read.flatten()], position, sent)
        if self.choices > 1:  # in double precision, so that the order of nodes is that of exact sums
            log_p = log_p.double() * self.config.tree_sharpen
        branches = None
        if self.hints is not None:
            slots = sent["waiting"]
            token, branches = self.hints.branches(log_p, token, sent["tail"][slots], None, slots, read)
        tree = self._grow(log_p, token, branches)
        self.rows.plant(sent["waiting"], tree)
        return Decided(self._nodes_to_run(tree, sent))

    def settle(self, table: np.ndarray | None) -> np.ndarray:
        if self._plan.model != DRAFTER:
            return super().settle(table)
        rows, slots = self.rows, self._plan.layout.slots
        rows.nodes[slots] = rows.most_nodes if table is None else table[: len(slots), 0]
        for slot in slots.tolist():
            rows.progress[slot].forwards[KIND_OF_PHASE[PROPOSE]] += 1
        rows.phase[slots] = VERIFY
        return np.zeros_like(slots)

    def _grow(self, log_p: torch.Tensor, token: torch.Tensor, branches: trees.Branches | None) -> trees.Tree:
        """The tree (R, N) from the likeliest tokens (R, depths, choices), their ``log_p``, and what each is worth after
        those above, if known; here a chain.
        """
        return trees.chain(log_p, token, branches)

    def _nodes_to_run(self, tree: trees.Tree, sent: Sent) -> torch.Tensor | None:
        """How many nodes of each tree are run (R, 1); None for all."""
        return None

    def _enter_round(self, slots: np.ndarray) -> None:
        """Draft next, unless some prompt is left to run or a draft would be useless."""
        super()._enter_round(slots)
        rows = self.rows
        useful = (rows.limit[slots] - rows.lengths()[slots] > 1) | (self.config.schedule == "reference")
        drafting = (rows.phase[slots] != PREFILL) & (rows.round[slots] > 0) & useful
        if rows.most_nodes:
            rows.phase[slots[drafting]] = PROPOSE
