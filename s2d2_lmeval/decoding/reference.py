"""Code that exists only to match the published implementation: its draw orders, its notation of decisions, its bugs.

Decoders ask here once, when they are created, for what the options require.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from s2d2_lmeval.decoding.generation import (
    ACCEPTED,
    AUTOREGRESSIVE,
    DENOISED,
    EDITED,
    HIGH_CONFIDENCE,
    KEPT,
    RATIO,
    RESAMPLED,
    PublishedStep,
    Step,
)
from s2d2_lmeval.errors import ConfigError

if TYPE_CHECKING:
    from s2d2_lmeval.decoding.options.config import DecodingConfig
    from s2d2_lmeval.families import Facts


class FixedSource:
    """Deterministic: every uniform is 0.5, every categorical draw the argmax."""

    def uniform(self, key: object, needed: torch.Tensor) -> torch.Tensor:
        return torch.full(needed.shape, 0.5, device=needed.device)

    def categorical(self, probabilities: torch.Tensor, key: object) -> torch.Tensor:
        return probabilities.argmax(-1)

    def gumbel(self, probabilities: torch.Tensor, key: object) -> torch.Tensor:
        return torch.zeros_like(probabilities)

    def drawing(self, rows: torch.Tensor, needed: torch.Tensor) -> torch.Tensor:
        return rows


class TorchDraws:
    """The global generator of torch."""

    def uniform(self, n: int) -> torch.Tensor:
        return torch.rand(n)

    def categorical(self, probabilities: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(probabilities, 1).squeeze(-1)


class SequentialSource:
    """Draws in the order of the published code, one row at a time, and only what that draws; so it reads the device to
    know how much that is. ``draws`` has ``uniform(n)`` and ``categorical(probabilities)``.
    """

    def __init__(self, draws: Any) -> None:
        self.draws = draws

    def uniform(self, key: object, needed: torch.Tensor) -> torch.Tensor:
        values = torch.as_tensor(self.draws.uniform(int(needed.sum())))
        drawn = torch.zeros(needed.shape, dtype=values.dtype, device=needed.device)
        drawn[needed] = values.to(needed.device)
        return drawn

    def categorical(self, probabilities: torch.Tensor, key: object) -> torch.Tensor:
        if not len(probabilities):
            return probabilities.new_zeros(0, dtype=torch.long)
        return torch.as_tensor(self.draws.categorical(probabilities)).to(probabilities.device)

    def gumbel(self, probabilities: torch.Tensor, key: object) -> torch.Tensor:
        """Nothing is known of draws to come."""
        return torch.zeros_like(probabilities)

    def drawing(self, rows: torch.Tensor, needed: torch.Tensor) -> torch.Tensor:
        return rows[needed]


@dataclass(frozen=True)
class Rules:
    """What block denoising does only to match the published code; all of it is off in the fast path."""

    drafts_whole_block: bool
    """A draft reads the decided places of its block too: all of them are drawn for, or an entropy sums over all."""
    commits_apart: bool
    """A finished block is committed by a separate forward; drafts commit nothing."""
    commits_last_block: bool
    """So is a block that no other follows, unless it ends with a stop token."""
    commits_stopped_block: bool
    """So is one with a stop token."""
    finishes_blocks: bool
    """Sub-blocks continue after the last requested token, to the end of the block."""
    breaks_ties: bool
    """Equal confidences are ordered as ``torch.topk`` orders them on the published tensor, not from the left."""


def rules_of(config: DecodingConfig, facts: Facts) -> Rules:
    """What the options require of checkpoints with these ``facts``.

    Raises:
        ConfigError: a draft is to read places that the schedule does not run.
    """
    collapsed = config.collapse_entropy and config.strategy == "entropy_bounded"
    if collapsed and config.schedule == "lookahead":
        raise ConfigError(
            "collapse_entropy sums over every place of the block, and schedule=lookahead does not run the decided ones "
            "again; use schedule=fused, or collapse_entropy=false."
        )
    reference = config.schedule == "reference"
    return Rules(
        drafts_whole_block=collapsed or (config.sampled and not config.keyed),
        commits_apart=reference,
        commits_last_block=reference and facts.commits_last_block != "never",
        commits_stopped_block=reference and facts.commits_last_block == "always",
        finishes_blocks=reference,
        breaks_ties=not config.keyed,
    )


def most_confident(confidence: torch.Tensor, order: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """``order`` (1, L) of a block with its ``count`` (1,) first places chosen as published: by ``torch.topk`` of the
    ``confidence`` (1, L), -inf where nothing is masked. Which of equal values it takes depends on how many are asked
    for, and on top-p with trained weights most are exactly 1.
    """
    chosen = confidence[0].topk(min(int(count), confidence.shape[1])).indices
    rank = order + order.shape[1]
    rank[0, chosen] = torch.arange(len(chosen), device=rank.device)
    return (rank.unsqueeze(-2) < rank.unsqueeze(-1)).sum(-1)


def within_collapsed_entropy(confidence: torch.Tensor, order: torch.Tensor, bound: float) -> torch.Tensor:
    """As published, every place costs the one entropy of all ``confidence`` (R, L) of its block: which places (R, L),
    in their ``order``, stay below ``bound``.
    """
    entropy = -(confidence * confidence.clamp_min(1e-12).log()).sum(-1, keepdim=True)
    return (order + 1) * entropy < bound


def uniforms_until_refused(
    source: Any, key: Any, tested: torch.Tensor, ratio: torch.Tensor, one_by_one: bool
) -> torch.Tensor:
    """Whether a uniform is below ``ratio`` (R, M), where ``tested`` (R, M). ``one_by_one``, as published: none is drawn
    in a row after the first that is not.
    """
    if not one_by_one:
        return (source.uniform(key, tested).to(ratio.dtype) < ratio) & tested
    stands = torch.zeros_like(tested)
    alive = tested.new_ones(len(tested))
    for place in range(tested.shape[1]):
        needed = torch.zeros_like(tested)
        needed[:, place] = tested[:, place] & alive
        drawn = source.uniform(key, needed)[:, place].to(ratio.dtype)
        stands[:, place] = alive = needed[:, place] & (drawn < ratio[:, place])
    return stands


def verifies_short_span(masks: torch.Tensor, confident: torch.Tensor, shortest: int) -> torch.Tensor:
    """``legacy_ssd_span_strategy``: a span shorter than ``shortest`` is verified (R,) anyway if too few
    ``masks`` (R, L) are ``confident`` (R, L).
    """
    return confident.sum(-1) < masks.sum(-1).clamp_max(shortest)


_NOTATION = (
    *((ACCEPTED, 1, 0), (KEPT, 1, 0), (RESAMPLED, 1, 0.5), (RATIO, 1, 0.2)),
    *((HIGH_CONFIDENCE, -1, -0.4), (DENOISED, -1, 0), (AUTOREGRESSIVE, -1, -0.5)),
)
"""Sign and offset of a position by how it was decided, in the order in which these are listed."""


def notation_of(step: Step, verifies: bool, order: Sequence[int]) -> list[int | float | str]:
    """Positions decided in a step in the published notation.

    p accepted or kept without resampling, p + 0.5 resampled, p + 0.2 by ratio, -p - 0.4 by high confidence, -p - 0.5
    from the last row of committed text, and -p (plain p in a decoder without a verifier) by the remasking strategy;
    in this order, and in ``order`` (B,) within a kind.
    """
    entries: list[int | float | str] = []
    for mark, sign, offset in _NOTATION:
        places = sorted((order[place], place) for place, found in enumerate(step.marks) if found == mark)
        sign = sign if verifies or mark != DENOISED else 1
        entries += [sign * (step.start + place) + offset for _, place in places]
    return entries


def order_of_blocks(steps: Sequence[Step], verifies: bool) -> list[PublishedStep]:
    """The decoding order of block denoising: an entry per step that decides, ``|`` before a block's first step."""
    entries: list[PublishedStep] = []
    start, number = -1, 0
    for step in steps:
        if step.kind == "draft":
            start, number = step.start, number + 1 if step.start == start else 0
        if any(step.marks):
            positions = notation_of(step, verifies, step.order)
            entries.append(["|", *positions] if number == 0 else positions)
    return entries


