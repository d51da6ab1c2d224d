"""Prompts: token ids, text or chat messages, why they cannot be decoded, and the requests that they make."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import Any

from transformers import AutoTokenizer

from s2d2_lmeval.decoding.generation import Progress, Request
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.errors import RequestError, S2D2Error, first_line, shown
from s2d2_lmeval.families import Facts
from s2d2_lmeval.templates import limited


def tokenizer_of(source: str, hub: Mapping[str, Any]) -> Any:
    """The tokenizer next to a checkpoint.

    Raises:
        RequestError: there is none that loads without remote code.
    """
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **hub)
    except Exception as error:  # as many kinds as there are files of tokenizers
        raise RequestError(
            f"{source or 'this model'} has no tokenizer that loads ({first_line(error)}): give token ids, or set "
            "model.tokenizer."
        ) from None


def is_message(value: Any) -> bool:
    """Whether a value is one message of a chat."""
    return isinstance(value, Mapping) and {"role", "content"} <= value.keys()


def is_text(prompt: Any) -> bool:
    """Whether a prompt is text or a list of chat messages, not token ids."""
    return isinstance(prompt, str) or (isinstance(prompt, (list, tuple)) and bool(prompt) and is_message(prompt[0]))


def encode(tokenizer: Any, prompt: Any) -> list[int]:
    """Token ids of a text as it is, or of chat messages in the tokenizer's template, rendered under limits.

    Raises:
        RequestError: messages without a template, or that it refuses.
        CheckpointError: a template that does not come to an end.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError("This tokenizer has no chat template: give the prompt as text.")
    if not all(is_message(message) for message in prompt):
        raise RequestError(f"{shown(prompt)} mixes chat messages (role and content) with something else.")
    with limited():
        try:
            text = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
        except S2D2Error:
            raise
        except Exception as error:  # a template is a program of the checkpoint
            raise RequestError(f"The chat template refuses these messages: {first_line(error)}") from None
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def with_stops(config: DecodingConfig, options: Any, tokenizer: Any) -> DecodingConfig:
    """``config`` with the tokenizer's end-of-text token among the stop tokens, unless ``options`` name them."""
    named = isinstance(options, DecodingConfig) or "stop_token_ids" in (options or {})
    if named or tokenizer.eos_token_id is None:
        return config
    return config.replace(stop_token_ids=tuple(dict.fromkeys((*config.stop_token_ids, tokenizer.eos_token_id))))


def undecodable(prompt: Sequence[int], budget: int, context: int, mask_token_id: int | None) -> str:
    """Why a prompt cannot be decoded with ``budget`` new tokens in ``context`` positions; empty if it can."""
    if not prompt:
        return "is empty; a block-diffusion model needs at least one token to start from."
    if mask_token_id is not None and mask_token_id in prompt:
        return f"contains the mask token (id {mask_token_id}), which the model would fill in. Remove it."
    if len(prompt) + budget > context:
        return (
            f"has {len(prompt)} tokens and asks for {shown(budget)} more, but the context holds {context}. Shorten it, "
            "ask for fewer new tokens, or raise max_context up to what the checkpoint allows."
        )
    return ""


def requests_of(
    prompts: Sequence[Any],
    max_new_tokens: Any,
    seeds: Any,
    stop: Callable[[int, list[int]], int | None] | None,
    begun: Callable[[int, Progress], None] | None,
    context: int,
    facts: Facts,
) -> list[Request]:
    """The requests for answers to ``prompts`` of token ids, with ``max_new_tokens`` for all or for each, and ``seeds``
    for each or none.

    Raises:
        RequestError: a prompt that cannot be decoded, or a budget or seed that is not a number.
    """
    budgets = [max_new_tokens] * len(prompts) if is_whole(max_new_tokens) else several("max_new_tokens", max_new_tokens)
    if stop is not None and not callable(stop):
        raise RequestError(f"stop={shown(stop)} is not a function of a request and its new tokens.")
    keys = list(range(len(prompts))) if seeds is None else several("seeds", seeds)
    if not len(prompts) == len(budgets) == len(keys):
        raise RequestError(
            f"{len(prompts)} prompts, {len(budgets)} budgets, {len(keys)} seeds: give one of each per prompt."
        )
    requests = []
    for index, (prompt, budget, key) in enumerate(zip(prompts, budgets, keys, strict=True)):
        ids = tokens(f"Prompt {index}", prompt)
        if not is_whole(budget) or budget < 0:
            raise RequestError(f"Prompt {index}: max_new_tokens={shown(budget)} is negative or not a whole number.")
        if not is_whole(key) or not -(1 << 63) <= key < 1 << 63:
            raise RequestError(f"Prompt {index}: the seed {shown(key)} is not a whole number of 64 bits.")
        refuse_undecodable(index, ids, int(budget), context, facts)
        rule = None if stop is None else partial(stop, index)
        told = None if begun is None else partial(begun, index)
        requests.append(Request(ids, int(budget), int(key), rule, told))
    return requests


