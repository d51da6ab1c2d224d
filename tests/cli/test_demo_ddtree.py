"""The demo of drafts: a line per decoder, in the terminal and in files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from s2d2_lmeval.cli import main
from s2d2_lmeval.cli.demo import packaged_study, toy_tasks
from s2d2_lmeval.cli.demo_ddtree import BUDGETS, configurations


def test_the_table_and_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["demo-ddtree", "--limit", "1", "--budgets", "4", "20", "--output", str(tmp_path)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "results.json").read_text())
    names = ["ar", "dflash", "ddtree 4", "ddtree 20"]
    assert [one["configuration"] for one in found["measured"]] == names == list(found["configurations"])
    assert all(name in shown for name in names)
    assert {(one["equal"], one["documents"]) for one in found["measured"]} == {(3, 3)}
    alone, *drafted = found["measured"]
    assert alone["acceptance_length"] is None
    for one in drafted:
        assert one["acceptance_length"] > one["without_bonus"] > 1
        assert one["tokens_per_target_forward"] > alone["tokens_per_target_forward"] == 1
        assert one["target_milliseconds"] > 0
        assert one["drafter_milliseconds"] > 0
    assert (tmp_path / "results.md").read_text().count("\n| ") == 2 + len(names)


def test_the_packaged_study_is_the_same() -> None:
    study = packaged_study("demo-ddtree")
    assert study.decoding == configurations(BUDGETS, seed_chain=False)
    assert [task.task for task in study.tasks] == toy_tasks()
    assert study.models == {"toy": {"pretrained": "toy", "draft": "toy"}}
