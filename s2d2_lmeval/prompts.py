"""Prompts: token ids, text or chat messages, and why they cannot be decoded."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from transformers import AutoTokenizer

from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.errors import RequestError, first_line, shown


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
    """Token ids of a text as it is, or of chat messages in the tokenizer's template.

    Raises:
        RequestError: messages without a template, or that it refuses.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError("This tokenizer has no chat template: give the prompt as text.")
    if not all(is_message(message) for message in prompt):
        raise RequestError(f"{shown(prompt)} mixes chat messages (role and content) with something else.")
    try:
        text = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
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


def several(name: str, values: Any, what: str = "a list of one for each") -> list[Any]:
    """``values`` as a list; RequestError for something else than several."""
    try:
        if not isinstance(values, (str, bytes)):
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
