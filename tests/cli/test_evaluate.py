"""`eval`: the harness's own command line, with the model registered and the packaged tasks found."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from s2d2_lmeval.cli import main
from s2d2_lmeval.cli.evaluate import folders
from s2d2_lmeval.errors import S2D2Error
from s2d2_lmeval.harness.upstream import include_path

TASK = """
task: cli_letters
custom_dataset: !function letters.load
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "x"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
CODE = """
from datasets import Dataset, DatasetDict

def load(**_):
    return DatasetDict({"test": Dataset.from_list([{"question": "one"}, {"question": "two?"}])})
"""


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[argparse.Namespace]:
    """What reaches the harness, in place of running it."""
    from lm_eval._cli import HarnessCLI

    seen: list[argparse.Namespace] = []
    monkeypatch.setattr(HarnessCLI, "execute", lambda _, namespace: seen.append(namespace))
    return seen


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "cli_letters.yaml").write_text(TASK)
    (folder / "letters.py").write_text(CODE)
    return folder


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "a", "--limit", "1", "--samples", '{"a": [0]}'], "--limit must be None"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
    ],
)
def test_what_the_harness_refuses_is_one_message(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["eval", *arguments]) == 2
    written = capsys.readouterr().err
    assert "s2d2-lmeval: lm_eval: " in written
    assert said in written


