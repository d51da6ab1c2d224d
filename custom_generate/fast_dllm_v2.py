"""Fast-dLLM v2 decoding under the published names, run by this package's engine.

With the defaults ``random_source="torch"`` and ``schedule="reference"`` ids, forwards and decoding order equal the
published code's for the same seed. A prompt of exactly one block, which the published code loses, is decoded like any
other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from s2d2_lmeval.custom_generate.published import config_of, one_prompt, published, ready
from s2d2_lmeval.errors import ConfigError


@published(
    "* max_new_tokens=None max_gen_toks=None max_length=None tokenizer=None mask_id=None threshold=1.0 "
    "small_block_size=8 block_size=32 stop_token=151645 stopping_criteria=None top_p=0.95 temperature=0.0 "
    "use_block_cache=False return_decoding_order=False return_dict_in_generate=False output_scores=False "
    "output_hidden_states=False use_attention_mask=False random_source='torch' schedule='reference'"
)
def generate(arguments: dict[str, Any]) -> Any:
    """Continue one prompt by threshold decoding of sub-blocks (Fast-dLLM v2, arXiv 2509.26328).

    Args:
        model: what :func:`s2d2_lmeval.load` returns, or a Qwen2 model of transformers with Fast-dLLM v2 weights (its
            weights are shared).
        max_new_tokens, max_gen_toks, max_length: how much to decode, as published: whole blocks only.
            ``max_new_tokens // block_size`` blocks from the one that the prompt ends in, and one token after them;
            ``max_gen_toks`` wins, and ``max_length`` counts the prompt in.
        threshold: every mask of the sub-block above this probability is decided in a step, and the most confident one.
        stop_token: ends the answer once everything before it is decided; it is part of the answer.
        temperature, top_p: zero drafts the argmax; ``top_p`` then filters only the verifier and what routing looks at.
        return_decoding_order, return_dict_in_generate: how to answer; see below.
        output_scores, output_hidden_states: refused, for the engine keeps neither.
        tokenizer, stopping_criteria, use_attention_mask: taken, as published, and without effect.

    Returns:
        ids (1, P + new), in a ``GenerateDecoderOnlyOutput`` with ``return_dict_in_generate``; with
        ``return_decoding_order`` a pair of that and ``decoding_order`` and ``total_forward_steps``.
    """
    return _decode("dynamic", arguments)


@published(
    "ssd_ratio_tempering_factor min_ssd_span_length allow_resample cache_ver draft_ver do_verify_policy "
    "hysteresis_threshold_on hysteresis_threshold_off token_acceptance_estimator ssd_confidence_margin_threshold "
    "ssd_entropy_temperature ucb_beta ucb_span_length_bins ucb_block_progress_bins ucb_entropy_bins ucb_entropy_source "
    "do_verify_score_type score_penalty_coef do_verify_score_threshold=0.0 use_ssd_cache=False",
    extends=generate,
)
def generate_ssd_policy(arguments: dict[str, Any]) -> Any:
    """Continue one prompt with S2D2: the model drafts a sub-block and verifies it at block size one (arXiv 2603.25702).

    Where the published function goes wrong, this one does what the option says: with ``use_block_cache`` a sub-block
    begins with a whole forward, and with ``draft_ver`` the rows before the block's first mask are causal in every
    sub-block.

    Args:
        use_ssd_cache: in name only: without effect, and refused with ``use_block_cache``, as published.
    """
    if arguments["use_ssd_cache"] and arguments["use_block_cache"]:
        raise ConfigError("use_ssd_cache was never implemented; leave it out.")
    return _decode("s2d2", arguments)


def _decode(decoder: str, arguments: Mapping[str, Any]) -> Any:
    """Run the engine on the published ``arguments``."""
    if arguments["output_scores"] or arguments["output_hidden_states"]:
        raise ConfigError("output_scores and output_hidden_states are not available: the engine keeps neither.")
    prompt, mask = one_prompt(arguments["input_ids"]), arguments["mask_id"]
    config = config_of(
        arguments,
        decoder=decoder,
        max_new_tokens=_budget(arguments, len(prompt)),
        stop_token_ids=(arguments["stop_token"],),
        trim_stop_tokens=False,
        temperature=float(arguments["temperature"] or 1.0),  # at zero only the draft is the argmax
    )
    engine = ready(arguments["model"], family="fast_dllm_v2", mask_token_id=mask, block_length=config.block_length)
    answer = engine.generate([prompt], config)[0]
    ids = torch.tensor([prompt + answer.token_ids], device=arguments["input_ids"].device)
    out = GenerateDecoderOnlyOutput(sequences=ids) if arguments["return_dict_in_generate"] else ids
    if not arguments["return_decoding_order"]:
        return out
    return out, {"decoding_order": answer.decoding_order, "total_forward_steps": int(answer.stats["nfe"])}


def _budget(arguments: Mapping[str, Any], prompt: int) -> int:
    """New tokens of the published loop: whole blocks, less the prompt's part of the first, and the token after them."""
    budget = arguments["max_new_tokens"] if arguments["max_gen_toks"] is None else arguments["max_gen_toks"]
    if budget is None and arguments["max_length"] is not None:
        budget = arguments["max_length"] - prompt
    if budget is None:
        raise ConfigError("Give max_new_tokens (or max_gen_toks, or max_length): how much is there to decode?")
    block = arguments["block_size"]
    return max(0, int(budget) // block * block + 1 - prompt % block)
