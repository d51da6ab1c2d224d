"""A checkpoint named on the command line: its model, its tokenizer, and the text of its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from s2d2_lmeval.errors import ConfigError, RequestError
from s2d2_lmeval.harness.arguments import sort_arguments
from s2d2_lmeval.harness.loading import check_mask, check_shift, choose_device, load_model, load_tokenizer
from s2d2_lmeval.model import BlockDiffusionModel
from s2d2_lmeval.prompts import encode as encoded
from s2d2_lmeval.runtime.memory import RowLimit


def open_model(
    source: str,
    options: Mapping[str, Any],
    *,
    device: str | None = None,
    dtype: str = "auto",
    revision: str | None = None,
) -> tuple[BlockDiffusionModel, Any, dict[str, Any]]:
    """Load ``source``; ``options`` are named as in the harness's ``--model_args``.

    Returns:
        The model, its tokenizer, and those of ``options`` that are the decoder's.

    Raises:
        S2D2Error: for an option or a checkpoint that cannot be used.
    """
    arguments = sort_arguments(source, options)
    if arguments.custom is not None or arguments.model_class is not None:
        raise ConfigError(
            "custom_generate and custom_model_class are for `s2d2-lmeval eval`: a function of your own leaves no "
            "trace to show."
        )
    loaded = load_model(
        arguments,
        rows=arguments.rows or RowLimit(1),
        dtype=dtype,
        device=choose_device(device, None),
        revision=revision,
    )
    assert loaded.engine is not None
    tokenizer = load_tokenizer(arguments, loaded.source, revision)
    check_mask(tokenizer, loaded.engine.facts, arguments.loading.get("mask_token_id"))
    loaded.engine.tokenizer = tokenizer
    check_shift(tokenizer, loaded.engine, arguments.loading.get("probe"))
    return loaded.engine, tokenizer, dict(arguments.decoding)


def encode(tokenizer: Any, prompt: str, *, chat: bool | None = None, system: str | None = None) -> list[int]:
    """Token ids of ``prompt``, as a user's message in the chat template or as it is.

    Args:
        chat: None uses the template if the tokenizer has one.

    Raises:
        RequestError: if a template is requested and there is none.
    """
    templated = bool(tokenizer.chat_template) if chat is None else chat
    if not templated:
        if system is not None:
            raise RequestError("--system needs the chat template; remove --no-chat, or put the text into the prompt.")
        return encoded(tokenizer, prompt)
    if not tokenizer.chat_template:
        raise RequestError("This tokenizer has no chat template; use --no-chat.")
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return encoded(tokenizer, messages)
