"""The card of an adapter: what it is for, what it was trained on, how far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from s2d2_lmeval.training.adapter import Form
from s2d2_lmeval.training.trainer import Recipe

ROWS = 12
"""Looks that the card shows."""


def card(
    source: str,
    about: str,
    form: Form,
    recipe: Recipe,
    records: Sequence[Mapping[str, Any]],
) -> str:
    """The card as Markdown; ``about`` says what the adapter was trained on."""
    masks = (
        f"random tokens from {form.noise[0]} to {form.noise[1] - 1}, each of which sees earlier ones"
        if form.noise
        else "a vector for each place, which see each other"
    )
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
tags: [speculative-decoding, lora]
---

# A draft adapter for {source}

A LoRA of rank {form.rank} that only draft queries go through: with it {source} drafts for itself, and its answers stay
those of the plain weights.

    lm_eval --model s2d2 --model_args pretrained={source},draft_adapter=THIS_FOLDER --tasks …

- window {form.window}; masks: {masks}
- trained on {about}
- texts per step: {recipe.texts * recipe.accumulate}, up to {recipe.windows} windows each; AdamW, rate {recipe.rate:g}

On held-out answers: tokens that a draft gets accepted, and how often each place of a window is right.

| step | seconds | mask tokens | accepted per draft | right at each place |
| --: | --: | --: | --: | :-- |
{table}
"""
