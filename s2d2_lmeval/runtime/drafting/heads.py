"""What a drafter's head says of a token that the drafter's own law does not know: which tokens stand before it.

All published heads have one form: token b after the tokens a1 ... ak of a path gets a bias <said, v[b]>, v being one of
the head's own tables, and differ in what is ``said`` at a place whose hidden state is h:

``vanilla``   w[a], a = ak, the token before (DSpark's Markov head)
``gated``     σ(G [h; w[a]]) ∘ w[a]
``rnn``       tanh(o) with [g, c, o] = J [s; w[a]; h], where a state s' = σ(g) ∘ s + (1 - σ(g)) ∘ tanh(c) goes on
``selector``  w[a] ∘ P h (DFlash 2)
``domino``    SiLU(E [h; s]) with s a GRU over the target's embeddings of a1 ... ak; nothing at the first places

The first two and the selector know one token, the others carry a state along the path. Weights have their published
names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import embedding, linear

MARKOV = ("vanilla", "gated", "rnn")
CHOICES = 16
"""Tokens per place that a draft chooses from where it knows what stands before."""

Said = tuple[torch.Tensor, torch.Tensor | None]
"""What is said (..., rank), and the state (..., any) after it, if the head carries one."""


@dataclass(frozen=True)
class HeadShape:
    """The ``kind`` of a head, the ``rank`` of its tables, and of ``domino`` the size of its ``state`` and the number of
    first places that it leaves as they are (``uncorrected``). ``choices``: tokens per place that it was trained to
    choose from.
    """

    kind: str
    rank: int
    state: int = 0
    uncorrected: int = 0
    choices: int = CHOICES

    def build(self, vocabulary: int, hidden: int, shared: list[Any]) -> Head:
        """The head, for states of size ``hidden``; ``shared`` will hold the target's embedding first."""
        if self.kind == "domino":
            return DominoHead(self, vocabulary, hidden, shared)
        return (CandidateSelector if self.kind == "selector" else MarkovHead)(self, vocabulary, hidden)


class Head(nn.Module, ABC):
    """The common part of all heads."""

    carries = False
    """Whether it has a state."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.shape = shape

    @abstractmethod
    def published(self) -> Mapping[str, nn.Module]:
        """Its parts, by the names that they have within a drafter."""

    @property
    @abstractmethod
    def vectors(self) -> torch.Tensor:
        """v, (vocabulary, rank)."""

    @abstractmethod
    def after(self, above: torch.Tensor, hidden: torch.Tensor, state: torch.Tensor | None, place: int) -> Said:
        """What is said after tokens ``above`` (...), with the ``state`` before them (None: they are the first of their
        paths), at places with states ``hidden`` (..., H), of which ``place`` is the number from 0.
        """

    def forward(
        self,
        above: torch.Tensor,
        token: torch.Tensor,
        hidden: torch.Tensor,
        state: torch.Tensor | None = None,
        place: int = 0,
    ) -> Said:
        """The bias (R, S, A, K) of each ``token`` (R, S, K) after each token ``above`` (R, S, A), in S places with
        states ``hidden`` (R, S, H), ``place`` the first, and the head's state after it; ``state`` (R, S, A, any) is the
        one before.
        """
        said, state = self.after(above, hidden.unsqueeze(2).expand(-1, -1, above.shape[2], -1), state, place)
        return said @ self.vectors[token].transpose(2, 3), state


class MarkovHead(Head):
    """DSpark's."""

    def __init__(self, shape: HeadShape, vocabulary: int, hidden: int) -> None:
        super().__init__(shape)
        rank, self.carries = shape.rank, shape.kind == "rnn"
        self.markov_w1 = nn.Embedding(vocabulary, rank)
        self.markov_w2 = nn.Linear(rank, vocabulary, bias=False)
        if shape.kind == "gated":
            self.gate_proj = nn.Linear(hidden + rank, rank)
        elif shape.kind == "rnn":
            self.joint_proj = nn.Linear(2 * rank + hidden, 3 * rank)

    def published(self) -> Mapping[str, nn.Module]:
        return {"markov_head": self}

    @property
    def vectors(self) -> torch.Tensor:
        return self.markov_w2.weight

    def after(self, above: torch.Tensor, hidden: torch.Tensor, state: torch.Tensor | None, place: int) -> Said:
        known = self.markov_w1(above)
        if self.shape.kind == "gated":
            return torch.sigmoid(self.gate_proj(torch.cat([hidden, known], dim=-1))) * known, None
        if self.shape.kind == "vanilla":
            return known, None
        state = torch.zeros_like(known) if state is None else state
        gate, candidate, said = self.joint_proj(torch.cat([state, known, hidden], dim=-1)).chunk(3, dim=-1)
        return said.tanh(), torch.lerp(candidate.tanh(), state, gate.sigmoid())


