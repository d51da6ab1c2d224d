"""Errors for the user: one sentence on what is wrong, one on what to do."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LONGEST = 1200
"""Maximum characters of a message, which may quote a damaged file of any length."""
LONGEST_SHOWN = 80


class S2D2Error(ValueError):
    """Base of every error that this package raises on purpose."""

    def __init__(self, message: str) -> None:
        end = LONGEST // 4
        super().__init__(message if len(message) <= LONGEST else f"{message[: LONGEST - end]} … {message[-end:]}")


def first_line(error: BaseException) -> str:
    """Another library's message, shortened to a sentence; the error's type if it is empty."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


class CheckpointError(S2D2Error):
    """A checkpoint that cannot be loaded as what it claims to be."""


class ConfigError(S2D2Error):
    """An option that is unknown, ill-typed, contradictory or of another decoder."""


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


class TrainingError(S2D2Error):
    """Training that cannot begin or go on."""


class StudyError(S2D2Error):
    """A study that contradicts itself, or a folder of results that cannot be resumed."""


def shown(value: Any) -> str:
    """``value`` for a message, always short."""
    try:
        text = repr(value)
    except Exception:  # an integer of thousands of digits, or an object's own fault
        text = f"a {type(value).__name__} that cannot be written out"
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 1]}…"


@contextmanager
def without_messages(logger: str, *phrases: str) -> Iterator[list[str]]:
    """Keeps another library's messages that contain one of ``phrases`` off the terminal, where they would mislead.

    Yields the list that receives them.
    """
    kept: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        hidden = any(phrase in record.getMessage() for phrase in phrases)
        kept.extend([record.getMessage()] * hidden)
        return not hidden

    source = logging.getLogger(logger)
    source.addFilter(keep)
    try:
        yield kept
    finally:
        source.removeFilter(keep)
