"""Answer extraction: the number at the end of a calculation, the program in a reply."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from decimal import Decimal

_NUMBER = re.compile(
    r"(?<![\w.])(?P<sign>[-\u2212]?) ?(?:[$€£] ?)?(?P<inner>[-\u2212]?)"
    r"(?P<digits>\d{1,3}(?:[,\u202f\u00a0]\d{3})+(?!\d)|\d+)(?P<fraction>\.\d+)?"
)
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|\\,)(?=\d{3})")
_FRACTION = re.compile(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}")


def answered_number(text: str) -> Decimal | None:
    r"""The number that a worked solution ends in.

    In order of preference: the last ``\boxed{…}`` that holds a number, the number after the last ``####``, the last
    number of the text. Thousands separators, currency signs, units and ``\frac`` are understood; None if there is no
    number. Thoughts (``<think>``) do not count.
    """
    marked = marked_number(text)
    if marked is not None:
        return marked
    found = _numbers(without_thoughts(text))
    return found[-1] if found else None


def marked_number(text: str) -> Decimal | None:
    r"""As :func:`answered_number`, but only a number in ``\boxed{…}`` or after ``####``."""
    text = without_thoughts(text)
    for boxed in reversed(list(_boxed(text))):
        found = _numbers(boxed)
        if found:
            return found[-1]
    for marked in reversed(text.split("####")[1:]):
        found = _numbers(marked.partition("\n")[0])
        if found:
            return found[0]
    return None


def boxed_answer(text: str) -> str | None:
    r"""The content of the last ``\boxed{…}`` outside of thoughts."""
    return next(reversed(list(_boxed(without_thoughts(text)))), None)


def same_number(first: Decimal | None, second: Decimal | None) -> bool:
    """Whether both are numbers and equal; to a millionth, for answers such as 33.333333."""
    return first is not None and second is not None and abs(first - second) <= Decimal("1e-6")


def _boxed(text: str) -> Iterator[str]:
    r"""The contents of every ``\boxed{…}``, braces inside it balanced; an unclosed one reaches to the end."""
    for match in re.finditer(r"\\f?boxed\s*\{", text):
        depth, end = 1, match.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        yield text[match.end() : end - 1 if not depth else end]


def _numbers(text: str) -> list[Decimal]:
    text = _FRACTION.sub(lambda match: f" {Decimal(match[1]) / (Decimal(match[2]) or 1)} ", text)
    text = _THOUSANDS.sub(",", text.replace(r"\$", "$"))
    numbers = []
    for match in _NUMBER.finditer(text):
        digits = re.sub(r"\D", "", match["digits"])
        # "7-2" and "(3) - 2" are differences, "x = -2" is a negative number.
        difference = re.search(r"[\d)\]]\s*$", text[: match.start()]) is not None
        value = Decimal(digits + (match["fraction"] or ""))
        numbers.append(-value if match["inner"] or (match["sign"] and not difference) else value)
    return numbers


_FENCE = re.compile(
    r"^[ \t]*(?P<fence>`{3,}|~{3,})[ \t]*(?P<language>[\w+-]*)[^\n]*\n(?P<code>.*?)(?:^[ \t]*(?P=fence)|\Z)",
    re.DOTALL | re.MULTILINE,
)
_PYTHON = ("python", "py", "python3")
_CLASS = re.compile(r"^class\s+(?P<name>\w+)[^\n]*:[^\n]*\n(?P<body>(?:[ \t]+[^\n]*(?:\n|\Z)|[ \t]*\n)*)", re.MULTILINE)


def without_thoughts(text: str) -> str:
    """A reply without what stands between ``<think>`` and ``</think>``.

    A template may have opened the thoughts in the prompt, and the token budget may end before they do.
    """
    text = text.rpartition("</think>")[2]
    return text.partition("<think>")[0]


def answered_code(text: str, entry_point: str) -> str:
    """The code in a reply: the last fenced block that defines ``entry_point``; where none does, the longest of those
    marked as Python, or of all; the whole text where it has no blocks. Thoughts do not count.

    A block that the token budget cut off counts to its end.
    """
    text = without_thoughts(text)
    blocks = [(match["language"].lower() in _PYTHON, match["code"]) for match in _FENCE.finditer(text)]
    if not blocks:
        return text
    defining = [code for _, code in blocks if _defines(code, entry_point)]
    return defining[-1] if defining else max(blocks, key=lambda block: (block[0], len(block[1])))[1]


def is_plainly_code(text: str, entry_point: str) -> bool:
    """Whether a reply leaves no choice of its program: no fenced block, or one that defines ``entry_point``."""
    blocks = [match["code"] for match in _FENCE.finditer(without_thoughts(text))]
    return not blocks or (len(blocks) == 1 and _defines(blocks[0], entry_point))


def whole_program(prompt: str, reply: str, entry_point: str) -> str:
    """A program from a HumanEval prompt (imports, helpers, signature and docstring of ``entry_point``) and a reply.

    A reply that defines the function itself, or a class (such as ``Solution``) with that method, stands after the
    prompt's imports and helpers; any other continues the prompt.
    """
    code = answered_code(reply, entry_point)
    if not _defines(code, entry_point):
        return prompt + code
    code = textwrap.dedent(code)  # fences inside a list are indented as a whole
    holders = [match["name"] for match in _CLASS.finditer(code) if _defines(match["body"], entry_point)]
    alone = re.search(rf"^(?:async\s+)?def\s+{re.escape(entry_point)}\s*\(", code, re.MULTILINE)
    method = f"\n{entry_point} = {holders[-1]}().{entry_point}\n" if holders and not alone else ""
    return f"{preamble(prompt, entry_point)}\n{code}{method}"


def preamble(prompt: str, entry_point: str) -> str:
    """What a HumanEval prompt has ahead of ``entry_point``: imports, and helpers that its tests may call."""
    start = re.search(rf"^(?:async\s+)?def\s+{re.escape(entry_point)}\s*\(", prompt, re.MULTILINE)
    return prompt[: start.start()] if start else ""


def _defines(code: str, name: str) -> bool:
    return re.search(rf"^[ \t]*(?:async\s+)?def\s+{re.escape(name)}\s*\(", code, re.MULTILINE) is not None
