"""The demo's tables, and the whole of it on a few documents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from s2d2_lmeval.cli import main
from s2d2_lmeval.cli.demo import QUALITY, packaged_study, speed_columns, together, toy_tasks
from s2d2_lmeval.studies.report.tables import cells, in_markdown


def test_speed_is_relative_to_the_first_configuration() -> None:
    sums = {"tokens_per_forward": 1.0, "seconds": 2.0, "new_tokens": 100, "nfe": 100, "forwards": 100}
    first = together("ar", {"tokens_per_second": 50.0, **sums})
    lines = [first, together("s2d2", {"tokens_per_second": 125.0, **sums}, first)]
    assert [line["speedup"] for line in lines] == [1.0, 2.5]
    answered = [{**line, "equal": equal, "documents": 3} for line, equal in zip(lines, (3, 2), strict=True)]
    header, shown = cells(speed_columns("ar"), answered)
    assert header == ["decoder", "tokens per forward", "tokens/s", "speed-up over ar", "seconds", "answers as ar"]
    assert shown[0][-1] == "3 of 3"
    assert shown[1] == ["s2d2", "1.00", "125", "2.50x", "2.0", "2 of 3"]


def test_a_table_is_markdown_too() -> None:
    common = {"task": "s2d2_toy_programs", "documents": 4, "new_tokens": 20.0}
    rows = [
        {"configuration": "ar", **common, "accuracy": 0.5, "nfe": 20.0, "tokens_per_forward": 1.0, "acceptance": None},
        {"configuration": "s2d2", **common, "accuracy": 0.25, "nfe": 8, "tokens_per_forward": 2.5, "acceptance": 0.75},
    ]
    lines = in_markdown(*cells(QUALITY, rows), texts=2).splitlines()
    assert lines[1] == "| :-- | :-- | --: | --: | --: | --: |"
    assert lines[2] == "| programs | ar | 50.0% | 20.0 | 1.00 |  |"
    assert lines[3] == "| programs | s2d2 | 25.0% | 8.0 | 2.50 | 75% |"


@pytest.mark.slow
def test_the_demo_from_beginning_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--limit", "3", "--output", str(tmp_path / "demo")]) == 0
    shown = capsys.readouterr().out
    assert "speed-up over ar" in shown
    assert "positions" in shown
    written = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert {(row["configuration"], row["task"]) for row in written["tasks"]} == {
        (name, task) for name in packaged_study("demo").decoding for task in toy_tasks()
    }
    assert all(row["documents"] == 3 for row in written["tasks"])
    speed = {row["configuration"]: row for row in written["speed"]}
    assert speed["ar"]["tokens_per_forward"] == 1.0
    assert speed["sliding"]["equal"] == speed["sliding auto"]["equal"] == speed["ar"]["documents"] == 9
    assert speed["sliding"]["tokens_per_forward"] > 2
    assert "| task | decoder |" in (tmp_path / "demo" / "results.md").read_text()
