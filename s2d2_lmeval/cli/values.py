"""``name=value`` on the command line."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterable
from typing import Any

from s2d2_lmeval.errors import ConfigError

_WORDS = {"true": True, "false": False, "none": None, "null": None}


def parse_value(text: str) -> Any:
    """The value that ``text`` writes: a number, true/false/none, a Python literal, else the text itself."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def parse_options(pairs: Iterable[str]) -> dict[str, Any]:
    """A dictionary of ``name=value`` texts.

    :raises ConfigError: for a text that is no such pair, or a name that comes twice.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip()
        if not equals or not name:
            raise ConfigError(f"--option {pair}: write name=value, such as block_length=16.")
        if name in options:
            raise ConfigError(f"--option {name} is given twice; give it once.")
        options[name] = parse_value(text.strip())
    return options


def add_option_argument(parser: argparse._ActionsContainer) -> None:
    """``--option name=value``, any number of them."""
    parser.add_argument(
        "--option",
        "-o",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="decoding or loading options by the names of --model_args (docs/options.md)",
    )
