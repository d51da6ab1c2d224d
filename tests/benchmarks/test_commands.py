"""The measurements that the docs name run, on a few problems."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import frontier, nemotron, policies, spiffy_savings
from benchmarks.published import __main__ as published
from s2d2_lmeval.toy import CORPORA, held_out


def test_policies(capsys: pytest.CaptureFixture[str]) -> None:
    policies.main(["--tasks", "instructions", "--limit", "1", "--repeats", "1"])
    shown = capsys.readouterr().out
    assert [name for name in policies.GRID if f" {name} " not in shown] == []


def test_nemotron(capsys: pytest.CaptureFixture[str]) -> None:
    nemotron.main(["--steps", "20", "--prompts", "2", "--new_tokens", "6"])
    rows = {row.split(" | ")[0].strip("| "): row.split(" | ")[1:] for row in capsys.readouterr().out.splitlines()[2:]}
    assert rows.keys() == nemotron.LOOPS.keys()
    assert rows["`ar`"][:2] == ["12", "1.00"]


@pytest.mark.slow
def test_spiffy_savings(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["spiffy_savings", "--problems", "1", "--bases", "static", "--nodes", "4"]
    monkeypatch.setattr("sys.argv", command)
    spiffy_savings.main()
    rows = {row.split(" | ")[0]: row for row in capsys.readouterr().out.splitlines()}
    assert rows["| static itself"].endswith("| 1.00 |")
    assert float(rows["| calibrated, 4 nodes"].split(" | ")[-1].strip(" |")) > 1
    assert {"| static, fused", "| static, fused, spiffy"} <= rows.keys()


def test_no_draft_saves_more_than_the_limit(tmp_path: Path) -> None:
    model, tokenizer = spiffy_savings.open_toy()
    (row,) = spiffy_savings.limits(model, tokenizer, ["static"], tmp_path, problems=1)
    steps, savable = map(int, row.split(" | ")[1:3])
    asked = [spiffy_savings.prompt_of(tokenizer, held_out(name)[0]) for name in CORPORA]
    options = spiffy_savings.options_of(model, tokenizer, "static", draft_nodes=16)
    line = spiffy_savings.measure(model, "drafted", options, asked)
    assert line.steps == steps
    assert 0 < line.accepted <= savable < steps


def test_frontier(capsys: pytest.CaptureFixture[str]) -> None:
    frontier.main(["--prompts", "1", "--new_tokens", "8"])
    rows = {row.split(" | ")[0].strip("| "): row.split(" | ") for row in capsys.readouterr().out.splitlines()}
    assert rows.keys() >= frontier.WAYS["toy"].keys()
    assert all(rows[name][-1].startswith("3 of 3") for name in frontier.WAYS["toy"])
    assert float(rows["sliding, 64 queries"][1]) > float(rows["ar"][1]) == 1.0


def test_published_loops_decide_the_same_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    published.main(["--pairs", "1", "--new-tokens", "32"])
    shown = capsys.readouterr().out
    assert [one.name for one in published.pairs() if one.name not in shown] == []
