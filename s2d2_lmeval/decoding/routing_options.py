"""The decoding options of when to verify that are not published ones."""

from __future__ import annotations

from dataclasses import dataclass

from s2d2_lmeval.decoding.options import option


@dataclass(frozen=True)
class RoutingOptions:
    """Part of :class:`~s2d2_lmeval.decoding.config.DecodingConfig`."""

    verify_cost_ratio: float | None = option(
        None,
        "throughput: cost of a verification, in drafts, which makes its answers reproducible; none: measured, so "
        "answers depend on timings and on the batch",
        decoders=("s2d2",),
        schemes=("block", "editing", "subblock"),
        low=0.0,
    )
