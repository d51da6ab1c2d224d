"""The common part of the published entry points: signature and help from a table, the model, the prompt, the answer.

:func:`published` makes a function from a list of parameters and a body that takes all arguments in one dictionary.
The table of decoding options completes its docstring, so each argument is explained once.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from s2d2_lmeval.decoding.generation import Generation
from s2d2_lmeval.decoding.options.config import SYNONYMS, DecodingConfig
from s2d2_lmeval.decoding.options.general import GREEDY
from s2d2_lmeval.errors import ConfigError, RequestError
from s2d2_lmeval.families import adopt
from s2d2_lmeval.model import BlockDiffusionModel, load

Answer = TypeVar("Answer")

FIELDS = {field.name: field for field in dataclasses.fields(DecodingConfig)}

_ARGS, _RETURNS = "\n\nArgs:", "\n\nReturns:"
_RAISES = """

Raises:
    ConfigError: a name that is not a decoding option, or a value that is out of range or contradicts the model.
    RequestError: ids that are not one prompt (a table of prompts where rows are decoded together), or a prompt that
        cannot be decoded."""
_MEANINGS = {name: field.metadata["meaning"] for name, field in FIELDS.items()}
_MEANINGS |= {name: _MEANINGS[option] for name, option in SYNONYMS.items()}
_MEANINGS |= {
    "input_ids": "the prompt, (1, P)",
    "attention_mask": "taken without effect",
    "mask_id": "id of the mask token; None is the checkpoint's own",
    "random_source": "torch (the global generator, in the published order), fixed, keyed, or an object with "
    "uniform(n) and categorical(probabilities)",
    "schedule": "reference (a forward per prefill, draft, verification and commit, as published), or one with fewer "
    "forwards and the same ids",
    "return_forward_stats": "also answer with the statistics",
    "return_stats": "also answer with the statistics",
    "kwargs": "what an evaluation harness hands to every model is taken and has no effect; every other name is a "
    "decoding option",
}

# What lm-eval and transformers hand to every generate function. It says nothing about decoding blocks.
_OF_HARNESSES = """
    attention_mask bos_token_id cache_implementation eos_token_id generation_config logits_processor logits_to_keep
    max_length pad_token_id past_key_values position_ids return_dict_in_generate stop stopping_criteria streamer
    synced_gpus tokenizer until use_cache
