"""What a drafter's head says of a token that the drafter's own law does not know: which token stands before it.

DSpark's Markov heads, under their published names: token b after token a gets the bias <w1[a], w2[b]>, at a place whose
hidden state is h. A gated head takes σ(G [h; w1[a]]) ∘ w1[a] in place of w1[a].
"""

from __future__ import annotations

import torch
from torch import nn

KINDS = ("vanilla", "gated")


class MarkovHead(nn.Module):
    """A head of ``kind`` for a ``vocabulary`` and hidden states of size ``hidden``."""

    def __init__(self, vocabulary: int, rank: int, hidden: int, kind: str = "vanilla") -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(vocabulary, rank)
        self.markov_w2 = nn.Linear(rank, vocabulary, bias=False)
        if kind == "gated":
            self.gate_proj = nn.Linear(hidden + rank, rank)

    def after(self, above: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """What tokens ``above`` (...) say of the next, (..., rank), at places with states ``hidden`` (..., H)."""
        said = self.markov_w1(above)
        if hasattr(self, "gate_proj"):
            said = torch.sigmoid(self.gate_proj(torch.cat([hidden, said], dim=-1))) * said
        return said

    def forward(self, above: torch.Tensor, token: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The bias (R, S, K above, K) of each ``token`` (R, S, K) after each token ``above`` (R, S, K above) in places
        with states ``hidden`` (R, S, H).
        """
        said = self.after(above, hidden.unsqueeze(2).expand(-1, -1, above.shape[2], -1))
        return said @ self.markov_w2.weight[token].transpose(2, 3)
