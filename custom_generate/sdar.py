"""SDAR decoding under the published names: what the S2D2 and SDAR repositories export, run by this package's engine.

With the defaults ``random_source="torch"`` and ``schedule="reference"`` ids, forwards and decoding order equal the
published code's for the same seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from s2d2_lmeval.custom_generate.published import config_of, one_prompt, published, ready
from s2d2_lmeval.decoding.generation import Generation
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.errors import ConfigError

DECODER_OF_STRATEGY = {
    "sequential": "sequential",
    "low_confidence_static": "static",
    "low_confidence_dynamic": "dynamic",
    "entropy_bounded": "entropy_bounded",
}


@published(
    "attention_mask=None mask_id=None gen_length=128 max_gen_toks=None block_length=8 denoising_steps=8 "
    "temperature=1.0 top_k=0 top_p=1.0 remasking_strategy='low_confidence_dynamic' confidence_threshold=0.85 "
    "eb_threshold=None stopping_criteria_idx=None return_forward_stats=False do_sample=False trim_stop_tokens=True "
    "* random_source='torch' schedule='reference'"
)
def block_diffusion_generate_baseline(arguments: dict[str, Any]) -> Any:
    """Continue one prompt with one of SDAR's four remasking strategies, without verification.

    Where the published function writes over the prompt (more tokens per step than masks in the first block) or leaves
    masks behind (entropy_bounded with fewer steps than tokens), this one decodes what is masked, and all of it.

    Args:
        model: what :func:`s2d2_lmeval.load` returns, or an SDAR model of transformers (its weights are shared).
        gen_length, max_gen_toks: at least so many new tokens; the last block is filled up, so it may be up to
            ``block_length - 1`` more. ``max_gen_toks`` wins.
        stopping_criteria_idx: token ids that end the answer once their block is finished; None means none.

    Returns:
        ids (1, P + new); with ``return_forward_stats`` a pair of these and ``decoding_order`` and
        ``total_forward_steps``.
    """
    strategy = arguments.pop("remasking_strategy")
    if strategy not in DECODER_OF_STRATEGY:
        raise ConfigError(f"remasking_strategy={strategy!r} is not one of: {', '.join(DECODER_OF_STRATEGY)}.")
    return _decode(DECODER_OF_STRATEGY[strategy], arguments)


@published(
    "cache_ver draft_ver min_ssd_span_length ssd_ratio_tempering_factor ssd_ratio_threshold ssd_threshold_all_spans "
    "always_check_high_confidence legacy_ssd_span_strategy allow_resample do_verify_policy do_verify_score_threshold "
    "hysteresis_threshold_on hysteresis_threshold_off token_acceptance_estimator ssd_confidence_margin_threshold "
    "ssd_confidence_power ssd_entropy_threshold ssd_confidence_margin_coef ssd_entropy_temperature ucb_beta "
    "ucb_span_length_bins ucb_block_progress_bins ucb_entropy_bins ucb_entropy_source do_verify_score_type "
    "score_penalty_coef",
    extends=block_diffusion_generate_baseline,
)
def block_diffusion_generate(arguments: dict[str, Any]) -> Any:
    """Continue one prompt with S2D2: the model drafts a block and verifies it at block size one (arXiv 2603.25702)."""
    return _decode("s2d2", arguments)


def _decode(decoder: str, arguments: Mapping[str, Any]) -> torch.Tensor | tuple[torch.Tensor, dict[str, Any]]:
    """Run the engine on the published ``arguments``."""
    prompt = one_prompt(arguments["input_ids"])
    config = config_of(
        arguments,
        by_temperature=False,
        decoder=decoder,
        stop_token_ids=tuple(arguments["stopping_criteria_idx"] or ()),
        denoising_steps=min(arguments["denoising_steps"], arguments["block_length"]),  # more have nothing left to do
        collapse_entropy=True,  # the published formula of entropy_bounded: one entropy for the whole block
    )
    mask = arguments["mask_id"]
    engine = ready(arguments["model"], family="sdar", mask_token_id=mask, block_length=config.block_length)
    generation = engine.generate([prompt], config)[0]
    tokens = _as_published(generation, len(prompt), config, engine.facts.mask_token_id)
    ids = torch.tensor([tokens], device=arguments["input_ids"].device)
    if not arguments["return_forward_stats"]:
        return ids
    order: Sequence[Any] = generation.decoding_order
    if config.decoder == "sequential":
        order = _planned_order(order, config)
    return ids, {"decoding_order": order, "total_forward_steps": int(generation.stats["nfe"])}


def _planned_order(decoding_order: Sequence[Any], config: DecodingConfig) -> list[list[Any]]:
    """As published, a sequential step lists as many positions as it planned, even past the end of its block."""
    assert config.denoising_steps is not None
    whole, rest = divmod(config.block_length, config.denoising_steps)
    planned: list[list[Any]] = []
    step = 0
    for entry in decoding_order:
        begins = entry[0] == "|"
        step = 0 if begins else step + 1
        first = entry[int(begins)]
        planned.append(entry[: int(begins)] + list(range(first, first + whole + (step < rest))))
    return planned


def _as_published(generation: Generation, prompt: int, config: DecodingConfig, mask: int) -> list[int]:
    """Prompt and answer up to the first stop token, exclusive, without masks at the end; untrimmed the whole canvas."""
    canvas = generation.canvas
    if not config.trim_stop_tokens:
        total = -(-(prompt + config.max_new_tokens) // config.block_length) * config.block_length
        return canvas + [mask] * (total - len(canvas))
    stop = next((i for i in range(prompt, len(canvas)) if canvas[i] in config.stop_token_ids), len(canvas))
    while stop > prompt and canvas[stop - 1] == mask:
        stop -= 1
    return canvas[:stop]
