"""Block-diffusion decoding for ``transformers``' own ``model.generate``.

Two ways to the same decoder::

    model.generate(**inputs, custom_generate="path/to/this/repository", trust_remote_code=True, decoder="s2d2")

    from s2d2_lmeval.custom_generate.generate import generate
    model.generate(**inputs, custom_generate=generate, decoder="s2d2")

``model`` is any transformers model of a known family; its weights are shared, not copied. Lengths, sampling and stops
are those of ``model.generate``: ``max_new_tokens``, ``do_sample``, ``temperature``, ``top_k``, ``top_p``, ``min_p``,
``typical_p``, ``suppress_tokens``, ``bad_words_ids`` and ``sequence_bias`` of single tokens, ``eos_token_id``,
``pad_token_id``, ``stopping_criteria`` and ``max_time`` (asked of each row alone), ``streamer`` (block by block,
never taking text back), and by the path ``stop_strings`` with ``tokenizer`` (which transformers withholds from
functions). Decoding options are those of :class:`s2d2_lmeval.DecodingConfig`; the default is the family's published
setting. Left-padded batches are decoded together. Everything else that ``model.generate`` takes and blocks cannot
honour is refused by name.
"""

from __future__ import annotations

import copy
import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StopStringCriteria,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from s2d2_lmeval import DecodingConfig
from s2d2_lmeval.custom_generate.published import ready, unpadded, with_answers
from s2d2_lmeval.decoding.generation import Generation
from s2d2_lmeval.decoding.options.config import SYNONYMS
from s2d2_lmeval.decoding.options.names import FOREIGN
from s2d2_lmeval.errors import RequestError
from s2d2_lmeval.model import BlockDiffusionModel
from s2d2_lmeval.streaming import Stream

_OF_A_ROW = (
    *(TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper, TypicalLogitsWarper),
    *(SuppressTokensLogitsProcessor, NoBadWordsLogitsProcessor, SequenceBiasLogitsProcessor),
)
"""Processors that depend on one row of logits alone. The decoders apply them themselves, also to drafts."""
_FILTERS = ("temperature", "top_k", "top_p", "min_p", "typical_p")
_OWN_CRITERIA = (EosTokenCriteria, MaxLengthCriteria)
_REFUSED = {
    **dict.fromkeys(("past_key_values", "cache"), "the engine has a cache of its own"),
    "inputs_embeds": "a prompt is token ids: give input_ids",
    **dict.fromkeys(
        ("output_scores", "output_logits", "output_hidden_states", "output_attentions"),
        "a block's tokens come from several forwards, whose outputs are not kept",
    ),
    **dict.fromkeys(
        ("assistant_model", "prompt_lookup_num_tokens"),
        "drafts come from the decoder; for a separate drafter give draft=… to s2d2_lmeval.load",
    ),
    "negative_prompt_ids": "nothing is decoded against a second prompt",
    "penalty_alpha": "contrastive search compares one next token after another",
    "dola_layers": "only the last layer's logits are read",
    "watermarking_config": "a watermark depends on the tokens before, and a block's tokens are decided together",
}
"""Arguments of ``model.generate`` that cannot be honoured, and why."""
_IN_GENERATION_CONFIG = frozenset(GenerationConfig().__dict__)
# transformers takes an argument out of its generation config if this function names it, and refuses it if neither does.
OPTIONS = frozenset(
    name
    for name in DecodingConfig.option_names()
    if name not in _IN_GENERATION_CONFIG and SYNONYMS.get(name, name) not in _IN_GENERATION_CONFIG
)
_UNPREPARED: Any = object()

logger = logging.getLogger("s2d2_lmeval")


@dataclass
class BlockDiffusionOutput(GenerateDecoderOnlyOutput):
    """transformers' output; with ``logprobs`` and ``top_logprobs`` of :class:`s2d2_lmeval.Generation` for every row, if
    the option ``logprobs`` asks for them.
    """

    logprobs: list[list[float | None] | None] | None = None
    top_logprobs: list[list[list[tuple[int, float]]] | None] | None = None


def generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor | None = None,
    inputs: torch.Tensor | None = _UNPREPARED,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    stats: list[dict[str, float]] | None = None,
    **kwargs: Any,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """The function that ``model.generate(custom_generate=…)`` calls, given itself or the repository's path.

    Args:
        input_ids: prompts (B, P), left-padded according to ``attention_mask`` (in ``kwargs``).
        stats: a list that receives the decoding statistics of every row.
        kwargs: decoding options, and other arguments of ``model.generate``. Without ``seed``, keyed randomness has
            seed 0, or with ``do_sample=True`` one drawn from torch's global generator, so that ``torch.manual_seed``
            governs sampling as everywhere in transformers.

    Returns:
        ids (B, P + new), stop tokens included and padded to the right as transformers does, or an output object where
        ``return_dict_in_generate`` is set, which ``logprobs`` needs.

    Raises:
        ConfigError: an option out of range or of another decoder.
        RequestError: an input that blocks cannot be decoded from.
    """
    if inputs is not _UNPREPARED:
        # The path form passes the raw arguments of model.generate. Let it prepare them for this function.
        given = {"input_ids": input_ids, "inputs": inputs, "stats": stats, **kwargs}
        return through_transformers(
            model.generate,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            **{name: value for name, value in given.items() if value is not None},
        )
    if input_ids is None or generation_config is None:
        raise RequestError("Call model.generate(custom_generate=…), which prepares what this function needs.")
    asked, settings = _asked_of_transformers(sys._getframe(1)), generation_config
    _refuse_other_modes(model, settings, logits_processor, asked)
    engine = ready(model)
    config = _config(engine, settings, {name: kwargs[name] for name in kwargs.keys() & OPTIONS})
    prompts = _unpadded_on_the_left(input_ids, kwargs.get("attention_mask"))
    answers = _answers(
        asked.get("streamer"),
        engine,
        prompts,
        config,
        settings.max_length - input_ids.shape[1],
        _stop_rule(prompts, stopping_criteria, input_ids.device),
    )
    if stats is not None:
        stats.extend(answer.stats for answer in answers)
    pad = settings.pad_token_id if settings.pad_token_id is not None else next(iter(config.stop_token_ids), None)
    if pad is None and len({len(answer.token_ids) for answer in answers}) > 1:
        raise RequestError("Answers of different lengths need a pad token: pass pad_token_id.")
    sequences = with_answers(input_ids, answers, pad or 0)
    return _output(sequences, answers, config.logprobs) if settings.return_dict_in_generate else sequences


def _output(sequences: torch.Tensor, answers: list[Generation], with_laws: bool) -> BlockDiffusionOutput:
    kept = ("logprobs", "top_logprobs") if with_laws else ()
    return BlockDiffusionOutput(sequences, **{name: [getattr(answer, name) for answer in answers] for name in kept})


