"""I-DLM's strided decoding under its published name, run by this package's engine.

With the defaults ``random_source="torch"`` and ``schedule="reference"`` ids and forwards equal the published code's for
the same seed where that follows the model's law: without filters at temperature one. Elsewhere it compares a filtered
draft with an unfiltered verifier, and at temperature zero it draws; here both are filtered, and zero is the argmax.
"""

from __future__ import annotations

from typing import Any

import torch

from s2d2_lmeval.custom_generate.published import config_of, one_prompt, published, ready


@published(
    "max_new_tokens=128 gen_block_size=3 temperature=1.0 top_k=50 top_p=0.95 verify_alpha=1.0 stop_token_ids=None "
    "mask_id=None random_source='torch' schedule='reference' return_stats=True"
)
def generate(arguments: dict[str, Any]) -> Any:
    """Continue one prompt by strided decoding (I-DLM, arXiv 2604.11035).

    Args:
        model: what :func:`s2d2_lmeval.load` returns, or a Qwen3 model of transformers with these weights.
        gen_block_size: the stride: a forward drafts one token fewer.
        verify_alpha: factor on the draft's probability in the acceptance test.
        stop_token_ids: tokens that end the answer, which holds the first of them; None: no token.

    Returns:
        ids (1, P + new); with ``return_stats`` a pair of these and a dictionary with ``nfe``.
    """
    prompt, stride = one_prompt(arguments["input_ids"]), arguments.pop("gen_block_size")
    config = config_of(
        arguments,
        decoder="strided",
        block_length=stride,
        draft_tolerance=arguments.pop("verify_alpha"),
        stop_token_ids=tuple(arguments["stop_token_ids"] or ()),
        trim_stop_tokens=False,
    )
    engine = ready(arguments["model"], family="idlm", mask_token_id=arguments["mask_id"])
    answer = engine.generate([prompt], config)[0]
    ids = torch.tensor([prompt + answer.token_ids], device=arguments["input_ids"].device)
    return (ids, {"nfe": int(answer.stats["nfe"])}) if arguments["return_stats"] else ids
