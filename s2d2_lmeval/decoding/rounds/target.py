"""Autoregressive decoding by rounds: a target says what follows each node of a draft tree, and the walk down the tree
goes on as long as that is one of the node's children.

Without drafts every round is one token, the decoder ``ar`` of autoregressive models. A decoder with a drafter
(:mod:`~s2d2_lmeval.decoding.rounds.dflash`, :mod:`~s2d2_lmeval.decoding.rounds.ddtree`) only has to plant trees. What
follows a node is the arg-max, or a draw from randomness keyed by request and position, so the output is the same for
every tree: a token that comes out is always what the target says after the tokens before it ("sample and match";
DFlash, arXiv 2602.06036, and DDTree, arXiv 2604.12989).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from s2d2_lmeval.decoding.decoder import AUTOREGRESSIVE, Decoder, Plan, Seating
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.readback import Outcome, fetch
from s2d2_lmeval.decoding.rounds import trees
from s2d2_lmeval.decoding.rounds.target_passes import TargetPlan, TargetRows, plan_target
from s2d2_lmeval.decoding.sampling import random
from s2d2_lmeval.decoding.sampling.filters import probabilities
from s2d2_lmeval.decoding.state import DRAFT, KIND_OF_PHASE, PREFILL
from s2d2_lmeval.errors import NumericalError
from s2d2_lmeval.families.facts import NO_MASK
from s2d2_lmeval.registry import DECODERS
from s2d2_lmeval.runtime.costs import MeasureCosts

if TYPE_CHECKING:
    from typing_extensions import Self

    from s2d2_lmeval.families import Facts


@DECODERS.register("ar", "autoregressive", "pipelined", **AUTOREGRESSIVE)
class Target(Decoder[TargetRows]):
    """The decoder ``ar`` of autoregressive models, and what decoders with a drafter have in common."""

    feeds_drafter = False

    def __init__(self, config: DecodingConfig, facts: Facts, rows: TargetRows, chunk: int) -> None:
        self.config = config
        self.facts = facts
        self.rows = rows
        self.prefill_chunk = chunk
        self.source = random.source_of(config.random_source, config.seed)
        self.depths = self.most_depths(config, facts)

    @classmethod
    def seat(cls, seating: Seating) -> Self:
        """A decoder with seats for a run."""
        config, facts, slots = seating.config, seating.facts, seating.slots
        rows = TargetRows(slots, seating.longest, cls.most_nodes(config, facts, slots), seating.device)
        return cls(config, facts, rows, seating.prefill_chunk)

    @staticmethod
    def most_nodes(config: DecodingConfig, facts: Facts, slots: int) -> int:
        """Nodes that a row's tree may have where ``slots`` rows are in flight."""
        return 0

    @staticmethod
    def most_depths(config: DecodingConfig, facts: Facts) -> int:
        """Depth that a row's tree may have."""
        return 0

    @property
    def capacity(self) -> int:
        """Positions that a row may write to in the cache."""
        queries = (self.rows.depth.shape[1]) * (1 if self.facts.token_shift else 2)
        return self.rows.length + max(queries, self.depths) + self.depths + 1

    def weigh(self, measure_costs: MeasureCosts) -> None:
        """Nothing here depends on what forwards cost."""

    def admitted(self, slot: int) -> None:
        """A request has been seated in ``slot``."""
        self._enter_round(slot)

    def plan(self) -> Plan:
        """Lay out the next forward of all active rows."""
        self._plan = plan_target(
            self.rows, self.facts.mask_token_id, self.facts.token_shift, self.prefill_chunk, self.feeds_drafter
        )
        return self._plan

    # ---- device ----

    def advance(self, logits: torch.Tensor) -> Outcome:
        """Take the wanted logits (M, V) of the planned forward, and walk. Reads the device once.

        :raises NumericalError: when the logits are not numbers.
        """
        plan, rows = self._plan, self.rows
        if not len(logits):  # prefill chunks only
            return self._settle(plan, None)
        if self.facts.mask_token_id != NO_MASK:
            logits[:, self.facts.mask_token_id] = -torch.inf
        follows = torch.full_like(rows.parent, -1).index_put(plan.at, self._say(logits))
        path = trees.descend(follows, rows.token, rows.parent, plan.depth, self.depths)
        end = path.max(1, keepdim=True).values
        fresh = torch.cat([rows.token, follows], dim=1)
        tokens = fresh.gather(1, torch.cat([path, end + rows.token.shape[1]], dim=1))
        sound = self._sound(logits).expand(len(path), 1)
        return self._settle(plan, fetch([sound, path, tokens, plan.depth]))

    def _say(self, logits: torch.Tensor) -> torch.Tensor:
        """The tokens (M,) that the target says behind the nodes of ``logits`` (M, V)."""
        config, plan = self.config, self._plan
        if not config.sampled:
            return logits.argmax(-1)
        row, node = plan.at
        position = plan.length[row] + plan.depth[row, node]
        key = random.Key(random.DRAFT, plan.key[row], position, torch.zeros_like(position))
        return self.source.categorical(probabilities(logits, config), key)

    def _sound(self, logits: torch.Tensor) -> torch.Tensor:
        """Whether all was numbers, on the device."""
        return logits.isnan().any().logical_not()

    # ---- host ----

    def _settle(self, plan: TargetPlan, read: list[np.ndarray] | None) -> Outcome:
        """Take accepted paths over; move every row to its next round."""
        rows, slots = self.rows, plan.request.layout.slots
        outcome = Outcome.zeros(len(slots))
        rows.cached[slots] += plan.request.keep
        for row, slot in enumerate(slots.tolist()):
            rows.progress[slot].forwards[KIND_OF_PHASE[rows.phase[slot]]] += 1
            if rows.phase[slot] != PREFILL:
                assert read is not None
                self._after_round(row, slot, [table[slot] for table in read], outcome)
            if not rows.complete[slot]:
                self._enter_round(slot)
        return outcome

    def _after_round(self, row: int, slot: int, read: list[np.ndarray], outcome: Outcome) -> None:
        sound, path, tokens, depth = read
        if not sound[0]:
            raise NumericalError
        rows = self.rows
        path = path[path > 0] - 1
        fresh = [*tokens[1 : 1 + len(path)].tolist(), int(tokens[-1])]
        outcome.path[row] = path
        outcome.kept[row] = len(path)
        rows.cached[slot] += len(path)
        rows.record(slot, fresh, depth, self.facts.mask_token_id)
        struck = rows.extend(slot, fresh, self.config.stop_token_ids)
        rows.complete[slot] = struck or len(rows.tokens[slot]) >= rows.limit[slot]

    def _enter_round(self, slot: int) -> None:
        """Run a round next, or first a chunk of a long prompt."""
        rows = self.rows
        rows.nodes[slot] = 0
        rows.phase[slot] = PREFILL if len(rows.tokens[slot]) - rows.cached[slot] > self.prefill_chunk else DRAFT
