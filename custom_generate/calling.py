"""What the published entry points have in common: the model, the prompt, and whose argument is whose."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from s2d2_lmeval.decoding.generation import Generation
from s2d2_lmeval.decoding.options.config import SYNONYMS, DecodingConfig
from s2d2_lmeval.decoding.options.sampling import GREEDY
from s2d2_lmeval.errors import ConfigError, RequestError
from s2d2_lmeval.families import adopt
from s2d2_lmeval.model import BlockDiffusionModel, load

FIELDS = {field.name: field for field in dataclasses.fields(DecodingConfig)}

# What lm-eval and transformers hand to every generate function. It says nothing about decoding blocks.
HARNESS_ARGUMENTS = frozenset(
    (
        *("attention_mask", "bos_token_id", "cache_implementation", "eos_token_id", "generation_config"),
        *("logits_processor", "logits_to_keep", "max_length", "pad_token_id", "past_key_values", "position_ids"),
        *("return_dict_in_generate", "stop", "stopping_criteria", "streamer", "synced_gpus", "tokenizer", "until"),
        "use_cache",
    )
)

_ready: WeakKeyDictionary[nn.Module, BlockDiffusionModel] = WeakKeyDictionary()


def decoding_options(arguments: Mapping[str, Any], *, temperature: float | None = None) -> dict[str, Any]:
    """``arguments`` without those of the harness; what is left must be decoding options.

    Where the published function samples by its ``temperature`` alone, ``do_sample`` is left out too: harnesses say
    False whatever the temperature.

    Raises:
        ConfigError: samples are asked for at temperature zero.
    """
    options = {name: value for name, value in arguments.items() if name not in HARNESS_ARGUMENTS}
    if temperature is not None and options.pop("do_sample", False) and temperature < GREEDY:
        raise ConfigError("do_sample=true contradicts temperature=0, which is greedy: give a temperature, such as 1.0.")
    return options


def options_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those published ``arguments`` that are decoding options, under whatever name; of two names of an option the later
    one holds, and None says nothing.
    """
    options = {SYNONYMS.get(name, name): value for name, value in arguments.items() if value is not None}
    return {name: value for name, value in options.items() if name in FIELDS}


def config_of(arguments: Mapping[str, Any], **settings: Any) -> DecodingConfig:
    """The configuration that published ``arguments`` ask for, with ``settings`` in place of what they say."""
    # The published code may predict the mask.
    return DecodingConfig(**{**options_of(arguments), **settings, "suppress_mask_token": False})


def one_prompt(input_ids: torch.Tensor) -> list[int]:
    """The ids of the only row of ``input_ids``.

    Raises:
        RequestError: several rows, or none.
    """
    if input_ids.dim() != 2 or input_ids.shape[0] != 1:
        raise RequestError(
            f"input_ids of shape {tuple(input_ids.shape)} are not one prompt (1, P): the published functions decode "
            "one prompt at a time. Use batch_size=1 here, or s2d2_lmeval.load(…).generate for batches."
        )
    return input_ids[0].tolist()


def ready(model: Any, **facts: Any) -> BlockDiffusionModel:
    """``model`` as an engine: itself, or the engine around a transformers model, which is kept for the next call.

    ``facts`` (``family``, ``mask_token_id``, ``block_length``; None: as the model says) are passed to
    :func:`s2d2_lmeval.load` for a transformers model.
    """
    if isinstance(model, BlockDiffusionModel):
        mask = facts.get("mask_token_id")
        if mask is not None and mask != model.facts.mask_token_id:
            raise RequestError(
                f"mask_id={mask} is not the mask token of this model ({model.facts.mask_token_id}); leave it out."
            )
        return model
    facts = {name: value for name, value in facts.items() if value is not None}
    native, known = adopt(model, **facts)
    engine = _ready.get(model)
    if engine is None or engine.hf_model is not native or engine.facts != known:
        engine = _ready[model] = load(model, **facts)
    return engine


def decode_rows(
    arguments: Mapping[str, Any], counts: Sequence[str], **settings: Any
) -> torch.Tensor | tuple[torch.Tensor, dict[str, Any]]:
    """Decode every row of ``input_ids`` (R, P) and answer with ids (R, P + new), if asked with statistics and
    ``counts``.
    """
    input_ids, stops = arguments["input_ids"], arguments["stopping_criteria_idx"]
    prompts = _prompts_of(input_ids, arguments["attention_mask"])
    options = {**options_of(arguments), **settings, **decoding_options(arguments["kwargs"])}
    if stops is not None:
        options["stop_token_ids"] = tuple(stops)
    decoder = ready(arguments["model"], mask_token_id=arguments["mask_id"], block_length=arguments.get("block_length"))
    config = decoder.config(options)
    answers = decoder.generate(prompts, config)
    ids = _with_answers(input_ids, answers, config)
    return (ids, _statistics_of(answers, counts)) if arguments["return_forward_stats"] else ids


def _prompts_of(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[list[int]]:
    """The ids of every row of ``input_ids`` (R, P), without the padding that ``attention_mask`` (R, P) leaves out.

    Raises:
        RequestError: ids that are no table.
    """
    if input_ids.dim() != 2:
        raise RequestError(f"input_ids must be 2-D (batch, prompt length), not of shape {tuple(input_ids.shape)}.")
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return [ids[kept.bool()].tolist() for ids, kept in zip(input_ids, real, strict=True)]


def _with_answers(input_ids: torch.Tensor, answers: Sequence[Generation], config: DecodingConfig) -> torch.Tensor:
    """``input_ids`` (R, P) and after each row its new tokens; shorter ones are filled up on the right with the first
    stop token (0 without any).
    """
    longest = max((len(answer.token_ids) for answer in answers), default=0)
    fill = config.stop_token_ids[0] if config.stop_token_ids else 0
    new = [answer.token_ids + [fill] * (longest - len(answer.token_ids)) for answer in answers]
    return torch.cat([input_ids, input_ids.new_tensor(new).view(len(new), longest)], dim=1)


def _statistics_of(answers: Sequence[Generation], names: Sequence[str]) -> dict[str, Any]:
    """Of each answer ``decoding_order``, ``total_forward_steps`` and the counts ``names``: lists, but of a single
    answer the values themselves, as published.
    """
    stats: dict[str, list[Any]] = {
        "decoding_order": [answer.decoding_order for answer in answers],
        "total_forward_steps": [int(answer.stats["nfe"]) for answer in answers],
        **{name: [int(answer.stats.get(name, 0)) for answer in answers] for name in names},
    }
    return {name: values[0] if len(answers) == 1 else values for name, values in stats.items()}
