"""What token follows what, counted in the running text: a term of a token's worth in a draft tree.

A draft gives every position its own distribution, whatever stands before it, so at the second position a tree cannot
know which token belongs to which branch. How often ``b`` followed ``a`` in prompts and answers says something of it:
with weight w the probability of ``b`` after ``a`` is multiplied by (1 + count(a, b) / p(b))^w, p(b) its share of the
text, and all of a position's choices together keep what they have. Counts are kept on the device and only steer what is
drafted.
"""

from __future__ import annotations

import numpy as np
import torch

from s2d2_lmeval.decoding.decoder import DecoderSetup
from s2d2_lmeval.decoding.rounds.trees import Branches
from s2d2_lmeval.decoding.state import SequenceState

SIZE = 2**18
"""Counters of pairs, which share them by a hash."""

SMOOTHING, UNSEEN = 0.5, 500.0
"""Counts that every token is taken to have, and those of all tokens together."""


class Pairs:
    """Counted pairs, with the ``weight`` of the counts. The host passes ``width`` tokens of each row to a step."""

    def __init__(self, setup: DecoderSetup, weight: float, width: int) -> None:
        self.weight, self.width = weight, width
        self.counts = setup.tables.full("pairs", (SIZE,), 0, torch.float32)
        self.tokens = setup.tables.full("tokens", (setup.facts.vocab_size,), 0, torch.float32)
        self.known = np.zeros(setup.slots, dtype=np.int64)
        """How many tokens of each row have been passed on."""

    def fresh(self, rows: SequenceState) -> np.ndarray:
        """(count, width) tokens that are to be counted next, with the one before them; -1 for none."""
        told = np.full((rows.count, self.width), -1, dtype=np.int64)
        for slot in rows.active().tolist():
            start = max(int(self.known[slot]) - 1, 0)
            part = rows.tokens[slot][start : start + self.width]
            told[slot, : len(part)] = part
            self.known[slot] = start + len(part)
        return told

    def read(self, fresh: torch.Tensor) -> None:
        """Count what :meth:`fresh` told."""
        above, token = fresh[:, :-1].clamp_min(0).flatten(), fresh[:, 1:].flatten()
        seen, token = (token >= 0).float(), token.clamp_min(0)
        self.counts.index_add_(0, _counter(above, token), seen)
        self.tokens.index_add_(0, token, seen)

    def branches(self, log_p: torch.Tensor, token: torch.Tensor, root: torch.Tensor) -> Branches:
        """The log-values of choices (R, S, K), and their ``token``, after each choice of the position before and, at
        the first, after ``root`` (R, 1).
        """
        choices = log_p.shape[2]
        above = torch.cat([root.unsqueeze(2).expand(-1, 1, choices), token[:, :-1]], dim=1).unsqueeze(3)
        share = (self.tokens[token] + SMOOTHING) / (self.tokens.sum() + UNSEEN)
        often = (self.counts[_counter(above, token.unsqueeze(2))] / share.unsqueeze(2)).log1p()
        given = log_p.unsqueeze(2) + self.weight * often
        given = given + (log_p.logsumexp(2)[:, :, None, None] - given.logsumexp(3, keepdim=True))
        # Rounded, a mass may exceed 1; but no node is worth more than its parent.
        given = given.nan_to_num(nan=-torch.inf, neginf=-torch.inf).clamp_max(0)
        return Branches(*given.sort(dim=3, descending=True, stable=True))


def _counter(above: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    return (above * 1_000_003 + token * 7919) % SIZE