def _unpadded_on_the_left(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[list[int]]:
    if attention_mask is not None and bool((attention_mask[:, 1:] < attention_mask[:, :-1]).any()):
        raise RequestError("attention_mask has zeros after ones: pad prompts on the left (padding_side='left').")
    return unpadded(input_ids, attention_mask)


def through_transformers(
    model_generate: Callable[..., Any],
    *args: Any,
    stop_strings: str | list[str] | None = None,
    tokenizer: Any = None,
    stopping_criteria: Any = None,
    **kwargs: Any,
) -> Any:
    """``model.generate`` with this module's function, which transformers gives no tokenizer: the stop strings become a
    criterion before.

    Raises:
        RequestError: stop strings without the tokenizer.
    """
    settings = kwargs.get("generation_config")
    if stop_strings is None and settings is not None and settings.stop_strings is not None:
        stop_strings = settings.stop_strings
        kwargs["generation_config"] = settings = copy.copy(settings)
        settings.stop_strings = None
    if stop_strings is not None:
        if tokenizer is None:
            raise RequestError("stop_strings are read with the tokenizer: give tokenizer=… too.")
        stopping_criteria = [*(stopping_criteria or ()), StopStringCriteria(tokenizer, stop_strings)]
    return model_generate(
        *args,
        stopping_criteria=None if stopping_criteria is None else StoppingCriteriaList(stopping_criteria),
        custom_generate=generate,
        **kwargs,
    )


def _asked_of_transformers(caller: FrameType) -> dict[str, Any]:
    """The arguments that the running ``model.generate`` was given.

    It names ``streamer`` and others itself and withholds them from functions, and its own cache takes the place of the
    user's; where it is the caller, its variables still have them.
    """
    if caller.f_code.co_name != "generate" or "generation_mode_kwargs" not in caller.f_locals:
        raise RequestError("Call model.generate(custom_generate=…), which prepares what this function needs.")
    return {**caller.f_locals["kwargs"], **caller.f_locals}


def _answers(
    streamer: Any,
    engine: BlockDiffusionModel,
    prompts: list[list[int]],
    config: DecodingConfig,
    budget: int,
    stop: Callable[[int, list[int]], int | None] | None,
) -> list[Generation]:
    """The answers; with a ``streamer`` the only one, whose tokens it gets block by block."""
    if streamer is None:
        return engine.generate(prompts, config, max_new_tokens=budget, stop=stop)
    if len(prompts) > 1:
        raise RequestError("streamer takes one prompt at a time.")
    try:
        stream = Stream(lambda tokens, _: streamer.put(torch.tensor(tokens)), config, budget, stop)
        answers = engine.generate(prompts, config, max_new_tokens=budget, stop=stream.stop)
        stream.finish(answers[0].token_ids)
        return answers
    finally:
        streamer.end()


def _refuse_other_modes(
    model: PreTrainedModel,
    settings: GenerationConfig,
    processors: LogitsProcessorList | None,
    asked: Mapping[str, Any],
) -> None:
    for name, reason in _REFUSED.items():
        if asked.get(name) is not None or getattr(settings, name, None) not in (None, False):
            raise RequestError(f"{name} cannot be honoured: {reason}. Leave it out.")
    if (settings.num_beams or 1) > 1:
        raise RequestError("Blocks are not decoded by beam search: leave num_beams at 1.")
    foreign = [item for item in processors or () if not isinstance(item, _OF_A_ROW)]
    if settings.repetition_penalty == model.generation_config.repetition_penalty:
        # The user did not ask for it: it is in the checkpoint's generation config.
        kept = [item for item in foreign if not isinstance(item, RepetitionPenaltyLogitsProcessor)]
        if len(kept) < len(foreign):
            logger.warning(
                "repetition_penalty=%s of generation_config.json is left out: %s.",
                *(settings.repetition_penalty, FOREIGN["repetition_penalty"].advice.partition(":")[0]),
            )
        foreign = kept
    if foreign:
        raise RequestError(
            f"{', '.join(type(item).__name__ for item in foreign)} looks at the tokens before, and a block's tokens "
            "are decided together. Leave its option out (min_new_tokens, repetition_penalty, …)."
        )


def _config(engine: BlockDiffusionModel, settings: GenerationConfig, given: dict[str, Any]) -> DecodingConfig:
    config = engine.config(_options(settings, given))
    if config.logprobs and not settings.return_dict_in_generate:
        raise RequestError("logprobs come beside the sequences: give return_dict_in_generate=True too.")
    return config


def _options(settings: GenerationConfig, given: dict[str, Any]) -> dict[str, Any]:
    """Decoding options from transformers' settings; the caller's own options come first."""
    options: dict[str, Any] = {"do_sample": bool(settings.do_sample), "trim_stop_tokens": False}
    if settings.do_sample:
        options["seed"] = int(torch.randint(2**31, ()).item())
        options |= {name: getattr(settings, name) for name in _FILTERS}
    stops = () if settings.eos_token_id is None else _as_tuple(settings.eos_token_id)
    # A stop token is never a bad word to transformers.
    bad_words = [word for word in settings.bad_words_ids or () if tuple(word) not in {(stop,) for stop in stops}]
    options["suppress_tokens"] = [*(settings.suppress_tokens or ()), *bad_words]
    options["logit_bias"] = settings.sequence_bias
    named = {SYNONYMS.get(name, name) for name in given}
    if stops and "stop_token_ids" not in named:
        options["stop_token_ids"] = stops
    return {**{name: value for name, value in options.items() if name not in named}, **given}


def _as_tuple(ids: Any) -> tuple[int, ...]:
    return tuple(int(i) for i in ids) if isinstance(ids, (list, tuple, torch.Tensor)) else (int(ids),)


def _stop_rule(
    prompts: list[list[int]], criteria: StoppingCriteriaList | None, device: torch.device
) -> Callable[[int, list[int]], int | None] | None:
    """transformers' stopping criteria, asked of each row alone, after every block for each of its tokens in turn."""
    others = StoppingCriteriaList(item for item in criteria or () if not isinstance(item, _OWN_CRITERIA))
    if not others:
        return None
    asked = [0] * len(prompts)

    def stop(index: int, new: list[int]) -> int | None:
        first = min(asked[index], len(new)) + 1
        asked[index] = len(new)
        for length in range(first, len(new) + 1):
            ids = torch.tensor([prompts[index] + new[:length]], device=device)
            if bool(torch.as_tensor(others(ids, None)).all()):
                return length
        return None

    return stop


def _signature() -> inspect.Signature:
    """The signature with every decoding option by name: transformers reads it to tell options from misspelt ones."""
    plain = inspect.signature(generate)
    own = list(plain.parameters.values())
    keyword = inspect.Parameter.KEYWORD_ONLY
    options = [inspect.Parameter(name, keyword, default=None) for name in sorted(OPTIONS)]
    return plain.replace(parameters=[*own[:-1], *options, own[-1]])


generate.__signature__ = _signature()  # type: ignore[attr-defined]
