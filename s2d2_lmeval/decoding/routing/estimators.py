"""Estimates of how likely the verifier accepts a drafted token, from the draft distribution alone (S2D2, section on
routing).

An estimator is a function of a :class:`DraftStatistics` and the configuration to probabilities (M,), registered under
the value of ``token_acceptance_estimator``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.sampling.row_statistics import RowStatistics
from s2d2_lmeval.registry import ESTIMATORS


@dataclass(frozen=True)
class DraftStatistics:
    """The input of an estimator: the statistics ``of`` M draft distributions over a ``vocabulary``, and the
    ``confidence`` (M,) of the drafted tokens.
    """

    of: RowStatistics
    vocabulary: int
    confidence: torch.Tensor

    @property
    def margin(self) -> torch.Tensor:
        """(M,) the top probability minus the second."""
        return self.of.first - self.of.second

    @property
    def entropy(self) -> torch.Tensor:
        """(M,) normalised."""
        return normalised(self.of.entropy, self.vocabulary)


def normalised(entropy: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """``entropy`` (M,) in nats over its maximum, log V."""
    return entropy / math.log(vocabulary)


def acceptance_estimate(
    statistics: RowStatistics, vocabulary: int, confidence: torch.Tensor, config: DecodingConfig
) -> torch.Tensor:
    """Estimated acceptance probability (M,) from the ``statistics`` (M,) of the draft distributions over V tokens and
    the drafted tokens' ``confidence`` (M,), by the estimator that the options name.
    """
    estimator = ESTIMATORS[config.token_acceptance_estimator].implementation
    estimate: torch.Tensor = estimator(DraftStatistics(statistics, vocabulary, confidence), config)
    return estimate


@ESTIMATORS.register("hard_margin_threshold")
def hard_margin_threshold(draft: DraftStatistics, config: DecodingConfig) -> torch.Tensor:
    """1 where the margin of the best token over the second exceeds the threshold, else 0."""
    return (draft.margin > config.ssd_confidence_margin_threshold).to(draft.margin.dtype)


@ESTIMATORS.register("hard_entropy_threshold")
def hard_entropy_threshold(draft: DraftStatistics, config: DecodingConfig) -> torch.Tensor:
    """1 where the entropy is below the threshold, else 0."""
    return (draft.entropy < config.ssd_entropy_threshold).to(draft.confidence.dtype)


@ESTIMATORS.register("soft_confidence_power")
def soft_confidence_power(draft: DraftStatistics, config: DecodingConfig) -> torch.Tensor:
    """A power of the confidence."""
    return draft.confidence.pow(config.ssd_confidence_power).clamp(0, 1)


@ESTIMATORS.register("soft_clipped_linear_margin")
def soft_clipped_linear_margin(draft: DraftStatistics, config: DecodingConfig) -> torch.Tensor:
    """A multiple of the margin."""
    return (config.ssd_confidence_margin_coef * draft.margin).clamp(0, 1)


@ESTIMATORS.register("soft_entropy_negexp")
def soft_entropy_negexp(draft: DraftStatistics, config: DecodingConfig) -> torch.Tensor:
    """Falls exponentially with the entropy."""
    return (-config.ssd_entropy_temperature * draft.entropy).exp().clamp(0, 1)


@ESTIMATORS.register("soft_renyi_2_entropy")
def soft_renyi_2_entropy(draft: DraftStatistics, config: DecodingConfig) -> torch.Tensor:
    """The probability that two draws from the draft distribution agree."""
    return draft.of.collision.clamp(0, 1)