class CandidateSelector(Head):
    """DFlash 2's."""

    def __init__(self, shape: HeadShape, vocabulary: int, hidden: int) -> None:
        super().__init__(shape)
        self.predecessor_codebook, self.successor_codebook = (
            nn.Parameter(torch.zeros(vocabulary, shape.rank)) for _ in range(2)
        )
        self.hidden_projection = nn.Linear(hidden, shape.rank, bias=False)

    def published(self) -> Mapping[str, nn.Module]:
        return {"candidate_selector": self}

    @property
    def vectors(self) -> torch.Tensor:
        return self.successor_codebook

    def after(self, above: torch.Tensor, hidden: torch.Tensor, state: torch.Tensor | None, place: int) -> Said:
        return embedding(above, self.predecessor_codebook) * self.hidden_projection(hidden), None


class DominoHead(Head):
    """Domino's (arXiv 2605.29707)."""

    carries = True

    def __init__(self, shape: HeadShape, vocabulary: int, hidden: int, shared: list[Any]) -> None:
        super().__init__(shape)
        self._shared = shared
        self.prefix_gru = nn.GRU(hidden, shape.state, batch_first=True, bias=False)
        self.embed_proj: Any = nn.Sequential(
            nn.Linear(hidden + shape.state, shape.rank, bias=False),
            nn.SiLU(),
            nn.Linear(shape.rank, vocabulary, bias=False),
        )

    def published(self) -> Mapping[str, nn.Module]:
        return {"prefix_gru": self.prefix_gru, "embed_proj": self.embed_proj}

    @property
    def vectors(self) -> torch.Tensor:
        vectors: torch.Tensor = self.embed_proj[2].weight
        return vectors

    def after(self, above: torch.Tensor, hidden: torch.Tensor, state: torch.Tensor | None, place: int) -> Said:
        gru: Any = self.prefix_gru
        read = embedding(above, self._shared[0].weight).to(hidden)
        state = hidden.new_zeros(*above.shape, gru.hidden_size) if state is None else state
        reset, update, new = linear(read, gru.weight_ih_l0).chunk(3, dim=-1)
        of_reset, of_update, of_new = linear(state, gru.weight_hh_l0).chunk(3, dim=-1)
        new = torch.tanh(new + torch.sigmoid(reset + of_reset) * of_new)
        state = torch.lerp(new, state, torch.sigmoid(update + of_update))
        if place < self.shape.uncorrected:
            return hidden.new_zeros(*above.shape, self.shape.rank), state
        return self.embed_proj[:2](torch.cat([hidden, state], dim=-1)), state


class AfterToken:
    """A drafter's ``head``, as decoders ask it about the last draft."""

    def __init__(self, head: Head) -> None:
        self.head = head
        self.choices, self.carries = head.shape.choices, head.carries
        self.drafted = torch.empty(0)
        """Hidden states (M, H) of the wanted queries of the last draft."""

    def __call__(
        self,
        above: torch.Tensor,
        token: torch.Tensor,
        read: torch.Tensor,
        state: torch.Tensor | None = None,
        place: int = 0,
    ) -> Said:
        """As of the head, at the logits ``read`` (R, S) of the last draft."""
        home = self.drafted.device
        bias, state = self.head(above.to(home), token.to(home), self.drafted[read.to(home)], state, place)
        return bias.to(above.device), state
