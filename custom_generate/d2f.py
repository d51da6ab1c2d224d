"""D2F decoding under the published names, for LLaDA and Dream with D2F adapters, run by this package's engine.

With the defaults ``random_source="torch"`` and ``schedule="reference"`` ids, forwards and decoding order equal the
published code's for the same seed; for Dream, those of the published code with its attention masks passed on (as
published, Dream drops them).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from s2d2_lmeval.custom_generate.published import config_of, one_prompt, published, ready
from s2d2_lmeval.decoding.generation import Generation
from s2d2_lmeval.errors import ConfigError


@published(
    "* max_length=... max_new_tokens=... block_size=... mask_token_id=... model_type='llada' eos_token_id=None "
    "device=None dtype=None temperature=0.0 top_p=None top_k=None block_add_threshold=0.1 decoded_token_threshold=0.5 "
    "skip_threshold=0.9 margin_confidence=False neg_entropy=False shift_logits=None return_forward_stats=False "
    "include_prompt=False random_source='torch' schedule='reference'"
)
def generate_block_single(arguments: dict[str, Any]) -> Any:
    """Continue one prompt with pipelined blocks, decided by confidence (D2F, arXiv 2508.09192).

    Args:
        model: the result of :func:`s2d2_lmeval.load`, or a LLaDA or Dream model of transformers (its weights are
            shared) with the adapter merged.
        max_length, max_new_tokens: maximum positions of prompt and answer together, and maximum new tokens; whole
            blocks only.
        block_size, mask_token_id: as trained: 32, and 126336 (LLaDA) or 151666 (Dream).
        model_type: ``llada`` or ``dream``; must be what the model is.
        eos_token_id: token ids after which no further block opens; the answer ends before the first. None means none.
        temperature, top_p, top_k: zero drafts the argmax; the filters then only affect its probability.
        shift_logits: None, or the model's own value.
        include_prompt: return ids (1, P + new), as evaluation harnesses expect.
        schedule: ``reference``, or ``fused``, which stops at once when the answer is decided (same ids).
        device, dtype: accepted without effect; the model's own are used.

    Returns:
        the new ids (new,) without the stop token; with ``return_forward_stats`` a pair of these and ``decoding_order``,
        ``total_forwards`` and what was published about blocks.
    """
    return _decode("pipelined", arguments)


@published(
    "draft_confidence_threshold verify_confidence_threshold min_tokens_per_step target_block_size ssd_partial_ar_span "
    "ssd_threshold_draft_confidence ssd_ratio_tempering_factor min_ssd_span_length allow_resample cache_ver=False "
    "draft_ver=False",
    extends=generate_block_single,
)
def generate_block_speculative(arguments: dict[str, Any]) -> Any:
    """Continue one prompt with S2D2 on pipelined blocks: the model drafts the open blocks and verifies the first run of
    masks (arXiv 2603.25702).

    Args:
        cache_ver, draft_ver: must be equal, and have no effect, as published.
    """
    if arguments.pop("cache_ver") != arguments.pop("draft_ver"):
        raise ConfigError("cache_ver and draft_ver must be equal; on pipelined blocks neither has an effect.")
    arguments["min_tokens_per_step"] = max(arguments["min_tokens_per_step"] or 1, 1)
    arguments["ssd_partial_ar_span"] = max(arguments["ssd_partial_ar_span"] or 0, 0)
    arguments["min_ssd_span_length"] = max(arguments["min_ssd_span_length"], 0)
    return _decode("s2d2", arguments)


def _decode(decoder: str, arguments: dict[str, Any]) -> torch.Tensor | tuple[torch.Tensor, dict[str, Any]]:
    """Run the engine on the published ``arguments``."""
    prompt, block, stops = one_prompt(arguments["input_ids"]), arguments["block_size"], arguments["eos_token_id"]
    more = dict(arguments["kwargs"])
    budget = more.pop("max_gen_toks", arguments["max_new_tokens"])
    config = config_of(
        {**arguments, "kwargs": more},
        decoder=decoder,
        max_new_tokens=0,
        stop_token_ids=(stops,) if isinstance(stops, int) else tuple(stops or ()),
        nucleus_first=True,  # the published order of the filters
    )
    blocks = min(budget, arguments["max_length"] - len(prompt)) // block
    config = config.replace(max_new_tokens=max(blocks, 0) * block)
    family, mask = str(arguments["model_type"] or "llada").lower(), arguments["mask_token_id"]
    engine = ready(arguments["model"], family=family, mask_token_id=mask, block_length=config.block_length)
    if engine.facts.family != family:
        raise ConfigError(f"model_type={family} is not what this model is; give model_type={engine.facts.family}.")
    if arguments["shift_logits"] not in (None, engine.facts.token_shift):
        raise ConfigError(f"shift_logits={arguments['shift_logits']} is not true of {family} models; leave it out.")
    generation = engine.generate([prompt], config)[0]
    ids = torch.tensor(generation.token_ids, dtype=torch.long, device=arguments["input_ids"].device)
    if arguments["include_prompt"]:
        ids = torch.cat([arguments["input_ids"], ids.unsqueeze(0)], dim=1)
    return (ids, _statistics(generation, len(prompt), block)) if arguments["return_forward_stats"] else ids


def _statistics(generation: Generation, prompt: int, block: int) -> dict[str, Any]:
    """The published statistics. A forward covers what its predecessor left without keys; blocks count from 1, the
    prompt is block 0; a block is active while it, or one before it, has masks.
    """
    forwards: Counter[int] = Counter()
    active = covered = active_before = 0
    keys, end = 0, prompt
    drafts = [step for step in generation.steps if step.kind == "draft"]
    for step in drafts:
        active_before += (end - step.start) // block
        end = step.start + len(step.before)
        first = (keys - prompt) // block + 1 if keys >= prompt else 0
        forwards.update(range(first, (end - prompt) // block + 1))
        active += len(step.before) // block
        covered += (end - keys) // block
        keys = step.start
    total, iterations = int(generation.stats["nfe"]), len(drafts) + 1
    counts = [count for number, count in forwards.items() if number]
    return {
        "per_block_forwards": dict(sorted(forwards.items())),
        "average_forwards_excluding_prompt": sum(counts) / len(counts) if counts else 0.0,
        "total_forwards": total,
        "avg_forwards_per_block": total / max(1, len(counts)),
        "avg_active_blocks_per_forward": active / max(1, total),
        "avg_active_blocks_per_step": active_before / iterations,
        "avg_forwarded_blocks_per_forward": covered / max(1, total),
        "decoding_order": generation.decoding_order,
    }
