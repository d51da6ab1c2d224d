"""Whether a response solves a toy problem; each scorer takes kind, prompt, what the problem specifies, and response."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from s2d2_lmeval.tasks import sandbox

COLORS = ("red", "blue", "green", "black", "white", "pink", "gold", "gray")

_FINAL = re.compile(r"#### (-?\d+)")


def _arithmetic(kind: str, prompt: str, wanted: Mapping[str, Any], response: str) -> bool:
    """The first ``#### n`` of the response is the right number."""
    match = _FINAL.search(response)
    return match is not None and int(match.group(1)) == wanted["result"]


def _program(kind: str, prompt: str, wanted: Mapping[str, Any], response: str) -> bool:
    """The program returns the right value in every test case. Runs ``response`` in the sandbox: a body is put below
    the prompt, a whole ``def`` is taken as it is.
    """
    text = response.strip("\n")
    if text.lstrip().startswith("def "):
        source = text.lstrip()
    else:
        source = f"{prompt}\n{'    ' if text and not text[0].isspace() else ''}{text}\n"
    results = sandbox.call(source, wanted["name"], wanted["arguments"])
    try:
        return results is not None and json.dumps(results) == json.dumps(wanted["results"])
    except (TypeError, ValueError):  # sets, bytes, numbers of thousands of digits
        return False


def _instruction(kind: str, prompt: str, wanted: Mapping[str, Any], response: str) -> bool:
    """The response, apart from white space around it, follows the instruction."""
    return INSTRUCTIONS[kind](response.strip(), **wanted)


def _same(text: str, response: str) -> bool:
    return text == response


def _is_bullet_list(text: str, items: list[str]) -> bool:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [line[1:].strip() for line in lines if line[0] in "-*"] == items and len(lines) == len(items)


def _ends_with(text: str, topic: str, ending: str) -> bool:
    return text.removesuffix(".").endswith(ending) and topic in text.split(ending)[0].lower()


def _is_quoted(text: str, words: str) -> bool:
    return len(text) > 1 and text[0] == text[-1] == '"' and text[1:-1].strip() == words


def _counts(text: str, first: int, last: int) -> bool:
    return text.replace(",", " ").split() == [str(number) for number in range(first, last + 1)]


def _is_distinct(text: str, number: int, avoid: list[str]) -> bool:
    named = [part.strip().lower() for part in text.split(",")]
    return len(named) == len(set(named)) == number and set(named) <= set(COLORS) - set(avoid)


INSTRUCTIONS: dict[str, Callable[..., bool]] = {
    "repeat": _same,
    "uppercase": _same,
    "bullets": _is_bullet_list,
    "ending": _ends_with,
    "reverse": _same,
    "quotes": _is_quoted,
    "count": _counts,
    "distinct": _is_distinct,
}
"""Kind of instruction -> whether a response follows it; any response that does is right, as in IFEval."""

SCORERS: dict[str, Callable[[str, str, Mapping[str, Any], str], bool]] = {
    "arithmetic": _arithmetic,
    "programs": _program,
    "instructions": _instruction,
}
