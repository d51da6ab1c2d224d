"""SDAR decoding under the published names: what the S2D2 and SDAR repositories export, run by this package's engine.

``block_diffusion_generate``           S2D2: the model drafts a block and verifies it at block size one
``block_diffusion_generate_baseline``  the four remasking strategies without verification

Both take the published arguments with the published defaults and answer as published. With the defaults
``random_source="torch"`` and ``schedule="reference"`` ids, forwards and decoding order equal the published code's for
the same seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from s2d2_lmeval.custom_generate.calling import config_of, decoding_options, one_prompt, ready
from s2d2_lmeval.custom_generate.signatures import documented, extends
from s2d2_lmeval.decoding.generation import Generation
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.errors import ConfigError

DECODER_OF_STRATEGY = {
    "sequential": "sequential",
    "low_confidence_static": "static",
    "low_confidence_dynamic": "dynamic",
    "entropy_bounded": "entropy_bounded",
}


@documented
def block_diffusion_generate_baseline(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    mask_id: int | None = None,
    gen_length: int = 128,
    max_gen_toks: int | None = None,
    block_length: int = 8,
    denoising_steps: int = 8,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    remasking_strategy: str = "low_confidence_dynamic",
    confidence_threshold: float = 0.85,
    eb_threshold: float | None = None,
    stopping_criteria_idx: Sequence[int] | None = None,
    return_forward_stats: bool = False,
    do_sample: bool = False,
    trim_stop_tokens: bool = True,
    *,
    random_source: Any = "torch",
    schedule: str = "reference",
    **kwargs: Any,
) -> torch.Tensor | tuple[torch.Tensor, dict[str, Any]]:
    """Continue one prompt with one of SDAR's remasking strategies.

    Where the published function writes over the prompt (more tokens per step than masks in the first block) or leaves
    masks behind (entropy_bounded with fewer steps than tokens), this one decodes what is masked, and all of it.

    Args:
        model: what :func:`s2d2_lmeval.load` returns, or an SDAR model of transformers (its weights are shared).
        gen_length, max_gen_toks: new tokens at least; the last block is filled up, so it may be up to
            ``block_length - 1`` more. ``max_gen_toks`` wins.
        stopping_criteria_idx: token ids that end the answer once their block is finished; None means none.

    Returns:
        ids (1, P + new); with ``return_forward_stats`` a pair of these and ``decoding_order`` and
        ``total_forward_steps``.

    Raises:
        ConfigError: a name that is no decoding option, or a value that is out of range.
        RequestError: not exactly one prompt, or a prompt that cannot be decoded.
    """
    arguments = dict(locals())
    if remasking_strategy not in DECODER_OF_STRATEGY:
        known = ", ".join(DECODER_OF_STRATEGY)
        raise ConfigError(f"remasking_strategy={remasking_strategy!r} is not one of: {known}.")
    return _decode(DECODER_OF_STRATEGY[arguments.pop("remasking_strategy")], arguments)


@extends(
    block_diffusion_generate_baseline,
    "cache_ver draft_ver min_ssd_span_length ssd_ratio_tempering_factor ssd_ratio_threshold ssd_threshold_all_spans "
    "always_check_high_confidence legacy_ssd_span_strategy allow_resample do_verify_policy do_verify_score_threshold "
    "hysteresis_threshold_on hysteresis_threshold_off token_acceptance_estimator ssd_confidence_margin_threshold "
    "ssd_confidence_power ssd_entropy_threshold ssd_confidence_margin_coef ssd_entropy_temperature ucb_beta "
    "ucb_span_length_bins ucb_block_progress_bins ucb_entropy_bins ucb_entropy_source do_verify_score_type "
    "score_penalty_coef",
)
def block_diffusion_generate(arguments: dict[str, Any]) -> torch.Tensor | tuple[torch.Tensor, dict[str, Any]]:
    """Continue one prompt with S2D2 (arXiv 2603.25702)."""
    return _decode("s2d2", arguments)


def _decode(decoder: str, arguments: Mapping[str, Any]) -> torch.Tensor | tuple[torch.Tensor, dict[str, Any]]:
    """Run the engine on the published ``arguments``."""
    prompt = one_prompt(arguments["input_ids"])
    config = config_of(
        arguments,
        decoder=decoder,
        stop_token_ids=tuple(arguments["stopping_criteria_idx"] or ()),
        denoising_steps=min(arguments["denoising_steps"], arguments["block_length"]),  # more have nothing left to do
        collapse_entropy=True,  # the published formula of entropy_bounded: one entropy for the whole block
    ).replace(**decoding_options(arguments["kwargs"]))
    engine = ready(
        arguments["model"], family="sdar", mask_token_id=arguments["mask_id"], block_length=config.block_length
    )
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
