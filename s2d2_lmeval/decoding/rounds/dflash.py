"""DFlash: a block-diffusion drafter proposes a chain for an autoregressive target (arXiv 2602.06036).

A round of a row, from the last token that was decided:

1. draft   the drafter fills the block behind that token in one pass; it has read the target's features of all text
2. plant   the arg-max of every place is a chain of nodes
3. verify  the target runs the token and its nodes in one pass (:mod:`~s2d2_lmeval.decoding.rounds.target`)
4. accept  walk; accepted nodes become prefix of both models, the target's word behind them is the next round's token

Rows that wait for a draft share the drafter's forward, all others that of the target; a draft stays on the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from s2d2_lmeval.decoding.decoder import EXACT, Plan
from s2d2_lmeval.decoding.options.blocks import ScheduleOption
from s2d2_lmeval.decoding.options.rounds import DrafterOptions
from s2d2_lmeval.decoding.readback import Outcome
from s2d2_lmeval.decoding.rounds import trees
from s2d2_lmeval.decoding.rounds.target import Target
from s2d2_lmeval.decoding.rounds.target_passes import DraftPlan, TargetRows, plan_draft
from s2d2_lmeval.decoding.sampling import random
from s2d2_lmeval.decoding.sampling.filters import probabilities
from s2d2_lmeval.decoding.state import KIND_OF_PHASE, PREFILL, PROPOSE, VERIFY
from s2d2_lmeval.registry import DECODERS

if TYPE_CHECKING:
    from s2d2_lmeval.decoding.options.config import DecodingConfig
    from s2d2_lmeval.families import Facts


TARGETS_LAW = f"the target's own autoregressive law, token for token the output of ar with the same seed{EXACT}"


@DECODERS.register(
    "dflash",
    *("autoregressive", "block"),
    promise=TARGETS_LAW,
    options=(ScheduleOption, DrafterOptions),
    needs_drafter=True,
)
class DFlash(Target):
    """The decoder ``dflash``."""

    @staticmethod
    def layout(config: DecodingConfig) -> str:
        return "chain of a block"

    feeds_drafter = True

    def __init__(self, config: DecodingConfig, facts: Facts, rows: TargetRows, chunk: int) -> None:
        super().__init__(config, facts, rows, chunk)
        assert facts.drafter is not None
        self.drafter = facts.drafter
        # Only noise that is a function of the position can be known before it is drawn.
        self._noise = cast("random.KeyedNoise", self.source)
        self._coupled = config.sampled and config.couple_drafts and not self.source.sequential
        self._draft: DraftPlan | None = None
        self._drafts_sound = torch.tensor(True, device=rows.device)

    @staticmethod
    def most_depths(config: DecodingConfig, facts: Facts) -> int:
        assert facts.drafter is not None
        return (config.draft_block_size or facts.drafter.block_length) - 1

    @classmethod
    def most_nodes(cls, config: DecodingConfig, facts: Facts, slots: int) -> int:
        return cls.most_depths(config, facts)

    def plan(self) -> Plan:
        """Lay out the drafter's forward if any row waits for a draft, else the target's."""
        if (self.rows.phase == PROPOSE).any():
            self._draft = plan_draft(self.rows, self.drafter, self.depths + 1)
            return self._draft
        self._draft = None
        return super().plan()

    def advance(self, logits: torch.Tensor) -> Outcome:
        if self._draft is None:
            return super().advance(logits)
        return self._after_draft(self._draft, logits)

    def _after_draft(self, plan: DraftPlan, logits: torch.Tensor) -> Outcome:
        """Plant what was drafted; ``logits`` (R * depths, V). The device is not read."""
        rows, slots = self.rows, plan.request.layout.slots
        self._drafts_sound = self._drafts_sound & logits.isnan().any().logical_not()
        tree = self._grow(self._log_p(plan, logits).view(len(slots), self.depths, -1))
        rows.plant(plan.slots, tree)
        rows.nodes[slots] = self._nodes_to_run(tree)
        for slot in slots.tolist():
            rows.progress[slot].forwards[KIND_OF_PHASE[PROPOSE]] += 1
        rows.phase[slots] = VERIFY
        return Outcome.zeros(len(slots))

    def _log_p(self, plan: DraftPlan, logits: torch.Tensor) -> torch.Tensor:
        """What the drafter holds of every token (R * depths, V).

        At a temperature, if so asked, the noise is added that the target will be drawn with: where both agree in law,
        they then agree in the token.
        """
        config = self.config
        if not self._coupled:
            return logits.log_softmax(-1)
        p = probabilities(logits, config)
        ahead = torch.arange(self.depths, device=logits.device)
        position = (plan.length.unsqueeze(1) + ahead).flatten()
        key = random.Key(random.DRAFT, plan.key.repeat_interleave(self.depths), position, torch.zeros_like(position))
        return (p.log() + self._noise.gumbel(p, key)).log_softmax(-1)

    def _grow(self, log_p: torch.Tensor) -> trees.Tree:
        """The tree (R, N) of drafts ``log_p`` (R, depths, V)."""
        best, token = log_p.topk(1, dim=-1)
        return trees.grow(best, token, self.depths)

    def _nodes_to_run(self, tree: trees.Tree) -> np.ndarray | int:
        """How many nodes of each row's tree are run."""
        return self.depths

    def _sound(self, logits: torch.Tensor) -> torch.Tensor:
        return super()._sound(logits) & self._drafts_sound

    def _enter_round(self, slot: int) -> None:
        """Draft next, unless prompt is left to run or no draft can be of use."""
        super()._enter_round(slot)
        rows = self.rows
        left = rows.limit[slot] - len(rows.tokens[slot])
        useful = rows.depth.shape[1] > 1 and (left > 1 or self.config.schedule == "reference")
        if rows.phase[slot] != PREFILL and rows.progress[slot].steps and useful:
            rows.phase[slot] = PROPOSE
