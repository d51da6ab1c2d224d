"""Text in pieces: nothing is taken back, and stop strings are never shown."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from s2d2_lmeval.streaming import Text
from s2d2_lmeval.toy import checkpoint_path


@cache
def toy() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(checkpoint_path())


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


class Counting:
    """A tokenizer that counts the tokens that it decodes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.decoded = tokenizer, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def decode(self, token_ids: list[int], **options: Any) -> str:
        self.decoded += len(token_ids)
        return str(self.tokenizer.decode(token_ids, **options))


@settings(deadline=None)  # the tokenizer is read once
@example(parts=["<<<", "<😀😀<<€", "<<€😀<😀"], cut=5)
@given(
    parts=st.lists(
        st.one_of(st.text(alphabet="ab \nQé€😀<>|", max_size=8), st.sampled_from(["<|im_end|>", "<|MASK|>"])),
        max_size=12,
    ),
    cut=st.integers(1, 5),
)
def test_of_byte_tokens_each_is_decoded_once(parts: list[str], cut: int) -> None:
    tokenizer = Counting(toy())
    ids = toy()("".join(parts))["input_ids"]
    shown = Text(tokenizer)
    pieces = [shown.more(ids[begin : begin + cut]) for begin in range(0, len(ids), cut)]
    assert "".join(pieces) + shown.rest() == toy().decode(ids, skip_special_tokens=True)
    assert tokenizer.decoded <= 4 * len(ids)  # a character has at most four bytes
    assert Text(Bytes()).more([0xC3]) == ""


@pytest.mark.parametrize("cut", [1, 2, 3, 5])
@pytest.mark.parametrize("text", ["a" + "😀" * 40, "aé€" + "€" * 40, "<<<<😀😀<<€<<€😀<😀" * 4])
def test_characters_that_are_cut_again_and_again(text: str, cut: int) -> None:
    tokenizer = Counting(toy())
    ids, shown = toy()(text)["input_ids"], Text(tokenizer)
    pieces = [shown.more(ids[begin : begin + cut]) for begin in range(0, len(ids), cut)]
    assert "".join(pieces) + shown.rest() == text
    assert tokenizer.decoded <= 4 * len(ids)


def test_other_tokens_are_decoded_together() -> None:
    tokenizer, ids = Counting(toy()), toy()("one two three")["input_ids"]
    tokenizer.clean_up_tokenization_spaces = True
    shown = Text(tokenizer)
    for token in ids:
        shown.more([token])
    assert tokenizer.decoded > len(ids)


def test_a_beginning_of_a_stop_string_waits() -> None:
    shown = Text(Bytes(), ["\nQ"])
    assert shown.more(list(b"one\n")) == "one"
    assert shown.more(list(b"two\n")) == "\ntwo"
    assert shown.more(list(b"Question")) == ""
    assert shown.rest() == ""
    assert shown.whole == "one\ntwo"
