"""Two runs of the harness: what is paired, what is refused, what is said to differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from s2d2_lmeval.cli import main
from s2d2_lmeval.errors import StudyError
from s2d2_lmeval.studies.compare import compare, figures, read_run, what_differed

TIME = "2026-11-28T16-00-00.000000"


def write_run(folder: Path, right: Sequence[int], **changes: Any) -> Path:
    """A run on ten documents of a task ``t``, the ``right`` ones answered rightly."""
    config = {"model": "s2d2", "model_args": {"pretrained": "m", "decoder": "ar"}, "limit": None, "torch_seed": 1}
    about = {"environment": {"device": "a"}, "rows_in_flight": 8, "tasks": {"t": {"tokens_per_forward": 2.0}}}
    about |= {"totals": {"tokens_per_second": 30.0}, "configurations": [{"decoding": {"decoder": "ar", "top_p": 1.0}}]}
    content = {"results": {"t": {}}, "configs": {"t": {}}, "versions": {"t": changes.pop("version", 1)}}
    task = changes.pop("task", "t")
    content["configs"] = {task: {}}
    prompt, hashed = changes.pop("prompt", "p"), changes.pop("hashed", "h")
    config |= {"s2d2": {**about, **changes.pop("s2d2", {})}, **changes}
    folder.mkdir(parents=True)
    (folder / f"results_{TIME}.json").write_text(json.dumps({**content, "config": config}))
    lines = []
    for document in range(10):
        sample: dict[str, Any] = {"doc_id": document, "doc_hash": f"{hashed}{document}", "prompt_hash": prompt}
        value, answer = float(document in right), f"{folder.name} says {document}"
        lines.append({**sample, "filter": "none", "metrics": ["exact"], "exact": value, "resps": [[answer]]})
        lines.append({**sample, "filter": "decode", "metrics": ["nfe"], "nfe": 3.0, "resps": [[answer]]})
    (folder / f"samples_{task}_{TIME}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_differences_are_paired(tmp_path: Path) -> None:
    first, second = (
        read_run(write_run(tmp_path / name, right)) for name, right in (("one", range(4)), ("two", range(2, 10)))
    )
    (found,) = compare(first, second)
    assert (found.task, found.metric, found.count) == ("t", "exact,none", 10)
    assert (found.first, found.second, found.difference) == (0.4, 0.8, pytest.approx(0.4))
    # Six documents are better and two worse; Agresti and Min add a half to both and two to the number.
    middle, spread = (6.5 - 2.5) / 12, 1.959964 * (9 - 4**2 / 12) ** 0.5 / 12
    assert (found.low, found.high) == pytest.approx((middle - spread, middle + spread), abs=1e-6)
    assert found.p_value == pytest.approx(2 * 37 / 256)
    assert [document for document, *_ in found.documents] == [0, 1, *range(4, 10)]
    assert found.documents[0][1:] == (1.0, 0.0, "one says 0", "two says 0")


def test_runs_of_custom_functions_are_compared_by_their_arguments(tmp_path: Path) -> None:
    first, second = (
        read_run(write_run(tmp_path / str(steps), range(5), s2d2={"configurations": [{"options": {"steps": steps}}]}))
        for steps in (4, 8)
    )
    assert what_differed(first, second) == [("steps", "4", "8")]


def test_no_difference_has_an_interval_too(tmp_path: Path) -> None:
    first, second = (read_run(write_run(tmp_path / name, range(5))) for name in "ab")
    (found,) = compare(first, second)
    assert (found.difference, found.p_value, found.documents) == (0.0, 1.0, ())
    assert -0.25 < found.low < 0 < found.high < 0.25
    assert what_differed(first, second) == []


def test_settings_that_differ(tmp_path: Path) -> None:
    decoding = {"decoder": "s2d2", "top_p": 0.9, "block_length": 4}
    changes = {"model_args": {"pretrained": "m", "decoder": "s2d2"}, "limit": 10.0}
    s2d2 = {"configurations": [{"decoding": decoding}], "environment": {"device": "b"}}
    first = read_run(write_run(tmp_path / "one", range(5)))
    second = read_run(write_run(tmp_path / "two", range(5), s2d2=s2d2, **changes))
    expected = [("decoder", "ar", "s2d2"), ("limit", "None", "10.0"), ("device", "a", "b"), ("top_p", "1.0", "0.9")]
    assert what_differed(first, second) == expected
    # Times of two machines say nothing about decoders.
    assert figures(first, second) == [("t", "tokens_per_forward", 2.0, 2.0)]
    assert figures(first, first)[-1] == ("in all", "tokens_per_second", 30.0, 30.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "u"}, "no task in common: t and u"),
        ({"version": 2}, "t is of version 1 in one run and 2"),
        ({"hashed": "other"}, "document 0 is another one in each run"),
        ({"prompt": "other"}, "document 0 was put in other words.*--other_prompts"),
    ],
)
def test_runs_that_are_not_comparable(tmp_path: Path, changes: Mapping[str, Any], said: str) -> None:
    first = read_run(write_run(tmp_path / "one", range(5)))
    second = read_run(write_run(tmp_path / "two", range(5), **changes))
    with pytest.raises(StudyError, match=said):
        compare(first, second)
    if "prompt" in changes:
        assert len(compare(first, second, other_prompts=True)) == 1


def test_what_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="holds no results of lm_eval"):
        read_run(tmp_path)
    (tmp_path / "results_1.json").write_text("{}")
    with pytest.raises(StudyError, match="is not a result of lm_eval: it has no config"):
        read_run(tmp_path)
    folder = write_run(tmp_path / "one", range(5))
    next(folder.glob("samples_*")).unlink()
    with pytest.raises(StudyError, match="run lm_eval with --log_samples"):
        compare(read_run(folder), read_run(folder))


def test_the_newest_results_of_a_folder_count(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", range(5))
    older = folder / "results_2025-01-01T00-00-00.000000.json"
    older.write_text("{}")
    assert read_run(tmp_path).path.name == f"results_{TIME}.json"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = write_run(tmp_path / "one", range(4)), write_run(tmp_path / "two", range(2, 10))
    output = tmp_path / "out.json"
    assert main(["compare", str(one), str(two), "--show", "1", "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "Their settings are the same." in shown
    assert "+0.400" in shown
    assert "8 of 10" in shown
    assert "one says 0" in shown
    assert "7 more documents differ; --show 8" in shown
    assert json.loads(output.read_text())["differences"][0]["difference"] == pytest.approx(0.4)
