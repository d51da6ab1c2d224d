"""Hub tokens: used, and left out of everything that is written down."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

ADVICE = (
    "a hub token that is given as an argument shows in command lines and files of yours; set the environment variable "
    "HF_TOKEN instead. It is left out of everything that is recorded here."
)

HIDDEN = "(hidden)"
_NAMES = ("token", "hf_token", "hub_token", "use_auth_token", "api_key")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}|(?<=\btoken=)[^,\s)}'\"]+")


def redacted(value: Any) -> Any:
    """A copy of plain data without hub tokens: under their usual names, and by what they look like."""
    if isinstance(value, Mapping):
        return {name: HIDDEN if _is_secret(name, one) else redacted(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(one) for one in value]
    return _TOKEN.sub(HIDDEN, value) if isinstance(value, str) else value


def holds_token(arguments: Mapping[str, Any]) -> bool:
    """Whether model arguments hold a token (``True`` stands for the one of the environment)."""
    return any(_is_secret(name, value) for name, value in arguments.items())


def _is_secret(name: Any, value: Any) -> bool:
    return name in _NAMES and isinstance(value, str) and bool(value)
