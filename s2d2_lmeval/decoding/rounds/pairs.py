"""What token follows what, counted in the running text: a term of a token's worth in a draft tree.

A draft gives every position its own distribution, whatever stands before it, so at the second position a tree cannot
know which token belongs to which branch. How often ``b`` followed ``a`` in prompts and answers says something of it:
with weight w the probability of ``b`` after ``a`` is multiplied by (1 + count(a, b) / p(b))^w, p(b) its share of the
text, and all of a position's choices together keep what they have. Counts are kept on the device and only steer what is
drafted.
"""

from __future__ import annotations

import torch

from s2d2_lmeval.decoding.decoder import DecoderSetup

SIZE = 2**18
"""Counters of pairs, which share them by a hash."""

SMOOTHING, UNSEEN = 0.5, 500.0
"""Counts that every token is taken to have, and those of all tokens together."""


class Pairs:
    """Counted pairs, with the ``weight`` of the counts."""

    def __init__(self, setup: DecoderSetup, weight: float) -> None:
        self.weight = weight
        self.counts = setup.tables.full("pairs", (SIZE,), 0, torch.float32)
        self.tokens = setup.tables.full("tokens", (setup.facts.vocab_size,), 0, torch.float32)

    def read(self, fresh: torch.Tensor) -> None:
        """Count the tokens ``fresh`` (count, W) of every row but the first, which stands before them; -1: none."""
        real, fresh = fresh >= 0, fresh.clamp_min(0)
        seen, above, token = (real[:, :-1] & real[:, 1:]).float().flatten(), fresh[:, :-1], fresh[:, 1:]
        self.counts.index_add_(0, _counter(above, token).flatten(), seen)
        self.tokens.index_add_(0, token.flatten(), seen)

    def term(self, above: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """What the counts add to the log-values of choices ``token`` (R, S, K) after each of those ``above`` (R, S, K
        above): (R, S, K above, K).
        """
        share = (self.tokens[token] + SMOOTHING) / (self.tokens.sum() + UNSEEN)
        counted = self.counts[_counter(above.unsqueeze(3), token.unsqueeze(2))]
        return self.weight * (counted / share.unsqueeze(2)).log1p()


def _counter(above: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    return torch.add(above * 1_000_003, token, alpha=7919) & (SIZE - 1)
