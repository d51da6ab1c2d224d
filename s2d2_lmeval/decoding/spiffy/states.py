"""Choose the draft states of a block from a draft graph and the latest distribution.

The host decides how many states a row may draft, from its number of masks alone. The device chooses them
(the most probable ones) and fills in their tokens. Nothing here synchronizes with the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from s2d2_lmeval.decoding.decoder import DecoderSetup
from s2d2_lmeval.decoding.spiffy.graph import DraftGraph
from s2d2_lmeval.runtime.graphs import Tables, numbers


@dataclass
class RankTables:
    """The latest distribution of every row, in the order in which states are named.

    ``places`` (rows, B) the block's places, first the one that would be decided first; ``tokens`` (rows, B, K) of each
    place, the most probable first; ``log_p`` (rows, B, K) of these.
    """

    places: torch.Tensor
    tokens: torch.Tensor
    log_p: torch.Tensor

    @classmethod
    def empty(cls, rows: int, length: int, width: int, setup: DecoderSetup) -> RankTables:
        """Before the first distribution."""
        tables, shape = setup.tables, (rows, length, width)
        places = tables.put("ranked.places", torch.arange(length).repeat(rows, 1))
        return cls(places, tables.full("ranked.tokens", shape), tables.full("ranked.log_p", shape, 0, setup.dtype))


class Eligibility:
    """Which nodes a block of so many masks may draft: known on the host.

    ``inside`` and ``finishing`` (B + 1, D) by number of masks: those that leave a mask, and those that leave none.
    Where a block without masks is not over (``revises``), all leave something to do.
    """

    def __init__(self, graph: DraftGraph, block_length: int, revises: bool) -> None:
        reach = np.array([node.reach for node in graph.nodes], dtype=np.int64)
        size = np.array([len(node.pairs) for node in graph.nodes], dtype=np.int64)
        masks = np.arange(block_length + 1)[:, None]
        self.finishing = (reach <= masks) & (size == masks) & (not revises)
        self.inside = (reach <= masks) & ~self.finishing

    def drafts(self, masks: np.ndarray, finishes: np.ndarray, most: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        """(R, D) which nodes rows with so many ``masks`` (R,) draft, the first ``most`` of those that can be.

        States that leave no mask only where ``finishes`` (R,). Returns these that leave a mask, and those that do not.
        """
        inside, finishing = self.inside[masks], self.finishing[masks] & finishes[:, None]
        eligible = inside | finishing
        taken = eligible & (eligible.cumsum(1) <= np.asarray(most).reshape(-1, 1))
        return inside & taken, finishing & taken


class StateDrafter:
    """Fills in the nodes of a graph with the places and tokens of the latest distribution.

    ``graph`` has D nodes of up to P pairs; ``revises`` as for :class:`Eligibility`. Scores are those of the paper's
    run-time pruning: a node's own score is the geometric mean of the probabilities of its tokens, its score the
    geometric mean of that and of its best child's.
    """

    def __init__(self, graph: DraftGraph, block_length: int, revises: bool, tables: Tables) -> None:
        self.revises = revises

        def put(name: str, values: np.ndarray) -> torch.Tensor:
            return tables.put(f"graph.{name}", torch.from_numpy(values))

        count = len(graph.nodes)
        widest = max((len(node.pairs) for node in graph.nodes), default=0)
        place, token = np.full((2, count, widest), -1, dtype=np.int64)
        for number, node in enumerate(graph.nodes):
            place[number, : len(node.pairs)], token[number, : len(node.pairs)] = np.array(node.pairs).T
        above = np.zeros((count, count + 1), dtype=bool)
        for number, node in enumerate(graph.nodes):
            above[number, list(node.parents)] = True
        used = place >= 0
        self.widest = widest
        self.vocabulary_ranks = int(token.max(initial=0)) + 1
        self.used = put("used", used)
        # Nodes with ranks beyond the block are never eligible.
        self.place = put("place", place.clip(0, block_length - 1))
        self.token = put("token", token.clip(0))
        self.size = put("size", used.sum(1))
        self.reach = put("reach", place.max(1, initial=-1) + 1)
        self.has_parent = put("has_parent", above)
        self.tiers = [
            put(f"tier.{size}", np.flatnonzero(used.sum(1) == size)) for size in np.unique(used.sum(1)).tolist()
        ]

    def draft(
        self,
        block: torch.Tensor,
        masks: torch.Tensor,
        tables: RankTables,
        inside: torch.Tensor,
        finishing: torch.Tensor,
    ) -> torch.Tensor:
        """States (rows, D, B) that may follow ``block`` (rows, B) with these ``masks`` (rows, B).

        First the best ``inside`` (rows,) that leave a mask, then the best ``finishing`` (rows,) that leave none; what
        comes after these means nothing.
        """
        rows, length = block.shape
        places = tables.places[:, self.place]  # (rows, D, P)
        row = numbers(rows, block.device).view(-1, 1, 1)
        tokens = tables.tokens[row, places, self.token]
        log_p = tables.log_p[row, places, self.token].masked_fill(~self.used, 0)
        left = masks.sum(-1, keepdim=True)
        eligible = (self.reach <= left) & (self.size <= left)
        score = self._closed(self._scores(log_p.sum(-1) / self.size, eligible))
        unfinished = (self.size < left) | self.revises
        order = [
            score.masked_fill(~(eligible & which), -torch.inf).argsort(dim=-1, descending=True, stable=True)
            for which in (unfinished, ~unfinished)
        ]
        number = numbers(score.shape[1], block.device).expand_as(score)
        after = (number - inside.unsqueeze(1)).clamp_min(0)
        node = torch.where(number < inside.unsqueeze(1), order[0], order[1].gather(1, after))
        chosen = node.unsqueeze(-1).expand(-1, -1, places.shape[-1])
        # Unused pairs write past the block.
        target = places.masked_fill(~self.used, length).gather(1, chosen)
        states = block.new_zeros(rows, score.shape[1], length + 1)
        states[..., :length] = block.unsqueeze(1)
        return states.scatter(2, target, tokens.gather(1, chosen))[..., :length]

    def _scores(self, own: torch.Tensor, eligible: torch.Tensor) -> torch.Tensor:
        """Log scores (rows, D) from the nodes' ``own`` (rows, D): children, which hold more pairs, come first."""
        score = own
        for tier in reversed(self.tiers):
            children = self.has_parent[:, tier + 1].T & eligible.unsqueeze(1)  # (rows, tier, D)
            best = score.unsqueeze(1).masked_fill(~children, -torch.inf).amax(-1)
            blended = torch.where(best.isinf(), own[:, tier], (own[:, tier] + best) / 2)
            score = score.index_copy(1, tier, blended)
        return score

    def _closed(self, score: torch.Tensor) -> torch.Tensor:
        """``score`` (rows, D), none above the best of its parents: the best n nodes are then connected."""
        score = torch.cat([torch.full_like(score[:, :1], torch.inf), score], dim=1)  # the root is always there
        for tier in self.tiers:
            above = score.unsqueeze(1).masked_fill(~self.has_parent[tier], -torch.inf).amax(-1)
            score = score.index_copy(1, tier + 1, torch.minimum(score[:, tier + 1], above))
        return score[:, 1:]
