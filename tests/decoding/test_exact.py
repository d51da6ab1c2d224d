"""``exact``: in half precision too, the same numbers in every batch, and for ``sliding`` those of ``ar``, bit for
bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from s2d2_lmeval import load
from s2d2_lmeval.decoding.options.reading import queries_of
from s2d2_lmeval.decoding.passes import Sent
from s2d2_lmeval.decoding.rounds.acceptance import Keyed
from s2d2_lmeval.decoding.rounds.target import Target
from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.runtime.cache import SlotCache
from s2d2_lmeval.runtime.passes import Layout
from s2d2_lmeval.runtime.shapes import Frame, Shape

from . import drafting_tiny
from .tiny import VOCABULARY, tiny_model

PROMPTS = [[(5 * i + 3 * j) % 19 for j in range(3 + (7 * i) % 31)] for i in range(9)]
Said = dict[tuple[int, ...], bytes]


@contextmanager
def overheard() -> Iterator[Said]:
    """The target's logits after every text that it judged, as bytes."""
    said: Said = {}
    judge, admitted, holder = Keyed.judge, Target.admitted, {}

    def judging(self: Keyed, logits: torch.Tensor, sent: Sent) -> Any:
        slots, nodes = (index.tolist() for index in sent.at("verify"))
        for row, cell in enumerate(sent.cells("verify").tolist()):
            slot, node = slots[row], nodes[row]
            if cell != slot * sent.places + node or sent["depth"][slot, node] < 0:
                continue  # padding
            path = []
            while node:
                path.append(int(sent["token"][slot, node]))
                node = int(sent["parent"][slot, node])
            text = (*holder["rows"].tokens[slot], *reversed(path))
            bits = logits[row].numpy().tobytes()
            assert said.setdefault(text, bits) == bits, "a run contradicts itself"
        return judge(self, logits, sent)

    def admitting(self: Target, slot: int) -> None:
        holder["rows"] = self.rows
        admitted(self, slot)

    with patch.object(Keyed, "judge", judging), patch.object(Target, "admitted", admitting):
        yield said


def decode(options: dict[str, Any], rows: int, **loading: Any) -> tuple[list[list[int]], Said]:
    plain = tiny_model(dtype=torch.bfloat16, hidden=64, layers=3)
    model = load(plain, mask_token_id=VOCABULARY - 1, block_length=4, max_batch=rows, **loading)
    with overheard() as said:
        answers = model.generate(PROMPTS, {"stop_token_ids": (), **options}, max_new_tokens=14)
    return [answer.token_ids for answer in answers], said


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 1.0}], ids=["greedy", "sampled"])
def test_sliding_is_ar_and_a_batch_is_its_rows_bit_for_bit(sampling: dict[str, Any]) -> None:
    expected, bits = decode({"decoder": "ar", **sampling}, 1, exact=True)
    for decoder, rows in (("ar", 6), ("sliding", 1), ("sliding", 6)):
        answers, others = decode({"decoder": decoder, **sampling}, rows, exact=True)
        assert answers == expected
        shared = bits.keys() & others.keys()
        assert len(shared) >= len(bits)
        assert all(bits[text] == others[text] for text in shared)


def test_otherwise_bits_differ() -> None:
    """Or the test above could not fail."""
    _, bits = decode({"decoder": "ar"}, 1)
    _, others = decode({"decoder": "sliding"}, 6)
    assert any(bits[text] != others[text] for text in bits.keys() & others.keys())


@pytest.mark.parametrize(
    "options", [{"decoder": "s2d2"}, {"schedule": "lookahead", "cache_ver": True, "draft_ver": True}]
)
def test_blocks_do_not_depend_on_their_batch(options: dict[str, Any]) -> None:
    answers = []
    for rows in (1, 6):
        plain = tiny_model(dtype=torch.bfloat16, hidden=64, layers=3)
        model = load(plain, mask_token_id=VOCABULARY - 1, block_length=4, max_batch=rows, exact=True)
        answers.append(model.generate(PROMPTS, {"stop_token_ids": (), **options}, max_new_tokens=12))
    for one, other in zip(*answers, strict=True):
        assert one.canvas == other.canvas
        assert one.decoding_order == other.decoding_order


def test_captured_forwards_are_the_eager_ones() -> None:
    for decoder in ("ar", "sliding"):
        eager, graphed = (decode({"decoder": decoder}, 6, exact=True, static_shapes=shapes) for shapes in (False, True))
        assert eager == graphed


def test_a_drafter_beside_it() -> None:
    model = drafting_tiny.pair(max_batch=3)
    model._runner.part = 64
    expected = model.generate(PROMPTS[:4], {"decoder": "ar"}, max_new_tokens=9)
    drafted = model.generate(PROMPTS[:4], {"decoder": "ddtree", "tree_budget": 12}, max_new_tokens=9)
    assert [one.token_ids for one in drafted] == [one.token_ids for one in expected]


def test_rows_are_cut_into_forwards_of_one_shape() -> None:
    layout, cache = Layout(np.array([0, 1, 3, 4]), np.array([5, 4, 3, 8])), SlotCache(5, 32)
    cache.lengths[:] = [1, 2, 3, 4, 5]
    shape = Shape.in_parts(layout, 9, cache, 5, 8)
    assert shape == Shape(24, 5, 8, 32, 16, padded=True, part=8)
    frame = Frame(layout, shape)
    assert frame.part_of.tolist() == [0, 1, 1, 2]
    assert frame.at.tolist() == [*range(5), *range(8, 15), *range(16, 24)]
    told = {name: torch.from_numpy(values) for name, values in frame.attention(cache).items()}
    assert [one["widths"].tolist() for _, one in frame.parts(told)] == [
        [5, 0, 0, 0, 0],
        [0, 4, 0, 3, 0],
        [0, 0, 0, 0, 8],
    ]
    assert [one["offsets"].tolist() for _, one in frame.parts(told)] == [[0] * 5, [0, 0, 0, 4, 0], [0] * 5]
    assert [at for at, _ in frame.parts(told)] == [slice(0, 8), slice(8, 16), slice(16, 24)]
    with pytest.raises(ConfigError, match="a row brings 9: give exact=9 or more"):
        Shape.in_parts(Layout(np.arange(1), np.array([9])), 1, cache, 5, 8)


def test_what_exact_takes() -> None:
    assert [queries_of(value) for value in (False, True, "true", "False", 48, "48")] == [0, 64, 64, 0, 48, 48]
    for wrong in (0, 1, 5, -3, "many", 2.5):
        with pytest.raises(ConfigError, match="exact="):
            queries_of(wrong)
    with pytest.raises(ConfigError, match="give exact=12 or more"):
        decode({"schedule": "lookahead", "block_length": 4, "cache_ver": True, "draft_ver": True}, 1, exact=8)
