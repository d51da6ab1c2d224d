"""Draft trees from marginals: which continuations are worth a row.

A drafter gives a distribution per future position. A continuation's value is the product of its tokens' probabilities,
so the best tree of N nodes holds the N most probable prefixes (DDTree, arXiv 2604.12989, section 3). The heap that
builds it one node at a time has an exact equivalent in a few top-k calls of fixed shape: the best N of every depth,
then the best N of all. A chain is the tree with one choice per depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
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


def grow(log_p: torch.Tensor, token: torch.Tensor, nodes: int, seed_chain: bool = False) -> Tree:
    """The best ``nodes`` prefixes of each row.

    ``log_p`` and ``token`` (R, S, K) are the K likeliest tokens of each of S future positions, best first; minus
    infinity rules a choice out. With ``seed_chain`` the arg-max chain comes first, then the best others.
    """
    rows, depths, choices = log_p.shape
    score = log_p.new_zeros(rows, 1)
    scores, keys, parents, picks, offset = [], [], [], [], 0
    for depth in range(depths):
        above, choice = _promising(score.shape[1], choices, nodes, log_p.device)
        candidates = score[:, above] + log_p[:, depth, choice]
        key = candidates.clone()
        if seed_chain:
            key[:, :1] = torch.inf  # the first child of the first, which is the chain's
        key, index = key.topk(min(nodes, candidates.shape[1]), dim=1)
        score = candidates.gather(1, index)
        parents.append(offset + above[index])
        picks.append(depth * choices + choice[index])
        scores.append(score)
        keys.append(key)
        offset = 1 + sum(part.shape[1] for part in scores[:-1])
    # Stable: among equals the shallower comes first, so a parent precedes its child.
    order = torch.cat(keys, dim=1).sort(dim=1, descending=True, stable=True).indices
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
        value=torch.cat(scores, dim=1).gather(1, kept).exp(),
    )
    return Tree(*(pad(table, (0, short)) for table in (tree.token, tree.parent, tree.depth, tree.value)))


@lru_cache(maxsize=256)
def _promising(beam: int, choices: int, nodes: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Places in a beam and among choices, both best first, whose sum can be one of the ``nodes`` best: fewer than so
    many others are at least as good in both.
    """
    place = np.arange(min(beam, nodes))[:, None]
    above, choice = ((place + 1) * (np.arange(min(choices, nodes)) + 1) <= nodes).nonzero()
    return torch.from_numpy(above).to(device), torch.from_numpy(choice).to(device)


def paths(parent: torch.Tensor, nodes: int) -> torch.Tensor:
    """Whether node j is node i itself or above it (R, nodes + 1, nodes + 1), from the parents (R, nodes + 1) of nodes
    behind a root at index 0, which is above all. A few doubling steps on the device: twice as far up in each.
    """
    above = torch.eye(nodes + 1, dtype=torch.bool, device=parent.device).expand(len(parent), -1, -1)
    jump = parent[:, : nodes + 1]
    for _ in range(max(nodes, 1).bit_length()):
        above = above | above.gather(1, jump.unsqueeze(2).expand_as(above))
        jump = jump.gather(1, jump)
    return above


def empty(rows: int, nodes: int, device: torch.device, dtype: torch.dtype) -> Tree:
    """Trees without a node."""
    zeros = torch.zeros(rows, nodes, dtype=torch.long, device=device)
    return Tree(zeros, zeros, zeros, zeros.to(dtype))


def descend(
    follows: torch.Tensor, token: torch.Tensor, parent: torch.Tensor, depth: torch.Tensor, depths: int
) -> torch.Tensor:
    """The nodes (count, 1 + depths) on the way down, the root first; 0 behind the last.

    Tables (count, N + 1) with the root at index 0: ``follows`` what comes behind each node, and the nodes' ``token``,
    ``parent`` and ``depth`` (-1: no node). Children of a node have different tokens, so there is one way at most.
    """
    here = torch.zeros_like(parent[:, :1])
    walking = torch.ones_like(here, dtype=torch.bool)
    path = [here]
    for level in range(1, depths + 1):
        child = walking & (depth == level) & (parent == here) & (token == follows.gather(1, here))
        walking, here = child.any(1, keepdim=True), child.long().argmax(1, keepdim=True)
        path.append(here)
    return torch.cat(path, dim=1)
