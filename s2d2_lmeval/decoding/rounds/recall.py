"""What followed the end of the text before: one more choice at every future position of a draft tree.

The last tokens are looked up in prompt and answer, and in other texts of the run (prompt lookup). What followed them
there, c1 c2 ..., competes with the drafter: after c1 ... c(t-1) the next token is c(t) with probability w, else as the
drafter says. w is learned: how often c(t) was right where it was not the drafter's own first choice, for every length
of the match and every confidence of the drafter. So it costs nothing where the drafter is sure, or text does not
repeat. Text, n-grams and w are kept on the device, have fixed shapes, and only steer what is drafted.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from s2d2_lmeval.decoding.decoder import DecoderSetup
from s2d2_lmeval.runtime.graphs import numbers

SIZE = 2**20
"""Places of n-grams, which share them by a hash: a match is compared with the text."""

KEPT = 2**12
"""Tokens of each row's latest texts."""

GRAM, LONGEST = 4, 8
"""Tokens of the longest n-gram, and the longest match that is told from shorter ones."""

BUCKETS = 5
"""Of the drafter's confidence: no draft at all, and its quarters."""

NO_CELL = (LONGEST + 1) * BUCKETS
"""Cells of trust are those of every length and bucket, and one for what was the drafter's choice anyway."""

NOTHING = -2
"""What is before the beginning of a text's end; memory that is empty holds -1."""

PRIOR = 4.0
"""Tries that a match is taken to have had, of which as many succeeded as the drafter's doubt of its first choice."""

PLACES, MOST_READ = 2**28, 2**10
"""More than there are tokens in memory: above it an n-gram's entry says when it was written, so the newest wins. And
more than there are tokens of a row in a step.
"""

FACTOR, FACTOR_OF_ROW = 2_862_933_555_777_941_757, 6_364_136_223_846_793_005
"""Of the hash of an n-gram, modulo 2^64."""


