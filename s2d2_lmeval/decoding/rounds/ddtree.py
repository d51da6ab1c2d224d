"""DDTree: the best draft tree within a node budget, from one block-diffusion draft (arXiv 2604.12989).

The drafter gives a distribution per place of its block. A node of the tree is a prefix, and its value the product of
its tokens' probabilities, which is how likely it is to be accepted if the drafter is right; the best tree of N nodes
holds the N likeliest prefixes (:func:`~s2d2_lmeval.decoding.rounds.trees.grow`). The target verifies all of them in one
pass, and the rest is as in :mod:`~s2d2_lmeval.decoding.rounds.dflash`.

``tree_budget=auto``  Wider forwards cost more, and each further node is worth less. Of the nodes of all rows in flight
the best k run, with k chosen to maximise the round's expected tokens per second at the measured cost of target and
drafter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from s2d2_lmeval.decoding.decoder import DecoderSetup
from s2d2_lmeval.decoding.options.blocks import ScheduleOption
from s2d2_lmeval.decoding.options.general import LogprobsOption
from s2d2_lmeval.decoding.options.rounds import DrafterOptions, HintOptions, TreeOptions
from s2d2_lmeval.decoding.passes import Sent
from s2d2_lmeval.decoding.rounds import trees
from s2d2_lmeval.decoding.rounds.dflash import TARGETS_LAW, DFlash
from s2d2_lmeval.decoding.rounds.hints import Hints
from s2d2_lmeval.registry import DECODERS
from s2d2_lmeval.runtime.costs import MeasureCosts
from s2d2_lmeval.runtime.drafting.heads import CHOICES
from s2d2_lmeval.runtime.graphs import numbers
from s2d2_lmeval.runtime.passes import DRAFTER

if TYPE_CHECKING:
    from s2d2_lmeval.decoding.options.config import DecodingConfig
    from s2d2_lmeval.families import Facts

WIDEST, WIDEST_FORWARD = 256, 1024
"""What ``tree_budget=auto`` considers: nodes per row, and queries of all rows together."""


@DECODERS.register(
    "ddtree",
    *("autoregressive", "block"),
    promise=TARGETS_LAW,
    options=(ScheduleOption, DrafterOptions, TreeOptions, HintOptions, LogprobsOption),
    needs_drafter=True,
)
class DDTree(DFlash):
    """The decoder ``ddtree``."""

    @staticmethod
    def layout(config: DecodingConfig) -> str:
        return f"tree of {config.tree_budget} nodes"

    seconds_of: torch.Tensor | None = None
    """Under ``tree_budget=auto``, seconds of a round (count * queries per row + 1,) by the target's queries."""

    @classmethod
    def most_nodes(cls, config: DecodingConfig, facts: Facts, slots: int) -> int:
        if config.tree_budget != "auto":
            return int(config.tree_budget)
        share = WIDEST_FORWARD // (slots * (1 if facts.token_shift else 2))
        return max(min(WIDEST, share), cls.most_depths(config, facts))

    def __init__(self, setup: DecoderSetup) -> None:
        super().__init__(setup)
        if self._takes_hints:
            self.hints = Hints(setup, self.depths, True, self.after_token)

    @property
    def _takes_hints(self) -> bool:
        return bool(self.config.pairs or self.config.lookup) and self.config.schedule != "reference"

    @property
    def choices(self) -> int:
        nodes = self.rows.most_nodes
        most = self.after_token.choices if self.after_token is not None else CHOICES if self._takes_hints else nodes
        return max(min(most, nodes), 1)

    def calibrate_costs(self, measure_costs: MeasureCosts) -> None:
        """With ``tree_budget=auto``, measure the cost of rounds at this batch size."""
        if self.config.tree_budget == "auto":
            rows, widest = self.rows.count, self.node_queries * (self.rows.most_nodes + 1)
            target = measure_costs(widest)(np.arange(rows * widest + 1))
            block = self.depths + 1
            draft = measure_costs(block, model=DRAFTER)(rows * block)
            self.seconds_of = self.tables.put("seconds", torch.from_numpy(target + draft))
        super().calibrate_costs(measure_costs)

    def _grow(self, log_p: torch.Tensor, token: torch.Tensor, branches: trees.Branches | None) -> trees.Tree:
        nodes, first = self.rows.most_nodes, self.config.tree_seed_chain
        return trees.grow(log_p, token, nodes, first, self.beams, branches)

    def _nodes_to_run(self, tree: trees.Tree, sent: Sent) -> torch.Tensor | None:
        if self.seconds_of is None:
            return None
        waiting = numbers(len(tree.value), tree.value.device) < sent["waiting_rows"]
        return nodes_worth_running(tree, waiting, self.seconds_of, self.node_queries).unsqueeze(1)


def nodes_worth_running(
    tree: trees.Tree, among: torch.Tensor, seconds_of: torch.Tensor, node_queries: int
) -> torch.Tensor:
    """How many nodes of each row's ``tree`` (R, N) to run (R,), so that expected tokens per second are highest.

    Nodes of a row may be left out from the end; what one is worth is the least value up to it, so that a seeded chain
    is judged as it stands. ``seconds_of`` (Q,) are those of a round of 0, 1, ... queries.
    """
    rows = len(tree.value)
    value = tree.value.cummin(1).values * among.unsqueeze(1)
    value, order = value.flatten().sort(descending=True, stable=True)
    taken = numbers(rows * tree.value.shape[1] + 1, value.device)
    running = among.sum()
    tokens = torch.cat([value.new_zeros(1), value]).cumsum(0) + running
    seconds = seconds_of[((taken + running) * node_queries).clamp_max(len(seconds_of) - 1)]
    best = (tokens / seconds).argmax()
    run = torch.zeros_like(value).scatter(0, order, (taken[1:] <= best).to(value.dtype))
    return (run.view(rows, -1) * (tree.value > 0)).sum(1).long()
