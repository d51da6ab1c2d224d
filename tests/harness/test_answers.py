"""The number and the program in a reply."""

from __future__ import annotations

from decimal import Decimal

import pytest

from s2d2_lmeval.tasks.answers import answered_code, answered_number, same_number, whole_program


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#### 18", "18"),
        ("16 - 3 = 13 eggs.\n#### 1,234", "1234"),
        ("#### $1,234,567.50.", "1234567.50"),
        ("#### -7", "-7"),
        ("#### −7", "-7"),
        ("#### 70%\nQuestion: 5 and 6", "70"),
        (r"so \boxed{18} it is, after 3 days", "18"),
        (r"\boxed{\$1{,}234} in 7 weeks", "1234"),
        (r"\boxed{\text{18 eggs}}", "18"),
        (r"first \boxed{1}, then \boxed{25}", "25"),
        (r"\boxed{25} and \boxed{x}", "25"),
        (r"\boxed{3", "3"),
        (r"\boxed{\frac{3}{4}}", "0.75"),
        (r"\boxed{1} wins over #### 2 and 3", "1"),
        ("The answer is 42.", "42"),
        ("The answer is **42**.", "42"),
        ("She has 3, then 4, so $1,200 in all.", "1200"),
        ("It costs $5.50.", "5.50"),
        ("x = -2", "-2"),
        ("-$20", "-20"),
        ("$-20", "-20"),
        ("7-2", "2"),
        ("9 - 4 = 5", "5"),
        ("1,23", "23"),
        ("1,2,3", "3"),
        ("in the 1990s there were 12", "12"),
        ("3.0", "3.0"),
    ],
)
def test_numbers(text: str, expected: str) -> None:
    assert answered_number(text) == Decimal(expected)


@pytest.mark.parametrize("text", ["", "no idea", "####", r"\boxed{}", "...", "---"])
def test_no_number(text: str) -> None:
    assert answered_number(text) is None
    assert not same_number(answered_number(text), Decimal(0))
    assert not same_number(None, None)


def test_equal_numbers() -> None:
    assert same_number(Decimal("18"), Decimal("18.00"))
    assert same_number(Decimal("33.3333333"), Decimal("33.33333333"))
    assert not same_number(Decimal("18"), Decimal("18.1"))


CODE = "def f(x):\n    return x\n"


@pytest.mark.parametrize(
    "text",
    [
        f"Sure:\n```python\n{CODE}```\nDone.",
        f"```\n{CODE}```",
        f"```python\n{CODE}",
        f"```py title=x\n{CODE}```",
        f"Example:\n```python\nprint(f(1))\nprint(f(2))\nprint(f(3))\n```\nand\n```python\n{CODE}```",
        f"```\nsome longer output\nthat is not code at all\n```\n```python\n{CODE}```",
        f"~~~python\n{CODE}~~~",
        f"~~~\n{CODE}",
        f"````python\n{CODE}````",
        f"A draft:\n```python\ndef f(x):\n    # longer, wrong\n    return None\n```\nNo:\n```python\n{CODE}```",
        f"```python\n{CODE}```\nIt is used like so:\n```python\nfor n in range(100):\n    print(f(n))\n```",
        f"<think>\n```python\ndef f(x):\n    return None\n```\n</think>\n```python\n{CODE}```",
        f"Perhaps\n```python\ndef f(x):\n    return None\n```\n</think>\n```python\n{CODE}```",
        f"```python\n{CODE}```\n<think>\n```python\ndef f(x): return None\n```",
        f"~~~python\n{CODE}~~~\n```\nf(1) == 1\n```",
    ],
)
def test_fenced_code(text: str) -> None:
    assert answered_code(text, "f") == CODE


def test_text_without_fences_is_code() -> None:
    assert answered_code("    return 1", "f") == "    return 1"


@pytest.mark.parametrize("text", ["<think>\n```python\ndef f(x): return x\n```", "<think>def f(x): return x</think>"])
def test_thoughts_are_not_answers(text: str) -> None:
    assert answered_code(text, "f") == ""
    assert answered_number(text.replace("x", "7")) is None


PROMPT = 'import math\n\ndef helper(x):\n    return x\n\ndef f(x):\n    """Doc."""\n'


@pytest.mark.parametrize(
    "reply",
    [
        "    return helper(math.floor(x))\n",
        "```python\n    return helper(math.floor(x))\n```",
        "```python\ndef f(x):\n    return helper(math.floor(x))\n```",
        "1. Like so:\n   ```python\n   def f(x):\n       return helper(math.floor(x))\n   ```",
        "def f(x):\n    return helper(math.floor(x))",
        "```python\nclass Solution:\n    def f(self, x):\n        return helper(math.floor(x))\n```",
        "```python\nclass S(object):\n\n    def g(self): return 1\n\n    def f(self, x): return self.g()\n```",
        "```python\nclass Other:\n    def f(self): return 5\n\ndef f(x):\n    return helper(math.floor(x))\n```",
        "```python\nclass Solution:\n    @staticmethod\n    def f(x):\n        return 1\n\nprint(Solution().f(2))\n```",
    ],
)
def test_whole_programs_run(reply: str) -> None:
    space: dict = {}
    exec(whole_program(PROMPT, reply, "f"), space)
    assert space["f"](1.5) == 1
