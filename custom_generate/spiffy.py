"""Spiffy as a decoding function: lossless speculation over denoising states (arXiv 2509.18085).

``spiffy_generate``  what a block decoder writes, through the same states, in fewer forwards

There is no published implementation whose name or arguments could be kept; those here are named as in
:mod:`s2d2_lmeval.custom_generate.sdar`. It decodes the rows of a batch together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from s2d2_lmeval.custom_generate.calling import decode_rows
from s2d2_lmeval.custom_generate.signatures import documented


@documented
def spiffy_generate(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    mask_id: int | None = None,
    gen_length: int = 128,
    max_gen_toks: int | None = None,
    block_length: int | None = None,
    base: str | None = None,
    draft_graph: str = "default",
    draft_nodes: int | str = "auto",
    lossless: bool = True,
    stopping_criteria_idx: Sequence[int] | None = None,
    return_forward_stats: bool = False,
    **kwargs: Any,
) -> torch.Tensor | tuple[torch.Tensor, dict[str, Any]]:
    """Continue prompts with a block decoder, several of its steps per forward.

    Args:
        model: what :func:`s2d2_lmeval.load` returns, or an SDAR or LLaDA2 model of transformers.
        input_ids: the prompts, (R, P); shorter ones are padded on the left, which ``attention_mask`` (R, P) says.
        gen_length, max_gen_toks: maximum number of new tokens; ``max_gen_toks`` wins.
        block_length: None is the checkpoint's own.
        base: the decoder that is accelerated; None is ``dynamic``, or ``editing`` on LLaDA2.
        stopping_criteria_idx: token ids that end an answer; None means the checkpoint's own.
        kwargs: options of the base decoder, such as ``confidence_threshold`` or ``denoising_steps``; what an evaluation
            harness hands to every model besides is taken and has no effect.

    Returns:
        ids (R, P + new), answers that are shorter filled up on the right with the first stop token (0 without any);
        with ``return_forward_stats`` a pair of these ids and, of each row, ``decoding_order`` and the statistics:
        ``total_forward_steps``, ``steps``, ``states_drafted`` and ``states_accepted``, each of which saved a forward.
        Of a single row they are as published, not a list.

    Raises:
        ConfigError: a name that is no decoding option, or a value that is out of range.
        RequestError: ids that are no table, or a prompt that cannot be decoded.
    """
    return decode_rows(locals(), _COUNTS, decoder="spiffy")


_COUNTS = ("steps", "states_drafted", "states_accepted")
