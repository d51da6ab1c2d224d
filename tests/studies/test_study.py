"""Study files: what they come to, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from s2d2_lmeval.cli import main
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.errors import S2D2Error, StudyError
from s2d2_lmeval.families.facts import Facts
from s2d2_lmeval.families.registry import family_named
from s2d2_lmeval.studies.planning import Job, Plan
from s2d2_lmeval.studies.study import make_study, read_study

ROOT = Path(__file__).parents[2]


def test_grids_and_points(study: dict[str, Any]) -> None:
    study["decoding"]["dynamic"] = {"decoder": "dynamic", "grid": {"confidence_threshold": [0.8, 0.9], "top_k": [0, 5]}}
    study["seeds"] = [0, 1]
    made = make_study(study)
    assert list(made.decoding)[2:4] == [
        "dynamic confidence_threshold=0.8 top_k=0",
        "dynamic confidence_threshold=0.8 top_k=5",
    ]
    points = made.points()
    assert len(points) == 6 * 2
    assert points[1].decoding_options == {"decoder": "ar", "seed": 1}
    assert points[0].task.limit == 6


def test_repeats_come_in_turn(study: dict[str, Any]) -> None:
    study["decoding"] = {"a": {"decoder": "ar"}, "b": {"decoder": "dynamic"}}
    points = make_study({**study, "repeats": 2}).points()
    of_one = [(point.repeat, point.decoding) for point in points if point.task == points[0].task]
    assert of_one == [(0, "a"), (0, "b"), (1, "a"), (1, "b")]
    digests = {Job(**vars(point), identity="i", code="c").digest for point in points}
    assert len(digests) == len(points)
    assert {Job(**vars(point), identity="i", code="c").digest for point in make_study(study).points()} < digests


def test_a_task_may_have_settings_of_its_own(study: dict[str, Any]) -> None:
    study["tasks"] = ["a", {"task": "b", "limit": 2, "metric": "m,f"}]
    first, second = make_study(study).tasks
    assert (first.limit, second.limit, second.metric) == (6, 2, "m,f")


def test_names_of_points_depend_on_everything_that_results_do(study: dict[str, Any]) -> None:
    def digest(code: str = "1", identity: str = "m", **changes: Any) -> str:
        return Job(**vars(make_study({**study, **changes}).points()[0]), identity=identity, code=code).digest

    same = digest()
    assert same == digest(limit=3)  # more documents of the same
    assert same == digest(decoding={"other name": {"decoder": "ar"}})
    others = [
        digest(code="2"),
        digest(identity="n"),
        digest(seeds=[1]),
        digest(batch_size=2),
        digest(num_fewshot=1),
        digest(models={"toy": {"pretrained": "toy", "dtype": "bfloat16"}}),
        digest(decoding={"ar": {"decoder": "ar", "top_k": 5}}),
    ]
    assert len({same, *others}) == len(others) + 1


MISTAKES: dict[str, tuple[dict[Any, Any], str]] = {
    "key": ({"decodings": {}}, "'decodings' is not a key of a study. Did you mean decoding?"),
    "key that is not text": ({5: 1}, "5 is not a key of a study. Known: "),
    "key of a task that is not text": ({"tasks": [{"task": "a", 5: 1}]}, "tasks: 5 is not a key of a task."),
    "no models": ({"models": {}}, "the study has no models: it should be"),
    "no tasks": ({"tasks": []}, "the study has no tasks: it should be"),
    "no decoding": ({"decoding": {}}, "has no decoding"),
    "option": ({"decoding": {"x": {"confidence_treshold": 0.9}}}, "Did you mean confidence_threshold?"),
    "ignored option": ({"decoding": {"x": {"decoder": "ar", "confidence_threshold": 0.9}}}, "option of decoder"),
    "value": ({"decoding": {"x": {"decoder": "dynamic", "confidence_threshold": -1}}}, "too small"),
    "misfit": ({"decoding": {"x": {"decoder": "pipelined"}}}, "does not go with model toy"),
    "grid": ({"decoding": {"x": {"grid": {"top_k": 5}}}}, "lists of values"),
    "grid twice": ({"decoding": {"x": {"top_k": 1, "grid": {"top_k": [5]}}}}, "in the grid and beside it"),
    "clash": ({"decoding": {"a": {"decoder": "ar"}, "b": {"decoder": "ar"}}}, "b is the same as a"),
    "seed": ({"decoding": {"a": {"seed": 1}}}, "give seeds to the study"),
    "seeds": ({"seeds": [1, 1]}, "different whole numbers"),
    "batch": ({"batch_size": 0}, "number of rows"),
    "baseline": ({"baselines": {"ar": "arr"}}, "Did you mean ar?"),
    "baseline kind": ({"baselines": {"static": "ar"}}, "baselines: 'static' should be ar or dynamic"),
    "model option": ({"models": {"m": {"pretrained": "toy", "decoder": "ar"}}}, "put it under decoding"),
    "model typo": ({"models": {"m": {"pretrained": "toy", "dtyp": "float32"}}}, "Did you mean dtype?"),
    "model names": ({"models": ["a/x", "b/x"]}, "the same name"),
    "limit": ({"limit": 0.5}, "number of documents"),
    "task twice": ({"tasks": ["s2d2_toy_arithmetic"] * 2}, "there twice"),
    "task key": ({"tasks": [{"task": "a", "limits": 3}]}, "Did you mean limit?"),
    "unknown task": ({"tasks": ["s2d2_toy_arithmetics"]}, "Did you mean s2d2_toy_arithmetic?"),
    "unsafe task": ({"tasks": ["s2d2_toy_programs"]}, "--confirm_run_unsafe_code"),
    "task wins": (
        {"gen_kwargs": {"top_k": 7}, "decoding": {"a": {"decoder": "ar", "top_k": 5}}},
        "sets top_k=7, which would win",
    ),
    "search": ({"search": {"trials": 3}}, "search has no space"),
    "search axis": ({"search": {"trials": 3, "space": {"top_k": {"low": 3}}}}, "low below high"),
    "search option": ({"search": {"trials": 3, "space": {"topk": {"low": 1, "high": 3}}}}, "Did you mean top_k?"),
    "metric": (
        {"tasks": [{"task": "s2d2_toy_arithmetic", "metric": "nope"}]},
        "has no metric nope; give metric: one of",
    ),
    "filter": ({"tasks": [{"task": "s2d2_toy_arithmetic", "metric": "accuracy,nope"}]}, "has no metric accuracy,nope"),
    "name above": ({"name": "../.."}, "is not the name of a folder"),
    "name elsewhere": ({"name": "/tmp/x"}, "is not the name of a folder"),
    "name of two lines": ({"name": "a\nb"}, "one line"),
    "one seed": ({"seeds": 5}, "a list of different whole numbers"),
    "seeds that are none": ({"seeds": [True]}, "whole numbers"),
    "model of a number": ({"models": {"m": 5}}, "models: m: 5 should be a mapping"),
    "decoding of a word": ({"decoding": {"a": "ar"}}, "decoding: a: 'ar' should be a mapping"),
    "large grid": ({"decoding": {"a": {"grid": {"top_k": [*range(10**5)], "seed": [*range(10**5)]}}}}, "10000 points"),
    "many points": ({"seeds": [*range(6000)]}, "the study has more than 10000 points"),
    "large number": ({"limit": 10**4000}, "more than 18 digits"),
    "search in parallel": (
        {"search": {"trials": 3, "space": {"top_k": {"low": 1, "high": 3}}, "parallel": 0}},
        "search: parallel: 0 should be a whole number from 1",
    ),
    "search step": ({"search": {"trials": 3, "space": {"top_k": {"low": 1, "high": 3, "step": 0}}}}, "optuna"),
    "search log": ({"search": {"trials": 3, "space": {"top_p": {"low": 0.0, "high": 1.0, "log": True}}}}, "optuna"),
    "search twice": (
        {"search": {"trials": 3, "space": {"top_k": {"choices": [1, 2]}}, "decoding": {"top_k": 3}}},
        "in the space and beside it",
    ),
    "objective of another name": (
        {"search": {"trials": 3, "space": {"top_k": {"low": 1, "high": 3}}, "objectives": ["acuracy"]}},
        "Did you mean accuracy?",
    ),
    "wrong type in a task": ({"tasks": [{"task": "a", "limit": "3"}]}, "tasks: limit: '3' should be a number of doc"),
    "wrong type of one of two": (
        {"apply_chat_template": 5},
        "apply_chat_template: 5 should be true, false or the name",
    ),
    "objective": (
        {"search": {"trials": 3, "space": {"top_k": {"low": 1, "high": 3}}, "objectives": ["speed"]}},
        "search: objectives: 'speed' should be some of",
    ),
}


# The harness's own tasks are indexed before a name is called unknown: thousands of files.
SLOW = ("unknown task",)


@pytest.mark.parametrize(
    "mistake", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in MISTAKES]
)
def test_mistakes_are_found_before_anything_runs(study: dict[str, Any], mistake: str, tmp_path: Path) -> None:
    changes, message = MISTAKES[mistake]
    with pytest.raises(S2D2Error) as caught:
        Plan(make_study({**study, **changes}), tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


NO_STUDIES = {
    "list": ("- a", "holds no study"),
    "not closed": ("models: [", "cannot be read"),
    "empty": ("", "holds no study"),
    "zero": ("\x00", "cannot be read"),
    "key twice": (
        "models: [toy]\ndecoding: {a: {decoder: ar}}\ndecoding: {b: {decoder: ar}}",
        "'decoding' is there twice",
    ),
    "key twice below": ("decoding:\n  a: {top_k: 1, top_k: 2}", r"'top_k' is there twice \(line 2\)"),
    "nested": ("a: " + "[" * 9000, "nested too deeply"),
    "contains itself": ("a: &a [*a]", "contains itself"),
    "grows": (
        "\n".join(["a0: &a0 [1, 1]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40))]),
        "more than 1",
    ),
    "many digits": ("limit: " + "9" * 5000, "cannot be read"),
    "large": ("a" * 300_000, "more than 262144 bytes"),
    "date": ("name: 2024-01-01", "put it in quotes"),
    "python": ("name: !!python/object:os.system x", "cannot be read"),
}


@pytest.mark.parametrize("what", NO_STUDIES)
def test_files_that_are_no_studies(tmp_path: Path, what: str) -> None:
    content, message = NO_STUDIES[what]
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(StudyError, match=message) as caught:
        read_study(tmp_path / "x.yaml")
    assert str(caught.value).startswith(str(tmp_path / "x.yaml"))


@pytest.mark.parametrize("path", ["/dev/zero", "/tmp", "none.yaml"])
def test_what_is_no_file(path: str) -> None:
    with pytest.raises(StudyError, match=r"cannot be read as a study: .*file"):
        read_study(Path(path))


def test_anchors_and_merges_are_no_keys_given_twice(tmp_path: Path) -> None:
    text = "models: [toy]\ntasks: [a]\ndecoding:\n  a: &a {decoder: s2d2, top_k: 1}\n  b: {<<: *a, top_k: 2}"
    (tmp_path / "x.yaml").write_text(text)
    assert read_study(tmp_path / "x.yaml").decoding["b"] == {"decoder": "s2d2", "top_k": 2}


def test_optuna_is_missed_before_anything_runs(study: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    study["search"] = {"trials": 3, "space": {"top_k": {"low": 1, "high": 3}}}
    with pytest.raises(StudyError, match=r"s2d2-lmeval\[sweep\]"):
        Plan(make_study(study), Path("nowhere"))


def test_a_plan_needs_no_connection(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither the hub's documents nor its models are at hand."""
    task = "task: far\ndataset_path: nobody/nothing-at-all\noutput_type: generate_until\ndoc_to_text: x\n"
    (tmp_path / "far.yaml").write_text(task)
    study = {"models": ["nobody/nothing-at-all"], "tasks": ["far", "s2d2_toy_arithmetic"], "seeds": [0, 1]}
    study |= {"decoding": {"ar": {"decoder": "ar"}}, "include_path": str(tmp_path), "limit": 3}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(study))
    for name in ("--plan", "--dry-run"):
        assert main(["sweep", str(tmp_path / "x.yaml"), name, "--output", str(tmp_path / "out")]) == 0
        shown = capsys.readouterr().out
        assert "nothing-at-all, far, ar, seed 1: decoder=ar" in shown
        assert "4 points, 6 samples and those of tasks that are not on this machine." in shown
        assert "Not checked: tasks: far cannot be loaded" in shown
        assert "Not checked: model nothing-at-all" in shown
    assert main(["sweep", str(tmp_path / "x.yaml"), "--output", str(tmp_path / "out")]) == 2
    assert "far cannot be loaded" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_line_refuses_with_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", str(tmp_path / "none.yaml")]) == 2
    assert "cannot be read as a study" in capsys.readouterr().err


