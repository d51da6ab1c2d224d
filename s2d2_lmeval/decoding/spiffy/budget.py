"""How many states to draft.

A drafted state saves a forward whenever decoding reaches it, and widens the forward that runs it. The calibration
counted how often each state of the graph was reached; the cost of a width is measured. The number never changes the
output.
"""

from __future__ import annotations

import numpy as np

from s2d2_lmeval.decoding.spiffy.graph import DraftGraph, states_at_most
from s2d2_lmeval.decoding.spiffy.states import Eligibility
from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.runtime.costs import CostCurve

PRIOR = 16.0
"""Expected hits after which this run's own hits count as much as the calibration's counts."""


class DraftBudget:
    """States per row and forward: a given number, or, if ``nodes`` is ``auto``, the number with the most steps per
    second.

    Raises:
        ConfigError: ``auto``, and a graph that does not say how often its states occur.
    """

    def __init__(self, graph: DraftGraph, nodes: int | str) -> None:
        self.automatic = nodes == "auto"
        self.most = states_at_most(graph, nodes)
        if self.automatic and not graph.counted:
            raise ConfigError(
                "draft_nodes=auto needs a draft graph with counts, which `s2d2-lmeval calibrate` writes; calibrate "
                "one, or give draft_nodes a number."
            )
        self.costs: CostCurve | None = None
        self.frequency = np.array([node.count / max(node.chances, 1) for node in graph.nodes])
        self.hits = self.expected = 0.0

    def choose(
        self, eligibility: Eligibility, masks: np.ndarray, finishes: np.ndarray, queries: int, widths: tuple[int, int]
    ) -> int:
        """States that each row may draft now; ``queries`` is the forward's width without drafts.

        ``masks`` (rows,) is 0 for rows that draft none; ``finishes`` as for :meth:`Eligibility.drafts`;
        ``widths`` queries of a state that leaves a mask, and of one that does not.
        """
        if self.costs is None or not len(self.frequency):
            return self.most
        inside, finishing = eligibility.drafts(masks, finishes, self.most)
        drafted = inside | finishing
        at = drafted.cumsum(1)[drafted]

        def by_number(values: np.ndarray) -> np.ndarray:
            """Sum of ``values`` (rows, D) over the first 0, 1, …, D drafts of each row."""
            return np.bincount(at, values[drafted], minlength=self.most + 1).cumsum()

        hits = by_number(np.broadcast_to(self.frequency, drafted.shape))
        wider = by_number(np.where(finishing, widths[1], widths[0]))
        stepping = max(int((masks > 0).sum()), 1)
        worth = (stepping + self.confidence * hits) / self.costs(queries + wider)
        chosen = int(worth.argmax())
        self.expected += float(hits[chosen])
        return chosen

    @property
    def confidence(self) -> float:
        """Hits so far over those that the counts let expect, one to begin with."""
        return (PRIOR + self.hits) / (PRIOR + self.expected)

    def learn(self, accepted: int) -> None:
        """So many drafted states were reached."""
        self.hits += accepted
