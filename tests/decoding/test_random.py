"""Keyed randomness: the same number for the same name, whatever computes it and when."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2d2_lmeval.decoding.sampling.random import ACCEPT, DRAFT, Key, KeyedSource, hashed

WORDS = torch.arange(3).unsqueeze(1) * 7, torch.arange(5).expand(3, 5) + 2**33, torch.tensor([[0], [4], [1]])
"""Request, position, draw of three rows of five places."""


def test_numbers_stay_what_they_are() -> None:
    """A seed names the same answers in every version."""
    bits = hashed(1234, ACCEPT, tuple(torch.tensor([word]) for word in (0, 17, 2)))
    assert bits.tolist() == [-949661231747577986]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**62), purpose=st.integers(1, 3), start=st.integers(-(2**62), 2**62))
def test_tensors_and_arrays_give_the_same(seed: int, purpose: int, start: int) -> None:
    """A CPU's keys are hashed in numpy, a GPU's in torch."""
    words = tuple(word + start for word in WORDS)
    by_torch = hashed(seed, purpose, words)
    by_numpy = hashed(seed, purpose, tuple(word.numpy() for word in words))
    assert by_torch.tolist() == by_numpy.tolist()
    assert by_torch.unique().numel() == 15


def test_what_is_taken_of_a_key_is_drawn_as_in_the_whole() -> None:
    source, key = KeyedSource(5), Key(DRAFT, *WORDS)
    whole = source.uniform(key, torch.ones(3, 5, dtype=torch.bool))
    at = torch.tensor([2, 0, 0]), torch.tensor([4, 1, 3])
    taken = key.take(at)
    assert source.uniform(taken, at[0] >= 0).tolist() == whole[at].tolist()
    again = taken.take((torch.tensor([2, 0]),))
    assert source.uniform(again, at[0][:2] >= 0).tolist() == whole[at][[2, 0]].tolist()
