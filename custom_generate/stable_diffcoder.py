"""Stable-DiffCoder's decoder under its published name, run by this package's engine.

With the defaults ``random_source="torch"`` and ``schedule="reference"`` ids, forwards and decoding order equal the
published code's for the same seed. Where that leaves masks behind (fewer steps than tokens with a threshold) and fails,
this one decodes them.
"""

from __future__ import annotations

from typing import Any

import torch

from s2d2_lmeval.custom_generate.published import (
    config_of,
    decided_positions,
    gumbel_draws,
    one_prompt,
    published,
    ready,
)
from s2d2_lmeval.errors import ConfigError


@published(
    "steps=128 gen_length=128 block_length=4 temperature=0.0 threshold=0.95 mask_id=None eos_id=None shift=False "
    "random_source='torch' schedule='reference' return_stats=True"
)
def generate_block(arguments: dict[str, Any]) -> Any:
    """Continue one prompt by block denoising (Stable-DiffCoder).

    Args:
        model: what :func:`s2d2_lmeval.load` returns, or a Llama model of transformers with these weights.
        steps: of all blocks together; a block takes its share.
        gen_length: number of new tokens; the last block ends with them.
        threshold: fill every mask above this probability, and the best one; None: the schedule's number per step.
        eos_id: the token from which on its block is filled with it, and after which no block follows; None: no token.
        shift: refused if true, as these models predict a mask's own token.

    Returns:
        ids (1, P + new); with ``return_stats`` a pair of these and a dictionary with ``nfe`` (without the prompt's
        forward, as published) and ``decoding_order``.
    """
    if arguments.pop("shift"):
        raise ConfigError("shift=True reads other logits than those that were trained; leave it out.")
    static, length = arguments["threshold"] is None, arguments["block_length"]
    blocks = max(arguments["gen_length"] // length, 1)
    steps = min(max(arguments.pop("steps") // blocks, 1), length)
    prompt, stop = one_prompt(arguments["input_ids"]), arguments["eos_id"]
    source = gumbel_draws(arguments["random_source"])
    config = config_of(
        {**arguments, "random_source": source},
        decoder="static" if static else "dynamic",
        denoising_steps=steps if static else length,
        stop_token_ids=() if stop is None else (stop,),
        trim_stop_tokens=False,
        short_last_block=True,
        transfer_counts="masks",
        untempered_confidence=True,
    )
    engine = ready(
        arguments["model"], family="stable_diffcoder", mask_token_id=arguments["mask_id"], block_length=length
    )
    answer = engine.generate([prompt], config)[0]
    new = answer.canvas[len(prompt) :]
    if answer.finish_reason == "stop":
        kept = len(answer.token_ids)
        new = new[:kept] + [stop] * (len(new) - kept)
    ids = torch.tensor([prompt + new], device=arguments["input_ids"].device)
    if not arguments["return_stats"]:
        return ids
    order = decided_positions(answer, ids.shape[1])
    return ids, {"nfe": int(answer.stats["decode_nfe"]), "decoding_order": order}
