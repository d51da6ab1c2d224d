"""LLaDA2 decoding under the published names, run by this package's engine.

With the defaults ``random_source="torch"`` and ``schedule="reference"`` ids, forwards and decoding order equal the
published code's for the same seed, given that its block-causal mask masks: as published it only biases the scores of a
prompt's forward, and blocks of the prompt see later ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from s2d2_lmeval.custom_generate.published import config_of, one_prompt, published, ready


@published(
    "* mask_id=None eos_id=156892 gen_length=2048 max_gen_toks=None block_length=32 temperature=0.0 top_k=None "
    "top_p=None threshold=0.95 editing_threshold=0.9 max_post_steps=16 num_to_transfer=1 eos_early_stop=False "
    "record_decoding_order=False return_stats=True random_source='torch' schedule='reference'"
)
def generate_cached(arguments: dict[str, Any]) -> Any:
    """Continue one prompt by block denoising with token editing (LLaDA2.1).

    Args:
        model: what :func:`s2d2_lmeval.load` returns, or a Glm4Moe model of transformers with LLaDA2 weights (its
            weights are shared). A model of the published code holds them in another shape: load it by its path.
        eos_id: the token that the answer is cut after; None cuts nowhere.
        gen_length, max_gen_toks: maximum number of new tokens; ``max_gen_toks`` wins.
        temperature: zero is the argmax, at temperature one's confidence; anything above it samples, after top-k and
            top-p (None: off).
        threshold: every mask above this confidence is filled, and at least ``num_to_transfer``.
        eos_early_stop: end with the block that holds ``eos_id``; otherwise all of the length is decoded, then cut.
        record_decoding_order, return_stats: what is answered besides the ids; nothing without ``return_stats``.

    Returns:
        ids (1, P + new), the end token included, and a dictionary with ``nfe`` and, where it was asked for,
        ``decoding_order``: per step ``{"edit": [(position, old, new)], "unmask": [...]}``, in it ``p`` for a mask
        filled by confidence, ``-p`` accepted, ``-p - 0.5`` resampled.
    """
    return _decode("editing", arguments)


@published(
    "min_ssd_span_length legacy_ssd_span_strategy ssd_ratio_tempering_factor do_verify_policy hysteresis_threshold_on "
    "hysteresis_threshold_off do_verify_score_type score_penalty_coef token_acceptance_estimator "
    "ssd_confidence_margin_threshold ssd_entropy_temperature do_verify_score_threshold=0.0",
    extends=generate_cached,
)
def generate_ssd_policy(arguments: dict[str, Any]) -> Any:
    """Continue one prompt with S2D2: the model drafts a block and verifies it at block size one (arXiv 2603.25702).

    Verification fills masks; only drafts edit.
    """
    return _decode("s2d2", arguments)


def _decode(decoder: str, arguments: Mapping[str, Any]) -> Any:
    """Run the engine on the published ``arguments``."""
    prompt, eos, mask = one_prompt(arguments["input_ids"]), arguments["eos_id"], arguments["mask_id"]
    stops = () if eos is None else (eos,)
    config = config_of(arguments, decoder=decoder, stop_token_ids=stops, trim_stop_tokens=False)
    engine = ready(arguments["model"], family="llada2", mask_token_id=mask, block_length=config.block_length)
    answer = engine.generate([prompt], config)[0]
    ids = torch.tensor([prompt + answer.token_ids], device=arguments["input_ids"].device)
    if not arguments["return_stats"]:
        return ids
    order = {"decoding_order": answer.decoding_order} if arguments["record_decoding_order"] else {}
    return ids, {"nfe": int(answer.stats["nfe"]), **order}
