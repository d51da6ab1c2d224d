"""The cache's name among a module's arguments, which transformers 5.24 changed."""

from __future__ import annotations

import pytest
from torch import nn

from s2d2_lmeval.runtime.cache import cache_argument


class Before(nn.Module):
    def forward(self, hidden: object, past_key_values: object = None) -> None: ...


class Since(nn.Module):
    def forward(self, hidden: object, cache: object = None) -> None: ...


@pytest.mark.parametrize(("module", "name"), [(Before(), "past_key_values"), (Since(), "cache")])
def test_the_signature_says_it(module: nn.Module, name: str) -> None:
    assert cache_argument(module) == name
