"""Draft trees: their growth from draft distributions, and visibility within a round.

A drafter gives a distribution per future position. A continuation's value is the product of its tokens' probabilities,
so the best tree of N nodes holds the N most probable prefixes (DDTree, arXiv 2604.12989, section 3). The heap that
builds it one node at a time has an exact equivalent in a few top-k calls of fixed shape: the best N of every depth,
then the best N of all. A chain is the tree with one choice per depth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch.nn.functional import pad

TEXT, NODE, VERIFIER, SEED, WINDOW, NOBODY = range(6)
"""What a query of a round is (:func:`~s2d2_lmeval.decoding.rounds.target.plan_round`); NOBODY pads."""


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


class Branches(Protocol):
    """What the choices of a position are worth after a node of the position before."""

    def after(self, depth: int, own: torch.Tensor, above: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-values and choices (R, B, K) of position ``depth``, best first, after each of B nodes: its choice of the
        position before is ``own`` (R, B), and its parent that of ``above`` (R, B) among the nodes that were asked about
        before. To be asked depth by depth.
        """


@dataclass(frozen=True)
class PairBranches:
    """Branches that depend on the choice above alone: log-values and choices (R, S, K above, K), best first."""

    log_p: torch.Tensor
    choice: torch.Tensor

    def after(self, depth: int, own: torch.Tensor, above: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As :class:`Branches` says."""
        at = own.unsqueeze(2).expand(-1, -1, self.log_p.shape[3])
        return self.log_p[:, depth].gather(1, at), self.choice[:, depth].gather(1, at)


def grow(
    log_p: torch.Tensor,
    token: torch.Tensor,
    nodes: int,
    seed_chain: bool = False,
    beams: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
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
    score, own = log_p.new_zeros(rows, 1), token.new_zeros(rows, 1)
    origin = own
    scores, keys, parents, picks, offset = [], [], [], [], 0
    for depth in range(depths):
        above, choice = beams[depth]
        if branches is None:
            worth, picked = log_p[:, depth, choice], choice.expand(rows, -1)
        else:
            worth, picked = (table[:, above, choice] for table in branches.after(depth, own, origin))
        candidates = score[:, above] + worth
        key = candidates.clone()
        if seed_chain:
            key[:, :1] = torch.inf  # the first child of the first, which is the chain's
        key, index = key.topk(min(nodes, candidates.shape[1]), dim=1)
        score, own, origin = candidates.gather(1, index), picked.gather(1, index), above[index]
        parents.append(offset + origin)
        picks.append(depth * choices + own)
        scores.append(score)
        keys.append(key)
        offset = 1 + sum(part.shape[1] for part in scores[:-1])
    # Stable: among equals the shallower comes first, so a parent precedes its child.
    order = torch.cat(keys, dim=1).sort(dim=1, descending=True, stable=True).indices
    kept = order[:, :nodes]
    index_of = torch.zeros_like(order).scatter(
        1, order, torch.arange(1, order.shape[1] + 1, device=order.device).expand_as(order)
    )
    index_of = torch.cat([index_of.new_zeros(rows, 1), index_of], dim=1)
    pick = torch.cat(picks, dim=1).gather(1, kept)
    tables = (
        token.flatten(1).gather(1, pick),
        index_of.gather(1, torch.cat(parents, dim=1).gather(1, kept)),
        pick // choices + 1,
        torch.cat(scores, dim=1).gather(1, kept).exp(),
    )
    return Tree(*(pad(table, (0, nodes - kept.shape[1])) for table in tables))


def chain(log_p: torch.Tensor, token: torch.Tensor, branches: Branches | None = None) -> Tree:
    """The likeliest choice of each position after that of the position before, from the arguments of :func:`grow`."""
    rows, depths, _ = token.shape
    worth, own = log_p[:, :, 0], torch.zeros_like(token[:, :, 0])
    if branches is not None:
        parts, first = [], own[:, :1]
        last = first
        for depth in range(depths):
            value, last = (table[:, 0, :1] for table in branches.after(depth, last, first))
            parts.append((value, last))
        worth, own = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    above = torch.arange(depths, device=token.device).expand(rows, -1)
    return Tree(token.gather(2, own.unsqueeze(2)).squeeze(2), above, above + 1, worth.cumsum(1).exp())


def beams_of(
    depths: int, choices: int, nodes: int, put: Callable[[str, torch.Tensor], torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of every depth, indices into the beam above and into the choices, both best first, whose sums can be among the
    ``nodes`` best: fewer than ``nodes`` others are at least as good in both. ``put`` brings them to the device.
    """
    found, beam = [], 1
    for depth in range(depths):
        place = np.arange(min(beam, nodes))[:, None]
        pairs = ((place + 1) * (np.arange(min(choices, nodes)) + 1) <= nodes).nonzero()
        above, choice = (put(f"beam.{depth}.{side}", torch.from_numpy(one)) for side, one in enumerate(pairs))
        found.append((above, choice))
        beam = min(nodes, len(above))
    return found


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
    kind: torch.Tensor,
    owner: torch.Tensor,
    above: torch.Tensor,
    slots: torch.Tensor,
    causal_windows: bool = False,
    seeds: bool = False,
) -> torch.Tensor:
    """Visibility of a round, (R, W, W), from the kind of each query and the node it belongs to, (R, W).

    Text is token-causal and seen by all. A node is seen by what belongs to itself or to a node below it. A verifier is
    seen by itself and by its node's window, a window by itself, or by its later masks only (``causal_windows``). A
    window with a seed (``seeds``) sees that in place of the token that it repeats: its node's or, at the root, the last
    of the text. Row r's tree is that of ``above[slots[r]]``.
    """
    query, key = owner.unsqueeze(2), owner.unsqueeze(1)
    of_query, of_key = kind.unsqueeze(2), kind.unsqueeze(1)
    place = torch.arange(kind.shape[1], device=kind.device)
    earlier = place.unsqueeze(1) >= place
    text = (of_key == TEXT) & ((of_query != TEXT) | earlier)
    own = of_windows(of_query, seeds) & (query == key)
    window = (of_key >= VERIFIER) & (of_key < NOBODY) & own
    if causal_windows:
        window &= earlier
    visible = text | window
    if above.shape[1] > 1:
        visible |= (of_key == NODE) & (of_query != TEXT) & above[slots.view(-1, 1, 1), query, key]
    if seeds:
        last = (kind == TEXT) & (kind.roll(-1, 1) != TEXT)
        visible &= ~(own & (last | (kind == NODE)).unsqueeze(1))
    visible.diagonal(dim1=1, dim2=2).fill_(True)
    return visible