STUDIES = sorted([*(ROOT / "studies").glob("*.yaml"), *(ROOT / "s2d2_lmeval/studies/packaged").glob("*.yaml")])


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_studies_fit_the_schema_that_editors_complete_them_from(path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    first, *_ = path.read_text(encoding="utf-8").splitlines()
    named = path.parent / first.removeprefix("# yaml-language-server: $schema=")
    validator = jsonschema.Draft202012Validator(json.loads(named.read_text(encoding="utf-8")))
    validator.check_schema(validator.schema)
    study = yaml.safe_load(path.read_text(encoding="utf-8"))
    validator.validate(study)
    for changes in ({"decodings": {}}, {"decoding": {"a": {"top_kk": 1}}}, {"limit": "3"}, {"seeds": 5}):
        assert not validator.is_valid({**study, **changes}), changes


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_packaged_studies_are_studies(path: Path) -> None:
    made = read_study(path)
    assert made.points()
    assert "ar" in {options.get("decoder") for options in made.decoding.values()}


PUBLISHED = {
    "paper-sdar": ("sdar", {"sdar-8b-A": 4, "sdar-8b-B": 16}),
    "paper-fast-dllm-v2": ("fast_dllm_v2", {"fast-dllm-v2-7b": 32}),
    "paper-llada2": ("llada2", {"llada2.1-mini": 32}),
    "paper-d2f": ("llada", {"d2f-llada": 32}),
    "thresholds": ("sdar", {"SDAR-1.7B-Chat": 4}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_packaged_studies_fit_their_families(name: str) -> None:
    """No checkpoint is at hand, so the facts are put together from the family's table."""
    family_name, lengths = PUBLISHED[name]
    family = family_named(family_name)
    made = read_study(ROOT / "studies" / f"{name}.yaml")
    for model, length in lengths.items():
        assert model in made.models
        facts = Facts(
            family=family.name,
            native_class=family.native_class,
            mask_token_id=1,
            block_length=length,
            vocab_size=100,
            token_shift=family.token_shift,
            stop_token_ids=(2,),
            max_context=4096,
            defaults=family.defaults(length),
            scheme=family.scheme,
        )
        configurations = {name: DecodingConfig.from_options(options, facts) for name, options in made.decoding.items()}
        assert len(set(map(str, configurations.values()))) == len(configurations)


def test_a_part_of_a_study() -> None:
    whole = read_study(ROOT / "studies" / "thresholds.yaml")
    part = whole.part(["s2d2_gsm8k"], "dynamic")
    assert [task.task for task in part.tasks] == ["s2d2_gsm8k"]
    assert {options["decoder"] for options in part.decoding.values()} == {"ar", "dynamic"}
    assert whole.part(None, None) == whole
    with pytest.raises(StudyError, match=r"Did you mean s2d2_gsm8k\?"):
        whole.part(["s2d2_gms8k"], None)
    with pytest.raises(StudyError, match=r"Did you mean dynamic\?"):
        whole.part(None, "dynamics")
