"""WeDLM's decoders under their published names, run by this package's engine.

With the default ``random_source="torch"`` ids, forwards and decoding order of :func:`generate` equal the published
engine's for the same seed; those of :func:`generate_wedlm` the published model's method, which draws nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from s2d2_lmeval.custom_generate.published import config_of, one_prompt, published, ready


@published(
    "max_tokens=64 temperature=0.2 top_k=0 top_p=1.0 wedlm_window_size=16 wedlm_entropy_threshold=0.4 "
    "wedlm_pos_penalty_factor=0.02 stop_token_ids=None mask_id=None random_source='torch' return_stats=True"
)
def generate(arguments: dict[str, Any]) -> Any:
    """Continue one prompt by streaming decoding of a reordered window (WeDLM).

    Args:
        model: what :func:`s2d2_lmeval.load` returns, or a Qwen3 or Qwen2 model of transformers with these weights.
        wedlm_window_size: places of the window.
        wedlm_entropy_threshold: fill every mask of less entropy (nats), and the lowest one.
        wedlm_pos_penalty_factor: entropy added per place after the window's first mask.
        stop_token_ids: tokens that end the answer, which holds the first of them; None is the checkpoint's own.

    Returns:
        ids (1, P + new); with ``return_stats`` a pair of these and a dictionary with ``nfe`` (without the prompt's
        forward, as published) and ``decoding_order``.
    """
    stops = arguments["stop_token_ids"]
    engine = ready(arguments["model"], family="wedlm", mask_token_id=arguments["mask_id"])
    prompt = one_prompt(arguments["input_ids"])
    config = config_of(
        arguments,
        decoder="reordered",
        block_length=arguments.pop("wedlm_window_size"),
        entropy_threshold=arguments.pop("wedlm_entropy_threshold"),
        position_penalty=arguments.pop("wedlm_pos_penalty_factor"),
        stop_token_ids=engine.facts.stop_token_ids if stops is None else tuple(stops),
        trim_stop_tokens=False,
    )
    answer = engine.generate([prompt], config)[0]
    ids = torch.tensor([prompt + answer.token_ids], device=arguments["input_ids"].device)
    if not arguments["return_stats"]:
        return ids
    return ids, {"nfe": int(answer.stats["decode_nfe"]), "decoding_order": answer.decoding_order}


@published(
    "max_new_tokens=... block_size=... mask_token_id=None confidence_threshold=0.0 temperature=1.0 top_p=1.0 top_k=0 "
    "return_stats=True"
)
def generate_wedlm(arguments: dict[str, Any]) -> Any:
    """Continue one prompt window by window, each filled by confidence before the next begins (WeDLM).

    Args:
        model: what :func:`s2d2_lmeval.load` returns, or a Qwen3 or Qwen2 model of transformers with these weights.
        max_new_tokens: that many; no token ends the answer, as published.
        block_size: places of a window.
        confidence_threshold: fill every mask of at least this probability, and the best one; 0: one per forward.
        temperature: rescales probabilities; tokens are the argmax at any temperature, as published.
        top_p, top_k: without effect, as published.

    Returns:
        ids (1, P + new); with ``return_stats`` a pair of these and a dictionary with ``nfe`` (the prompt runs with the
        first window, as published) and ``decoding_order``.
    """
    engine = ready(arguments["model"], family="wedlm", mask_token_id=arguments["mask_token_id"])
    prompt = one_prompt(arguments["input_ids"])
    config = config_of(
        {**arguments, "random_source": "fixed", "top_p": 1.0, "top_k": 0},
        decoder="reordered",
        whole_windows=True,
        stop_token_ids=(),
    )
    answer = engine.generate([prompt], config.replace(suppress_mask_token=True))[0]
    ids = torch.tensor([prompt + answer.token_ids], device=arguments["input_ids"].device)
    if not arguments["return_stats"]:
        return ids
    return ids, {"nfe": int(answer.stats["decode_nfe"]), "decoding_order": answer.decoding_order}
