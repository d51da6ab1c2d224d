"""Draft trees: their growth from draft distributions, and visibility within a round.

A drafter gives a distribution per future position. A continuation's value is the product of its tokens' probabilities,
so the best tree of N nodes holds the N most probable prefixes (DDTree, arXiv 2604.12989, section 3). The heap that
builds it one node at a time has an exact equivalent in a few top-k calls of fixed shape: the best N of every depth,
then the best N of all. A chain is the tree with one choice per depth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch.nn.functional import pad

from s2d2_lmeval.runtime.graphs import numbers
from s2d2_lmeval.runtime.visibility import NOBODY as UNSEEN
from s2d2_lmeval.runtime.visibility import by_reach

TEXT, NODE, VERIFIER, SEED, WINDOW = range(5)
"""What a query of a round is (:func:`~s2d2_lmeval.decoding.rounds.target.plan_round`)."""

NOBODY = -1
"""What pads."""


@dataclass(frozen=True)
class Tree:
    """Up to N nodes per row (R, N) in descending value, so parents come before children and every prefix is a tree.

    ``token`` ids; ``parent`` 0 for the root, else 1 + the parent's index; ``depth`` from 1; ``value`` the probability
    of the prefix that ends here, 0 where there is no node.
    """

    token: torch.Tensor
    parent: torch.Tensor
    depth: torch.Tensor
    value: torch.Tensor

    @cached_property
    def rooted(self) -> torch.Tensor:
        """(R, N + 1) the values of the root, to which every walk comes, and of the nodes."""
        return pad(self.value, (1, 0), value=1.0)


class Branches(Protocol):
    """What the choices of a position are worth after a node of the position before."""

    def after(self, depth: int, child: torch.Tensor) -> torch.Tensor:
        """Log-values (R, B, K) of the choices of position ``depth`` after each of B nodes, of which ``child`` (R, B)
        says which of the K children of which node they are: that node's place among those that were asked about before,
        times K, and the choice. To be asked depth by depth.
        """


@dataclass(frozen=True)
class PairBranches:
    """Branches that depend on the choice above alone: log-values (R, S, K above, K)."""

    given: torch.Tensor

    def after(self, depth: int, child: torch.Tensor) -> torch.Tensor:
        """As :class:`Branches` says."""
        choices = self.given.shape[3]
        return self.given[:, depth].gather(1, (child % choices).unsqueeze(2).expand(-1, -1, choices))


@dataclass(frozen=True)
class Beams:
    """What the growth of trees of a size has to look at. ``above``, ``choice``, ``child``: of every depth, indices into
    the beam above and into the choices, both best first, whose sums can be among the best: fewer others than there are
    nodes are at least as good in both; and which child that is (:class:`Branches`). ``offsets`` (2, T): of all that is
    kept of every depth, what to add to a node's place in its beam to have that among all after a root, and to a choice
    to have it among those of all positions.
    """

    above: list[torch.Tensor]
    choice: list[torch.Tensor]
    child: list[torch.Tensor]
    offsets: torch.Tensor


def grow(
    log_p: torch.Tensor,
    token: torch.Tensor,
    nodes: int,
    seed_chain: bool = False,
    beams: Beams | None = None,
    branches: Branches | None = None,
) -> Tree:
    """The best ``nodes`` prefixes of each row.

    ``log_p`` and ``token`` (R, S, K) are the K likeliest tokens of each of S future positions, best first; minus
    infinity rules a choice out. With ``seed_chain`` the argmax chain comes first, then the best others.
    ``beams`` are those of :func:`beams_of`. With ``branches`` a token is worth what it is after the one above it.
    """
    rows, depths, choices = log_p.shape
    if beams is None:
        beams = beams_of(depths, choices, nodes, lambda _, index: index.to(log_p.device))
    score, child = log_p.new_zeros(rows, 1), token.new_zeros(rows, 1)
    scores, keys, children = [], [], []
    for depth in range(depths):
        if branches is None:
            candidates = score[:, beams.above[depth]] + log_p[:, depth, beams.choice[depth]]
        else:
            given = branches.after(depth, child)
            candidates = (score.unsqueeze(2) + given).flatten(1)
        key = candidates
        if seed_chain:  # the best child of the first, which is the chain's
            best = torch.zeros_like(child[:, :1]) if branches is None else given[:, 0].argmax(1, keepdim=True)
            key = candidates.scatter(1, best, torch.inf)
        key, index = key.topk(min(nodes, candidates.shape[1]), dim=1)
        score = candidates.gather(1, index) if seed_chain else key
        child = beams.child[depth][index] if branches is None else index
        scores.append(score)
        keys.append(key)
        children.append(child)
    child = torch.cat(children, dim=1)
    parents, picks = child // choices + beams.offsets[0], child % choices + beams.offsets[1]
    # Stable: among equals the shallower comes first, so a parent precedes its child.
    order = torch.cat(keys, dim=1).sort(dim=1, descending=True, stable=True).indices
    kept = order[:, :nodes]
    index_of = order.scatter(1, order, numbers(order.shape[1] + 1, order.device)[1:].expand_as(order))
    index_of = pad(index_of, (1, 0))
    pick = picks.gather(1, kept)
    tables = (
        token.flatten(1).gather(1, pick),
        index_of.gather(1, parents.gather(1, kept)),
        pick // choices + 1,
        torch.cat(scores, dim=1).gather(1, kept).exp(),
    )
    return Tree(*(pad(table, (0, nodes - kept.shape[1])) for table in tables))


def chain(log_p: torch.Tensor, token: torch.Tensor, branches: Branches | None = None) -> Tree:
    """The likeliest choice of each position after that of the position before, from the arguments of :func:`grow`."""
    rows, depths, _ = token.shape
    worth, own = log_p[:, :, 0], torch.zeros_like(token[:, :, 0])
    if branches is not None:
        parts, last = [], own[:, :1]
        for depth in range(depths):
            value, last = branches.after(depth, last).max(2)
            parts.append((value, last))
        worth, own = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    above = numbers(depths, token.device).expand(rows, -1)
    return Tree(token.gather(2, own.unsqueeze(2)).squeeze(2), above, above + 1, worth.cumsum(1).exp())


def beams_of(depths: int, choices: int, nodes: int, put: Callable[[str, torch.Tensor], torch.Tensor]) -> Beams:
    """The beams of trees of at most so many ``nodes``; ``put`` brings them to the device."""
    tables: tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]] = ([], [], [])
    offsets: list[tuple[int, int]] = []
    beam, first = 1, 0
    for depth in range(depths):
        place = np.arange(min(beam, nodes))[:, None]
        pairs = ((place + 1) * (np.arange(min(choices, nodes)) + 1) <= nodes).nonzero()
        for number, indices in enumerate((*pairs, pairs[0] * choices + pairs[1])):
            tables[number].append(put(f"beam.{depth}.{number}", torch.from_numpy(indices)))
        beam, before = min(nodes, len(pairs[0])), first
        first = len(offsets) + 1
        offsets += [(before, depth * choices)] * beam
    return Beams(*tables, put("beam.offsets", torch.tensor(offsets).view(-1, 2).t().contiguous().long()))


def empty(rows: int, nodes: int, device: torch.device, dtype: torch.dtype) -> Tree:
    """Empty trees."""
    zeros = torch.zeros(rows, nodes, dtype=torch.long, device=device)
    return Tree(zeros, zeros, zeros, zeros.to(dtype))


def ancestors(parent: torch.Tensor, depths: int) -> torch.Tensor:
    """Whether node j is node i itself or above it (R, n, n), from the parents (R, n) of nodes after a root at index 0,
    which is above all. Doubling: every step looks twice as far up, to a depth of at least ``depths``.
    """
    nodes = parent.shape[1]
    above = torch.eye(nodes, dtype=torch.bool, device=parent.device).expand(len(parent), -1, -1)
    for _ in range(min(depths, nodes - 1).bit_length()):
        above = above | above.gather(1, parent.unsqueeze(2).expand_as(above))
        parent = parent.gather(1, parent)
    return above


def of_windows(kind: torch.Tensor, seeds: bool) -> torch.Tensor:
    """Which queries belong to windows, from the kind of each; ``seeds``: whether windows begin with one."""
    return (kind == WINDOW) | (kind == SEED) if seeds else kind == WINDOW


def tree_visibility(
    rank: torch.Tensor,
    kind: torch.Tensor,
    owner: torch.Tensor,
    above: torch.Tensor,
    slots: torch.Tensor,
    causal_windows: bool | None = False,
    seeds: bool = False,
) -> torch.Tensor:
    """Visibility of a round, (R, W, W), from the place of each query in the text (``rank``, UNSEEN of others), its kind
    and the node it belongs to, all (R, W). With ``causal_windows`` None there are no windows.

    Text is token-causal and seen by all. A node is seen by what belongs to itself or to a node below it. A verifier is
    seen by itself and by its node's window, a window by itself, or by its later masks only (``causal_windows``). A
    window with a seed (``seeds``) sees that in place of the token that it repeats: its node's or, at the root, the last
    of the text. Row r's tree is that of ``above[slots[r]]``.
    """
    query, key = owner.unsqueeze(2), owner.unsqueeze(1)
    of_query, of_key = kind.unsqueeze(2), kind.unsqueeze(1)
    visible = by_reach(rank, rank.clamp_max(UNSEEN - 1))
    if above.shape[1] > 1:
        visible |= (of_key == NODE) & (of_query != TEXT) & above[slots.view(-1, 1, 1), query, key]
    if causal_windows is None:
        return visible
    own = of_windows(of_query, seeds) & (query == key)
    window = (of_key >= VERIFIER) & own
    if causal_windows:
        place = numbers(kind.shape[1], kind.device)
        window &= place.unsqueeze(1) >= place
    visible |= window
    if seeds:
        last = (kind == TEXT) & (kind.roll(-1, 1) != TEXT)
        visible &= ~(own & (last | (kind == NODE)).unsqueeze(1))
        visible.diagonal(dim1=1, dim2=2).fill_(True)
    return visible
