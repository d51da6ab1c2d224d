"""Visibility among the queries of a pass.

Every attention pattern of block diffusion is one comparison: a key has a *rank*, a query has a *reach*, and a query
sees the keys whose rank does not exceed its reach, and itself.

=====================  ==============================  =========================================
queries                rank as a key                   reach as a query
=====================  ==============================  =========================================
token-causal           its position                    its position
block-causal           its position                    last position of its block
draft                  its position                    last position of its block
verifier, first half   its position                    its position
verifier, mask i       :data:`NOBODY`                  the position before i
=====================  ==============================  =========================================
"""

from __future__ import annotations

import numpy as np
import torch

NOBODY = int(np.iinfo(np.int32).max)
"""Rank of a key that only its own query sees."""

NOTHING = -1
"""Reach of a query that sees only itself among the queries."""


def block_end(positions: np.ndarray, block_length: int) -> np.ndarray:
    """Last position of the block (aligned to position 0) that holds each of ``positions``."""
    return (positions // block_length + 1) * block_length - 1


def by_reach(rank: torch.Tensor, reach: torch.Tensor) -> torch.Tensor:
    """Visibility (R, W, W) from ranks (R, W) and reaches (R, W)."""
    visible = rank.unsqueeze(1) <= reach.unsqueeze(2)
    visible.diagonal(dim1=1, dim2=2).fill_(True)
    return visible


def with_group(visible: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """``visible`` (R, W, W) where besides all queries of one positive ``group`` (R, W) see each other."""
    grouped = group.unsqueeze(2)
    return visible | ((grouped > 0) & (grouped == group.unsqueeze(1)))


def in_branches(visible: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """``visible`` (R, W, W) without the queries of other branches: those of a positive ``branch`` (R, W) are seen by
    their own branch only.
    """
    own = branch.unsqueeze(1)
    return visible & ((own == 0) | (own == branch.unsqueeze(2)))
