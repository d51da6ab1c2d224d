"""Drafts at random places of texts, as a decoder sees them: which token each mask guesses, and what it sees.

A draft starts at a token of an answer. Its masks guess the tokens after that one, and it sees its text up to there, and
itself: all of it, or what comes before. In an adapter's window the token is not known; its first mask stands in the
token's place. A drafter's block begins with the token, and its masks stand where the guessed tokens will.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch

from s2d2_lmeval.training.data import Text


@dataclass(frozen=True)
class Windows:
    """``K`` drafts of ``W`` masks in texts of ``L`` tokens in a row.

    Attributes:
        tokens, positions, text: (L,) token ids, positions in their text, and which text.
        starts: (K,) index of the token where a draft starts.
        masks: W.
        known: (K, W) whether the text has the token that a mask guesses.
        truth: (K, W) that token, where it is known.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    text: torch.Tensor
    starts: torch.Tensor
    masks: int
    known: torch.Tensor
    truth: torch.Tensor

    @property
    def teachers(self) -> torch.Tensor:
        """(K * W,) index of the token after which a shifted target says what each mask guesses, at most the last."""
        index = self.starts.unsqueeze(1) + torch.arange(self.masks, device=self.starts.device)
        return index.clamp(max=len(self.tokens) - 1).flatten()

    def places(self, width: int) -> torch.Tensor:
        """(K * width,) of each of the first ``width`` queries of every draft."""
        return torch.arange(width, device=self.starts.device).repeat(len(self.starts))

    def positions_of(self, width: int) -> torch.Tensor:
        """(K * width,) their positions in their text."""
        return self.positions[self.starts].repeat_interleave(width) + self.places(width)

    def clean_sight(self) -> torch.Tensor:
        """(L, L) what tokens see: their text up to themselves."""
        return (self.text.unsqueeze(1) == self.text).tril()

    def sight(self, width: int, causal: bool = False) -> torch.Tensor:
        """(K * width, L + K * width) what they see of the texts and of each other."""
        start = self.starts.repeat_interleave(width).unsqueeze(1)
        index = torch.arange(len(self.tokens), device=start.device)
        clean = (index < start) & (self.text[start] == self.text)
        draft = torch.arange(len(self.starts), device=start.device).repeat_interleave(width)
        own = draft.unsqueeze(1) == draft
        return torch.cat([clean, own.tril() if causal else own], dim=1)


def draw(texts: Sequence[Text], masks: int, per_text: int, rng: Random, device: torch.device | str) -> Windows:
    """Up to ``per_text`` drafts of ``masks`` masks in each of ``texts``, at random places of its answer."""
    tokens: list[int] = []
    positions: list[int] = []
    owner, starts, ends = [], [], []
    for number, text in enumerate(texts):
        first, ids = len(tokens), [*text.prompt, *text.answer]
        places = range(max(len(text.prompt), 1), len(ids) - 1)
        chosen = sorted(rng.sample(places, min(per_text, len(places))))
        starts += [first + place for place in chosen]
        ends += [first + len(ids)] * len(chosen)
        tokens += ids
        positions += range(len(ids))
        owner += [number] * len(ids)
    held = torch.tensor(tokens, device=device)
    target = torch.tensor(starts, device=device).unsqueeze(1) + 1 + torch.arange(masks, device=device)
    known = target < torch.tensor(ends, device=device).unsqueeze(1)
    return Windows(
        tokens=held,
        positions=torch.tensor(positions, device=device),
        text=torch.tensor(owner, device=device),
        starts=torch.tensor(starts, device=device),
        masks=masks,
        known=known,
        truth=held[target.clamp(max=len(tokens) - 1)],
    )
