"""LLaDA2 decoding under the published names, run by this package's engine.

``generate_cached``      block denoising with token editing (LLaDA2)
``generate_ssd_policy``  the same with S2D2: the model drafts a block and verifies it at block size one

Both take the published arguments with the published defaults and answer as published: a pair of ids ``(1, P + new)``
and ``{"nfe"}`` (with ``record_decoding_order=True`` also ``"decoding_order"``), and with ``return_stats=False`` the ids
alone. With the defaults ``random_source="torch"`` and ``schedule="reference"`` ids, forwards and decoding order equal
the published code's for the same seed, given that its block-causal mask masks: as published it only biases the scores
of a prompt's forward, and blocks of the prompt see later ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from s2d2_lmeval.custom_generate.calling import FIELDS, decoding_options, one_prompt, ready
from s2d2_lmeval.decoding.options.config import DecodingConfig


def generate_cached(
    model: Any,
    input_ids: torch.Tensor,
    *,
    mask_id: int | None = None,
    eos_id: int | None = 156892,
    gen_length: int = 2048,
    max_gen_toks: int | None = None,
    block_length: int = 32,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    threshold: float = 0.95,
    editing_threshold: float = 0.9,
    max_post_steps: int = 16,
    num_to_transfer: int = 1,
    eos_early_stop: bool = False,
    record_decoding_order: bool = False,
    return_stats: bool = True,
    random_source: Any = "torch",
    schedule: str = "reference",
    **kwargs: Any,
) -> Any:
    """Continue one prompt by block denoising with token editing (LLaDA2.1).

    Args:
        model: what :func:`s2d2_lmeval.load` returns, or a Glm4Moe model of transformers with LLaDA2 weights (its
            weights are shared). A model of the published code holds them in another shape: load it by its path.
        input_ids: the prompt, (1, P).
        mask_id: None is the checkpoint's own (156895 for the published ones).
        eos_id: the token that the answer is cut behind; None cuts nowhere.
        gen_length, max_gen_toks: new tokens at most; ``max_gen_toks`` wins.
        temperature: zero is the arg-max, at temperature one's confidence; anything above it samples, after top-k and
            top-p (None: off).
        threshold: every mask above this confidence is filled, and ``num_to_transfer`` at least.
        editing_threshold: a decided token of the open block gives way to another above this confidence.
        max_post_steps: steps that may still edit a block without masks, until one changes nothing.
        eos_early_stop: end with the block that holds ``eos_id``; otherwise all of the length is decoded, then cut.
        random_source: ``torch`` (the global generator, in the published order), ``fixed``, ``keyed``, or an object with
            ``uniform(n)`` and ``categorical(probabilities)``.
        schedule: ``reference`` (a forward per prefill, draft, verification and commit) or ``fused`` (same ids, fewer
            forwards: as many as the published code takes without a cache).
        kwargs: what an evaluation harness hands to every model is taken and has no effect. Every other name is a
            decoding option.

    Returns:
        ids (1, P + new), the end token included, and a dictionary with ``nfe`` and, where it was asked for,
        ``decoding_order``: per step ``{"edit": [(position, old, new)], "unmask": [...]}``, in it ``p`` for a mask
        filled by confidence, ``-p`` accepted, ``-p - 0.5`` resampled.

    Raises:
        ConfigError: a name that is no decoding option, or a value out of range.
        RequestError: not exactly one prompt, or a prompt that cannot be decoded.
    """
    arguments = dict(locals())
    return _decode("editing", arguments, kwargs)


def generate_ssd_policy(
    model: Any,
    input_ids: torch.Tensor,
    *,
    mask_id: int | None = None,
    eos_id: int | None = 156892,
    gen_length: int = 2048,
    max_gen_toks: int | None = None,
    block_length: int = 32,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    threshold: float = 0.95,
    editing_threshold: float = 0.9,
    max_post_steps: int = 16,
    num_to_transfer: int = 1,
    eos_early_stop: bool = False,
    min_ssd_span_length: int = 1,
    legacy_ssd_span_strategy: bool = False,
    ssd_ratio_tempering_factor: float = 1.0,
    do_verify_policy: str = "mask_span_length",
    do_verify_score_threshold: float = 0.0,
    hysteresis_threshold_on: float = 0.0,
    hysteresis_threshold_off: float = -1.0,
    do_verify_score_type: str = "difference_dynamic",
    score_penalty_coef: float = 2.0,
    token_acceptance_estimator: str = "hard_margin_threshold",
    ssd_confidence_margin_threshold: float = 0.05,
    ssd_entropy_temperature: float = 1.0,
    record_decoding_order: bool = False,
    return_stats: bool = True,
    random_source: Any = "torch",
    schedule: str = "reference",
    **kwargs: Any,
) -> Any:
    """Continue one prompt with S2D2 (arXiv 2603.25702).

    Arguments and answer are those of :func:`generate_cached`, and S2D2's own options. Verification fills masks; only
    drafts edit.
    """
    arguments = dict(locals())
    return _decode("s2d2", arguments, kwargs)


def _decode(decoder: str, arguments: Mapping[str, Any], kwargs: Mapping[str, Any]) -> Any:
    """Run the engine on the published ``arguments``."""
    prompt = one_prompt(arguments["input_ids"])
    length, eos = arguments["max_gen_toks"], arguments["eos_id"]
    temperature = float(arguments["temperature"] or 0.0)
    config = DecodingConfig(
        **{
            **{name: value for name, value in arguments.items() if name in FIELDS},
            "decoder": decoder,
            "max_new_tokens": arguments["gen_length"] if length is None else length,
            "confidence_threshold": arguments["threshold"],
            "stop_token_ids": () if eos is None else (eos,),
            "trim_stop_tokens": False,
            "do_sample": temperature > 0,
            "temperature": temperature,
            "top_k": arguments["top_k"] or 0,
            "top_p": 1.0 if arguments["top_p"] is None else arguments["top_p"],
            "suppress_mask_token": False,  # the published code may predict the mask
        }
    )
    config = config.replace(**decoding_options(kwargs, temperature=temperature))
    engine = ready(
        arguments["model"], family="llada2", mask_token_id=arguments["mask_id"], block_length=config.block_length
    )
    answer = engine.generate([prompt], config)[0]
    ids = torch.tensor([prompt + answer.token_ids], device=arguments["input_ids"].device)
    if not arguments["return_stats"]:
        return ids
    statistics: dict[str, Any] = {"nfe": int(answer.stats["nfe"])}
    if arguments["record_decoding_order"]:
        statistics["decoding_order"] = answer.decoding_order
    return ids, statistics
