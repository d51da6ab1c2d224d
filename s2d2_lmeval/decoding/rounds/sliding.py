"""Sliding self-speculation: verification, bonus token and the next draft in one forward, with exactly the AR output.

The model drafts by diffusion and verifies itself at block size one, as in S2D2, but every forward does both, and the
draft window slides: it begins at the first undecided position, not at a block boundary. A round is that of
:mod:`~s2d2_lmeval.decoding.rounds.target`, whose forward also runs draft windows where the walk may end; step 3 is:

a. draft   the window at the walk's end, if it had one, gives the marginals of the next tree
           (:mod:`~s2d2_lmeval.decoding.rounds.trees`), which also goes by the text so far
           (:mod:`~s2d2_lmeval.decoding.rounds.hints`)
b. buy     all rows divide the forward's query budget among nodes and windows
           (:mod:`~s2d2_lmeval.decoding.rounds.budgets`)

Without masks (``window=1``, all that there is for models without a mask token) drafts are what followed the last tokens
of the text before (:mod:`~s2d2_lmeval.decoding.rounds.lookup`), and the host gives trees to rows before their round.

The target chooses as the ``ar`` decoder does: the argmax, or a draw from randomness keyed by position. So the tokens
are those of ``ar`` with the same seed, whatever was drafted, and a round without a usable draft still yields one token.
With ``acceptance=rejection`` the distribution is that of ``ar``, but the draws differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from s2d2_lmeval.decoding.decoder import DecoderSetup
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.options.general import LogprobsOption
from s2d2_lmeval.decoding.options.option import SCHEMES
from s2d2_lmeval.decoding.options.rounds import HintOptions, SlidingOptions
from s2d2_lmeval.decoding.options.s2d2 import AcceptanceOption
from s2d2_lmeval.decoding.passes import Plan
from s2d2_lmeval.decoding.rounds import trees
from s2d2_lmeval.decoding.rounds.acceptance import Keyed, Rejection
from s2d2_lmeval.decoding.rounds.budgets import QueryBudget
from s2d2_lmeval.decoding.rounds.hints import Hints
from s2d2_lmeval.decoding.rounds.lookup import Draft, Lookup, Text
from s2d2_lmeval.decoding.rounds.target import Target, unread_masks
from s2d2_lmeval.decoding.state import DRAFT, PREFILL, VERIFY
from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.registry import DECODERS
from s2d2_lmeval.runtime import clock
from s2d2_lmeval.runtime.costs import MeasureCosts
from s2d2_lmeval.runtime.graphs import numbers

if TYPE_CHECKING:
    from s2d2_lmeval.families import Facts

WIDEST, WIDEST_FORWARD = 256, 1024
"""Queries that ``row_budget=auto`` considers per row, and for all rows together."""

DEEPEST, MOST_FOUND = 15, 32
"""Depth and nodes of a tree that is looked up."""

LEAST_WORTH = 0.1
"""Probability of acceptance below which a node that was looked up is not run, even if there is room for it."""

CHOICES = 16
"""Tokens per future position that a tree may branch over."""

PRICE_UNIT = 2.0**30
"""Prices travel to the host among integers."""


@DECODERS.register(
    "sliding",
    *SCHEMES,
    promise="the model's own autoregressive law, token for token the output of ar with the same seed (tested in "
    "float32 and float64, and on a CPU in bfloat16 with exact=true; otherwise near-ties can fall either way)",
    options=(AcceptanceOption, SlidingOptions, HintOptions, LogprobsOption),
    acceptances=("keyed", "rejection"),
)
class Sliding(Target):
    """The decoder ``sliding``."""

    @staticmethod
    def layout(config: DecodingConfig) -> str:
        seeds = " with its seed" * (config.draft_context == "published")
        return f"{config.draft_shape} of {config.row_budget} queries, window of {config.window}{seeds}"

    @staticmethod
    def caution(config: DecodingConfig) -> str | None:
        if not config.shares_budget:
            return None
        return (
            "the rows in flight share their budgets, so how many forwards an answer takes depends on the others "
            "(its tokens do not); share_budget=false keeps budgets apart"
        )

    def __init__(self, setup: DecoderSetup) -> None:
        super().__init__(setup)
        config, rows = self.config, self.rows
        if config.window > 1 and not self.facts.has_masks:
            raise ConfigError(
                f"window={config.window} is a window of masks, and {self.facts.family} checkpoints have no mask token: "
                "use window=1, where all drafts are looked up, or give a draft_adapter."
            )
        if config.draft_context == "published":
            self._check_seeds()
        self.window, self.seeds = config.window - 1, config.draft_context == "published"
        self.price = np.zeros(rows.count)
        """The price per query of each row's tree, in tokens, when it was bought."""
        self.waited = np.zeros(rows.count, dtype=np.int64)
        """Whether no node of a row's last draft is run."""
        queries = None if config.row_budget == "auto" else int(config.row_budget)
        most = self.most_queries(config, rows.count)
        self.budget = QueryBudget(
            *(queries, self.node_queries, self.window and self.window + unread_masks(self.facts) + self.seeds),
            *(most, config.shares_budget, self.depths),
        )
        if config.acceptance == "rejection" and config.sampled:
            law = setup.tables.full("law", (rows.count, self.window, self.facts.vocab_size), 0, setup.dtype)
            self.acceptance = Rejection(config, self.source, self.depths, law)
        else:
            choices = 1 if config.draft_shape == "chain" or not self.window else CHOICES
            self.acceptance = Keyed(config, self.source, self.depths, choices, coupled=config.sampled)
        if (config.pairs or config.lookup) and config.shares_budget and self.acceptance.choices > 1:
            self.hints = Hints(setup, self.depths)
        self.lookups = [Lookup()] * rows.count
        """What each row's drafts are looked up in: with shared budgets one for all."""
        self.texts: dict[int, Text] = {}

    def _check_seeds(self) -> None:
        """Refuse copies of nodes in windows where they would be nothing new to the model, or too new."""
        if self.facts.draft_adapter is not None and self.facts.draft_adapter.window is not None:
            raise ConfigError(
                f"draft_context=published: the adapter {self.facts.draft_adapter.source} was trained on masks after "
                "clean text; use draft_context=clean."
            )
        if self.facts.window_causal:
            raise ConfigError(
                f"draft_context=published: masks of {self.facts.family} checkpoints see what precedes them only, so a "
                "token before masks never sees them; use draft_context=clean."
            )

    @staticmethod
    def most_queries(config: DecodingConfig, slots: int) -> int:
        """Maximum queries of one row in a round: all of them if it is alone, otherwise at most twice its share."""
        if config.row_budget == "auto":
            widest = WIDEST if config.window > 1 else MOST_FOUND + 1
            return max(min(widest, WIDEST_FORWARD // slots), config.least_budget)
        return int(config.row_budget) * (2 if slots > 1 and config.shares_budget else 1)

    @classmethod
    def most_nodes(cls, config: DecodingConfig, facts: Facts, slots: int) -> int:
        nodes = max((cls.most_queries(config, slots) - 1) // (1 if facts.token_shift else 2), 1)
        return min(nodes, cls.most_depths(config, facts)) if config.draft_shape == "chain" else nodes

    @staticmethod
    def most_depths(config: DecodingConfig, facts: Facts) -> int:
        return max(config.window - 1, DEEPEST * config.looks_up)

    @property
    def capacity(self) -> int:
        return self.rows.length + self.budget.most + 1

    @property
    def most_logits(self) -> tuple[int, int]:
        # Rows share their budgets: one may read more, all together do not.
        most = self.budget.queries or self.budget.most
        return most + 1, max(most // self.node_queries + 1, self.window)

    def calibrate_costs(self, measure_costs: MeasureCosts) -> None:
        """With ``row_budget=auto``, measure the cost of forwards at this batch size."""
        if self.budget.queries is None:
            rows, budget = self.rows, self.budget
            seconds = measure_costs(budget.most)(np.arange(rows.count * budget.most + 1))
            budget.calibrate_costs(seconds, rows.count, self.tables)
            # Trees grow only as large as can pay, because growing them takes time too.
            rows.most_nodes = min(rows.most_nodes, max((budget.most - 1) // self.node_queries, 1))
        super().calibrate_costs(measure_costs)

    def plan(self) -> Plan:
        self._began = clock.agreed()
        if self.config.looks_up:
            self._look_up()
        return super().plan().tell(learned=self.budget.learned(), waited=self.waited)

    def admitted(self, slot: int) -> None:
        if self.config.looks_up:
            before, self.texts[slot] = self.texts.get(slot), Text(self.rows.tokens[slot])
            if not self.config.shares_budget:
                self.lookups[slot] = Lookup()
            elif before is not None:
                self.lookups[slot].finished(before)
        super().admitted(slot)

    def _look_up(self) -> None:
        """Give trees to the rows that are about to run a round."""
        rows, budget = self.rows, self.budget
        running = rows.active()[rows.phase[rows.active()] != PREFILL]
        most = min(budget.nodes_left(len(running)), rows.most_nodes, MOST_FOUND)
        found: dict[int, Draft] = {}
        for slot in running.tolist():
            text, lookup, room = (
                self.texts[slot],
                self.lookups[slot],
                int(rows.limit[slot]) - len(rows.tokens[slot]) - 1,
            )
            lookup.follow(text)
            chain = self.config.draft_shape == "chain"
            found[slot] = lookup.draft(text, most, min(DEEPEST, room), LEAST_WORTH, chain)
        worth = np.sort([value for draft in found.values() for value in draft.value])[::-1]
        price = budget.price_of_nodes(worth, len(running))
        rows.written = {slot: draft.above(price) for slot, draft in found.items()}
        for slot, draft in rows.written.items():
            rows.nodes[slot] = len(draft.token)
            rows.phase[slot] = VERIFY if draft.token else DRAFT

    # ---- device ----

    def _propose(self, logits: torch.Tensor, end: torch.Tensor) -> list[torch.Tensor]:
        if not self.window:
            return []
        sent, rows = self._sent, self.rows
        index = numbers(rows.token.shape[1], rows.device)
        at_end = (sent["holder"] == end) & (index < sent["windows"])
        met = at_end.any(1, keepdim=True)
        base = sent["base"] - sent.part("window").start
        tree = self._draft(logits, met, base + at_end.long().argmax(1, keepdim=True) * self.window, end)
        running, learned = sent["running"].squeeze(1).bool(), sent["learned"].view(torch.float64)
        waited = sent["waited"].unsqueeze(1).bool()
        # A tree of what was looked up alone is one too, and has windows if it can pay for them.
        nodes, windows, price = self.budget.buy(tree, tree.value[:, :1] > 0, running, waited, *learned)
        rows.plant(slice(None), tree)
        rows.holder.copy_(windows.long().argsort(dim=1, descending=True, stable=True))
        return [met, nodes, windows.sum(1, keepdim=True), (price * PRICE_UNIT).expand_as(nodes)]

    def _draft(self, logits: torch.Tensor, met: torch.Tensor, base: torch.Tensor, end: torch.Tensor) -> trees.Tree:
        """Grow each row's next tree from the window at ``base`` (count, 1) of the window ``logits``, if the walk's
        ``end`` ``met`` one, and from what the text says.
        """
        sent, nodes = self._sent, self.rows.most_nodes
        if not len(logits):
            return trees.empty(len(base), nodes, base.device, logits.dtype)
        ahead = numbers(self.window, base.device)
        position = sent["length"].unsqueeze(1) + sent["depth"].gather(1, end).clamp_min(0) + 1 + ahead
        of_window = (base.where(met, 0) + ahead).flatten()
        best, token = self.acceptance.candidates(logits[of_window], position, sent)
        # A node at position p needs a token after it: the walk's bonus.
        room = position < sent["limit"].unsqueeze(1) - 1
        best = best.masked_fill(~(room & met).unsqueeze(2), -torch.inf)
        branches = None
        if self.hints is not None:
            every = numbers(len(best), best.device)
            token, branches = self.hints.branches(best, token, self.hints.tail(), room, every)
        return trees.grow(best, token, nodes, beams=self.beams, branches=branches)

    # ---- host ----

    def settle(self, table: np.ndarray | None) -> np.ndarray:
        rows, plan = self.rows, self._plan
        layout, keep = plan.layout, plan.keep
        if self.budget.queries is None and plan.count("verify"):
            self.budget.step_took(clock.agreed() - self._began, layout.queries, int(np.maximum(keep - 1, 0).sum()))
        for slot, width in zip(layout.slots.tolist(), layout.widths.tolist(), strict=True):
            rows.progress[slot].count("queries", width)
        return super().settle(table)

    def _after_round(self, slots: np.ndarray, accepted: np.ndarray, proposed: np.ndarray) -> None:
        rows, ran = self.rows, (slots, self.rows.nodes[slots], self.rows.windows[slots], accepted)
        for slot, nodes_run, windows_run, taken in zip(*(values.tolist() for values in ran), strict=True):
            self.budget.round_ran(nodes_run, taken, self.price[slot])
            if self.window:
                rows.progress[slot].count("windows", windows_run)
        if not self.window:
            rows.nodes[slots] = 0
            return
        met, nodes, windows, price = proposed.T
        for slot, used in zip(slots.tolist(), met.tolist(), strict=True):
            rows.progress[slot].count("windows_used", used)
            rows.progress[slot].count("windows_missed", 1 - used)
        rows.nodes[slots], rows.windows[slots], self.price[slots] = nodes, windows, price / PRICE_UNIT
        self.waited[slots] = (met > 0) & (nodes == 0)
