"""Keys of requests, room in the context, encoding."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from s2d2_lmeval.errors import RequestError
from s2d2_lmeval.harness.prompts import Occurrences, encode, fitting, request_key


def request(doc: int, idx: int = 0, repeats: int | None = 1, task: str | None = "t") -> Any:
    return SimpleNamespace(task_name=task, doc_id=doc, idx=idx, repeats=repeats)


def test_keys_are_stable_and_apart() -> None:
    assert request_key([1, 2, 3], 0) == -420096572918013790
    keys = {request_key(ids, n) for ids in ([1], [1, 2], [2, 1], [0, 1], [1, 0], [70000]) for n in range(3)}
    assert len(keys) == 18
    assert all(-(2**63) <= key < 2**63 for key in keys)


def test_occurrences_count_within_a_document() -> None:
    seen = Occurrences(world_size=1)
    asked = [request(0), request(1), request(0), request(0, task="other"), request(0, repeats=None)]
    found = [seen.next(one, "p", place) for place, one in enumerate(asked)]
    assert found == [(0, None), (0, None), (1, None), (0, None), (2, None)]


@pytest.mark.parametrize("repeats", [1, 3])
def test_padding_between_processes_copies_the_repeats_in_turn(repeats: int) -> None:
    seen = Occurrences(world_size=2)
    found = [seen.next(request(0, repeats=repeats), "p", 10 + place) for place in range(3 * repeats)]
    assert [original for _, original in found] == [None] * repeats + [10 + place for place in range(repeats)] * 2


def test_room() -> None:
    room: dict[str, Any] = {"context": 10, "mask_token_id": 9, "truncate": False}
    assert fitting([1] * 6, 4, "x", **room) == [1] * 6
    with pytest.raises(RequestError, match=r"x: the prompt has 7 tokens and asks for 4 more, but the context holds 10"):
        fitting([1] * 7, 4, "x", **room)
    with pytest.raises(RequestError, match="empty"):
        fitting([], 4, "x", **room)
    with pytest.raises(RequestError, match="mask token"):
        fitting([1, 9], 4, "x", **room)
    cutting = {**room, "truncate": True}
    assert fitting([1, 2, 3, 4, 5, 6, 7], 4, "x", **cutting) == [2, 3, 4, 5, 6, 7]
    with pytest.raises(RequestError, match=r"the context holds 10\. .* checkpoint allows\.$"):
        fitting([1], 10, "x", **cutting)


def test_no_second_bos() -> None:
    class Tokenizer:
        bos_token = "<s>"

        def __call__(self, texts: list[str], add_special_tokens: bool = True) -> dict[str, list[list[int]]]:
            return {"input_ids": [[0] * add_special_tokens + [ord(letter) for letter in text] for text in texts]}

    assert encode(Tokenizer(), ["a", "<s>b"], None) == [[0, 97], [60, 115, 62, 98]]
    assert encode(Tokenizer(), ["a"], False) == [[97]]
    assert encode(Tokenizer(), [], None) == []
