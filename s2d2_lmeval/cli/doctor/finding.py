"""One line of what `doctor` reports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from s2d2_lmeval.errors import S2D2Error

OK, NOTE, PROBLEM = "ok", "note", "problem"


@dataclass(frozen=True)
class Finding:
    """``state``: ``ok``; ``note``, worth knowing; ``problem``, something will not work."""

    section: str
    name: str
    value: str
    state: str = OK


def looked_at(section: str, name: str, found: Iterator[Finding]) -> Iterator[Finding]:
    """What is ``found``; where looking at it fails, why."""
    try:
        yield from found
    except S2D2Error as error:
        yield Finding(section, name, str(error), PROBLEM)