class Recall:
    """Looks up the ends of texts. Matches in a row's own text come before those in others as long."""

    def __init__(self, setup: DecoderSetup, depths: int) -> None:
        def table(name: str, shape: tuple[int, ...], value: float, dtype: torch.dtype = torch.long) -> torch.Tensor:
            return setup.tables.full(f"recall.{name}", shape, value, dtype)

        self.text = table("text", (setup.slots, KEPT + 1), -1)
        """The latest tokens of every row, in a ring; the last column takes what is not there."""
        self.end = table("end", (setup.slots, 1), 0)
        """How many tokens each row has been told."""
        self.place = table("place", (SIZE,), 0)
        """Where an n-gram was last followed by a token, as a place in the flat text, and when."""
        self.steps = table("steps", (1,), 0)
        of_token = torch.tensor([pow(FACTOR, power, 2**62) for power in reversed(range(GRAM))]) * FACTOR
        self.factors = setup.tables.put("recall.factors", of_token.repeat(GRAM, 1).triu())
        """(GRAM, GRAM) of the tokens in each end of an n-gram, the longest first."""
        of_rows = torch.stack([(torch.arange(setup.slots) + 1) * FACTOR_OF_ROW, torch.zeros(setup.slots).long()], dim=1)
        self.of_row = setup.tables.put("recall.rows", of_rows * FACTOR)
        """What tells the n-grams of each row's own text from all."""
        self.quarters = setup.tables.put("recall.quarters", torch.tensor([1e-37, 0.25, 0.5, 0.75]))
        self.right, self.tried = (table(name, (NO_CELL + 1,), 0, torch.float32) for name in ("hits", "tries"))
        self.said = table("said", (setup.slots, depths), -1)
        """What each row's text goes on with, if it goes on as before; -1: nothing is known."""
        self.cell = table("cell", (setup.slots, depths), NO_CELL)
        """How far each of these was trusted; the last cell is for those that were the drafter's choice anyway."""

    def read(self, told: torch.Tensor) -> None:
        """Remember the tokens ``told`` (count, GRAM + W) of every row; the first GRAM stand before. -1: none."""
        fresh = told[:, GRAM:]
        real, rows, ahead = fresh >= 0, *(numbers(size, fresh.device) for size in fresh.shape)
        place = (self.end + ahead) % KEPT
        self.text.scatter_(1, place.where(real, KEPT), fresh)
        when = torch.add(ahead, self.steps, alpha=MOST_READ)
        entry = torch.add(torch.add(place, rows.unsqueeze(1), alpha=KEPT + 1), when, alpha=PLACES) * real
        key, known = self._keys(told.unfold(1, GRAM, 1)[:, :-1], self.of_row.unsqueeze(1))
        self.place.scatter_reduce_(0, key.flatten(), (entry[:, :, None, None] * known).flatten(), "amax")
        self.end += real.sum(1, keepdim=True)
        self.steps += 1

    def follow(self, tail: torch.Tensor, slots: torch.Tensor, depths: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What followed the longest known end of the ``tail`` (R, LONGEST) of the texts in ``slots`` (R,), and the
        length of the match, both (R, depths); -1 where nothing is known.
        """
        key, known = self._keys(tail[:, -GRAM:], self.of_row[slots])
        found = (self.place[key] * known % PLACES).flatten(1)
        row, place = found // (KEPT + 1), found % (KEPT + 1)
        back = (place.unsqueeze(2) - numbers(LONGEST + 1, place.device)[1:]) % KEPT
        ends = tail.flip(1).unsqueeze(1)
        length, best = (self.text[row.unsqueeze(2), back] == ends).long().cumprod(2).sum(2).max(1, keepdim=True)
        row, place = row.gather(1, best), place.gather(1, best)
        ahead = numbers(depths, place.device)
        said = self.text[row, (place + ahead) % KEPT]
        there = (length > 0) & (ahead < (self.end[row.squeeze(1)] - place) % KEPT)
        return said.where(there, -1), (length + ahead).clamp_max(LONGEST)

    def choose(
        self, log_p: torch.Tensor, token: torch.Tensor, said: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Choices (R, S, K) with what is ``said`` (R, S) among them, if need be as the last one, and which it is."""
        is_it = token == said.unsqueeze(2)
        last = ~is_it.any(2) & (said >= 0)
        token = torch.cat([token[:, :, :-1], said.where(last, token[:, :, -1]).unsqueeze(2)], dim=2)
        worth = log_p[:, :, -1].masked_fill(last, -torch.inf).unsqueeze(2)
        which = is_it.long().argmax(2).masked_fill(last, token.shape[2] - 1)
        return torch.cat([log_p[:, :, :-1], worth], dim=2), token, which

    def mix(
        self, given: torch.Tensor, said: torch.Tensor, which: torch.Tensor, length: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        """The log-values of choices after each choice above, ``given`` (R, S, K above, K), with the trust in what is
        ``said`` (R, S), which is the choice ``which`` (R, S), after a match of so much ``length`` (R, S).
        """
        depths, choices = which.shape[1], given.shape[3]
        above = pad(which[:, :-1], (1, 0))
        above = above.view(*above.shape, 1, 1).expand(-1, -1, 1, choices)
        after = given.gather(2, above).squeeze(2)
        top, first = after.max(2)
        sure = top.exp()
        bucket = torch.bucketize(sure, self.quarters.to(sure), right=True)
        new = (said >= 0) & ((first != which) | (bucket == 0))
        cell = torch.add(bucket, length, alpha=BUCKETS).where(new, NO_CELL)
        trust = (self.right[cell] + 1 - sure.clamp_max(1)) / (self.tried[cell] + PRIOR) * new
        self.said[slots, :depths], self.cell[slots, :depths] = said, cell
        after = after + (-trust).log1p().unsqueeze(2)
        at = which.unsqueeze(2)
        after = after.scatter(2, at, torch.logaddexp(after.gather(2, at), trust.log().unsqueeze(2)))
        return given.scatter(2, above, after.unsqueeze(2))

    def learn(self, decided: torch.Tensor, count: torch.Tensor, running: torch.Tensor) -> None:
        """The ``running`` rows (count, 1) have decided the first ``count`` (count, 1) of the tokens ``decided``."""
        width = min(self.said.shape[1], decided.shape[1])
        said, cell = self.said[:, :width], self.cell[:, :width]
        right = said == decided[:, :width]
        as_said = pad(right[:, :-1].long(), (1, 0), value=1).cumprod(1).bool()
        tried = as_said & (said >= 0) & (numbers(width, count.device) < count) & running
        self.tried.index_add_(0, cell.flatten(), tried.flatten().float())
        self.right.index_add_(0, cell.flatten(), (tried & right).flatten().float())
        self.said.masked_fill_(running, -1)

    def _keys(self, grams: torch.Tensor, of_row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Places (..., GRAM, 2) of the ends of ``grams`` (..., GRAM), the longest first, in the text of rows that are
        told apart by ``of_row`` (..., 2), and in all; and which of them there are (..., GRAM, 2).
        """
        ends = ((grams + 2).unsqueeze(-2) * self.factors).sum(-1)
        key = ends.unsqueeze(-1) + of_row.unsqueeze(-2)
        return (key >> 24) & (SIZE - 1), (grams >= 0).unsqueeze(-1).expand_as(key)
