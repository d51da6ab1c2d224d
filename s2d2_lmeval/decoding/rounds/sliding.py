"""Sliding self-speculation: verification, bonus token and the next draft in one forward, with exactly the AR output.

The model drafts by diffusion and verifies itself at block size one, as in S2D2, but every forward does both, and the
draft window slides: it begins at the first undecided position, not at a block boundary. One round of a row:

1. plan    a chain or tree of drafted tokens (nodes), and the places where its walk may end that get a draft window
2. forward the token that has no keys yet; the nodes; what tells the verifier's word on each; the windows
           (:mod:`~s2d2_lmeval.decoding.rounds.passes`)
3. judge   walk from the root down to where the verifier's word differs; that word is the bonus token
           (:mod:`~s2d2_lmeval.decoding.rounds.acceptance`)
4. commit  the path's keys and values (compacted where the path was not contiguous)
5. draft   the window at the walk's end, if it had one, gives the marginals of the next tree
           (:mod:`~s2d2_lmeval.decoding.rounds.trees`), and all rows share what a forward can carry
           (:mod:`~s2d2_lmeval.decoding.rounds.budgets`)

The verifier chooses as the ``ar`` decoder does: the arg-max, or a draw from randomness keyed by position. So the tokens
are those of ``ar`` with the same seed, whatever was drafted, and a round without a usable draft still yields one token.
With ``acceptance=rejection`` the law is that of ``ar``, the draws are others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from s2d2_lmeval.decoding.decoder import EXACT, Decoder, Seating
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.options.rounds import SlidingOptions
from s2d2_lmeval.decoding.options.s2d2 import AcceptanceOption
from s2d2_lmeval.decoding.readback import Outcome, fetch
from s2d2_lmeval.decoding.rounds import budgets as tree_budget
from s2d2_lmeval.decoding.rounds import trees
from s2d2_lmeval.decoding.rounds.acceptance import acceptance_of
from s2d2_lmeval.decoding.rounds.passes import RoundPlan, TreeRows, plan_round
from s2d2_lmeval.decoding.sampling import random
from s2d2_lmeval.decoding.state import KIND_OF_PHASE, PREFILL
from s2d2_lmeval.errors import NumericalError
from s2d2_lmeval.registry import DECODERS
from s2d2_lmeval.runtime import clock
from s2d2_lmeval.runtime.costs import MeasureCosts

if TYPE_CHECKING:
    from typing_extensions import Self

    from s2d2_lmeval.families import Facts

WIDEST, WIDEST_FORWARD = 256, 1024
"""Queries that ``row_budget=auto`` considers per row, and for all rows together."""

PRICE_UNIT = 2.0**30
"""Prices travel to the host among integers."""


@DECODERS.register(
    "sliding",
    *("block", "editing", "subblock", "pipelined"),
    promise=f"the model's own autoregressive law, token for token the output of ar with the same seed{EXACT}",
    options=(AcceptanceOption, SlidingOptions),
    acceptances=("keyed", "rejection"),
)
class Sliding(Decoder[TreeRows]):
    """The decoder ``sliding``."""

    @staticmethod
    def layout(config: DecodingConfig) -> str:
        return f"{config.draft_shape} of {config.row_budget} queries, window of {config.window}"

    @staticmethod
    def caution(config: DecodingConfig) -> str | None:
        if not config.shares_budget:
            return None
        return (
            "the rows in flight share their budgets, so how many forwards an answer takes depends on the others "
            "(its tokens do not); share_budget=false keeps budgets apart"
        )

    def __init__(
        self, config: DecodingConfig, facts: Facts, rows: TreeRows, most: int, device: torch.device, chunk: int
    ) -> None:
        self.config = config
        self.facts = facts
        self.mask_token_id = facts.mask_token_id
        self.shifted = facts.token_shift
        self.rows = rows
        self.device = device
        self.prefill_chunk = chunk
        self.acceptance = acceptance_of(config, random.source_of(config.random_source, config.seed))
        self.window = config.window - 1
        queries = None if config.row_budget == "auto" else int(config.row_budget)
        shared = config.shares_budget
        self.budget = tree_budget.QueryBudget(queries, self.queries_of_node(facts), self.window, most, shared)

    @classmethod
    def seat(cls, seating: Seating) -> Self:
        """A decoder with seats for a run."""
        config, facts = seating.config, seating.facts
        most = cls.most_queries(config, seating.slots)
        rows = TreeRows(seating.slots, seating.longest, cls.most_nodes(config, facts, most))
        return cls(config, facts, rows, most, seating.device, seating.prefill_chunk)

    @staticmethod
    def queries_of_node(facts: Facts) -> int:
        """A node takes a query and, in un-shifted models, its verifier one more. So does the token before all nodes."""
        return 1 if facts.token_shift else 2

    @staticmethod
    def most_queries(config: DecodingConfig, slots: int) -> int:
        """Queries that one row may bring to a round: all there are if it is alone, at most twice its share if not."""
        if config.row_budget == "auto":
            return max(min(WIDEST, WIDEST_FORWARD // slots), config.window + 1)
        return int(config.row_budget) * (2 if slots > 1 and config.shares_budget else 1)

    @classmethod
    def most_nodes(cls, config: DecodingConfig, facts: Facts, most: int) -> int:
        """Nodes of a tree of which so many queries are run at most."""
        nodes = max((most - 1) // cls.queries_of_node(facts), 1)
        return min(nodes, config.window - 1) if config.draft_shape == "chain" else nodes

    @property
    def capacity(self) -> int:
        """Positions that a row may write to in the cache."""
        return self.rows.length + self.budget.most + 1

    def weigh(self, measure_costs: MeasureCosts) -> None:
        """With ``row_budget=auto``, learn what forwards cost at this batch."""
        if self.budget.queries is None:
            most = self.rows.count * self.budget.most
            self.budget.weigh(measure_costs(self.budget.most)(np.arange(most + 1)), self.rows.count, self.device)
            # Trees grow no larger than pays: growing them takes time too.
            self.rows.resize(self.most_nodes(self.config, self.facts, self.budget.most))

    def admitted(self, slot: int) -> None:
        """A request has been seated in ``slot``: its first round has no draft, but a window."""
        self.rows.nodes[slot] = 0
        self.rows.windows[slot] = np.arange(self.rows.windows.shape[1]) == 0
        self.rows.enter_round(slot, self.prefill_chunk)

    def plan(self) -> RoundPlan:
        """Lay out the next forward of all active rows: text, nodes, verifiers, windows."""
        self._began = clock.now()
        self._plan = plan_round(
            self.rows, self.window, self.mask_token_id, self.shifted, self.prefill_chunk, self.device
        )
        return self._plan

    # ---- device ----

    def advance(self, logits: torch.Tensor) -> Outcome:
        """Take the wanted logits (M, V) of the planned forward; judge, draft, and buy the next round.

        Reads the device once.

        :raises NumericalError: when the logits are not numbers.
        """
        plan, facts = self._plan, self._plan.facts
        if not plan.verifies:  # prefill chunks only
            return self._settle(None)
        logits[:, self.mask_token_id] = -torch.inf
        verdict = self.acceptance.judge(logits[: plan.verifies], plan)
        begins = facts["length"].unsqueeze(1) + facts["depth"].gather(1, verdict.end).clamp_min(0) + 1
        base = facts["window_base"].gather(1, verdict.end)
        tree = self._draft(logits[plan.verifies :], base, begins)
        nodes, windows, price = self.budget.buy(tree, base >= 0, facts["running"].bool())
        sound = logits[: plan.verifies].isnan().any().logical_not().expand_as(base)
        columns = [sound, verdict.bonus, verdict.path, base >= 0, nodes]
        columns += [tree.token, tree.parent, tree.depth, windows, (price * PRICE_UNIT).expand(len(base), 1)]
        return self._settle(fetch(columns))

    def _draft(self, logits: torch.Tensor, base: torch.Tensor, begins: torch.Tensor) -> trees.Tree:
        """Grow each row's next tree from the window at ``base`` (count, 1; -1: none) of the window ``logits``, whose
        first position is ``begins`` (count, 1).
        """
        facts, budget = self._plan.facts, self.rows.token.shape[1] - 1
        if not len(logits):
            return trees.empty(len(base), budget, base.device, logits.dtype)
        offsets = torch.arange(self.window, device=base.device)
        position = begins + offsets
        best, token = self.acceptance.candidates(logits[(base.clamp_min(0) + offsets).flatten()], position, facts)
        # A node at position p needs a token behind it: the walk's bonus.
        room = (position < facts["limit"].unsqueeze(1) - 1) & (base >= 0)
        return trees.grow(best.masked_fill(~room.unsqueeze(2), -torch.inf), token, budget)

    # ---- host ----

    def _settle(self, read: list[np.ndarray] | None) -> Outcome:
        """Take accepted paths and new trees over; move every row to its next round."""
        rows, plan = self.rows, self._plan
        slots = plan.request.layout.slots
        outcome = Outcome.zeros(len(slots))
        rows.cached[slots] += plan.request.keep
        if plan.verifies:
            prompts = int((plan.request.keep - 1).clip(0).sum())
            self.budget.step_took(clock.now() - self._began, plan.request.layout.queries, prompts)
        for row, slot in enumerate(slots.tolist()):
            rows.progress[slot].forwards[KIND_OF_PHASE[rows.phase[slot]]] += 1
            rows.progress[slot].count("queries", int(plan.request.layout.widths[row]))
            if rows.phase[slot] != PREFILL:
                assert read is not None
                self._after_round(row, slot, [table[slot] for table in read], outcome)
            if not rows.complete[slot]:
                rows.enter_round(slot, self.prefill_chunk)
        return outcome

    def _after_round(self, row: int, slot: int, read: list[np.ndarray], outcome: Outcome) -> None:
        sound, bonus, path, met, nodes, token, parent, depth, windows, price = read
        if not sound[0]:
            raise NumericalError
        rows = self.rows
        path = path[path > 0] - 1
        fresh, nodes_run = [*rows.token[slot, path + 1].tolist(), int(bonus[0])], int(rows.nodes[slot])
        self.budget.round_ran(nodes_run, len(path), rows.price[slot])
        outcome.path[row] = path
        outcome.kept[row] = len(path)
        rows.cached[slot] += len(path)
        rows.record(slot, fresh, rows.depth[slot, 1 : 1 + nodes_run], self.mask_token_id)
        rows.progress[slot].count("windows", int(self._plan.windows[row]))
        rows.progress[slot].count("windows_used", int(met[0]))
        rows.progress[slot].count("windows_missed", 1 - int(met[0]))
        struck = rows.extend(slot, fresh, self.config.stop_token_ids)
        rows.complete[slot] = struck or len(rows.tokens[slot]) >= rows.limit[slot]
        rows.round[slot] += 1
        rows.nodes[slot], rows.windows[slot], rows.price[slot] = nodes[0], windows, price[0] / PRICE_UNIT
        rows.token[slot, 1:], rows.parent[slot, 1:], rows.depth[slot, 1:] = token, parent, depth