"""
HARNESS_ARGUMENTS = frozenset(_OF_HARNESSES.split())

_ready: WeakKeyDictionary[nn.Module, dict[str, tuple[Any, BlockDiffusionModel]]] = WeakKeyDictionary()


def published(
    parameters: str, extends: Callable[..., Any] | None = None
) -> Callable[[Callable[[dict[str, Any]], Answer]], Callable[..., Answer]]:
    """Let a function that takes all of its arguments in one dictionary be called under a published signature.

    Args:
        parameters: after ``model`` and ``input_ids``: ``name=default``, the default ``...`` where one must be given, or
            a decoding option's ``name`` alone, for the option's own default; those after ``*`` go by name only.
        extends: a published function whose parameters come first (by position where its own do), and whose help, from
            ``Args:`` on, continues the function's own.
    """
    if extends is None:
        own = _listed(f"model=... input_ids=... {parameters}", Parameter.POSITIONAL_OR_KEYWORD)
        every = [*own, Parameter("kwargs", Parameter.VAR_KEYWORD)]
    else:
        own = list(inspect.signature(extends).parameters.values())
        every = sorted([*own, *_listed(parameters, own[2].kind)], key=lambda parameter: parameter.kind)
    signature = inspect.Signature(every)

    def decorate(body: Callable[[dict[str, Any]], Answer]) -> Callable[..., Answer]:
        @functools.wraps(body)
        def function(*args: Any, **kwargs: Any) -> Answer:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return body(bound.arguments)

        function.__signature__ = signature  # type: ignore[attr-defined]
        function.__doc__ = _help(inspect.getdoc(body) or "", extends, list(signature.parameters))
        return function

    return decorate


def _listed(text: str, kind: Any) -> list[Parameter]:
    found = []
    for word in text.split():
        if word == "*":
            kind = Parameter.KEYWORD_ONLY
            continue
        name, given, literal = word.partition("=")
        default = ast.literal_eval(literal) if given else FIELDS[name].default
        types = FIELDS[name].type if name in FIELDS else "Any" if default in (None, ...) else type(default).__name__
        found.append(Parameter(name, kind, default=Parameter.empty if default is ... else default, annotation=types))
    return found


def _help(own: str, extends: Callable[..., Any] | None, names: Sequence[str]) -> str:
    """A docstring with a line for each argument that ``Args:`` leaves out, and with what every function raises."""
    if extends is None:
        written = own + _RAISES
    else:
        head, _, said = own.partition(_ARGS)
        written = head + _ARGS + said + (extends.__doc__ or "").partition(_ARGS)[2]
    told = ", ".join(re.findall(r"^    ([\w, ]+): ", written, re.MULTILINE)).split(", ")
    untold = [f"{name}: {_MEANINGS.get(name)}." for name in names if name not in told]
    lines = [textwrap.fill(line, 120, initial_indent=" " * 4, subsequent_indent=" " * 8) for line in untold]
    head, returns, rest = written.partition(_RETURNS)
    return "\n".join([head, *lines]) + returns + rest


def config_of(arguments: Mapping[str, Any], *, by_temperature: bool = True, **settings: Any) -> DecodingConfig:
    """The configuration that published ``arguments`` ask for, with ``settings`` in place of what they say.

    Where the published function samples ``by_temperature`` alone, ``do_sample`` says nothing: harnesses say False
    whatever the temperature.

    Raises:
        ConfigError: a name that is no option, or samples that are asked for at temperature zero.
    """
    temperature = float(arguments["temperature"] or 0.0)
    options = named_options(arguments)
    if by_temperature:
        options |= {"do_sample": temperature > 0, "temperature": temperature}
    # The published code may predict the mask.
    config = DecodingConfig(**{**options, **settings, "suppress_mask_token": False})
    return config.replace(**more_options(arguments, temperature if by_temperature else None))


def named_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those published ``arguments`` that are decoding options, under whatever name; of two names of an option the later
    one holds, and None says nothing.
    """
    options = {SYNONYMS.get(name, name): value for name, value in arguments.items() if value is not None}
    return {name: value for name, value in options.items() if name in FIELDS}


def more_options(arguments: Mapping[str, Any], temperature: float | None = None) -> dict[str, Any]:
    """The decoding options among the ``kwargs`` of published ``arguments``; see :func:`config_of`."""
    options = {name: value for name, value in arguments["kwargs"].items() if name not in HARNESS_ARGUMENTS}
    if options.get("logprobs"):
        raise ConfigError(
            "logprobs: published functions return ids and counts; take them from s2d2_lmeval.load(…).generate, or from "
            "model.generate(custom_generate=…, return_dict_in_generate=True)."
        )
    if temperature is not None and options.pop("do_sample", False) and temperature < GREEDY:
        raise ConfigError("do_sample=true contradicts temperature=0, which is greedy: give a temperature, such as 1.0.")
    return options


class _GumbelDraws:
    """The global generator: drafts by Gumbel noise in float64, drawn for every place of the block at once."""

    def __init__(self, first_by_multinomial: bool) -> None:
        self.first_by_multinomial = first_by_multinomial

    def uniform(self, n: int) -> torch.Tensor:
        return torch.rand(n)

    def categorical(self, probabilities: torch.Tensor) -> torch.Tensor:
        if self.first_by_multinomial and len(probabilities) == 1:
            return torch.multinomial(probabilities, 1).squeeze(-1)
        noise = torch.rand(probabilities.shape, dtype=torch.float64, device=probabilities.device)
        return (probabilities.double().log() - (-noise.log()).log()).argmax(-1)


def gumbel_draws(source: Any, first_by_multinomial: bool = False) -> Any:
    """The random ``source`` of published code that drafts with Gumbel noise; a single row, the first token of a block,
    may be drawn by torch.multinomial.
    """
    return _GumbelDraws(first_by_multinomial) if source == "torch" else source


