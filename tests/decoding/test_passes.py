"""The pass builder: where segments and reads of several rows end up in one packed forward."""

import numpy as np
import pytest
import torch

from s2d2_lmeval.decoding.passes import Cells, PassBuilder, Sent
from s2d2_lmeval.runtime.cache import SlotCache
from s2d2_lmeval.runtime.graphs import upload
from s2d2_lmeval.runtime.shapes import Frame, Shape

CPU = torch.device("cpu")


def built() -> tuple[PassBuilder, np.ndarray]:
    """Rows 4 and 9: texts of two and three tokens, a copy for each of the places 5 and 7 of the second, one mask
    after the first.
    """
    builder = PassBuilder(np.array([4, 9]))
    builder.span(np.array([10, 5]), np.array([2, 3])).set(source=np.arange(5), rank=7)
    copies = builder.each(np.array([1, 1]), np.array([5, 7]))
    builder.span(np.array([12, 0]), np.array([1, 0])).set(source=99)
    builder.lay_out()
    builder.read("copy", np.array([1, 1]), np.array([0, 2]), copies.query)
    builder.read("none", np.array([], dtype=int), np.array([], dtype=int), np.array([], dtype=int))
    builder.read("first", np.array([0]), np.array([3]), builder.layout.offsets[:1])
    return builder, copies.query


def test_segments_lie_one_after_the_other_within_each_row():
    builder, copies = built()
    assert builder.layout.widths.tolist() == [3, 5]
    assert builder.column("position").tolist() == [10, 11, 12, 5, 6, 7, 5, 7]
    assert builder.column("source", -1).tolist() == [0, 1, 99, 2, 3, 4, -1, -1]
    assert builder.padded("rank", -2, default=1).tolist() == [[7, 7, 1, -2, -2], [7, 7, 7, 1, 1]]
    assert copies.tolist() == [6, 7]


def test_a_plan_reads_its_groups_in_order_and_counts_them_per_row():
    builder, _ = built()
    plan = builder.plan(np.array([1, 2]), np.array([0, 1]), 4, known={"text": np.array([2, 3])})
    assert plan.query.tolist() == [6, 7, 0]
    assert (plan.count("copy"), plan.count("none"), plan.count("first"), plan.count("absent")) == (2, 0, 1, 0)
    assert plan.present == ("copy", "first")
    assert plan.wanted_counts.tolist() == [1, 2]
    assert plan.known["text"].tolist() == [2, 3]


@pytest.mark.parametrize("padded", [False, True])
def test_a_group_has_its_cells_whether_padded_or_not(padded: bool):
    builder, _ = built()
    plan = builder.plan(np.array([1, 2]), np.array([0, 1]), 4, rows={"extra": np.array([[1, 2]])})
    cache = SlotCache(12, 64)
    layout = builder.layout
    shape = Shape.bucket(layout, 3, cache, 12) if padded else Shape.tight(layout, 3, cache)
    assert shape is not None
    frame = Frame(layout, shape)
    sent = Sent(upload(CPU, plan.lay(frame, 12)), plan, frame)
    assert sent["extra"].tolist() == [[1, 2]]
    assert not len(sent.cells("none"))
    assert (sent.has("copy"), sent.has("none")) == (True, False)
    for name, expected in (("copy", {(9, 0), (9, 2)}), ("first", {(4, 3)})):
        table = Cells(torch.zeros(12 * 4 + 1, dtype=torch.long), 4)
        table.put(sent.cells(name), torch.ones(len(sent.cells(name)), dtype=torch.long))
        assert {(slot, place) for slot, place in table.table.nonzero().tolist()} == expected
        assert expected <= set(zip(*(part.tolist() for part in sent.at(name)), strict=True))


def test_a_pass_that_reads_nothing():
    builder = PassBuilder(np.array([2]))
    builder.span(np.array([0]), np.array([4]))
    builder.lay_out()
    plan = builder.plan(np.array([1]), np.array([4]), 1)
    assert plan.query.tolist() == []
    assert plan.wanted_counts.tolist() == [0]


def test_one_transfer_keeps_the_shapes():
    sent = upload(CPU, {"a": np.array([[True, False]]), "b": np.arange(3), "none": np.zeros((2, 0), dtype=np.int64)})
    assert [sent[name].tolist() for name in ("a", "b", "none")] == [[[1, 0]], [0, 1, 2], [[], []]]
