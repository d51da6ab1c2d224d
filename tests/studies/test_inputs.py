"""What changed is run again, what did not is not, and what is damaged or another's is not believed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from s2d2_lmeval.cli import main
from s2d2_lmeval.errors import StudyError
from s2d2_lmeval.harness import identity
from s2d2_lmeval.model import BlockDiffusionModel
from s2d2_lmeval.studies.planning import Job, Plan
from s2d2_lmeval.studies.points import model_identity
from s2d2_lmeval.studies.report.results import read_results
from s2d2_lmeval.studies.store import PointStore, decode_line, encode_line, read_point
from s2d2_lmeval.studies.study import make_study
from s2d2_lmeval.studies.sweep import Sweep
from s2d2_lmeval.toy import checkpoint_path

from .conftest import RunStudy
from .small import outcomes

TASK = """
task: own
custom_dataset: !function own.load
test_split: test
output_type: generate_until
doc_to_text: "What is {{question}}?"
doc_to_target: "{{answer}}"
process_results: !function own.process_results
generation_kwargs: {until: [], max_gen_toks: 8, do_sample: true, temperature: 2.0}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
CODE = '''
"""A task."""
from datasets import Dataset, DatasetDict


def load(**_):
    rows = [{"question": f"{n} + {n}", "answer": str(2 * n)} for n in range(4)]
    return DatasetDict({"test": Dataset.from_list(rows)})


def process_results(doc, results):
    return {"exact_match": score(doc["answer"], results[0])}


def score(answer, response):
    return float(answer in response)
'''


