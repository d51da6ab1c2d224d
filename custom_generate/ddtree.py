"""DFlash and DDTree under their published names: block-diffusion drafts for an autoregressive target.

Both complete one prompt with exactly the target's own distribution. With the defaults ``random_source="torch"`` and
``schedule="reference"`` tokens and acceptance lengths equal the published code's for the same seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from s2d2_lmeval.custom_generate.published import more_options, one_prompt, published, ready
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.model import BlockDiffusionModel

GREEDY = 1e-5
"""Temperatures below this are zero, as published."""


@dataclass(frozen=True)
class DraftedAnswer:
    """The return value of the published functions.

    ``output_ids`` (1, P + new), a stop token included; ``acceptance_lengths`` tokens per round of the target, its own
    included and nothing cut after a stop or the limit; ``stats`` this package's statistics.
    """

    output_ids: torch.Tensor
    num_input_tokens: int
    num_output_tokens: int
    acceptance_lengths: list[int]
    stats: dict[str, float]


@published(
    "mask_token_id=None max_new_tokens=2048 block_size=None stop_token_ids=None temperature=0.0 "
    "* draft=None random_source='torch' schedule='reference'"
)
def dflash_generate(arguments: dict[str, Any]) -> DraftedAnswer:
    """Continue one prompt with DFlash: the target verifies the drafter's argmax chain (arXiv 2602.06036).

    Args:
        model: what :func:`s2d2_lmeval.load` returns for a target with ``draft=``, or a transformers model.
        mask_token_id: None is the drafter's own; another is refused.
        block_size: positions of a drafted block, including the last decided token; None is the drafter's own. 1 drafts
            nothing.
        stop_token_ids: ids that end the answer and are part of it; None: no ids.
        temperature: of the target; the argmax below :data:`GREEDY`.
        draft: for a transformers model, the folder or hub id of its drafter.
        schedule: ``reference`` (a whole block is drafted in every round), or ``fused`` (not where nothing can come of
            it; the same tokens).

    Returns:
        a :class:`DraftedAnswer`.
    """
    return _decode("dflash", arguments)


@published("tree_budget=None", extends=dflash_generate)
def ddtree_generate(arguments: dict[str, Any]) -> DraftedAnswer:
    """Continue one prompt with DDTree: the target verifies the best tree of the same draft (arXiv 2604.12989).

    Args:
        tree_budget: nodes of a tree; as many as a chain has if None, ``auto`` for as many as pay on this machine.
    """
    return _decode("ddtree", arguments)


def _decode(decoder: str, arguments: Mapping[str, Any]) -> DraftedAnswer:
    prompt, model, draft = one_prompt(arguments["input_ids"]), arguments["model"], arguments["draft"]
    if draft is None and not isinstance(model, BlockDiffusionModel):
        raise ConfigError("a drafter is needed: give draft=…, the folder or hub id of one made for this model.")
    engine = ready(model, draft)
    drafter = engine.facts.drafter
    if drafter is None:
        raise ConfigError("this model has no drafter: load it with draft=…, or hand draft=… to this function.")
    if arguments["mask_token_id"] not in (None, drafter.mask_token_id):
        raise ConfigError(
            f"mask_token_id={arguments['mask_token_id']} is not the drafter's ({drafter.mask_token_id}); leave it out."
        )
    block = arguments["block_size"] or drafter.block_length
    decoder = "ar" if arguments["block_size"] == 1 else decoder
    options: dict[str, Any] = {} if decoder == "ar" else {"draft_block_size": block}
    if decoder == "ddtree":
        options["tree_budget"] = block - 1 if arguments["tree_budget"] is None else arguments["tree_budget"]
    budget, sampled = int(arguments["max_new_tokens"]), arguments["temperature"] >= GREEDY
    # The published loop continues until one token more than requested is decided.
    more = decoder != "ar" and len(prompt) + budget < engine.max_context
    config = DecodingConfig(
        **options,
        decoder=decoder,
        max_new_tokens=budget + more,
        stop_token_ids=tuple(arguments["stop_token_ids"] or ()),
        trim_stop_tokens=False,
        do_sample=sampled,
        temperature=arguments["temperature"] if sampled else 1.0,
        random_source=arguments["random_source"],
        schedule=arguments["schedule"],
    ).replace(**more_options(arguments, arguments["temperature"]))
    answer = engine.generate([prompt], config)[0]
    new = answer.token_ids[:budget]
    rounds = answer.steps[1:]
    return DraftedAnswer(
        output_ids=torch.tensor([prompt + new], device=arguments["input_ids"].device),
        num_input_tokens=len(prompt),
        num_output_tokens=len(new),
        acceptance_lengths=[len(step.tokens) for step in rounds],
        stats=answer.stats,
    )
