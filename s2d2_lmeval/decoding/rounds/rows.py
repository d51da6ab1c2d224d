"""The state of the rows in flight of decoders that go in rounds."""

from __future__ import annotations

import numpy as np
import torch

from s2d2_lmeval.decoding.decoder import DecoderSetup
from s2d2_lmeval.decoding.generation import Request
from s2d2_lmeval.decoding.rounds import trees
from s2d2_lmeval.decoding.rounds.lookup import Draft
from s2d2_lmeval.decoding.state import SequenceState
from s2d2_lmeval.runtime.shapes import power


class RoundRows(SequenceState):
    """Sequences in flight and, on the device, the tree that each runs next: ``token``, ``parent`` and ``depth``
    (-1: no node) (count, N + 1), the root at index 0, and ``holder``, the nodes with a draft window, in rising order.
    """

    def __init__(self, setup: DecoderSetup, nodes: int) -> None:
        super().__init__(setup.slots)
        self.prefix_grain = 1
        self.length = setup.longest
        self.device = setup.device
        self._tables = setup.tables
        self.limit = np.zeros(self.count, dtype=np.int64)
        """Maximum length of the sequence."""
        self.round = np.zeros(self.count, dtype=np.int64)
        """Rounds run so far."""
        self.nodes, self.windows = np.zeros((2, self.count), dtype=np.int64)
        """How many nodes and draft windows run: the first ones of the tables."""
        self.most_nodes = nodes
        """Nodes that a tree has room for."""
        self.written: dict[int, Draft] = {}
        """Slot -> the tree that it runs next, where the host drafted it."""

    def room_for(self, nodes: int) -> int:
        """Nodes, root included, that a step looks at to see these: few different numbers where steps are captured."""
        return min(power(nodes), self.most_nodes + 1) if self._tables.keep else nodes

    def make_room(self) -> None:
        """Allocate the tables for :attr:`most_nodes`, before the first request."""
        shape = (4, self.count, self.most_nodes + 1)
        self.token, self.parent, self.depth, self.holder = self._tables.full("tree", shape)

    def admit(self, slot: int, request: Request) -> None:
        """Take a request: its first round has no draft, but a window at the root."""
        super().admit(slot, request)
        self.tokens[slot] = list(request.prompt)
        self.limit[slot] = len(request.prompt) + request.max_new_tokens
        self.nodes[slot], self.windows[slot], self.round[slot] = 0, 1, 0

    def told(self) -> dict[str, np.ndarray]:
        """What the device is told of every row before each round: ``limit``, ``key`` and ``round`` (count,), and
        ``written`` (4, count, n), the trees of :attr:`written` as in the tables and whether there is one; n is 0
        without any.
        """
        nodes = max((len(draft.token) for draft in self.written.values()), default=-1) + 1
        written = np.zeros((4, self.count, self.room_for(nodes) if nodes else 0), dtype=np.int64)
        for slot, draft in self.written.items():
            written[:3, slot, 1 : len(draft.token) + 1] = draft.token, draft.parent, draft.depth
            written[3, slot] = 1
        return {"limit": self.limit, "key": self.key, "round": self.round, "written": written}

    def lengths(self) -> np.ndarray:
        """(count,) tokens of every sequence, prompt included."""
        return np.array(list(map(len, self.tokens)))

    def plant(self, slots: torch.Tensor | slice, tree: trees.Tree) -> None:
        """Run ``tree`` (R, N) in the rows ``slots`` (R,) next."""
        self.token[slots, 1:], self.parent[slots, 1:] = tree.token, tree.parent
        self.depth[slots, 1:] = torch.where(tree.value > 0, tree.depth, -1)
