"""Speculative acceptance: which drafted tokens the verifier accepts, and the replacement of the first rejected one.

Speculative sampling (Leviathan et al., 2023; Chen et al., 2023): accept a token x that was sampled from the draft q
with probability min(1, p(x) / q(x)), p being the verifier (the target); replace the first rejected one by a draw from
(p - q)+ normalised. Then the result follows p exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

ROUNDING = 1e-6
"""Rounding error in the mass of the difference of two equal distributions."""


@dataclass(frozen=True)
class Verdict:
    """What the verifier accepts of spans: R rows of L places.

    ``accepted`` (R, L) the accepted prefix of each span; ``rejected`` (R,) the place of the first rejection, L where
    there is none.
    """

    accepted: torch.Tensor
    rejected: torch.Tensor


def acceptance_ratio(verifier: torch.Tensor, draft: torch.Tensor, tempering: float) -> torch.Tensor:
    """min(1, (p / q) ** tempering) from the verifier's (p) and the draft's (q) probability of the drafted token."""
    return (verifier / draft.clamp_min(1e-12)).pow(tempering).clamp_max(1)


def judge(agrees: torch.Tensor, span: torch.Tensor) -> Verdict:
    """The accepted prefix of ``span`` (R, L) where ``agrees`` (R, L) says which tokens pass on their own."""
    standing = (agrees | ~span).long().cumprod(-1).bool()
    first = (standing.sum(-1)).masked_fill(standing.all(-1), span.shape[-1])
    return Verdict(accepted=standing & span, rejected=first)


def residual(verifier: torch.Tensor, draft: torch.Tensor) -> torch.Tensor:
    """(p - q)+ normalised, rows (K, V); p itself where nothing is left of it but rounding."""
    excess = (verifier - draft).clamp_min(0)
    mass = excess.sum(-1, keepdim=True)
    usable = (mass > ROUNDING) & mass.isfinite()
    return torch.where(usable, excess / mass.clamp_min(torch.finfo(mass.dtype).tiny), verifier)
