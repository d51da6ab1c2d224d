"""Text in pieces: nothing is taken back, and stop strings are never shown."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from s2d2_lmeval.streaming import Text


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, token_ids: list[int], **_: Any) -> str:
        return bytes(token_ids).decode(errors="replace")


@given(
    text=st.text(alphabet="ab\nQé", max_size=24),
    until=st.lists(st.text(alphabet="ab\nQé", min_size=1, max_size=3), max_size=3),
    cuts=st.lists(st.integers(0, 48), max_size=8),
)
def test_pieces_are_the_text_before_the_first_stop(text: str, until: list[str], cuts: list[int]) -> None:
    tokens, shown = list(text.encode()), Text(Bytes(), until)
    places = sorted({0, len(tokens), *(min(cut, len(tokens)) for cut in cuts)})
    pieces = [shown.more(tokens[begin:end]) for begin, end in pairwise(places)]
    ends = [place for string in until if (place := text.find(string)) >= 0]
    expected = text[: min(ends, default=len(text))]
    assert "".join(pieces) + shown.rest() == expected
    assert shown.whole == expected


def test_a_beginning_of_a_stop_string_waits() -> None:
    shown = Text(Bytes(), ["\nQ"])
    assert shown.more(list(b"one\n")) == "one"
    assert shown.more(list(b"two\n")) == "\ntwo"
    assert shown.more(list(b"Question")) == ""
    assert shown.rest() == ""
    assert shown.whole == "one\ntwo"
