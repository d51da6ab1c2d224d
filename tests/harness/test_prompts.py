"""Keys of requests, room in the context, encoding."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from s2d2_lmeval.errors import RequestError
from s2d2_lmeval.harness.prompts import Occurrences, Room, encode, is_padding, request_key


def request(doc: int, idx: int = 0, repeats: int | None = 1, task: str | None = "t") -> Any:
    return SimpleNamespace(task_name=task, doc_id=doc, idx=idx, repeats=repeats)


def test_keys_are_stable_and_apart() -> None:
    assert request_key([1, 2, 3], 0) == -420096572918013790
    keys = {request_key(ids, n) for ids in ([1], [1, 2], [2, 1], [0, 1], [1, 0], [70000]) for n in range(3)}
    assert len(keys) == 18
    assert all(-(2**63) <= key < 2**63 for key in keys)


def test_occurrences_count_within_a_document() -> None:
    seen = Occurrences()
    assert [seen.next(request(0), "p"), seen.next(request(1), "p"), seen.next(request(0), "p")] == [0, 0, 1]
    assert seen.next(request(0, task="other"), "p") == 0


def test_padding_is_recognised_only_between_processes() -> None:
    assert is_padding(request(0, repeats=1), 1, world_size=2)
    assert not is_padding(request(0, repeats=2), 1, world_size=2)
    assert not is_padding(request(0, repeats=1), 1, world_size=1)
    assert not is_padding(request(0, repeats=None), 5, world_size=2)


def test_room() -> None:
    room = Room(context=10, mask_token_id=9, truncate=False)
    assert room.fit([1] * 6, 4, "x") == [1] * 6
    with pytest.raises(RequestError, match=r"x: a prompt of 7 tokens and 4 new ones do not fit the context of 10"):
        room.fit([1] * 7, 4, "x")
    with pytest.raises(RequestError, match="empty"):
        room.fit([], 4, "x")
    with pytest.raises(RequestError, match="mask token"):
        room.fit([1, 9], 4, "x")
    cutting = Room(context=10, mask_token_id=9, truncate=True)
    assert cutting.fit([1, 2, 3, 4, 5, 6, 7], 4, "x") == [2, 3, 4, 5, 6, 7]
    with pytest.raises(RequestError, match=r"context of 10. Lower max_gen_toks\.$"):
        cutting.fit([1], 10, "x")


def test_no_second_bos() -> None:
    class Tokenizer:
        bos_token = "<s>"

        def __call__(self, texts: list[str], add_special_tokens: bool = True) -> dict[str, list[list[int]]]:
            return {"input_ids": [[0] * add_special_tokens + [ord(letter) for letter in text] for text in texts]}

    assert encode(Tokenizer(), ["a", "<s>b"], None) == [[0, 97], [60, 115, 62, 98]]
    assert encode(Tokenizer(), ["a"], False) == [[97]]
    assert encode(Tokenizer(), [], None) == []
