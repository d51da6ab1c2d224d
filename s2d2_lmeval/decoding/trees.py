"""Draft trees from marginals: which continuations are worth a row.

A drafter gives a distribution per future position. A continuation's value is the product of its tokens' probabilities,
so the best tree of N nodes holds the N most probable prefixes (DDTree, arXiv 2604.12989, section 3). The heap that
builds it one node at a time has an exact equivalent in a few top-k calls of fixed shape: the best N of every depth,
then the best N of all. A chain is the tree with one choice per depth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad


@dataclass(frozen=True)
class Tree:
    """Up to N nodes per row (R, N) in descending value, so parents come before children and every prefix is a tree.

    ``token`` ids; ``parent`` 0 for the root, else 1 + the parent's place; ``depth`` from 1; ``value`` the probability
    of the prefix that ends here, 0 for a place that holds no node.
    """

    token: torch.Tensor
    parent: torch.Tensor
    depth: torch.Tensor
    value: torch.Tensor


def grow(log_p: torch.Tensor, token: torch.Tensor, nodes: int) -> Tree:
    """The best ``nodes`` prefixes of each row.

    ``log_p`` and ``token`` (R, S, K) are the K likeliest tokens of each of S future positions, best first; minus
    infinity rules a choice out.
    """
    rows, depths, choices = log_p.shape
    score = log_p.new_zeros(rows, 1)
    scores, parents, picks, offset = [], [], [], 0
    for depth in range(depths):
        candidates = (score.unsqueeze(2) + log_p[:, depth].unsqueeze(1)).flatten(1)
        score, index = candidates.topk(min(nodes, candidates.shape[1]), dim=1)
        parents.append(offset + index // choices)
        picks.append(depth * choices + index % choices)
        scores.append(score)
        offset = 1 + sum(part.shape[1] for part in scores[:-1])
    # Stable: among equals the shallower comes first, so a parent precedes its child.
    every, order = torch.cat(scores, dim=1).sort(dim=1, descending=True, stable=True)
    kept = order[:, :nodes]
    place = torch.zeros_like(order).scatter(
        1, order, torch.arange(1, order.shape[1] + 1, device=order.device).expand_as(order)
    )
    place = torch.cat([place.new_zeros(rows, 1), place], dim=1)
    pick = torch.cat(picks, dim=1).gather(1, kept)
    short = nodes - kept.shape[1]
    tree = Tree(
        token=token.flatten(1).gather(1, pick),
        parent=place.gather(1, torch.cat(parents, dim=1).gather(1, kept)),
        depth=pick // choices + 1,
        value=every[:, :nodes].exp(),
    )
    return Tree(*(pad(table, (0, short)) for table in (tree.token, tree.parent, tree.depth, tree.value)))


@dataclass(frozen=True)
class Shape:
    """What of a tree is run: ``nodes`` (R,) its first so many, and ``windows`` (R, N + 1) bool, root first."""

    nodes: torch.Tensor
    windows: torch.Tensor


def shape(tree: Tree, budget: int, window: int, window_value: float) -> Shape:
    """Spend ``budget`` rows per sequence on nodes and on draft windows.

    A node costs its own row and a verifier row, a window ``window`` rows. The walk ends at node n with probability
    value(n) minus the values of its children in the tree; a window there is worth ``window_value`` tokens of the next
    round. Chosen is the number of nodes whose expected accepted tokens plus expected window value is largest.
    """
    rows, most = tree.value.shape
    value = torch.cat([torch.ones_like(tree.value[:, :1]), tree.value], dim=1)
    # children[r, m, i]: summed value of the children of i among the first m nodes
    born = torch.zeros(rows, most, most + 1, dtype=value.dtype, device=value.device)
    born.scatter_(2, tree.parent.unsqueeze(2), tree.value.unsqueeze(2))
    children = torch.cat([torch.zeros_like(born[:, :1]), born.cumsum(1)], dim=1)
    index = torch.arange(most + 1, device=value.device)
    present = index <= index.unsqueeze(1)
    ends = (value.unsqueeze(1) - children).clamp_min(0).masked_fill(~present, -1.0)
    best, order = ends.sort(dim=2, descending=True, stable=True)
    affordable = ((budget - 2 - 2 * index) // window).clamp(min=0)
    counted = torch.minimum(affordable, index + 1)
    won = torch.cat([torch.zeros_like(best[:, :, :1]), best.clamp_min(0).cumsum(2)], dim=2)
    won = won.gather(2, counted.view(1, -1, 1).expand(rows, -1, 1)).squeeze(2)
    worth = value.cumsum(1) + window_value * won
    real = torch.cat([torch.ones_like(tree.value[:, :1], dtype=torch.bool), tree.value > 0], dim=1)
    worth = worth.masked_fill((budget - 2 - 2 * index < 0) | ~real, -torch.inf)
    nodes = worth.argmax(1)
    chosen = nodes.view(-1, 1, 1).expand(rows, 1, most + 1)
    rank = order.gather(1, chosen).squeeze(1).argsort(dim=1)
    windows = rank < counted[nodes].unsqueeze(1)
    return Shape(nodes, windows & (index <= nodes.unsqueeze(1)))


def empty(rows: int, nodes: int, device: torch.device, dtype: torch.dtype) -> Tree:
    """Trees without a node."""
    zeros = torch.zeros(rows, nodes, dtype=torch.long, device=device)
    return Tree(zeros, zeros, zeros, zeros.to(dtype))
