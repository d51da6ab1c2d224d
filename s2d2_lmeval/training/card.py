"""The card of what was trained: what it is for, what it was trained on, how far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from s2d2_lmeval.training.student import Trainable
from s2d2_lmeval.training.trainer import Recipe

ROWS = 12
"""Looks that the card shows."""


def card(
    source: str,
    about: str,
    form: Trainable,
    recipe: Recipe,
    records: Sequence[Mapping[str, Any]],
) -> str:
    """The card as Markdown; ``about`` says what it was trained on."""
    step = -(-len(records) // ROWS)
    shown = [*records[:: max(step, 1)]]
    if shown[-1] is not records[-1]:
        shown.append(records[-1])
    lines = [
        f"| {one['step']} | {one['seconds']:.0f} | {one['mask_tokens']} | {one['accepted_per_draft']:.2f} | "
        f"{' '.join(f'{share:.2f}' for share in one['right'])} |"
        for one in shown
    ]
    table = "\n".join(lines)
    return f"""\
---
base_model: {source}
library_name: s2d2-lmeval
tags: [speculative-decoding, {form.tags}]
---

{form.described(source)}
- trained on {about}
- texts per step: {recipe.texts * recipe.accumulate}, up to {recipe.windows} drafts each; AdamW, rate {recipe.rate:g}

On held-out answers: tokens that a draft gets accepted, and how often each place of a draft is right.

| step | seconds | mask tokens | accepted per draft | right at each place |
| --: | --: | --: | --: | :-- |
{table}
"""
