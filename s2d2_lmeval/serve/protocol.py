"""OpenAI's completions and chat completions: what a request's fields ask for, and the objects of answers.

https://platform.openai.com/docs/api-reference/chat. A field that would change the answer and cannot be honoured is
refused by name; those that change nothing in this model are taken.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from s2d2_lmeval.decoding.generation import Generation
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.options.general import MOST_TOP_LOGPROBS
from s2d2_lmeval.errors import RequestError, S2D2Error, shown
from s2d2_lmeval.harness.arguments import GenerationArguments
from s2d2_lmeval.model import BlockDiffusionModel
from s2d2_lmeval.prompts import encode, is_text, is_whole, with_stops
from s2d2_lmeval.streaming import Piece

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "echo": (None, False),
    "best_of": (None, 1),
    "suffix": (None, ""),
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "logit_bias": (None, {}),
}
"""Fields that are not served, with the values that ask for nothing."""

SAMPLING = ("temperature", "top_p", "top_k", "min_p")
_TAKEN = {
    "model",
    "logprobs",
    "stream",
    "stream_options",
    "n",
    "seed",
    "stop",
    "user",
    "metadata",
    "store",
    "s2d2",
    *SAMPLING,
}
_OF_COMPLETIONS = {"prompt", "max_tokens"}
_OF_CHAT = {"messages", "max_tokens", "max_completion_tokens", "top_logprobs"}
MOST_ANSWERS, MOST_STOPS = 128, 16
MOST_LOGPROBS = 5
"""Likeliest tokens of completions."""
LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON lacks."""
DEFAULT_TOKENS = 256


@dataclass(frozen=True)
class Wanted:
    """What a request asks for: ``n`` answers to each of ``prompts`` (token ids) under one configuration."""

    chat: bool
    prompts: list[list[int]]
    config: DecodingConfig
    max_tokens: int
    n: int
    seeds: list[int]
    until: tuple[str, ...]
    stream: bool
    counts_usage: bool
    id: str = field(default_factory=lambda: f"s2d2-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))


def wanted(body: Any, chat: bool, name: str, model: BlockDiffusionModel, base: Mapping[str, Any]) -> Wanted:
    """Read a request's ``body``.

    Args:
        name: the served model's name; a request that names another is refused.
        base: decoding options of the server, which a request's own override.

    Raises:
        RequestError, ConfigError: in one sentence, what cannot be served.
    """
    if not isinstance(body, Mapping):
        raise RequestError("the body is not a JSON object.")
    _refuse_unserved(body, chat)
    if body.get("model", name) != name:
        raise RequestError(f"model {shown(body['model'])} is not served here: this is {name}.")
    options, until, budget = _options(body, base)
    config = with_stops(model.config(options), options, model.tokenizer)
    best = _logprobs_in_chat(body) if chat else _logprobs_in_completions(body)
    if best is not None:
        config = config.replace(logprobs=True, top_logprobs=best)
    prompts = [_messages(body, model)] if chat else _prompts(body, model)
    n = _whole(body, "n", 1, 1, MOST_ANSWERS)
    if len(prompts) * n > MOST_ANSWERS:
        raise RequestError(f"{len(prompts)} prompts with n={n} are more than {MOST_ANSWERS} answers; ask for fewer.")
    seed = body.get("seed")
    first = secrets.randbits(62) if seed is None else _whole(body, "seed", 0, -(1 << 62), 1 << 62)
    room = model.max_context - max(map(len, prompts))
    tokens = min(DEFAULT_TOKENS, max(room, 1)) if budget is None else budget
    return Wanted(
        chat=chat,
        prompts=prompts,
        config=config.replace(max_new_tokens=tokens),
        max_tokens=tokens,
        n=n,
        seeds=[first + number for number in range(n)],
        until=until,
        stream=_flag(body, "stream"),
        counts_usage=_flag(body.get("stream_options") or {}, "include_usage"),
    )


def _refuse_unserved(body: Mapping[str, Any], chat: bool) -> None:
    known = _TAKEN | {*SAMPLING} | (_OF_CHAT if chat else _OF_COMPLETIONS) | NEUTRAL.keys()
    for name in body.keys() - known:
        raise RequestError(f"{shown(name)} is not a field that this server knows.")
    for name, neutral in NEUTRAL.items():
        if body.get(name) not in neutral:
            raise RequestError(f"{name}={shown(body[name])} is not served; leave it out.")


def _logprobs_in_chat(body: Mapping[str, Any]) -> int | None:
    """How many of the likeliest tokens are asked for beside the decided ones; None if no log-probabilities are."""
    best = _whole(body, "top_logprobs", 0, 0, MOST_TOP_LOGPROBS)
    if best and not _flag(body, "logprobs"):
        raise RequestError(f"top_logprobs={best} needs logprobs=true.")
    return best if _flag(body, "logprobs") else None


def _logprobs_in_completions(body: Mapping[str, Any]) -> int | None:
    return None if body.get("logprobs") is None else _whole(body, "logprobs", 0, 0, MOST_LOGPROBS)


def _options(body: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...], int | None]:
    """Decoding options, stop strings and the budget."""
    own = body.get("s2d2") or {}
    if not isinstance(own, Mapping):
        raise RequestError("s2d2 is not an object of decoding options.")
    stop = body.get("stop") or []
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, Sequence) or len(stops) > MOST_STOPS:
        raise RequestError(f"stop: give a string or at most {MOST_STOPS} of them.")
    sampling = {name: body[name] for name in SAMPLING if body.get(name) is not None}
    parsed = GenerationArguments.parse({**sampling, "until": list(stops), **own})
    budgets = {name: body[name] for name in ("max_tokens", "max_completion_tokens") if body.get(name) is not None}
    budget = _whole(budgets, next(iter(budgets)), 1, 1, 1 << 20) if budgets else parsed.max_new_tokens
    return {**base, **parsed.options}, tuple(string for string in parsed.until if string), budget


