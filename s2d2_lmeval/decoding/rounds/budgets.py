"""Query budgets of a round: how many nodes and draft windows every row runs.

A node is worth its probability of acceptance. A window at a node is worth the gain of a draft in the next round, times
the probability that the walk ends there: the node's value minus its children's values. Both cost queries. At a given
price per query every row buys what is worth more than it costs, so rows with confident drafts buy more. The lowest
price at which the budget suffices divides it among all rows in flight; leftovers are distributed again, and each row
uses its share as well as possible. Without a budget, the price maximises the round's tokens minus its time at the
current rate of tokens per second (which maximises the long-run reward rate when rounds differ in length).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.nn.functional import pad

from s2d2_lmeval.decoding.rounds.trees import Tree
from s2d2_lmeval.runtime.graphs import Tables, constant, numbers

PRICES = 32
"""Prices tried, in equal ratios."""
CHEAPEST = 1e-4
"""The lowest price, relative to the one at which no row buys."""

PATIENCE = 0.995
"""Decay per round of the learned statistics."""

PRIOR_GAIN, PRIOR_WEIGHT = 4.0, 8.0
"""Prior expected gain of a draft, in tokens, and its pseudo-count. Statistics decay with every round, drafted or
not, so a run that has stopped drafting occasionally tries again.
"""


@dataclass(frozen=True)
class Terms:
    """Costs and gains: queries per node, masks per window, the gain of a draft in tokens (a number), and the maximum
    queries per row.
    """

    node: int
    window: int
    draft_value: torch.Tensor
    most: int

    def prices(self) -> torch.Tensor:
        """(P,) ascending; no row buys anything at the last."""
        highest = (self.draft_value / self.window).clamp_min(1 / self.node)
        return highest * constant("prices", highest.device, relative_prices)


def relative_prices(device: torch.device) -> torch.Tensor:
    """The prices (P,) over the one at which no row buys anything; the last is a bit above it."""
    return torch.logspace(0, 1, PRICES, 1 / CHEAPEST, device=device) * (CHEAPEST * 1.01)


@dataclass(frozen=True)
class Bids:
    """What each row would buy at each price (R, P): its first ``nodes``, ``queries`` in all, ``tokens`` expected."""

    prices: torch.Tensor
    nodes: torch.Tensor
    queries: torch.Tensor
    tokens: torch.Tensor

    def of(self, rows: torch.Tensor) -> Bids:
        """The bids of only the ``rows`` (R,); the others buy nothing."""
        among = rows.unsqueeze(1)
        return Bids(self.prices, self.nodes * among, self.queries * among, self.tokens * among)


def bid(tree: Tree, terms: Terms) -> Bids:
    """What the rows of ``tree`` would buy at every price.

    Adding a node changes the probability that the walk ends at it and at its parent only, so the value of the first
    m nodes with their best windows is a running sum over m.
    """
    value = tree.value.float()
    prices = terms.prices()
    node = numbers(value.shape[1] + 1, value.device)
    rooted = tree.rooted.float()
    before = rooted.gather(1, tree.parent) - _elders(tree).float()
    # A window at the root and at each node, and at its parent, before that node is added and after.
    chance = torch.cat([rooted, before, before - value], dim=1)
    window = terms.draft_value * chance.unsqueeze(-1) - terms.window * prices
    won, had = (
        every.split([len(node), *value.shape[1:] * 2], 1) for every in (window.clamp_min(0), (window > 0).int())
    )
    surplus = won[0] + pad((value.unsqueeze(-1) - terms.node * prices) + won[2] - won[1], (0, 0, 1, 0))
    surplus = surplus.cumsum(1)
    queries = terms.window * (had[0] + pad(had[2] - had[1], (0, 0, 1, 0))).cumsum(1) + (terms.node * node).view(-1, 1)
    # The last price is always within reach of a row that runs no node.
    out_of_reach = (queries > terms.most) | (rooted <= 0).unsqueeze(-1)
    gain, best = surplus.masked_fill(out_of_reach, -torch.inf).max(1)
    bought, within = queries.gather(1, best.unsqueeze(1)).squeeze(1), gain.isfinite()
    bought, gain = bought.where(within, 0), gain.where(within, 0)
    return Bids(prices, best, bought, gain + prices * bought)


def _elders(tree: Tree) -> torch.Tensor:
    """(R, N) what the siblings before each node are worth together."""
    parent, order = tree.parent.sort(dim=1, stable=True)
    value = tree.value.double().gather(1, order)
    before = value.cumsum(1) - value
    eldest = pad(parent[:, 1:] != parent[:, :-1], (1, 0), value=True)
    families = before.where(eldest, 0).cummax(1).values
    return value.scatter(1, order, before - families)  # every entry


def price_within(bids: Bids, budget: torch.Tensor) -> torch.Tensor:
    """(1,) index of the lowest price at which all rows together buy at most ``budget`` queries."""
    return (bids.queries.sum(0) <= budget).long().argmax(0, keepdim=True)


def price_for_rate(bids: Bids, seconds: torch.Tensor, fixed: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
    """(1,) index of the price with the most tokens, less ``rate`` tokens for every second that the round takes.

    ``seconds`` (Q,) of a forward of 0, 1, ... queries; ``fixed`` (1,) queries run at any price.
    """
    queries = (bids.queries.sum(0) + fixed).long().clamp_max(len(seconds) - 1)
    return (bids.tokens.sum(0) - rate * seconds[queries]).argmax(0, keepdim=True)


def price_paid(
    bids: Bids, seconds: torch.Tensor, fixed: torch.Tensor, rate: torch.Tensor, price: torch.Tensor
) -> torch.Tensor:
    """(1,) what a query came to, in tokens, where rows bought at the index ``price`` (1,): the time that all together
    added to the forward, at ``rate``. (The price itself only bounds it: things are bought whole.)
    """
    bought = bids.queries.index_select(1, price).sum(0)
    longer = seconds[(bought + fixed).clamp_max(len(seconds) - 1)] - seconds[fixed.clamp_max(len(seconds) - 1)]
    return rate * longer / bought.clamp_min(1)


def at_price(tree: Tree, bids: Bids, price: torch.Tensor, terms: Terms) -> tuple[torch.Tensor, torch.Tensor]:
    """What every row buys at the price with the index ``price`` (1,), as in :func:`fit`. Its bid says how many windows;
    they go where the walk most likely ends.
    """
    nodes = bids.nodes.index_select(1, price)
    windows = (bids.queries.index_select(1, price) - terms.node * nodes) // terms.window
    rank = walks_end(tree, nodes).squeeze(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return nodes, rank < windows


def fit(tree: Tree, budget: torch.Tensor, terms: Terms) -> tuple[torch.Tensor, torch.Tensor]:
    """The best that each row can run with ``budget`` (R,) queries of its own: the first so many nodes (R, 1), and which
    of them, root first, have a window (R, N + 1). Of few numbers of nodes, close together where they are small, it is
    the best, each with as many windows as are left, where the walk most likely ends; and then as many more nodes as
    pay.
    """
    rows, most = tree.value.shape
    value = tree.rooted
    counts = constant(("some", most), value.device, partial(some_up_to, most))
    ends = walks_end(tree, counts.expand(rows, -1))
    likeliest, order = ends.topk(min(terms.most // terms.window, most + 1), dim=2)
    left = budget.unsqueeze(1) - terms.node * counts
    windows = torch.minimum(left.clamp_min(0) // terms.window, counts + 1).clamp_max(likeliest.shape[2])
    won = pad(likeliest.clamp_min(0).cumsum(2), (1, 0))
    worth = value.cumsum(1)[:, counts] + terms.draft_value * won.gather(2, windows.unsqueeze(2)).squeeze(2)
    which = worth.masked_fill((left < 0) | (value[:, counts] <= 0), -torch.inf).argmax(1, keepdim=True)
    best = order.gather(1, which.unsqueeze(2).expand(rows, 1, order.shape[2])).squeeze(1)
    among = numbers(best.shape[1], value.device) < windows.gather(1, which)
    windowed, nodes = torch.zeros_like(value, dtype=torch.bool).scatter(1, best, among), counts[which]
    # A further node is walked to instead of the end at its parent, which may have a window.
    index = numbers(most + 1, value.device)[1:]
    gain = tree.value * (1 - terms.draft_value * windowed.gather(1, tree.parent)) * (index > nodes)
    runs = (terms.node * index <= budget.unsqueeze(1) - terms.window * windowed.sum(1, keepdim=True)) & (gain != 0)
    more, last = gain.cumsum(1).masked_fill(~runs, -torch.inf).max(1, keepdim=True)
    return torch.where(more > 0, last + 1, nodes), windowed


def some_up_to(most: int, device: torch.device) -> torch.Tensor:
    """Rising whole numbers (C,) from 0 to at most ``most``: all up to 16, then eight per doubling."""
    doublings = max(most.bit_length() - 4, 0)
    place = torch.arange(8 * doublings + (most >> doublings) + 1, device=device)
    return torch.where(place < 8, place, (8 + place % 8) << (place // 8 - 1).clamp_min(0))


def walks_end(tree: Tree, nodes: torch.Tensor) -> torch.Tensor:
    """How likely the walk ends at root and each node (R, C, N + 1), where the first ``nodes`` (R, C) run; -1 where none
    does.
    """
    value = tree.rooted.unsqueeze(1)
    run = numbers(value.shape[2], value.device) <= nodes.unsqueeze(2)
    children = (-value * run)[:, :, 1:]
    parent = tree.parent.unsqueeze(1).expand_as(children)
    return value.expand_as(run).scatter_add(2, parent, children).clamp_min(0).masked_fill(~run, -1.0)


def in_turn(
    tree: Tree, nodes: torch.Tensor, windows: torch.Tensor, budget: torch.Tensor, terms: Terms, waited: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``nodes`` (R, 1) and ``windows`` (R, N + 1) as bought of ``budget`` (R,); but rows that have ``waited`` (R, 1),
    because no node of their last draft was run, run this one: however much a new one promises, so would the next.
    """
    instead = torch.minimum(budget.unsqueeze(1) // terms.node, (tree.value > 0).sum(1, keepdim=True))
    now = waited & (nodes == 0) & (instead > 0)
    return torch.where(now, instead, nodes), windows & ~now


class QueryBudget:
    """Allocates queries to rows, and learns what drafts are worth in this run. Affects only speed.

    Args:
        queries: per row in flight; None chooses by :meth:`calibrate_costs`.
        node: queries of a node, and of a row's token before its draft.
        window: masks of a draft window.
        most: maximum queries per row.
        shared: whether rows share budgets and statistics.
        depths: maximum depth of a tree, if it is not that of a window.
    """

    def __init__(
        self, queries: int | None, node: int, window: int, most: int, shared: bool, depths: int | None = None
    ) -> None:
        self.queries, self.node, self.window, self.most, self.shared = queries, node, window, most, shared
        self.depths = window if depths is None else depths
        self._gained, self._drafts = 0.0, 0.0
        self._tokens, self._seconds = 0.0, 0.0
        self._known = np.zeros(0)
        self._seconds_of = torch.zeros(0)

    @property
    def draft_value(self) -> float:
        """The gain of a draft in tokens: those accepted, minus the price of its nodes."""
        gain = (PRIOR_GAIN * PRIOR_WEIGHT + self._gained) / (PRIOR_WEIGHT + self._drafts)
        within = self.depths if self.queries is None else (self.queries - self.node) // self.node
        return max(min(gain, float(within)), 0.0)

    def learned(self) -> np.ndarray:
        """The gain of a draft and the rate of tokens per second, float64 in the guise of whole numbers (2,)."""
        rate = self._tokens / self._seconds if self.queries is None else 0.0
        return np.array([self.draft_value, rate]).view(np.int64)

    def calibrate_costs(self, seconds: np.ndarray, rows: int, tables: Tables) -> None:
        """Record the costs of forwards of 0, 1, ... queries with ``rows`` in flight.

        Lowers :attr:`most` to what can pay at all: a round is worth a bonus token and a path as long as the window, so
        compared with rounds of a window alone, which bring what a draft is expected to, none may take longer than this
        many times as long.
        """
        self._known = seconds
        self._seconds_of = tables.put("seconds", torch.from_numpy(seconds).float())
        # Before the first round: what one round with drafts would give.
        expected = 1 + self.draft_value
        self._tokens = rows * expected
        self._seconds = float(seconds[min(rows * (self.window + self.node), len(seconds) - 1)])
        longest = self._seconds * (1 + self.depths) / expected
        pays = int(np.searchsorted(seconds, longest, side="right") - 1) // rows
        self.most = min(self.most, max(pays, self.window + self.node))

    def buy(
        self,
        tree: Tree,
        drafted: torch.Tensor,
        running: torch.Tensor,
        waited: torch.Tensor,
        draft_value: torch.Tensor,
        rate: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Nodes (count, 1) and windows (count, N + 1) of every row, and the price of a query (1,), by what has been
        :meth:`learned`.

        Only ``running`` rows (count,) spend. Of a budget in queries, rows without a draft (``drafted`` (count, 1) is
        false) spend a window; else they run one if it pays. ``waited`` (count, 1) is as in :func:`in_turn`.
        """
        terms = Terms(self.node, self.window, draft_value, self.most - self.node)
        if self.queries is None:
            bids = bid(tree, terms).of(running)
            fixed = running.sum(0, keepdim=True) * self.node
            at = price_for_rate(bids, self._seconds_of, fixed, rate)
            price = price_paid(bids, self._seconds_of, fixed, rate, at)
            bought = bids.queries.index_select(1, at).squeeze(1)
            return *in_turn(tree, *at_price(tree, bids, at, terms), bought, terms, waited), price
        share = self.queries - self.node
        if self.shared:
            price, spent = self._share_out(bid(tree, terms), share, drafted.squeeze(1), running)
        else:
            price, spent = tree.value.new_zeros(1), torch.full_like(tree.parent[:, 0], share)
        spent = spent.clamp(0, terms.most)
        nodes, windows = in_turn(tree, *fit(tree, spent, terms), spent, terms, waited)
        first = numbers(windows.shape[1], drafted.device) == 0
        return nodes * drafted, torch.where(drafted, windows, first), price

    def nodes_left(self, rows: int) -> int:
        """How many nodes one of ``rows`` may run beside its last token, if the others run none."""
        most = self.most if self.queries is None else min(self.most, self.queries * (rows if self.shared else 1))
        return most // self.node - 1

    def price_of_nodes(self, worth: np.ndarray, rows: int) -> float:
        """What a node has to be worth more than, of those that are ``worth`` (K,), in falling order, of all ``rows``
        together, where there are no windows.
        """
        if self.queries is None:
            asked = self.node * np.arange(rows, rows + len(worth) + 1)
            seconds = self._known[asked.clip(max=len(self._known) - 1)]
            most = int((np.append(0.0, worth.cumsum()) - self._tokens / self._seconds * seconds).argmax())
        elif self.shared:
            most = self.queries * rows // self.node - rows
        else:
            return 0.0
        return float(worth[most]) if most < len(worth) else 0.0

    def _share_out(
        self, bids: Bids, share: int, drafted: torch.Tensor, running: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The price of a query (1,) and what each row may spend (count,), together ``share`` queries per row."""
        among = running & drafted
        bids, drafting = bids.of(among), among.sum()
        budget = running.sum() * share - (running.sum() - drafting) * self.window
        price = price_within(bids, budget)
        spent = bids.queries.index_select(1, price).squeeze(1)
        return bids.prices[price], spent + (budget - spent.sum()) // drafting.clamp_min(1)

    def step_took(self, seconds: float, queries: int, prompts: int) -> None:
        """Without a budget of :attr:`queries`, record a step of ``seconds``, including time outside the model;
        ``prompts`` of its ``queries`` were prompts'.

        The cost of prompts cannot be chosen, so the rate of tokens per second leaves it out.
        """
        last = len(self._known) - 1
        of_rounds = self._known[min(queries - prompts, last)] / self._known[min(queries, last)]
        self._seconds = PATIENCE * self._seconds + seconds * float(of_rounds)
        self._tokens *= PATIENCE

    def round_ran(self, nodes: int, accepted: int, price: float) -> None:
        """Record how many tokens of a draft were ``accepted``, given its nodes and the ``price`` of a query."""
        self._tokens += accepted + 1
        if self.shared:
            self._gained, self._drafts = PATIENCE * self._gained, PATIENCE * self._drafts
            if nodes:
                self._gained += accepted - price * self.node * nodes
                self._drafts += 1