@pytest.fixture
def own(tmp_path: Path, study: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """The study on a task of its own, written with these words in place of others."""

    def write(*changes: tuple[str, str]) -> dict[str, Any]:
        (tmp_path / "tasks").mkdir(exist_ok=True)
        for name, text in (("own.yaml", TASK), ("own.py", CODE)):
            for old, new in changes:
                text = text.replace(old, new)
            (tmp_path / "tasks" / name).write_text(text)
        plain = {key: value for key, value in study.items() if key != "gen_kwargs"}
        own = {"tasks": ["own"], "include_path": str(tmp_path / "tasks"), "decoding": {"ar": {"decoder": "ar"}}}
        return {**plain, **own, "limit": 4}

    return write


CHANGES: dict[str, tuple[tuple[str, str], int]] = {
    "nothing": (("", ""), 0),
    "prompt": (("What is", "How much is"), 4),
    "one document": (('f"{n} + {n}"', 'f"{n} + {n % 3}"'), 1),
    "generation": (("temperature: 2.0", "temperature: 1.9"), 4),
    "target": (("str(2 * n)", "str(3 * n)"), 0),
    "score": (("float(answer in response)", "1.0"), 0),
    "scoring function": (("return float", "return 2 * float"), 0),
}


@pytest.mark.parametrize("what", CHANGES)
def test_changed_inputs_are_run_again(
    what: str, own: Callable[..., dict[str, Any]], run_study: RunStudy, tmp_path: Path
) -> None:
    """Only samples of which the prompt changed are decoded; the numbers are those of a study that starts afresh."""
    change, decoded = CHANGES[what]
    run_study(own(), tmp_path / "out")
    changed = own(change)
    assert run_study(changed, tmp_path / "out").new_samples == decoded
    run_study(changed, tmp_path / "fresh")
    (found,), (expected,) = (outcomes_of_the_result(tmp_path / name) for name in ("out", "fresh"))
    assert found == expected
    assert read_results(tmp_path / "out").rows[0].documents == 4
    assert run_study(changed, tmp_path / "out").new_samples == 0


def outcomes_of_the_result(folder: Path) -> list[Any]:
    found = []
    for path in (folder / "points").iterdir():
        record = read_point(path).of_the_result()
        texts = {name: sample["text"] for name, sample in record.samples.items()}
        assert record.result is not None
        found.append((texts, record.result["metrics"], record.result["documents"]))
    return found


def test_a_half_finished_point_with_another_prompt_keeps_nothing(
    own: Callable[..., dict[str, Any]], run_study: RunStudy, tmp_path: Path
) -> None:
    run_study({**own(), "limit": 2}, tmp_path / "out")
    sweep = run_study(own(("What is", "How much is")), tmp_path / "out")
    assert [(one.done, one.state) for one in sweep.points.values()] == [(4, "complete")]
    row = read_results(tmp_path / "out").rows[0]
    assert sum(row.acceptance_lengths.values()) == 0
    assert len(outcomes_of_the_result(tmp_path / "out")[0][0]) == 4


def test_comments_change_nothing(
    own: Callable[..., dict[str, Any]], run_study: RunStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_study(own(), tmp_path / "out")
    monkeypatch.setattr(BlockDiffusionModel, "generate", None)
    changed = own(("def score(answer, response):\n", 'def score(answer, response):\n    """Scores."""  # a comment\n'))
    sweep = run_study(changed, tmp_path / "out")
    assert {one.state for one in sweep.points.values()} == {"complete"}


def test_fewer_documents_are_those_alone(own: Callable[..., Any], run_study: RunStudy, tmp_path: Path) -> None:
    run_study(own(), tmp_path / "out")
    assert run_study({**own(), "limit": 2}, tmp_path / "out").new_samples == 0
    run_study({**own(), "limit": 2}, tmp_path / "fresh")
    assert outcomes_of_the_result(tmp_path / "out") == outcomes_of_the_result(tmp_path / "fresh")
    assert read_results(tmp_path / "out").rows[0].new_tokens == read_results(tmp_path / "fresh").rows[0].new_tokens


@pytest.mark.parametrize("kind", ["point", "segment", "sample"])
def test_damage_of_any_kind_is_decoded_again(
    kind: str, own: Callable[..., dict[str, Any]], run_study: RunStudy, tmp_path: Path
) -> None:
    run_study(own(), tmp_path / "whole")
    run_study(own(), tmp_path / "out")
    (path,) = (tmp_path / "out" / "points").iterdir()
    lines = path.read_bytes().splitlines(keepends=True)
    place = next(place for place, line in enumerate(lines) if f'"kind":"{kind}"'.encode() in line)
    lines[place] = lines[place].replace(b'"kind"', b'"king"')
    path.write_bytes(b"".join(lines))
    assert not read_point(path).is_complete()
    with pytest.raises(StudyError, match="not complete"):
        read_results(tmp_path / "out")
    sweep = run_study(own(), tmp_path / "out")
    assert sweep.new_samples == (1 if kind == "sample" else 4)
    assert outcomes(tmp_path / "out") == outcomes(tmp_path / "whole")


def test_a_file_under_another_name_is_refused(
    study: dict[str, Any], run_study: RunStudy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study["limit"] = 1
    sweep = run_study(study, tmp_path / "out")
    first, second = (one.job.path for one in sweep.points.values())
    shutil.copy(first, second)
    results = read_results(tmp_path / "out")
    assert len(results.rows) == 1
    assert "it was copied or renamed" in results.problems[0]
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(study))
    assert main(["sweep", str(tmp_path / "small.yaml"), "--output", str(tmp_path / "out")]) == 1
    assert "it was copied or renamed" in capsys.readouterr().out.replace("\n", " ")
    second.unlink()
    assert main(["sweep", str(tmp_path / "small.yaml"), "--output", str(tmp_path / "out")]) == 0


def test_results_that_are_deleted_while_it_runs(
    study: dict[str, Any], tmp_path: Path, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    study["limit"] = 3

    class Deleting:
        """Deletes the folder at the ``at``-th sample; where that is below 0, when the last point has ended."""

        def __init__(self, at: int) -> None:
            self.at = at

        def __call__(self, progress: Any) -> None:
            self.at -= progress.state == "running" and progress.told > 0
            last = progress.state == "complete" and progress.job.decoding == "s2d2"
            if self.at == 0 or (self.at < 0 and last):
                shutil.rmtree(tmp_path / "out")

    sweep = Sweep(Plan(make_study(study), tmp_path / "out"), backend, watcher=Deleting(2))
    with pytest.raises(StudyError, match="moved or deleted"):
        sweep.run()
    sweep = Sweep(Plan(make_study(study), tmp_path / "out"), backend, watcher=Deleting(-100))
    assert sweep.run() == {"failed": 2}
    assert "no longer in" in next(iter(sweep.points.values())).error


def test_what_a_model_is_made_of(tmp_path: Path) -> None:
    """Files beside the checkpoint count by what they hold, not by where they are."""
    shutil.copytree(checkpoint_path(), tmp_path / "model")
    arguments: dict[str, Any] = {name: str(tmp_path / "model") for name in ("pretrained", "draft", "tokenizer", "peft")}
    seen = {model_identity(arguments)}
    shutil.copytree(tmp_path / "model", tmp_path / "copy")
    assert model_identity({**arguments, "draft": str(tmp_path / "copy")}) in seen
    templates = tmp_path / "copy" / "additional_chat_templates"
    templates.mkdir()
    weights = next((tmp_path / "copy").glob("*.safetensors"))
    changed = weights.read_bytes()
    changes = {
        weights: changed[:-100] + bytes([changed[-100] ^ 1]) + changed[-99:],
        tmp_path / "copy" / "tokenizer.json": b"{}",
        templates / "tools.jinja": b"{{ messages }}",
    }
    for path, content in changes.items():
        path.write_bytes(content)
        for name in arguments:
            found = model_identity({**arguments, name: str(tmp_path / "copy")})
            assert found not in seen
            seen.add(found)
    (tmp_path / "copy" / "README.md").write_text("notes")
    assert model_identity({**arguments, "peft": str(tmp_path / "copy")}) in seen
    assert model_identity({**arguments, "token": "x", "cache_dir": "y"}) in seen


def test_a_draft_graph_counts_by_its_content(study: dict[str, Any], tmp_path: Path) -> None:
    graph = tmp_path / "graph.json"
    graph.write_text("{}")

    def digest(path: Path) -> str:
        options = {"decoder": "spiffy", "base": "static", "draft_graph": str(path)}
        point = make_study({**study, "decoding": {"a": options}}).points()[0]
        return Job(**vars(point), identity="m", code="1").digest

    before = digest(graph)
    assert digest(Path(shutil.copy(graph, tmp_path / "other.json"))) == before
    graph.write_text("[]")
    assert digest(graph) != before


ANSWERS = dict.fromkeys((1, 2, 3), "f65a6b63c94f1aea")
"""Number of the answers -> a digest of some. If it fails and answers changed on purpose, count ``ANSWERS`` up."""


def test_answers_have_a_number() -> None:
    import s2d2_lmeval

    model = s2d2_lmeval.load("toy", dtype="float32", device="cpu", max_batch=4)
    prompts = [list(range(5, 25)), list(range(30, 47)), [7, 8, 9]]
    texts = []
    for options in (
        {"decoder": "ar"},
        {"decoder": "dynamic", "block_length": 8},
        {"decoder": "s2d2", "block_length": 8, "do_sample": True, "temperature": 1.5, "seed": 3},
        {"decoder": "sliding", "do_sample": True},
    ):
        generations = model.generate(prompts, model.config({**options, "max_new_tokens": 24}))
        texts.append([generation.token_ids for generation in generations])
    assert {identity.ANSWERS: identity.of_plain(texts)} == {identity.ANSWERS: ANSWERS.get(identity.ANSWERS)}


TOKEN = "hf_" + "aBcDeFgHiJ" * 3 + "1234"


def test_hub_tokens_are_nowhere(
    study: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study.update(limit=1, models={"toy": {"pretrained": "toy", "token": TOKEN}})
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(study))
    generate = BlockDiffusionModel.generate

    def failing(self: Any, prompts: Any, config: Any, **options: Any) -> Any:
        if config.decoder == "ar":
            raise ValueError(f"401 for token={TOKEN}")
        return generate(self, prompts, config, **options)

    monkeypatch.setattr(BlockDiffusionModel, "generate", failing)
    assert main(["sweep", str(path), "--output", str(tmp_path / "out")]) == 1
    assert main(["report", str(tmp_path / "out")]) == 0
    assert "HF_TOKEN" in capsys.readouterr().out.replace("\n", " ")
    written = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert {"study.json", "index.html", "results.json"} <= {file.name for file in written}
    assert not [file for file in written if TOKEN.encode() in file.read_bytes()]
    assert (
        model_identity({"pretrained": "toy"})
        == json.loads((tmp_path / "out" / "study.json").read_text())["models"]["toy"]
    )


def test_lines_that_hold_something_else_are_not_believed(tmp_path: Path) -> None:
    sample = {"name": "a", "text": "", "stats": {}, "accepted": [], "order": None, "segment": 0, "elapsed": 0.0}
    assert decode_line(encode_line({"kind": "sample", **sample})) is not None
    wrong: dict[str, list[Any]] = {
        "stats": [None, [], {"nfe": 10**400}, {"nfe": float("nan")}, {"nfe": float("inf")}],
        "accepted": [None, [-1], ["1"], [10**30], [True]],
        "order": [[1], [[1, 2]], [["a", 1, 1]]],
        "segment": [None, "0", -1],
        "elapsed": [float("inf"), "1", None],
        "text": [None, 5],
    }
    for key, values in wrong.items():
        for value in values:
            assert decode_line(encode_line({"kind": "sample", **sample, key: value})) is None, (key, value)
    deep = b'{"kind":"sample","stats":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    with PointStore(tmp_path / f"{identity.of_plain({})}.jsonl") as store:
        store.append("point", definition={})
        store._write(deep + b"\n")
    assert read_point(store.path).unreadable == [2]