def _messages(body: Mapping[str, Any], model: BlockDiffusionModel) -> list[int]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not is_text(messages):
        raise RequestError("messages: give a list of objects with role and content.")
    plain = [{**one, "content": _content(one.get("content"))} for one in messages if isinstance(one, Mapping)]
    return encode(model.tokenizer, plain if len(plain) == len(messages) else messages)


def _content(content: Any) -> str:
    """A message's text, which may come in parts."""
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise RequestError(f"content {shown(content)} is not text.")
    return content


def _prompts(body: Mapping[str, Any], model: BlockDiffusionModel) -> list[list[int]]:
    prompt = body.get("prompt")
    single = isinstance(prompt, str) or (isinstance(prompt, list) and all(map(is_whole, prompt)))
    prompts = [prompt] if single else prompt
    if not isinstance(prompts, list) or not prompts:
        raise RequestError("prompt: give a text, token ids, or a list of either.")
    found = []
    for one in prompts:
        if not isinstance(one, str) and not (isinstance(one, list) and all(map(is_whole, one))):
            raise RequestError(f"prompt: {shown(one)} is neither text nor token ids.")
        found.append(encode(model.tokenizer, one) if isinstance(one, str) else list(one))
    return found


def _whole(body: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if not is_whole(value) or not low <= value <= high:
        raise RequestError(f"{name}={shown(value)} is not a whole number from {low} to {high}.")
    return int(value)


def _flag(body: Any, name: str) -> bool:
    value = body.get(name) if isinstance(body, Mapping) else body
    if value not in (None, True, False):
        raise RequestError(f"{name}={shown(value)} is neither true nor false.")
    return bool(value)


# Answers

FIGURES = ("nfe", "tokens_per_forward", "acceptance", "drafted", "accepted")


def answer_object(
    asked: Wanted, name: str, texts: Sequence[str], answers: Sequence[Generation], tokenizer: Any
) -> dict[str, Any]:
    """A whole answer."""
    choices = []
    for index, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        said = {"message": {"role": "assistant", "content": text}} if asked.chat else {"text": text}
        whole = Piece(text, answer.token_ids, answer.progress.laws(range(len(answer.token_ids))))
        logprobs = _logprobs_object(asked, whole, tokenizer) if asked.config.logprobs else None
        choices.append({"index": index, **said, "finish_reason": reason(answer), "logprobs": logprobs})
    kind = "chat.completion" if asked.chat else "text_completion"
    return {**_head(asked, name, kind), "choices": choices, "usage": usage(asked, answers)}


def _logprobs_object(asked: Wanted, piece: Piece, tokenizer: Any, offset: int = 0) -> dict[str, Any]:
    """The log-probabilities of a piece's tokens when they were decided; ``offset`` is the length of those before."""

    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        token = str(tokenizer.decode([token_id]))
        # A part of a character has no text of its own.
        own = None if "\ufffd" in token else list(token.encode())
        return {"token": token, "logprob": None if logprob is None else max(logprob, LEAST_LOGPROB), "bytes": own}

    said = list(map(entry, piece.token_ids, piece.logprobs))
    best = [[entry(*one) for one in several] for several in piece.top_logprobs]
    if asked.chat:
        content = [{**one, "top_logprobs": several} for one, several in zip(said, best, strict=True)]
        return {"content": content, "refusal": None}
    tokens = [one["token"] for one in said]
    # Of tokens with the same text, which parts of characters have, the likeliest counts.
    maps = [
        {each["token"]: each["logprob"] for each in reversed([*several, one])}
        for one, several in zip(said, best, strict=True)
    ]
    return {
        "tokens": tokens,
        "token_logprobs": [one["logprob"] for one in said],
        "top_logprobs": maps if asked.config.top_logprobs else None,
        "text_offset": list(accumulate(map(len, tokens), initial=offset))[:-1],
    }


def piece_object(
    asked: Wanted, name: str, index: int, piece: Piece | None, ended: str | None, tokenizer: Any, offset: int
) -> dict[str, Any]:
    """A piece of an answer, after tokens of ``offset`` characters, or its end."""
    said: dict[str, Any] = {"text": piece or ""}
    if asked.chat:
        said = {"delta": {} if piece is None else {"role": "assistant", "content": piece}}
    logprobs = _logprobs_object(asked, piece, tokenizer, offset) if piece is not None and piece.laws else None
    choice = {"index": index, **said, "finish_reason": ended, "logprobs": logprobs}
    return {**_head(asked, name, "chat.completion.chunk" if asked.chat else "text_completion"), "choices": [choice]}


def usage_object(asked: Wanted, name: str, answers: Sequence[Generation]) -> dict[str, Any]:
    """The last piece of a stream whose client asked for usage."""
    kind = "chat.completion.chunk" if asked.chat else "text_completion"
    return {**_head(asked, name, kind), "choices": [], "usage": usage(asked, answers)}


def _head(asked: Wanted, name: str, kind: str) -> dict[str, Any]:
    return {"id": asked.id, "object": kind, "created": asked.created, "model": name}


def reason(answer: Generation) -> str:
    """OpenAI's word for how an answer ended."""
    return "length" if answer.finish_reason == "length" else "stop"


def usage(asked: Wanted, answers: Sequence[Generation]) -> dict[str, Any]:
    """Tokens of prompts and answers, and what decoding them took, of all answers together or of each."""
    prompt, new = sum(map(len, asked.prompts)), sum(int(answer.stats["new_tokens"]) for answer in answers)
    figures = [{one: answer.stats[one] for one in FIGURES if one in answer.stats} for answer in answers]
    counts = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    return {**counts, "s2d2": figures[0] if len(figures) == 1 else figures}


def error_object(error: S2D2Error | str, kind: str = "invalid_request_error") -> dict[str, Any]:
    """OpenAI's form of an error."""
    return {"error": {"message": str(error), "type": kind, "param": None, "code": None}}
