"""Draft windows at random places of texts, as a decoder sees them: which token each mask guesses, and what it sees.

A window begins after an anchor, the last known token. Its first mask stands where the next token will stand, which is
not known either, and guesses the token after that; the mask at place j guesses the token j + 2 after the anchor. A mask
sees its text up to the anchor, and its own window: all of it, or what comes before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch

from s2d2_lmeval.training.data import Text


@dataclass(frozen=True)
class Windows:
    """``K`` windows of ``W`` masks in texts of ``L`` tokens in a row.

    Attributes:
        tokens, positions, text: (L,) token ids, positions in their text, and which text.
        anchors: (K,) index of the last known token.
        masks: W.
        known: (K, W) whether the text has the token that a mask guesses.
        truth: (K, W) that token, where it is known.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    text: torch.Tensor
    anchors: torch.Tensor
    masks: int
    known: torch.Tensor
    truth: torch.Tensor

    @property
    def ahead(self) -> torch.Tensor:
        """(K * W,) index of the place where each mask stands, at most the last one of all texts."""
        place = self.anchors.unsqueeze(1) + 1 + torch.arange(self.masks, device=self.anchors.device)
        return place.clamp(max=len(self.tokens) - 1).flatten()

    @property
    def place(self) -> torch.Tensor:
        """(K * W,) of each mask in its window."""
        return torch.arange(self.masks, device=self.anchors.device).repeat(len(self.anchors))

    @property
    def mask_positions(self) -> torch.Tensor:
        """(K * W,) position of each mask in its text."""
        return self.positions[self.anchors].repeat_interleave(self.masks) + 1 + self.place

    def clean_sight(self) -> torch.Tensor:
        """(L, L) what tokens see: their text up to themselves."""
        return (self.text.unsqueeze(1) == self.text).tril()

    def sight(self, causal: bool) -> torch.Tensor:
        """(K * W, L + K * W) what masks see of the texts and of each other."""
        anchor = self.anchors.repeat_interleave(self.masks).unsqueeze(1)
        index = torch.arange(len(self.tokens), device=anchor.device)
        clean = (index <= anchor) & (self.text[anchor] == self.text)
        window = torch.arange(len(self.anchors), device=anchor.device).repeat_interleave(self.masks)
        own = window.unsqueeze(1) == window
        return torch.cat([clean, own.tril() if causal else own], dim=1)


def draw(texts: Sequence[Text], masks: int, per_text: int, rng: Random, device: torch.device | str) -> Windows:
    """Up to ``per_text`` windows of ``masks`` masks in each of ``texts``, at random places of its answer."""
    tokens: list[int] = []
    positions: list[int] = []
    owner, anchors, ends = [], [], []
    for number, text in enumerate(texts):
        first, ids = len(tokens), [*text.prompt, *text.answer]
        begin = max(len(text.prompt) - 1, 0)
        places = range(begin, len(ids) - 2)
        chosen = sorted(rng.sample(places, min(per_text, len(places))))
        anchors += [first + place for place in chosen]
        ends += [first + len(ids)] * len(chosen)
        tokens += ids
        positions += range(len(ids))
        owner += [number] * len(ids)
    held = torch.tensor(tokens, device=device)
    target = torch.tensor(anchors, device=device).unsqueeze(1) + 2 + torch.arange(masks, device=device)
    known = target < torch.tensor(ends, device=device).unsqueeze(1)
    return Windows(
        tokens=held,
        positions=torch.tensor(positions, device=device),
        text=torch.tensor(owner, device=device),
        anchors=torch.tensor(anchors, device=device),
        masks=masks,
        known=known,
        truth=held[target.clamp(max=len(tokens) - 1)],
    )
