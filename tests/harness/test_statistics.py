"""Responses that carry statistics, the filter that reads them, metrics, and the totals of a run."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from lm_eval.api.registry import get_filter

from s2d2_lmeval.harness import report
from s2d2_lmeval.harness.filters import METRICS, StatsFilter, decoding_metrics, with_decoding_metrics
from s2d2_lmeval.harness.responses import TracedResponse

STATS = {
    "nfe": 4,
    "new_tokens": 8,
    "tokens_per_forward": 2.0,
    "acceptance": 0.5,
    "drafted": 6,
    "accepted": 3,
    "seconds": 1.5,
}


def test_a_response_is_its_text_and_remembers() -> None:
    response = TracedResponse("text", STATS)
    assert response == "text"
    assert json.dumps([response]) == '["text"]'
    for twin in (pickle.loads(pickle.dumps(response)), copy.copy(response), copy.deepcopy(response)):
        assert isinstance(twin, TracedResponse)
        assert (twin, twin.stats) == ("text", STATS)


def test_the_filter_is_registered() -> None:
    assert get_filter("s2d2_stats") is StatsFilter
    (figures,) = StatsFilter().apply([[TracedResponse("an answer", {"nfe": 2, "tokens_per_forward": 1.5})]], [])
    assert str(figures) == '{"nfe": 2, "tokens_per_forward": 1.5}'  # as the harness writes it into the samples


def test_the_filter_merges_repeats_by_sums() -> None:
    other = {**STATS, "nfe": 8, "tokens_per_forward": 1.0, "drafted": 2, "accepted": 0, "finish_reason": "stop"}
    one, two, none = StatsFilter().apply(
        [[TracedResponse("a", STATS)], [TracedResponse("a", STATS), TracedResponse("b", other)], ["plain"]], None
    )
    assert one == STATS
    assert none == {}
    assert two["responses"] == 2
    assert two["nfe"] == 6
    assert two["tokens_per_forward"] == pytest.approx(8 / 6)
    assert two["acceptance"] == pytest.approx(3 / 8)


def test_metrics() -> None:
    assert decoding_metrics(STATS) == {name: float(STATS[name]) for name in METRICS}
    assert decoding_metrics({}) == {}
    assert decoding_metrics({"nfe": 3, "finish_reason": "stop"}) == {"nfe": 3.0}


def test_one_function_for_both_filters() -> None:
    @with_decoding_metrics
    def process_results(doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
        """Exact match."""
        return {"exact_match": float(results[0] == doc["answer"])}

    assert process_results({"answer": "a"}, ["a"]) == {"exact_match": 1.0}
    assert process_results({"answer": "a"}, [STATS])["nfe"] == 4.0
    assert process_results({"answer": "a"}, [{}]) == {}
    assert process_results.__doc__ == "Exact match."


def test_totals_are_sums_over_sums() -> None:
    totals = report.Totals()
    before = {"forwards": 10, "nfe": 20, "new_tokens": 5, "drafted": 0, "accepted": 0, "seconds": 9}
    after = {"forwards": 14, "nfe": 30, "new_tokens": 25, "drafted": 8, "accepted": 6, "seconds": 99}
    before["tokens_per_forward"], after["tokens_per_forward"] = 0.25, 25 / 30
    totals.add_run(before, after, seconds=2.0)
    totals.add_response("gsm", {**STATS, "finish_reason": "stop"})
    totals.add_response("gsm", {**STATS, "nfe": 12})
    summary = totals.summary()
    assert summary["totals"]["nfe"] == 10
    assert summary["totals"]["tokens_per_forward"] == 2.0
    assert summary["totals"]["tokens_per_second"] == 10.0
    assert summary["totals"]["acceptance"] == 0.75
    assert summary["totals"]["rows_per_forward"] == 2.5
    assert summary["tasks"]["gsm"]["tokens_per_forward"] == 1.0
    assert "seconds" not in summary["tasks"]["gsm"]
    assert "scoring" not in summary


def test_processes_add_up_but_their_time_does_not() -> None:
    several = [report.Totals(), report.Totals(), report.Totals()]
    for totals, seconds in zip(several, (3.0, 5.0), strict=False):
        totals.add_run({}, {"nfe": 10, "new_tokens": 30}, seconds)
        totals.add_response("a", STATS)
    several[0].add_scoring({}, {"forwards": 2}, requests=4, seconds=1.0)
    summary = report.merge(several).summary()
    assert summary["totals"]["new_tokens"] == 60
    assert summary["totals"]["seconds"] == 5.0
    assert summary["totals"]["tokens_per_second"] == 12.0
    assert summary["tasks"]["a"]["requests"] == 2
    assert summary["scoring"] == {"requests": 4, "forwards": 2, "seconds": 1.0}


def test_environment_names_what_timings_depend_on() -> None:
    facts = report.environment(torch.device("cpu"), torch.float32, "sdpa")
    assert facts["dtype"] == "float32"
    assert facts["torch"] == torch.__version__
    assert facts["device"]
    json.dumps(facts)


def test_figures_of_a_run_are_those_of_its_results() -> None:
    totals = report.Totals()
    assert report.figures(totals) == ""
    totals.add_response("b", {"nfe": 10, "new_tokens": 30, "drafted": 8, "accepted": 6})
    totals.add_response("b", {"nfe": 10, "new_tokens": 10, "drafted": 2, "accepted": 2})
    totals.add_response("stock", {"nfe": 4, "new_tokens": 4})
    totals.add_run({}, {"nfe": 24, "forwards": 20, "new_tokens": 44}, 2.0)
    assert report.figures(totals).splitlines() == [
        "s2d2 decoded",
        "  b      2 answers, 40 tokens, 2.00 tokens per forward, 0.80 of the drafts accepted",
        "  stock  1 answers, 4 tokens, 1.00 tokens per forward",
        "  in all 20 forwards, 2.0 s, 22.0 tokens per second",
    ]