def test_other_errors_of_the_harness_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval._cli import HarnessCLI

    monkeypatch.setattr(HarnessCLI, "execute", lambda *_: int("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        main(["eval", "--tasks", "a"])


def test_arguments_reach_the_harness_untouched(parsed: list[argparse.Namespace]) -> None:
    assert main(["eval", "--model_args", "pretrained=toy,decoder=ar", "--tasks", "a,b", "--limit", "3"]) == 0
    (namespace,) = parsed
    assert namespace.command == "run"
    assert namespace.model == "s2d2"
    assert namespace.model_args == {"pretrained": "toy", "decoder": "ar"}
    assert namespace.tasks == ["a", "b"]
    assert namespace.limit == 3
    assert namespace.include_path == [str(include_path())]


def test_another_model_stays_what_it_is(parsed: list[argparse.Namespace], tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("model: dummy\ntasks: [a]\n")
    main(["eval", "--model", "hf", "--tasks", "a"])
    main(["eval", "--config", str(config), "--limit", "1"])
    assert [namespace.model for namespace in parsed] == ["hf", None]


def test_an_include_path_of_the_users_comes_behind_ours(parsed: list[argparse.Namespace], tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"include_path: {tmp_path}\n")
    main(["eval", "run", "--tasks", "a", "--include_path", str(tmp_path)])
    main(["eval", "--config", str(config), "--tasks", "a"])
    main(["eval", "ls", "tasks", "--include_path", str(tmp_path)])
    main(["eval", "--tasks", "a", "--include_path", str(include_path())])
    ours = str(include_path())
    assert [namespace.include_path for namespace in parsed] == [[ours, str(tmp_path)]] * 3 + [[ours]]


def test_several_folders_may_be_joined_as_the_harness_documents_it(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b:c"
    first.mkdir(), second.mkdir()
    assert folders(f"{first}:{tmp_path}", without=Path("/")) == [str(first), str(tmp_path)]
    assert folders(str(second), without=Path("/")) == [str(second)]
    assert folders([str(first), str(first)], without=Path("/")) == [str(first)]
    assert folders(None, without=first) == folders(str(first), without=first) == []


def test_help_is_ours_and_the_harness_s(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["eval", "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert "registered directly" in shown
    assert "--gen_kwargs" in shown


def test_tasks_of_the_user_and_of_the_package_in_one_run(
    checkpoint: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model_args", f"pretrained={checkpoint},decoder=dynamic", "--device", "cpu"]
    wanted = ["--tasks", "cli_letters,s2d2_toy_arithmetic", "--limit", "2", "--include_path", str(tasks)]
    assert main(["eval", *arguments, *wanted, "--output_path", str(tmp_path / "out")]) == 0
    assert "s2d2_toy_arithmetic" in capsys.readouterr().out
    (written,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(written.read_text())
    assert set(results["results"]) == {"cli_letters", "s2d2_toy_arithmetic"}
    assert results["config"]["s2d2"]["tasks"]["cli_letters"]["requests"] == 2


def test_a_refusal_writes_nothing(
    checkpoint: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model_args", f"pretrained={checkpoint},confidence_treshold=0.9", "--device", "cpu"]
    wanted = ["--tasks", "cli_letters", "--include_path", str(tasks), "--output_path", str(tmp_path / "out")]
    assert main(["eval", *arguments, *wanted]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("s2d2-lmeval: ")
    assert "confidence_threshold" in last
    assert not (tmp_path / "out").exists()


def test_errors_of_the_harness_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval._cli import HarnessCLI

    def fail(harness: HarnessCLI, namespace: argparse.Namespace) -> None:
        raise ValueError("Tasks not found: no_such_task")

    monkeypatch.setattr(HarnessCLI, "execute", fail)
    with pytest.raises(ValueError, match="Tasks not found: no_such_task"):
        main(["eval", "--tasks", "no_such_task"])


@pytest.fixture
def evaluation(checkpoint: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Without what takes the harness seconds: its versions of the whole system, and its index of all tasks."""
    from lm_eval.tasks import TaskManager

    index = TaskManager.__init__
    ours = {"include_defaults": False}
    monkeypatch.setattr(TaskManager, "__init__", lambda self, *given, **named: index(self, *given, **{**named, **ours}))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    arguments = ["--model_args", f"pretrained={checkpoint},decoder=dynamic", "--device", "cpu", "--limit", "1"]
    return [*arguments, "--tasks", "cli_letters", "--include_path", str(tasks), "--log_samples"]


@pytest.mark.parametrize("lost", ["results", "samples"])
def test_results_that_cannot_be_written_are_an_error(
    evaluation: list[str],
    lost: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A full disk; the harness itself says so in its log at most, and ends with 0."""
    caplog.set_level(logging.ERROR, logger="lm_eval")

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    where = "asdict" if lost == "results" else "sanitize_list"
    monkeypatch.setattr(f"lm_eval.loggers.evaluation_tracker.{where}", full)
    assert main(["eval", *evaluation, "--output_path", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr()
    assert "No space left on device" in shown.err.splitlines()[-1]
    assert "make room" in shown.err.splitlines()[-1]
    assert ("|exact_match|" in shown.out) is (lost == "results")


def test_plain_lm_eval_does_not_end_with_0_either(
    evaluation: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lm_eval.__main__ import cli_evaluate

    (tmp_path / "file").write_text("")
    path = str(tmp_path / "file" / "below")
    monkeypatch.setattr("sys.argv", ["lm_eval", "run", "--model", "s2d2", *evaluation, "--output_path", path])
    with pytest.raises(S2D2Error, match=r"Could not save results.*Not a directory"):
        cli_evaluate()
    assert "|exact_match|" in capsys.readouterr().out


TOKEN = "hf_" + "aBcDeFgHiJ" * 3 + "1234"


@pytest.mark.parametrize("plain", [False, True], ids=["s2d2-lmeval eval", "lm_eval"])
def test_hub_tokens_are_not_recorded(
    evaluation: list[str],
    plain: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    from lm_eval.__main__ import cli_evaluate

    monkeypatch.setenv("HF_TOKEN", "")
    evaluation[1] += f",token={TOKEN}"
    arguments = [*evaluation, "--output_path", str(tmp_path / "out")]
    if plain:
        monkeypatch.setattr("sys.argv", ["lm_eval", "run", "--model", "s2d2", *arguments])
        cli_evaluate()
        assert "HF_TOKEN" in caplog.text
    else:
        assert main(["eval", *arguments]) == 0
        shown = capsys.readouterr()
        assert "HF_TOKEN" in shown.err
        assert TOKEN not in shown.out + shown.err + caplog.text
        assert os.environ["HF_TOKEN"] == TOKEN
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) == 2
    assert not [path for path in files if TOKEN in path.read_text()]