def order_of_subblocks(steps: Sequence[Step], verifies: bool) -> list[PublishedStep]:
    """The decoding order of sub-blocks: it knows no blocks, no ranks, and a minus for everything denoised."""
    deciding = [step for step in steps if any(step.marks)]
    return [notation_of(step, True, [0] * len(step.marks)) for step in deciding]


def order_of_pipelines(steps: Sequence[Step], block_length: int, verifies: bool) -> list[PublishedStep]:
    """The decoding order of pipelined blocks, an entry per iteration: p confident or accepted, p + 0.5 resampled, -p
    forced. Position by position; with a verifier what was topped up comes last, block by block and best first.
    """
    entries: list[PublishedStep] = []
    for step, following in zip(steps, [*(later.kind for later in steps[1:]), ""], strict=True):
        if following == "verify":  # the iteration goes on
            continue
        found = []
        for place, mark in enumerate(step.marks):
            topped_up, position = verifies and mark == DENOISED, step.start + place
            shown = -position if mark == DENOISED else position + 0.5 if mark == RESAMPLED else position
            if mark:
                rank = (place // block_length, step.order[place]) if topped_up else (0, 0)
                found.append((topped_up, *rank, place, shown))
        entries.append([shown for *_, shown in sorted(found)])
    return entries


def order_of_edits(steps: Sequence[Step], verifies: bool) -> list[PublishedStep]:
    """The decoding order where tokens are edited: ``edit`` (position, old, new) and ``unmask`` of each step, in it p
    denoised, -p accepted, -p - 0.5 resampled.
    """
    entries: list[PublishedStep] = []
    for step in steps:
        kinds = (EDITED, ACCEPTED, RESAMPLED, DENOISED)
        found = {kind: [place for place, mark in enumerate(step.marks) if mark == kind] for kind in kinds}
        if step.kind == "draft":
            edits = [(step.start + place, step.before[place], step.tokens[place]) for place in found[EDITED]]
            entries.append({"edit": edits, "unmask": []})
        entry = entries[-1]
        assert isinstance(entry, dict)
        entry["unmask"] += [-step.start - place for place in found[ACCEPTED]]
        entry["unmask"] += [-step.start - place - 0.5 for place in found[RESAMPLED]]
        entry["unmask"] += [step.start + place for place in found[DENOISED]]
    return entries
