"""Sliding self-speculation as a decoding function.

``sliding_generate``  what autoregressive decoding writes, in a fraction of the forwards; no drafter, no training

It has no published counterpart; its arguments are named as in :mod:`s2d2_lmeval.custom_generate.sdar`. It decodes the
rows of a batch together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from s2d2_lmeval.custom_generate.calling import decoding_options, prompts_of, ready, statistics_of, with_answers


def sliding_generate(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    mask_id: int | None = None,
    gen_length: int = 128,
    max_gen_toks: int | None = None,
    window: int = 16,
    row_budget: int | str = 64,
    draft: str = "tree",
    acceptance: str = "keyed",
    stopping_criteria_idx: Sequence[int] | None = None,
    return_forward_stats: bool = False,
    **kwargs: Any,
) -> torch.Tensor | tuple[torch.Tensor, dict[str, Any]]:
    """Continue prompts autoregressively, several tokens per forward.

    Args:
        model: what :func:`s2d2_lmeval.load` returns, or a transformers model of a known family (its weights are
            shared).
        input_ids: the prompts, (R, P); shorter ones are padded on the left, which ``attention_mask`` (R, P) says.
        mask_id: None is the checkpoint's own.
        gen_length, max_gen_toks: new tokens at most; ``max_gen_toks`` wins.
        window: positions that a draft looks ahead.
        row_budget: queries per row and forward, or ``auto``: as many as pay on this machine.
        draft: ``tree`` or ``chain``.
        acceptance: ``keyed`` (token for token what ``ar`` writes with the same seed) or ``rejection`` (the same law).
        stopping_criteria_idx: token ids that end an answer; None means the checkpoint's own.
        return_forward_stats: also answer with the statistics.
        kwargs: ``do_sample``, ``temperature``, ``top_k``, ``top_p``, ``seed``; what an evaluation harness hands to
            every model besides is taken and has no effect.

    Returns:
        ids (R, P + new), answers that are shorter filled up on the right with the first stop token (0 without any);
        with ``return_forward_stats`` a pair of these ids and, of each row, ``decoding_order`` and the statistics:
        ``total_forward_steps``, ``queries``, ``accepted``, ``windows_used``, ``windows_missed``. Of a single row they
        are values, not lists.

    Raises:
        ConfigError: a name that is no decoding option, or a value that is out of range.
        RequestError: ids that are no table, or a prompt that cannot be decoded.
    """
    prompts = prompts_of(input_ids, attention_mask)
    options: dict[str, Any] = {
        "decoder": "sliding",
        "window": window,
        "row_budget": row_budget,
        "draft_shape": draft,
        "acceptance": acceptance,
        "max_new_tokens": gen_length if max_gen_toks is None else max_gen_toks,
        **decoding_options(kwargs),
    }
    if stopping_criteria_idx is not None:
        options["stop_token_ids"] = tuple(stopping_criteria_idx)
    decoder = ready(model, mask_token_id=mask_id)
    config = decoder.config(options)
    answers = decoder.generate(prompts, config)
    ids = with_answers(input_ids, answers, config)
    return (ids, statistics_of(answers, _COUNTS)) if return_forward_stats else ids


_COUNTS = ("queries", "accepted", "windows_used", "windows_missed")
