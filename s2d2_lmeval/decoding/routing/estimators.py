"""How likely the verifier accepts a drafted token, guessed from the draft distribution alone (S2D2, section on
routing).
"""

from __future__ import annotations

import math

import torch

from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.sampling.row_statistics import RowStatistics


def normalised(entropy: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """``entropy`` (M,) in nats over its largest value, log V."""
    return entropy / math.log(vocabulary)


def acceptance_estimate(
    statistics: RowStatistics, vocabulary: int, confidence: torch.Tensor, config: DecodingConfig
) -> torch.Tensor:
    """Estimated acceptance probability (M,) from the ``statistics`` (M,) of the draft distributions over V tokens and
    the drafted tokens' ``confidence`` (M,).
    """
    name = config.token_acceptance_estimator
    if name in ("hard_margin_threshold", "soft_clipped_linear_margin"):
        margin = statistics.first - statistics.second
        if name == "hard_margin_threshold":
            return (margin > config.ssd_confidence_margin_threshold).to(margin.dtype)
        return (config.ssd_confidence_margin_coef * margin).clamp(0, 1)
    if name == "soft_confidence_power":
        return confidence.pow(config.ssd_confidence_power).clamp(0, 1)
    if name == "soft_renyi_2_entropy":
        return statistics.collision.clamp(0, 1)
    entropy = normalised(statistics.entropy, vocabulary)
    if name == "hard_entropy_threshold":
        return (entropy < config.ssd_entropy_threshold).to(entropy.dtype)
    return (-config.ssd_entropy_temperature * entropy).exp().clamp(0, 1)
