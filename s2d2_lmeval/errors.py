"""Errors that a person at the terminal reads: one sentence on what is wrong, one on what to do."""

from __future__ import annotations


class S2D2Error(ValueError):
    """Base of every error that this package raises on purpose."""


class CheckpointError(S2D2Error):
    """A checkpoint that cannot be loaded as what it says it is."""


class ConfigError(S2D2Error):
    """An option that is unknown, ill-typed, contradictory or not of this decoder."""


class RequestError(S2D2Error):
    """A prompt or budget that cannot be decoded."""


class NumericalError(S2D2Error):
    """Logits that are not finite."""

    def __init__(self) -> None:
        super().__init__(
            "The model answered with logits that are not numbers (NaN or infinite). Check the checkpoint, or load it "
            "with dtype=float32."
        )


class CapacityError(S2D2Error):
    """Memory that does not hold a single request."""


class StudyError(S2D2Error):
    """A study that contradicts itself, or a folder of results that cannot be gone on with."""