def decided_positions(answer: Generation, end: int) -> list[list[int]]:
    """Of each step, the positions before ``end`` that it decided."""
    steps = ([abs(int(place)) for place in step if place != "|"] for step in answer.decoding_order)
    return [kept for step in steps if (kept := [place for place in step if place < end])]


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


def ready(model: Any, draft: Any = None, **facts: Any) -> BlockDiffusionModel:
    """``model`` as an engine: itself, or the engine around a transformers model (and its drafter ``draft``), which is
    kept for the next call.

    ``facts`` (``family``, ``mask_token_id``, ``block_length``; None: as the model says) are passed to
    :func:`s2d2_lmeval.load` for a transformers model.
    """
    if isinstance(model, BlockDiffusionModel):
        mask = facts.get("mask_token_id")
        if mask is not None and mask != model.facts.mask_token_id:
            raise RequestError(
                f"mask_id={mask} is not the mask token of this model ({model.facts.mask_token_id}); leave it out."
            )
        if draft is not None:
            raise ConfigError("this model was loaded already: give draft=… to s2d2_lmeval.load, not to this function.")
        return model
    facts = {name: value for name, value in facts.items() if value is not None}
    native, known = adopt(model, autoregressive=draft is not None, **facts)
    engines = _ready.setdefault(model, {})
    for_facts, engine = engines.get(str(draft), (None, None))
    if engine is None or engine.hf_model is not native or for_facts != known:
        engine = load(model, draft=draft, **facts)
        engines[str(draft)] = (known, engine)
    return engine


def unpadded(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[list[int]]:
    """The ids of every row of ``input_ids`` (R, P), without the padding that ``attention_mask`` (R, P) leaves out.

    Raises:
        RequestError: ids that are not a table.
    """
    if input_ids.dim() != 2:
        raise RequestError(f"input_ids must be 2-D (batch, prompt length), not of shape {tuple(input_ids.shape)}.")
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return [ids[kept.bool()].tolist() for ids, kept in zip(input_ids, real, strict=True)]


def with_answers(input_ids: torch.Tensor, answers: Sequence[Generation], pad: int) -> torch.Tensor:
    """``input_ids`` (R, P) and after each row its new tokens; shorter ones are filled up on the right with ``pad``."""
    longest = max((len(answer.token_ids) for answer in answers), default=0)
    new = [answer.token_ids + [pad] * (longest - len(answer.token_ids)) for answer in answers]
    return torch.cat([input_ids, input_ids.new_tensor(new).view(len(new), longest)], dim=1)


def decode_rows(
    arguments: Mapping[str, Any], counts: Sequence[str], **settings: Any
) -> torch.Tensor | tuple[torch.Tensor, dict[str, Any]]:
    """Decode every row of ``input_ids`` (R, P) and answer with ids (R, P + new), if asked with statistics:
    ``decoding_order``, ``total_forward_steps`` and the ``counts`` of each row; of a single row the values themselves.
    """
    input_ids, stops = arguments["input_ids"], arguments["stopping_criteria_idx"]
    prompts = unpadded(input_ids, arguments["attention_mask"])
    options = {**named_options(arguments), **settings, **more_options(arguments)}
    if stops is not None:
        options["stop_token_ids"] = tuple(stops)
    engine = ready(arguments["model"], mask_token_id=arguments["mask_id"], block_length=arguments.get("block_length"))
    config = engine.config(options)
    answers = engine.generate(prompts, config)
    ids = with_answers(input_ids, answers, next(iter(config.stop_token_ids), 0))
    if not arguments["return_forward_stats"]:
        return ids
    stats: dict[str, list[Any]] = {
        "decoding_order": [answer.decoding_order for answer in answers],
        "total_forward_steps": [int(answer.stats["nfe"]) for answer in answers],
        **{name: [int(answer.stats.get(name, 0)) for answer in answers] for name in counts},
    }
    return ids, {name: values[0] if len(answers) == 1 else values for name, values in stats.items()}
