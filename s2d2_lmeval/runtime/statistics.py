"""Definitions of the decoding statistics: every reported ratio, as one count over another.

Traces, answers, results files, filters, reports, benches and the command line add up counts and take their ratios from
:data:`RATIOS`. A ratio whose denominator is zero, or whose counts are not there, is undefined and therefore absent.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

RATIOS: Mapping[str, tuple[str, str]] = {
    "tokens_per_forward": ("new_tokens", "nfe"),
    "tokens_per_decode_forward": ("new_tokens", "decode_nfe"),
    "tokens_per_target_forward": ("new_tokens", "target_forwards"),
    "tokens_per_second": ("new_tokens", "seconds"),
    "decode_tokens_per_second": ("new_tokens", "decode_seconds"),
    "acceptance": ("accepted", "drafted"),
    "acceptance_length": ("round_tokens", "rounds"),
    "acceptance_length_without_bonus": ("round_accepted", "rounds"),
    "routed": ("routed_drafts", "drafts"),
    "rows_per_forward": ("nfe", "forwards"),
    "queries_per_forward": ("queries", "nfe"),
    "forwards_saved": ("states_accepted", "steps"),
}
"""Ratio -> (numerator, denominator).

new_tokens       tokens of the answers, up to and including the stop
nfe              forwards, each counted once per row in it; decode_nfe without those that only ran a piece of a prompt
forwards         calls of the model, with one row or many; target_forwards: as nfe, of the target beside a drafter
seconds          of whole engine steps; decode_seconds without steps in which every row only ran a piece of its prompt
drafted          tokens put before a verifier, accepted of these accepted; both only up to the end of the answer
rounds           verifications; round_tokens decided in them and round_accepted accepted, up to the end of the answer
drafts           drafts that a routing policy could send to the verifier; routed_drafts of these sent
queries          tokens fed to the model
steps            denoising steps; states_accepted of these needed no forward of their own
"""

BY_DEPTH = ("offered_at_", "accepted_at_")
"""Counts per depth d of a draft: verifications that had a token there, and of these the ones that accepted it."""


def ratios(counts: Mapping[str, Any]) -> dict[str, float]:
    """Those of :data:`RATIOS` that are defined by ``counts``."""
    return {
        name: counts[above] / counts[below]
        for name, (above, below) in RATIOS.items()
        if above in counts and counts.get(below, 0) > 0
    }


def with_ratios(counts: Mapping[str, Any]) -> dict[str, Any]:
    """``counts`` and their ratios; counts by depth become the list ``acceptance_by_depth``, from depth 1 on."""
    plain = {name: value for name, value in counts.items() if not name.startswith(BY_DEPTH)}
    rates: list[float] = []
    while counts.get(f"offered_at_{len(rates) + 1}"):
        depth = len(rates) + 1
        rates.append(round(counts.get(f"accepted_at_{depth}", 0) / counts[f"offered_at_{depth}"], 4))
    return {**plain, **ratios(counts), **({"acceptance_by_depth": rates} if rates else {})}


def without_ratios(statistics: Mapping[str, Any]) -> dict[str, float]:
    """The counts among ``statistics``: its numbers that are not ratios."""
    return {name: value for name, value in statistics.items() if isinstance(value, (int, float)) and name not in RATIOS}


def add(counts: MutableMapping[str, float], more: Mapping[str, float]) -> None:
    """Add ``more`` to ``counts``, name by name."""
    for name, value in more.items():
        counts[name] = counts.get(name, 0) + value


def gained(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """What counts rose by between two states of one record of statistics."""
    return {name: value - before.get(name, 0) for name, value in without_ratios(after).items()}
