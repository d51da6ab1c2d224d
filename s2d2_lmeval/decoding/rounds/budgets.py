"""How many queries a round is worth: nodes and draft windows of every row, bought at one price.

A node brings its probability of being accepted. A window at a node brings what a draft is worth in the next round,
times the probability that the walk ends there: the node's own value less the values of its children. Each costs
queries. At a price per query every row buys what brings more than it costs, so rows whose drafts are surer buy more,
and one number divides a budget among all rows in flight: the lowest price at which it suffices. What is left over is
shared out again, and each row makes the best of what it has. Without a budget the price is the one at which the round's
tokens, less the time it takes at the going rate of tokens per second, are largest (the rule that maximises a long-run
rate of reward where rounds differ in length).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from s2d2_lmeval.decoding.rounds.trees import Tree

PRICES = 64
"""Prices tried, in equal ratios."""
CHEAPEST = 1e-4
"""The lowest price, relative to the one at which nobody buys."""

PATIENCE = 0.995
"""How much of what was learned is kept from round to round."""

PRIOR_GAIN, PRIOR_WEIGHT = 4.0, 8.0
"""Prior expected gain of a draft, in tokens, and its pseudo-count. What was learned fades with every round, drafted or
not, so a run that has given up drafting tries again now and then.
"""


@dataclass(frozen=True)
class Terms:
    """What things cost and bring: queries of a node, masks of a window, tokens that a draft is worth, queries that one
    row may buy at most.
    """

    node: int
    window: int
    draft_value: float
    most: int

    def prices(self, device: torch.device) -> torch.Tensor:
        """(P,) rising; at the last nobody buys anything."""
        highest = max(1 / self.node, self.draft_value / self.window if self.window else 0.0)
        return torch.logspace(0, 1, PRICES, 1 / CHEAPEST, device=device) * (CHEAPEST * highest * 1.01)


@dataclass(frozen=True)
class Bids:
    """What each row would buy at each price (R, P): its first ``nodes``, ``queries`` in all, ``tokens`` expected."""

    prices: torch.Tensor
    nodes: torch.Tensor
    queries: torch.Tensor
    tokens: torch.Tensor

    def of(self, rows: torch.Tensor) -> Bids:
        """Those of ``rows`` (R,) alone; the others buy nothing."""
        among = rows.unsqueeze(1)
        return Bids(self.prices, self.nodes * among, self.queries * among, self.tokens * among)


@dataclass(frozen=True)
class Purchase:
    """What of a tree is run: ``nodes`` (R,) its first so many, and ``windows`` (R, N + 1) bool, root first."""

    nodes: torch.Tensor
    windows: torch.Tensor


def bid(tree: Tree, terms: Terms) -> Bids:
    """What the rows of ``tree`` would buy at every price.

    Adding a node changes the chance of the walk to end at two places, itself and its parent, so the worth of the first
    m nodes with their best windows is a running sum over m.
    """
    value = tree.value.float()
    prices = terms.prices(value.device)
    node = torch.arange(value.shape[1], device=value.device)
    elder = (tree.parent.unsqueeze(2) == tree.parent.unsqueeze(1)) & (node.unsqueeze(1) > node)
    taken = torch.where(elder, value.unsqueeze(1), 0).sum(2)
    one = torch.ones_like(value[:, :1])
    before = torch.cat([one, value], dim=1).gather(1, tree.parent) - taken

    def windows(chance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        surplus = (terms.draft_value * (terms.window > 0)) * chance.unsqueeze(-1) - terms.window * prices
        return surplus.clamp_min(0), (surplus > 0).to(value.dtype)

    root, own, was, becomes = windows(one), windows(value), windows(before), windows(before - value)
    surplus = (value.unsqueeze(-1) - terms.node * prices) + own[0] + becomes[0] - was[0]
    count = own[1] + becomes[1] - was[1]
    surplus = torch.cat([root[0], surplus], dim=1).cumsum(1)
    queries = terms.window * torch.cat([root[1], count], dim=1).cumsum(1)
    queries += (terms.node * torch.arange(value.shape[1] + 1, device=value.device)).view(-1, 1)
    real = torch.cat([one > 0, tree.value > 0], dim=1).unsqueeze(-1)
    # The last price is always within reach of a row that runs no node.
    surplus = surplus.masked_fill((queries > terms.most + 0.5) | ~real, -torch.inf)
    best = surplus.argmax(1, keepdim=True)
    bought = queries.gather(1, best).squeeze(1)
    gain = surplus.gather(1, best).squeeze(1)
    within = gain.isfinite()
    bought, gain = bought.where(within, 0), gain.where(within, 0)
    return Bids(prices, best.squeeze(1), bought.round().long(), gain + prices * bought)


def price_within(bids: Bids, budget: torch.Tensor) -> torch.Tensor:
    """(1,) index of the lowest price at which all rows together buy at most ``budget`` queries."""
    return (bids.queries.sum(0) <= budget).long().argmax(0, keepdim=True)


def price_for_rate(bids: Bids, seconds: torch.Tensor, fixed: torch.Tensor, rate: float) -> torch.Tensor:
    """(1,) index of the price with the most tokens, less ``rate`` tokens for every second that the round takes.

    ``seconds`` (Q,) of a forward of 0, 1, ... queries; ``fixed`` (1,) queries run at any price.
    """
    queries = (bids.queries.sum(0) + fixed).long().clamp_max(len(seconds) - 1)
    return (bids.tokens.sum(0) - rate * seconds[queries]).argmax(0, keepdim=True)


def price_paid(
    bids: Bids, seconds: torch.Tensor, fixed: torch.Tensor, rate: float, price: torch.Tensor
) -> torch.Tensor:
    """(1,) what a query came to, in tokens, where rows bought at the index ``price`` (1,): the time that all together
    added to the forward, at ``rate``. (The price itself only bounds it: things are bought whole.)
    """
    bought = bids.queries.index_select(1, price).sum(0)
    longer = seconds[(bought + fixed).clamp_max(len(seconds) - 1)] - seconds[fixed.clamp_max(len(seconds) - 1)]
    return rate * longer / bought.clamp_min(1)


def fit(tree: Tree, budget: torch.Tensor, terms: Terms) -> Purchase:
    """The best that each row can run with ``budget`` (R,) queries of its own: every number of nodes is tried, each with
    as many windows as are left, where the walk most likely ends.
    """
    rows, most = tree.value.shape
    value = torch.cat([torch.ones_like(tree.value[:, :1]), tree.value], dim=1)
    # children[r, m, i]: summed value of the children of i among the first m nodes
    born = torch.zeros(rows, most, most + 1, dtype=value.dtype, device=value.device)
    born.scatter_(2, tree.parent.unsqueeze(2), tree.value.unsqueeze(2))
    children = torch.cat([torch.zeros_like(born[:, :1]), born.cumsum(1)], dim=1)
    index = torch.arange(most + 1, device=value.device)
    ends = (value.unsqueeze(1) - children).clamp_min(0).masked_fill(index > index.unsqueeze(1), -1.0)
    likeliest, order = ends.topk(min(terms.most // terms.window, most + 1) if terms.window else 0, dim=2)
    left = budget.unsqueeze(1) - terms.node * index
    windows = left.clamp_min(0) // terms.window if terms.window else torch.zeros_like(left)
    windows = torch.minimum(windows, index + 1)
    won = torch.cat([torch.zeros_like(ends[:, :, :1]), likeliest.clamp_min(0).cumsum(2)], dim=2)
    worth = value.cumsum(1) + terms.draft_value * won.gather(2, windows.unsqueeze(2)).squeeze(2)
    real = torch.cat([torch.ones_like(tree.value[:, :1], dtype=torch.bool), tree.value > 0], dim=1)
    nodes = worth.masked_fill((left < 0) | ~real, -torch.inf).argmax(1, keepdim=True)
    best = order.gather(1, nodes.unsqueeze(2).expand(rows, 1, order.shape[2])).squeeze(1)
    among = torch.arange(best.shape[1], device=value.device) < windows.gather(1, nodes)
    return Purchase(nodes.squeeze(1), torch.zeros_like(value, dtype=torch.bool).scatter(1, best, among))


def at_price(tree: Tree, bids: Bids, price: torch.Tensor, terms: Terms) -> Purchase:
    """What every row buys at the price with the index ``price`` (1,): the purchase behind its bid, to the query.

    The bid says how many windows; they go where the walk most likely ends.
    """
    nodes = bids.nodes.index_select(1, price)
    value = torch.cat([torch.ones_like(tree.value[:, :1]), tree.value], dim=1)
    index = torch.arange(value.shape[1], device=value.device)
    if not terms.window:
        return Purchase(nodes.squeeze(1), torch.zeros_like(value, dtype=torch.bool))
    ends = value.scatter_add(1, tree.parent, -tree.value * (index[1:] <= nodes)).masked_fill(index > nodes, -1.0)
    windows = (bids.queries.index_select(1, price) - terms.node * nodes) // terms.window
    rank = ends.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return Purchase(nodes.squeeze(1), rank < windows)


class QueryBudget:
    """What every row runs next, and what this run has taught about its worth. Only speed depends on any of it.

    :param queries: per row in flight; None: as many as pay, by :meth:`calibrate_costs`.
    :param node: queries of a node, and of a row's token before its draft.
    :param window: masks of a draft window; 0: nothing is drafted.
    :param most: queries that one row may bring.
    :param shared: whether rows may take from each other's share, and learn from each other.
    """

    def __init__(self, queries: int | None, node: int, window: int, most: int, shared: bool) -> None:
        self.queries = queries
        self.node = node
        self.window = window
        self.most = most
        self.shared = shared
        self._gained, self._drafts = 0.0, 0.0
        self._tokens, self._seconds = 0.0, 0.0
        self._known = np.zeros(0)
        self._seconds_of = torch.zeros(0)

    @property
    def draft_value(self) -> float:
        """Tokens that a draft is worth: what stood of it, less the price of its nodes."""
        return max((PRIOR_GAIN * PRIOR_WEIGHT + self._gained) / (PRIOR_WEIGHT + self._drafts), 0.0)

    def calibrate_costs(self, seconds: np.ndarray, rows: int, device: torch.device) -> None:
        """Take note of what forwards of 0, 1, ... queries cost, ``rows`` in flight.

        Lowers :attr:`most` to what can pay at all: a round is worth a bonus token and a path as long as the window, so
        beside rounds with a window alone, which bring what a draft is expected to, none may take longer than this many
        times as long.
        """
        self._known = seconds
        self._seconds_of = torch.from_numpy(seconds).to(device, torch.float32)
        # Before the first round: what one round with drafts would give.
        expected = 1 + self.draft_value
        self._tokens = rows * expected
        self._seconds = float(seconds[min(rows * (self.window + self.node), len(seconds) - 1)])
        longest = self._seconds * (1 + self.window) / expected
        pays = int(np.searchsorted(seconds, longest, side="right") - 1) // rows
        self.most = min(self.most, max(pays, self.window + self.node))

    def buy(
        self, tree: Tree, drafted: torch.Tensor, running: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Nodes (count, 1) and windows (count, N + 1) of every row, and the price of a query (1,).

        Only ``running`` rows (count,) spend. Of a budget in queries, rows without a draft (``drafted`` (count, 1) is
        false) spend a window; else they run one if it pays.
        """
        terms = Terms(self.node, self.window, self.draft_value, self.most - self.node)
        if self.queries is None:
            bids = bid(tree, terms).of(running)
            fixed, rate = running.sum(0, keepdim=True) * self.node, self._tokens / self._seconds
            at = price_for_rate(bids, self._seconds_of, fixed, rate)
            bought = at_price(tree, bids, at, terms)
            return bought.nodes.unsqueeze(1), bought.windows, price_paid(bids, self._seconds_of, fixed, rate, at)
        with_draft, without = running & drafted.squeeze(1), running & ~drafted.squeeze(1)
        bids = bid(tree, terms).of(with_draft)
        price, spent = self._share_out(bids, with_draft.sum(), without.sum())
        bought = fit(tree, spent.clamp(0, terms.most), terms)
        first = (torch.arange(bought.windows.shape[1], device=drafted.device) == 0) & (self.window > 0)
        return bought.nodes.unsqueeze(1) * drafted, torch.where(drafted, bought.windows, first), price

    def _share_out(self, bids: Bids, drafting: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The price of a query (1,) and what each row may spend (count,) of a budget in queries."""
        assert self.queries is not None
        share = self.queries - self.node
        if not self.shared:
            return torch.zeros_like(bids.prices[:1]), torch.full_like(bids.queries[:, 0], share)
        budget = (drafting + others) * share - others * self.window
        price = price_within(bids, budget)
        spent = bids.queries.index_select(1, price).squeeze(1)
        return bids.prices[price], spent + (budget - spent.sum()) // drafting.clamp_min(1)

    def step_took(self, seconds: float, queries: int, prompts: int) -> None:
        """So long was a step, with all that is not the model, in which ``prompts`` of the ``queries`` were prompts'.

        What prompts cost is no one's choice and does not belong to the rate at which time turns into tokens.
        """
        if self.queries is None:
            last = len(self._known) - 1
            of_rounds = self._known[min(queries - prompts, last)] / self._known[min(queries, last)]
            self._seconds = PATIENCE * self._seconds + seconds * float(of_rounds)
            self._tokens *= PATIENCE

    def round_ran(self, nodes: int, accepted: int, price: float) -> None:
        """A draft of so many nodes, each at ``price`` a query, stood for ``accepted`` tokens."""
        self._tokens += accepted + 1
        if self.shared:
            self._gained, self._drafts = PATIENCE * self._gained, PATIENCE * self._drafts
            if nodes:
                self._gained += accepted - price * self.node * nodes
                self._drafts += 1
