"""Sliding self-speculation as a decoding function.

``sliding_generate``  what autoregressive decoding writes, in a fraction of the forwards; no drafter, no training

It has no published counterpart; its arguments are named as in :mod:`s2d2_lmeval.custom_generate.sdar`. It decodes the
rows of a batch together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from s2d2_lmeval.custom_generate.calling import decode_rows
from s2d2_lmeval.custom_generate.signatures import documented


@documented
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
        model: what :func:`s2d2_lmeval.load` returns, or a transformers model, whose weights are shared.
        input_ids: the prompts, (R, P); shorter ones are padded on the left, which ``attention_mask`` (R, P) says.
        gen_length, max_gen_toks: maximum number of new tokens; ``max_gen_toks`` wins.
        draft: ``tree`` or ``chain``.
        stopping_criteria_idx: token ids that end an answer; None means the checkpoint's own.
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
    return decode_rows(locals(), _COUNTS, decoder="sliding", draft_shape=draft)


_COUNTS = ("queries", "accepted", "windows_used", "windows_missed")
