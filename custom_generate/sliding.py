"""Sliding self-speculation as a decoding function; it has no published counterpart, and decodes the rows of a batch
together.
"""

from __future__ import annotations

from typing import Any

from s2d2_lmeval.custom_generate.published import decode_rows, published


@published(
    "attention_mask=None mask_id=None gen_length=128 max_gen_toks=None window=16 row_budget=64 draft='tree' "
    "acceptance='keyed' stopping_criteria_idx=None return_forward_stats=False"
)
def sliding_generate(arguments: dict[str, Any]) -> Any:
    """Continue prompts autoregressively, several tokens per forward: what autoregressive decoding writes, in a fraction
    of the forwards, without a drafter or training.

    Args:
        model: what :func:`s2d2_lmeval.load` returns, or a transformers model, whose weights are shared.
        input_ids: the prompts, (R, P); shorter ones are padded on the left, which ``attention_mask`` (R, P) says.
        gen_length, max_gen_toks: maximum number of new tokens; ``max_gen_toks`` wins.
        draft: ``tree`` or ``chain``.
        stopping_criteria_idx: token ids that end an answer; None means the checkpoint's own.

    Returns:
        ids (R, P + new), answers that are shorter filled up on the right with the first stop token (0 without any);
        with ``return_forward_stats`` a pair of these ids and, of each row, ``decoding_order`` and the statistics:
        ``total_forward_steps``, ``queries``, ``accepted``, ``windows_used``, ``windows_missed``. Of a single row they
        are values, not lists.
    """
    counts = ("queries", "accepted", "windows_used", "windows_missed")
    return decode_rows(arguments, counts, decoder="sliding", draft_shape=arguments["draft"])
