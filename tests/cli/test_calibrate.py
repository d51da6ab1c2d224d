"""s2d2-lmeval calibrate on the toy: file, table, picture, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from s2d2_lmeval.cli import main
from s2d2_lmeval.cli.prompts import read_prompts
from s2d2_lmeval.decoding.spiffy.graph import load_graph

ARGUMENTS = "pretrained=toy,base=static,block_length=4,max_new_tokens=12,dtype=float32"


def test_a_graph_is_written_shown_and_made_again_from_its_traces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "graph.json"
    prompts.write_text("What is 3 + 4?\n\nWrite the word tree.\nWhat is 20 - 6?\n")
    command = ["calibrate", "--model_args", ARGUMENTS, "--prompts", str(prompts), "--output", str(output)]
    assert main([*command, "--nodes", "5", "--depth", "3"]) == 0
    shown = capsys.readouterr().out
    graph = load_graph(str(output), "static")
    assert 1 <= len(graph.nodes) <= 5
    assert graph.block_length == 4
    assert graph.decoding["base"] == "static"
    assert graph.model["source"] == "toy"
    assert graph.calibration["prompts"] == 3
    assert "now" in shown
    assert "▇" in shown
    assert "draft_graph=" in shown
    traces = output.with_name("graph.json.traces.jsonl")
    kept = traces.read_text()
    assert main([*command, "--nodes", "2", "--depth", "3"]) == 0
    assert traces.read_text() == kept
    # The same nodes, but for parents that the smaller graph does not hold.
    held = [replace(node, parents=tuple(place for place in node.parents if place <= 2)) for node in graph.nodes[:2]]
    assert list(load_graph(str(output), "static").nodes) == held


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_args", "base=static"], "names no checkpoint"),
        (["--model_args", "pretrained=toy,base=s2d2"], "two forwards"),
        (["--model_args", "pretrained=toy,decoder=dynamic"], "decoder=spiffy"),
        (["--model_args", "pretrained=toy", "--nodes", "0"], "--nodes 0"),
    ],
)
def test_refusals(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is 3 + 4?\n")
    output = tmp_path / "graph.json"
    assert main(["calibrate", *arguments, "--prompts", str(prompts), "--output", str(output)]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_a_prompt_may_hold_any_separator_that_json_leaves_as_it_is(tmp_path: Path) -> None:
    texts = ["one\u2028line", "a\x85b", "c"]
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    path.write_bytes("\r\n".join(lines).encode())
    assert read_prompts(path, 9) == texts


def test_prompts_that_are_none_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in {"empty.txt": "\n", "bad.jsonl": '{"text": 3}\n'}.items():
        (tmp_path / name).write_text(text)
        command = ["calibrate", "--model_args", ARGUMENTS, "--prompts", str(tmp_path / name)]
        assert main([*command, "--output", str(tmp_path / "graph.json")]) == 2
        assert name in capsys.readouterr().err
