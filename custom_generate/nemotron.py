"""Nemotron-Labs-Diffusion's three decoders under their published names, run by this package's engine.

With the defaults ``random_source="torch"`` and ``schedule="reference"`` ids and forwards equal the published code's for
the same seed. The engine's own way to the output of ``ar_generate`` and ``linear_spec_generate`` is
``decoder=sliding``: verification and the next draft in one forward. With a budget for thoughts, published
self-speculation leaves the token that ends them out of the text and forces it again every round; here it comes once.
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
from s2d2_lmeval.decoding.generation import Generation
from s2d2_lmeval.errors import ConfigError


@published(
    "max_new_tokens=128 temperature=0.0 eos_token_id=None max_thinking_tokens=None end_think_token_id=None "
    "random_source='torch' return_stats=True"
)
def ar_generate(arguments: dict[str, Any]) -> Any:
    """Continue one prompt token by token (Nemotron-Labs-Diffusion).

    Args:
        model: what :func:`s2d2_lmeval.load` returns, or a Ministral3 model of transformers with these weights.
        temperature: zero is the argmax.
        eos_token_id: ends the answer, and is part of it; None is the checkpoint's own.
        max_thinking_tokens: if ``end_think_token_id`` is not among so many tokens, it comes next.

    Returns:
        ids (1, P + new); with ``return_stats`` a pair of these and a dictionary with ``nfe`` (the published count: the
        prompt's forward is that of the first token) and ``decoding_order``.
    """
    return _within_budget("ar", arguments)


@published(
    "max_new_tokens=128 block_length=32 threshold=None causal_context=True temperature=0.0 eos_token_id=None "
    "max_thinking_tokens=None end_think_token_id=None random_source='torch' schedule='reference' return_stats=True"
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
        max_thinking_tokens: where this many end, ``end_think_token_id`` is put into the block, unless it came earlier.

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
    "max_new_tokens=128 block_length=32 temperature=0.0 threshold=0.0 eos_token_id=None max_thinking_tokens=None "
    "end_think_token_id=None random_source='torch' return_stats=True"
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
        max_thinking_tokens: if ``end_think_token_id`` is not among so many tokens, it comes next.

    Returns:
        ids (1, P + new); with ``return_stats`` a pair of these and a dictionary with ``nfe``.
    """
    arguments["draft_threshold"] = arguments.pop("threshold")
    return _within_budget("linear_spec", arguments)


def _within_budget(decoder: str, arguments: dict[str, Any]) -> Any:
    """:func:`_decode`, and again after the token that ends thoughts where their budget ran out without it."""
    budget, end = arguments.pop("max_thinking_tokens"), arguments.pop("end_think_token_id")
    if (budget is None) != (end is None):
        raise ConfigError("max_thinking_tokens and end_think_token_id go together: give both, or neither.")
    if budget is None or budget >= arguments["max_new_tokens"]:
        return _decode(decoder, arguments)
    prompt, left = one_prompt(arguments["input_ids"]), arguments["max_new_tokens"] - budget
    thoughts: list[int] = []
    nfe, stopped = 0, False
    if budget:
        answer = _answer(decoder, {**arguments, "max_new_tokens": budget}, prompt)
        thoughts, nfe, stopped = answer.token_ids, int(answer.stats["nfe"]), answer.finish_reason == "stop"
    if not stopped and end not in thoughts:
        thoughts, nfe, left = [*thoughts, end], nfe + 1, left - 1
    if left and not stopped:
        answer = _answer(decoder, {**arguments, "max_new_tokens": left}, prompt + thoughts)
        thoughts, nfe = thoughts + _new(decoder, answer, len(prompt + thoughts)), nfe + int(answer.stats["nfe"])
    ids = torch.tensor([prompt + thoughts], device=arguments["input_ids"].device)
    return (ids, {"nfe": nfe}) if arguments["return_stats"] else ids


def _decode(decoder: str, arguments: Mapping[str, Any]) -> Any:
    """Run the engine on the published ``arguments``."""
    prompt = one_prompt(arguments["input_ids"])
    answer = _answer(decoder, arguments, prompt)
    ids = torch.tensor([prompt + _new(decoder, answer, len(prompt))], device=arguments["input_ids"].device)
    if not arguments["return_stats"]:
        return ids
    nfe = int(answer.stats["nfe"]) - (decoder in ("static", "dynamic"))
    order = decided_positions(answer, len(prompt) + arguments["max_new_tokens"])
    return ids, {"nfe": nfe, "decoding_order": order}


def _answer(decoder: str, arguments: Mapping[str, Any], prompt: list[int]) -> Generation:
    engine = ready(arguments["model"], family="nemotron_labs_diffusion", block_length=arguments.get("block_length"))
    stop, source = arguments["eos_token_id"], arguments["random_source"]
    stops = engine.facts.stop_token_ids if stop is None else (stop,)
    settings: dict[str, Any] = {"decoder": decoder, "stop_token_ids": stops, "trim_stop_tokens": False}
    if decoder in ("static", "dynamic"):
        settings |= {"cache_ver": True, "transfer_counts": "masks", "untempered_confidence": True}
        source = gumbel_draws(source, first_by_multinomial=True)
    config = config_of({**arguments, "random_source": source}, **settings)
    return engine.generate([prompt], config)[0]


def _new(decoder: str, answer: Generation, prompt: int) -> list[int]:
    """The tokens after ``prompt`` of them; of self-speculation also what the last round accepted beyond the limit."""
    overshoots = decoder == "linear_spec" and answer.finish_reason == "length"
    return answer.canvas[prompt:] if overshoots else answer.token_ids