def pairs_of(requests: Any, context: int, facts: Facts) -> list[tuple[list[int], list[int]]]:
    """``requests`` as pairs of token ids to score, a text and its continuation, that fit ``context`` positions.

    Raises:
        RequestError: something that cannot be scored.
    """
    pairs = []
    for index, request in enumerate(several("requests", requests)):
        pair = several(f"Request {index}", request)
        if len(pair) != 2:
            raise RequestError(f"Request {index} is not a pair of context and continuation.")
        before, continuation = (tokens(f"Request {index}", part) for part in pair)
        if not continuation:
            raise RequestError(f"Request {index}: the continuation is empty; there is nothing to score.")
        if facts.token_shift and not before:
            raise RequestError(
                f"Request {index}: the context is empty, and nothing predicts this model's first token. Put a "
                "token before it, such as the end-of-text token."
            )
        # With shifted logits the prediction after the last token is not needed, so that token takes no position.
        refuse_undecodable(index, [*before, *continuation], -int(facts.token_shift), context, facts)
        pairs.append((before, continuation))
    return pairs


def refuse_undecodable(index: int, prompt: list[int], budget: int, context: int, facts: Facts) -> None:
    """Raise RequestError for a prompt that cannot be decoded with ``budget`` new tokens in ``context`` positions."""
    reason = undecodable(prompt, budget, context, facts.mask_token_id)
    outside = [token for token in prompt if not 0 <= token < facts.vocab_size]
    if not reason and outside:
        reason = (
            f"holds token id {shown(outside[0])}, outside the vocabulary of {facts.vocab_size}: encode it with the "
            "checkpoint's own tokenizer."
        )
    if reason:
        raise RequestError(f"Prompt {index} {reason}")


def laws_of(logprobs: Any) -> set[str]:
    """The laws whose log-probabilities are asked for: ``decided``, ``ar``."""
    laws = {logprobs} if isinstance(logprobs, str) else {*map(str, several("logprobs", logprobs))}
    for unknown in laws - {"decided", "ar"}:
        raise RequestError(f"logprobs={shown(unknown)}: give decided, ar, or both.")
    return laws


def keeping(config: DecodingConfig, laws: set[str], top_logprobs: int) -> DecodingConfig:
    """``config``, which keeps what is asked for of the laws that tokens are decided by."""
    asked: dict[str, Any] = {"logprobs": True} if "decided" in laws else {}
    asked |= {"top_logprobs": top_logprobs} if top_logprobs else {}
    return config.replace(**asked) if asked else config


def several(name: str, values: Any, what: str = "a list of one for each") -> list[Any]:
    """``values`` as a list; RequestError for something else than several."""
    try:
        if not isinstance(values, (str, bytes, Mapping)):  # a tokenizer's output has its ids under "input_ids"
            return list(values)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise RequestError(f"{name}: {shown(values)} is not {what}.")


def tokens(name: str, ids: Any) -> list[int]:
    """Token ids as plain integers; RequestError for text, and whatever else is not token ids."""
    what = "text, a list of chat messages, or a list of token ids"
    try:
        return [operator.index(token) for token in several(name, ids, what)]
    except TypeError:
        raise RequestError(f"{name}: {shown(ids)} is not {what}.") from None


def is_whole(value: Any) -> bool:
    """Whether a value is an integer; True and False are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)
