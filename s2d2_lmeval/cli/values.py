"""Argument types of command lines: spellings, numbers within a range, and ``name=value``."""

from __future__ import annotations

import argparse
import ast
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from s2d2_lmeval.errors import ConfigError, shown

_WORDS = {"true": True, "false": False, "none": None, "null": None}


class Parser(argparse.ArgumentParser):
    """A parser to which ``--batch-size`` and ``--batch_size``, as the harness spells it, are the same."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's."""
        declared = {as_in_the_harness(name): name for name in self._option_string_actions}
        given = [_renamed(argument, declared) for argument in (sys.argv[1:] if args is None else args)]
        return super().parse_known_args(given, namespace)


class Print(argparse.Action):
    """An option that prints what its ``const`` returns, and ends the command."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """As argparse's."""
        print(self.const())
        parser.exit()


def as_in_the_harness(argument: str) -> str:
    """``argument`` with underscores in the name, if it is a long option."""
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if re.match(r"--[a-zA-Z][\w-]*$", name) else argument


def _renamed(argument: str, declared: dict[str, str]) -> str:
    name, equals, value = argument.partition("=")
    return declared.get(as_in_the_harness(name), name) + equals + value


def whole(low: int = 1, high: int = 1_000_000) -> Callable[[str], int]:
    """The type of an argument that takes a whole number from ``low`` to ``high``."""

    def read(text: str) -> int:
        value = int(text) if text.isdecimal() and len(text) <= 19 else low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number from {low} to {high}")
        return value

    return read


def real(low: float, high: float) -> Callable[[str], float]:
    """The type of an argument that takes a number from ``low`` to ``high``."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{shown(text)} is not a number from {low:g} to {high:g}")
        return value

    return read


def nonempty(text: str) -> str:
    """The type of an argument that must not be empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; give a value or omit the option")
    return text


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

    Raises:
        ConfigError: if a text is not such a pair, or a name occurs twice.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        option, equals, text = pair.partition("=")
        option = option.strip()
        if not equals or not option:
            raise ConfigError(f"--option {shown(pair)}: write name=value, such as block_length=16.")
        if option in options:
            raise ConfigError(f"--option {shown(option)} is given twice; give it once.")
        options[option] = parse_value(text.strip())
    return options


SHARED: dict[str, dict[str, Any]] = {
    "--limit": {"type": whole(), "default": 100, "help": "documents per task (default: %(default)s)"},
    "--rows": {"type": whole(), "default": 8, "help": "requests in flight (default: %(default)s)"},
    "--threads": {"type": whole(), "help": "of torch on the CPU"},
    "--revision": {"help": "of a hub id"},
    "--chat": {
        "action": argparse.BooleanOptionalAction,
        "default": None,
        "help": "put the prompt into the chat template (default: if the tokenizer has one)",
    },
    "--option": {
        "action": "extend",
        "nargs": "+",
        "default": [],
        "metavar": "NAME=VALUE",
        "help": "decoding or loading options by the names of --model_args (docs/options.md)",
    },
}
"""Options that several commands share."""


def add_shared(parser: argparse._ActionsContainer, *names: str, **changes: Any) -> None:
    """Declare some of :data:`SHARED`, with ``changes``."""
    for name in names:
        parser.add_argument(name, *(["-o"] if name == "--option" else []), **{**SHARED[name], **changes})
