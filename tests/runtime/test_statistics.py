"""One table says what every ratio is; what is undefined is absent."""

from __future__ import annotations

import numpy as np
import pytest

from s2d2_lmeval.runtime import clock
from s2d2_lmeval.runtime.statistics import RATIOS, gained, ratios, with_ratios, without_ratios
from s2d2_lmeval.runtime.trace import ForwardRecord, Trace


def forward(*kinds: str, seconds: float = 1.0) -> ForwardRecord:
    ones = np.ones(len(kinds), dtype=np.int64)
    return ForwardRecord(kinds, widths=3 * ones, wanted=ones, kept=ones, seconds=seconds, model_seconds=seconds / 2)


@pytest.mark.parametrize("name", RATIOS)
def test_a_ratio_is_there_exactly_where_it_is_defined(name: str) -> None:
    above, below = RATIOS[name]
    assert ratios({above: 6, below: 4})[name] == 1.5
    assert name not in ratios({above: 0, below: 0})
    assert name not in ratios({above: 6})
    assert name not in ratios({below: 4})
    assert name not in ratios({above: 6, below: -1.0}), "a clock that went backwards gives no rate"


def test_counts_are_what_is_no_ratio() -> None:
    stats = {"new_tokens": 6, "nfe": 4, "tokens_per_forward": 1.5, "finish_reason": "stop", "decoding_order": [1]}
    assert without_ratios(stats) == {"new_tokens": 6, "nfe": 4}
    assert gained({"nfe": 1, "tokens_per_forward": 9.0}, stats) == {"new_tokens": 6, "nfe": 3}


def test_depths_become_a_list() -> None:
    counts = {"offered_at_1": 4, "accepted_at_1": 3, "offered_at_2": 2}
    assert with_ratios(counts) == {"acceptance_by_depth": [0.75, 0.0]}
    assert with_ratios({"nfe": 1}) == {"nfe": 1}


def test_a_trace_tells_prompts_from_decoding_and_keeps_nothing_else() -> None:
    trace = Trace()
    for record in (forward("prefill", "prefill"), forward("prefill", "draft"), forward("verify", seconds=2.0)):
        trace.forwarded(record)
    trace.finished({"new_tokens": 6, "nfe": 99, "tokens_per_forward": 99.0, "drafted": 4, "accepted": 3, "drafts": 0})
    totals = trace.totals()
    assert (totals["forwards"], totals["prompt_only_forwards"]) == (3, 1)
    assert (totals["nfe"], totals["decode_nfe"]) == (5, 2)
    assert (totals["tokens_per_forward"], totals["tokens_per_decode_forward"]) == (6 / 5, 3.0)
    assert (totals["tokens_per_second"], totals["decode_tokens_per_second"]) == (6 / 4, 2.0)
    assert totals["acceptance"] == 0.75
    assert totals["queries"] == 15
    assert not {"routed", "tokens_per_target_forward", "target_seconds", "clock_reversals"} & totals.keys()
    assert trace.records == []
    trace.reset(keep_records=True)
    trace.forwarded(forward("draft"))
    assert [record.kinds for record in trace.records] == [("draft",)]
    assert trace.totals()["nfe"] == 1
    trace.reset()
    assert not any(trace.totals().values())


def test_what_a_trace_holds_does_not_grow_with_what_ran() -> None:
    trace = Trace()

    def held() -> int:
        return sum(len(value) for value in vars(trace).values() if hasattr(value, "__len__"))

    for _ in range(3):
        trace.forwarded(forward("draft", "verify"))
        trace.finished({"new_tokens": 2})
    before = held()
    for _ in range(1000):
        trace.forwarded(forward("draft", "verify"))
        trace.finished({"new_tokens": 2})
    assert held() == before


def test_a_clock_that_goes_backwards_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(clock.CLOCKS, "wall", lambda: 5.0)
    assert clock.since(7.0) == -2.0
    assert "the clock went backwards by 2 s" in caplog.text
    trace = Trace()
    trace.forwarded(forward("draft", seconds=-1.0))
    trace.finished({"new_tokens": 2})
    totals = trace.totals()
    assert totals["clock_reversals"] == 1
    assert "tokens_per_second" not in totals
    assert totals["tokens_per_forward"] == 2.0
