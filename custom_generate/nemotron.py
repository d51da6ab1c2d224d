"""Nemotron-Labs-Diffusion's three decoders under their published names, run by this package's engine.

With the defaults ``random_source="torch"`` and ``schedule="reference"`` ids and forwards equal the published code's for
the same seed. The engine's own way to the output of ``ar_generate`` and ``linear_spec_generate`` is
``decoder=sliding``: verification and the next draft in one forward. Budgets for thinking are not available.
"""

from __future__ import annotations

from collections.abc import Mapping
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


@published("max_new_tokens=128 temperature=0.0 eos_token_id=None random_source='torch' return_stats=True")
def ar_generate(arguments: dict[str, Any]) -> Any:
    """Continue one prompt token by token (Nemotron-Labs-Diffusion).

    Args:
        model: what :func:`s2d2_lmeval.load` returns, or a Ministral3 model of transformers with these weights.
        temperature: zero is the argmax.
        eos_token_id: ends the answer, and is part of it; None is the checkpoint's own.

    Returns:
        ids (1, P + new); with ``return_stats`` a pair of these and a dictionary with ``nfe`` (the published count: the
        prompt's forward is that of the first token) and ``decoding_order``.
    """
    return _decode("ar", arguments)


@published(
    "max_new_tokens=128 block_length=32 threshold=None causal_context=True temperature=0.0 eos_token_id=None "
    "random_source='torch' schedule='reference' return_stats=True"
)
def generate(arguments: dict[str, Any]) -> Any:
    """Continue one prompt block by block: a block's first token is the autoregressive choice, the rest is denoised
    (Nemotron-Labs-Diffusion).

    Args:
        model: what :func:`s2d2_lmeval.load` returns, or a Ministral3 model of transformers with these weights.
        max_new_tokens: a multiple of ``block_length``, as published.
        threshold: fill every mask above this probability, and the best one; None: one per step.
        causal_context: False, under which the prompt and finished blocks see all of themselves, is refused.
        temperature: zero is the argmax; a draft's confidence is its probability at temperature one.
        eos_token_id: ends the answer, and is part of it; None is the checkpoint's own.

    Returns:
        ids (1, P + new); with ``return_stats`` a pair of these and a dictionary with ``nfe`` (without the prompt's
        forward, as published) and ``decoding_order``.
    """
    if not arguments.pop("causal_context"):
        raise ConfigError("causal_context=False is not decoded here: these models are trained with a causal context.")
    if arguments["max_new_tokens"] % arguments["block_length"]:
        raise ConfigError(
            f"max_new_tokens={arguments['max_new_tokens']} is not a multiple of block_length="
            f"{arguments['block_length']}; give one that is, or use s2d2_lmeval.load(…).generate."
        )
    return _decode("static" if arguments["threshold"] is None else "dynamic", arguments)


@published(
    "max_new_tokens=128 block_length=32 temperature=0.0 threshold=0.0 eos_token_id=None random_source='torch' "
    "return_stats=True"
)
def linear_spec_generate(arguments: dict[str, Any]) -> Any:
    """Continue one prompt by linear self-speculation: draft a block, verify it, in turns (Nemotron-Labs-Diffusion).

    Args:
        model: what :func:`s2d2_lmeval.load` returns (with ``adapter=`` its draft LoRA), or a Ministral3 model of
            transformers with these weights.
        max_new_tokens: at least so many new tokens: as published, what the last verification accepted stays.
        threshold: probability from which a draft's mask is filled; 0: all of them in one forward.
        temperature: zero is the argmax.
        eos_token_id: ends the answer, and is part of it; None is the checkpoint's own.

    Returns:
        ids (1, P + new); with ``return_stats`` a pair of these and a dictionary with ``nfe``.
    """
    arguments["draft_threshold"] = arguments.pop("threshold")
    return _decode("linear_spec", arguments)


def _decode(decoder: str, arguments: Mapping[str, Any]) -> Any:
    """Run the engine on the published ``arguments``."""
    engine = ready(arguments["model"], family="nemotron_labs_diffusion", block_length=arguments.get("block_length"))
    stop, source, prompt = arguments["eos_token_id"], arguments["random_source"], one_prompt(arguments["input_ids"])
    stops = engine.facts.stop_token_ids if stop is None else (stop,)
    settings: dict[str, Any] = {"decoder": decoder, "stop_token_ids": stops, "trim_stop_tokens": False}
    if decoder in ("static", "dynamic"):
        settings |= {"cache_ver": True, "transfer_counts": "masks", "untempered_confidence": True}
        source = gumbel_draws(source, first_by_multinomial=True)
    config = config_of({**arguments, "random_source": source}, **settings)
    answer = engine.generate([prompt], config)[0]
    new = answer.token_ids
    if decoder == "linear_spec" and answer.finish_reason == "length":
        new = answer.canvas[len(prompt) :]
    ids = torch.tensor([prompt + new], device=arguments["input_ids"].device)
    if not arguments["return_stats"]:
        return ids
    nfe = int(answer.stats["nfe"]) - (decoder in ("static", "dynamic"))
    order = decided_positions(answer, len(prompt) + config.max_new_tokens)
    return ids, {"nfe": nfe, "decoding_order": order}
