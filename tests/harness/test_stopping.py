"""Stop strings: found where a token-by-token reader would find them, whatever the blocks and characters."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import example, given, settings
from hypothesis import strategies as st

from s2d2_lmeval.harness.prompts import StopStrings

SPECIAL = 256


def decode(tokens: Sequence[int]) -> str:
    """Byte tokens; 256 is the special token </think>."""
    parts, run = [], bytearray()
    for token in tokens:
        if token == SPECIAL:
            parts.append(run.decode("utf-8", "replace") + "</think>")
            run = bytearray()
        else:
            run.append(token)
    return "".join(parts) + run.decode("utf-8", "replace")


def token_by_token(tokens: list[int], strings: Sequence[str]) -> int | None:
    return next((n for n in range(1, len(tokens) + 1) if any(s in decode(tokens[:n]) for s in strings)), None)


def by_blocks(stopper: StopStrings, tokens: list[int], lengths: Sequence[int], request: int = 0) -> int | None:
    end = 0
    for length in lengths:
        end += length
        kept = stopper(request, tokens[:end])
        if kept is not None:
            return kept
        if end >= len(tokens):
            return None
    return stopper(request, tokens)


texts = st.text(alphabet="ab\n é€😀", max_size=40)
strings = st.lists(st.text(alphabet="ab\n é€😀", min_size=1, max_size=5), max_size=3)


@settings(max_examples=300, deadline=None)
@given(texts, strings, st.lists(st.integers(1, 9), min_size=1, max_size=40))
@example("aa😀b", ["😀"], [3, 1, 1, 1])
@example("ab\n\nab", ["\n\n", "b\n"], [8])
def test_equal_to_reading_token_by_token(text: str, stops: list[str], lengths: list[int]) -> None:
    tokens = list(text.encode())
    assert by_blocks(StopStrings(decode, stops), tokens, lengths) == token_by_token(tokens, stops)


def test_requests_do_not_disturb_each_other() -> None:
    stopper = StopStrings(decode, ["stop"])
    assert stopper(0, list(b"st")) is None
    assert stopper(1, list(b"op")) is None
    assert stopper(1, list(b"op here")) is None
    assert stopper(0, list(b"stop it")) == 4


def test_long_answers_are_read_once() -> None:
    read = 0

    def counting(tokens: Sequence[int]) -> str:
        nonlocal read
        read += len(tokens)
        return decode(tokens)

    stopper = StopStrings(counting, ["Question:"])
    tokens = list(b"x" * 4000)
    for end in range(4, 4001, 4):
        assert stopper(0, tokens[:end]) is None
    assert read < 10 * len(tokens)


def test_nothing_to_stop_at() -> None:
    assert StopStrings(decode, [])(0, list(b"abc")) is None
    assert StopStrings(decode, ["", ""])(0, list(b"abc")) is None
