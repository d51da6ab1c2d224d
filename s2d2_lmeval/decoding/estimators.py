"""How likely the verifier accepts a drafted token, guessed from the draft distribution alone (S2D2, section on
routing).
"""

from __future__ import annotations

import math

import torch

from s2d2_lmeval.decoding.config import DecodingConfig


def normalised_entropy(distribution: torch.Tensor) -> torch.Tensor:
    """Entropy of each row of ``distribution`` (..., V) over log V."""
    surprise = distribution.clamp_min(1e-12).log()
    return -(distribution * surprise).sum(-1) / math.log(distribution.shape[-1])


def acceptance_estimate(distribution: torch.Tensor, confidence: torch.Tensor, config: DecodingConfig) -> torch.Tensor:
    """Estimated acceptance probability (M,) from the draft ``distribution`` (M, V) and the drafted token's
    ``confidence`` (M,).
    """
    name = config.token_acceptance_estimator
    if name in ("hard_margin_threshold", "soft_clipped_linear_margin"):
        first, second = distribution.topk(2, dim=-1).values.unbind(-1)
        margin = first - second
        if name == "hard_margin_threshold":
            return (margin > config.ssd_confidence_margin_threshold).to(distribution.dtype)
        return (config.ssd_confidence_margin_coef * margin).clamp(0, 1)
    if name == "soft_confidence_power":
        return confidence.pow(config.ssd_confidence_power).clamp(0, 1)
    if name == "soft_renyi_2_entropy":
        return distribution.square().sum(-1).clamp(0, 1)
    entropy = normalised_entropy(distribution)
    if name == "hard_entropy_threshold":
        return (entropy < config.ssd_entropy_threshold).to(distribution.dtype)
    return (-config.ssd_entropy_temperature * entropy).exp().clamp(0, 1)
