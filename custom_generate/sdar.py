"""SDAR decoding under the published names: what the S2D2 and SDAR repositories export, run by this package's engine.

``block_diffusion_generate``           S2D2: the model drafts a block and verifies it at block size one
``block_diffusion_generate_baseline``  the four remasking strategies without verification

Both take the published arguments with the published defaults and answer as published: ids ``(1, P + new)``, and with
``return_forward_stats=True`` a pair of these ids and ``{"decoding_order", "total_forward_steps"}``. With the defaults
``random_source="torch"`` and ``schedule="reference"`` ids, forwards and decoding order equal the published code's for
the same seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from s2d2_lmeval.custom_generate.calling import FIELDS, decoding_options, one_prompt, ready
from s2d2_lmeval.decoding.generation import Generation
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.errors import ConfigError

DECODER_OF_STRATEGY = {
    "sequential": "sequential",
    "low_confidence_static": "static",
    "low_confidence_dynamic": "dynamic",
    "entropy_bounded": "entropy_bounded",
}


def block_diffusion_generate(
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
    cache_ver: bool = False,
    draft_ver: bool = False,
    min_ssd_span_length: int = 1,
    ssd_ratio_tempering_factor: float = 1.0,
    ssd_ratio_threshold: float = -1.0,
    ssd_threshold_all_spans: bool = False,
    always_check_high_confidence: bool = False,
    legacy_ssd_span_strategy: bool = False,
    allow_resample: bool = True,
    do_verify_policy: str = "mask_span_length",
    do_verify_score_threshold: float = -1.0,
    hysteresis_threshold_on: float = 0.0,
    hysteresis_threshold_off: float = -1.0,
    token_acceptance_estimator: str = "hard_margin_threshold",
    ssd_confidence_margin_threshold: float = 0.05,
    ssd_confidence_power: float = 1.0,
    ssd_entropy_threshold: float = 0.5,
    ssd_confidence_margin_coef: float = 1.0,
    ssd_entropy_temperature: float = 1.0,
    ucb_beta: float = 1.0,
    ucb_span_length_bins: int = 2,
    ucb_block_progress_bins: int = 2,
    ucb_entropy_bins: int = 2,
    ucb_entropy_source: str = "span",
    do_verify_score_type: str = "difference_dynamic",
    score_penalty_coef: float = 2.0,
    *,
    random_source: Any = "torch",
    schedule: str = "reference",
    **kwargs: Any,
) -> torch.Tensor | tuple[torch.Tensor, dict[str, Any]]:
    """Continue one prompt with S2D2 (arXiv 2603.25702).

    Args:
        model: what :func:`s2d2_lmeval.load` returns, or an SDAR model of transformers (its weights are shared).
        input_ids: the prompt, (1, P).
        mask_id: None is the checkpoint's own (151669 for those of JetLM).
        gen_length, max_gen_toks: new tokens at least; the last block is filled up, so it may be up to
            ``block_length - 1`` more. ``max_gen_toks`` wins.
        stopping_criteria_idx: token ids that end the answer once their block is finished; None means none.
        random_source: ``torch`` (the global generator, in the published order), ``fixed``, ``keyed``, or an object with
            ``uniform(n)`` and ``categorical(probabilities)``.
        schedule: ``reference`` (a forward per draft, verification and commit) or ``fused`` (same ids, fewer forwards).
        kwargs: what an evaluation harness hands to every model (``attention_mask``, ``use_cache``, ``pad_token_id``,
            ``stopping_criteria``, …) is taken and has no effect, as published. Every other name is a decoding option.

    Returns:
        ids (1, P + new); with ``return_forward_stats`` also ``decoding_order`` and ``total_forward_steps``.

    Raises:
        ConfigError: a name that is no decoding option, or a value that is out of range.
        RequestError: not exactly one prompt, or a prompt that cannot be decoded.
    """
    options = {name: value for name, value in locals().items() if name in FIELDS}
    length = gen_length if max_gen_toks is None else max_gen_toks
    return _decode(model, input_ids, mask_id, length, stopping_criteria_idx, options, kwargs, return_forward_stats)


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

    Arguments and answer are those of :func:`block_diffusion_generate`.
    Where the published function writes over the prompt (more tokens per step than masks in the first block) or leaves
    masks behind (entropy_bounded with fewer steps than tokens), this one decodes what is masked, and all of it.
    """
    if remasking_strategy not in DECODER_OF_STRATEGY:
        known = ", ".join(DECODER_OF_STRATEGY)
        raise ConfigError(f"remasking_strategy={remasking_strategy!r} is not one of: {known}.")
    options = {name: value for name, value in locals().items() if name in FIELDS}
    options["decoder"] = DECODER_OF_STRATEGY[options.pop("remasking_strategy")]
    length = gen_length if max_gen_toks is None else max_gen_toks
    return _decode(model, input_ids, mask_id, length, stopping_criteria_idx, options, kwargs, return_forward_stats)


def _decode(
    model: Any,
    input_ids: torch.Tensor,
    mask_id: int | None,
    length: int,
    stopping_criteria_idx: Sequence[int] | None,
    options: dict[str, Any],
    kwargs: Mapping[str, Any],
    return_forward_stats: bool,
) -> torch.Tensor | tuple[torch.Tensor, dict[str, Any]]:
    prompt = one_prompt(input_ids)
    config = DecodingConfig(
        **{
            **options,
            "max_new_tokens": length,
            "stop_token_ids": tuple(stopping_criteria_idx or ()),
            "denoising_steps": min(options["denoising_steps"], options["block_length"]),  # more have nothing left to do
            "suppress_mask_token": False,  # the published code may predict the mask
            "collapse_entropy": True,  # the published formula of entropy_bounded: one entropy for the whole block
        }
    ).replace(**decoding_options(kwargs))
    decoder = ready(model, family="sdar", mask_token_id=mask_id, block_length=config.block_length)
    generation = decoder.generate([prompt], config)[0]
    tokens = _as_published(generation, len(prompt), config, decoder.facts.mask_token_id)
    ids = torch.tensor([tokens], device=input_ids.device)
    if not return_forward_stats:
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
