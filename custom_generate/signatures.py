"""Signature and help of the published functions, so that each argument is written down and explained once.

A function that takes another's arguments and more says only what it adds (:func:`extends`). What its docstring leaves
unsaid about an argument comes from the table of decoding options (:func:`documented`).
"""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any, TypeVar

from s2d2_lmeval.custom_generate.calling import FIELDS
from s2d2_lmeval.decoding.options.config import SYNONYMS

Function = TypeVar("Function", bound=Callable[..., Any])
Answer = TypeVar("Answer")

_ARGS, _RETURNS = "\n\nArgs:", "\n\nReturns:"
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
    "kwargs": "what an evaluation harness hands to every model is taken and has no effect; every other name is a "
    "decoding option",
}


def documented(function: Function) -> Function:
    """``function``, its docstring with a line for each argument that ``Args:`` leaves out, before ``Returns:``."""
    written = inspect.getdoc(function) or ""
    told = ", ".join(re.findall(r"^    ([\w, ]+): ", written, re.MULTILINE)).split(", ")
    untold = [f"{name}: {_MEANINGS.get(name)}." for name in inspect.signature(function).parameters if name not in told]
    lines = [textwrap.fill(line, 120, initial_indent=" " * 4, subsequent_indent=" " * 8) for line in untold]
    head, returns, rest = written.partition(_RETURNS)
    function.__doc__ = "\n".join([head, *lines]) + returns + rest
    return function


def extends(
    base: Callable[..., Any], options: str = "", **defaults: Any
) -> Callable[[Callable[[dict[str, Any]], Answer]], Callable[..., Answer]]:
    """Let a function that takes all of its arguments in one dictionary be called like ``base``, and with more.

    Args:
        base: whose arguments come first, and whose help, from ``Args:`` on, continues the function's own.
        options: names of decoding options that are arguments too, with their defaults there.
        defaults: further arguments, or options with another default.
    """
    plain = inspect.signature(base)
    own = list(plain.parameters.values())
    kind = own[2].kind  # as the first after model and input_ids: by position too, or by name alone
    more = {**{name: FIELDS[name].default for name in options.split()}, **defaults}
    types = {name: field.type for name, field in FIELDS.items()}
    added = [
        inspect.Parameter(name, kind, default=default, annotation=types.get(name, type(default).__name__))
        for name, default in more.items()
    ]
    signature = plain.replace(parameters=sorted([*own, *added], key=lambda parameter: parameter.kind))

    def decorate(body: Callable[[dict[str, Any]], Answer]) -> Callable[..., Answer]:
        @functools.wraps(body)
        def function(*args: Any, **kwargs: Any) -> Answer:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return body(bound.arguments)

        function.__signature__ = signature  # type: ignore[attr-defined]
        head, _, said = (inspect.getdoc(body) or "").partition(_ARGS)
        function.__doc__ = head + _ARGS + said + (base.__doc__ or "").partition(_ARGS)[2]
        return documented(function)

    return decorate
