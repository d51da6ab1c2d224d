"""Spiffy as a decoding function: lossless speculation over denoising states (arXiv 2509.18085).

There is no published implementation whose name or arguments could be kept; those here are named as in
:mod:`s2d2_lmeval.custom_generate.sdar`. It decodes the rows of a batch together.
"""

from __future__ import annotations

from typing import Any

from s2d2_lmeval.custom_generate.published import decode_rows, published


@published(
    "attention_mask=None mask_id=None gen_length=128 max_gen_toks=None block_length=None base=None "
    "draft_graph='default' draft_nodes='auto' lossless=True stopping_criteria_idx=None return_forward_stats=False"
)
def spiffy_generate(arguments: dict[str, Any]) -> Any:
    """Continue prompts with a block decoder, through the same states, several of its steps per forward.

    Args:
        model: what :func:`s2d2_lmeval.load` returns, or an SDAR or LLaDA2 model of transformers.
        input_ids: the prompts, (R, P); shorter ones are padded on the left, which ``attention_mask`` (R, P) says.
        gen_length, max_gen_toks: maximum number of new tokens; ``max_gen_toks`` wins.
        block_length: None is the checkpoint's own.
        base: the decoder that is accelerated; None is ``dynamic``, or ``editing`` on LLaDA2.
        stopping_criteria_idx: token ids that end an answer; None means the checkpoint's own.

    Returns:
        ids (R, P + new), answers that are shorter filled up on the right with the first stop token (0 without any);
        with ``return_forward_stats`` a pair of these ids and, of each row, ``decoding_order`` and the statistics:
        ``total_forward_steps``, ``steps``, ``states_drafted`` and ``states_accepted``, each of which saved a forward.
        Of a single row they are as published, not a list.
    """
    return decode_rows(arguments, ("steps", "states_drafted", "states_accepted"), decoder="spiffy")
