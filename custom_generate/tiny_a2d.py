"""Tiny-A2D's sampler (dllm's BD3LM) under its published name, run by this package's engine.

With the defaults ``random_source="torch"`` and ``schedule="reference"`` ids, forwards and decoding order equal the
published code's for the same seed. Prompts are not padded here, so what that does to shorter rows of a batch, and to
tokens that equal the padding, does not happen.
"""

from __future__ import annotations

from math import ceil
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
    "max_new_tokens=128 steps=128 block_size=32 temperature=0.0 remasking='low_confidence' stochastic_transfer=False "
    "right_shift_logits=False steps_per_block=None mask_id=None eos_id=None random_source='torch' "
    "schedule='reference' return_stats=True"
)
def sample(arguments: dict[str, Any]) -> Any:
    """Continue one prompt by block denoising, blocks counted from the prompt's end (dllm's BD3LMSampler).

    Args:
        model: what :func:`s2d2_lmeval.load` returns, or a model of transformers with these weights.
        steps: of all blocks together; a block takes its share, rounded up, unless ``steps_per_block`` is given.
        steps_per_block: steps of a block.
        remasking: ``low_confidence``; ``random`` is refused.
        stochastic_transfer, right_shift_logits: refused if true.
        eos_id: the token whose block is the last one; None is the checkpoint's own.

    Returns:
        ids (1, P + new) with the whole last block; with ``return_stats`` a pair of these and a dictionary with ``nfe``
        and ``decoding_order`` (positions counted from the prompt's first token).
    """
    for name, value in (("remasking", "low_confidence"), ("stochastic_transfer", False), ("right_shift_logits", False)):
        if arguments.pop(name) != value:
            raise ConfigError(f"only {name}={value} is decoded here, as published by default; leave it out.")
    length, new = arguments["block_size"], arguments["max_new_tokens"]
    steps, per_block = arguments.pop("steps"), arguments.pop("steps_per_block")
    share = per_block or ceil(steps / max(ceil(new / length), 1))
    engine = ready(arguments["model"], family="tiny_a2d", mask_token_id=arguments["mask_id"], block_length=length)
    prompt, stop = one_prompt(arguments["input_ids"]), arguments["eos_id"]
    source = gumbel_draws(arguments["random_source"])
    config = config_of(
        {**arguments, "random_source": source},
        decoder="static",
        denoising_steps=min(share, length),
        stop_token_ids=engine.facts.stop_token_ids if stop is None else (stop,),
        trim_stop_tokens=False,
        short_last_block=True,
        transfer_counts="rounded",
        untempered_confidence=True,
    )
    answer = engine.generate([prompt], config)[0]
    ids = torch.tensor([answer.canvas], device=arguments["input_ids"].device)
    if not arguments["return_stats"]:
        return ids
    order = decided_positions(answer, ids.shape[1])
    return ids, {"nfe": int(answer.stats["nfe"]), "decoding_order": order}
