"""Study files: what they come to, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from s2d2_lmeval.cli import main
from s2d2_lmeval.cli.sweep import chosen
from s2d2_lmeval.decoding.config import DecodingConfig
from s2d2_lmeval.errors import S2D2Error, StudyError
from s2d2_lmeval.families.facts import Facts
from s2d2_lmeval.families.registry import family_named
from s2d2_lmeval.studies.planning import Plan
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


def test_a_task_may_have_settings_of_its_own(study: dict[str, Any]) -> None:
    study["tasks"] = ["a", {"task": "b", "limit": 2, "metric": "m,f"}]
    first, second = make_study(study).tasks
    assert (first.limit, second.limit, second.metric) == (6, 2, "m,f")


def test_names_of_points_depend_on_everything_that_results_do(study: dict[str, Any]) -> None:
    def digest(code: str = "1", identity: str = "m", **changes: Any) -> str:
        return make_study({**study, **changes}).points()[0].digest(identity, code)

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


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "key": ({"decodings": {}}, "decodings is no key of the study. Did you mean decoding?"),
    "no models": ({"models": {}}, "names no models"),
    "no tasks": ({"tasks": []}, "names no tasks"),
    "no decoding": ({"decoding": {}}, "names no decoding"),
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
    "baseline kind": ({"baselines": {"static": "ar"}}, "static is no key"),
    "model option": ({"models": {"m": {"pretrained": "toy", "decoder": "ar"}}}, "put it under decoding"),
    "model typo": ({"models": {"m": {"pretrained": "toy", "dtyp": "float32"}}}, "Did you mean dtype?"),
    "model names": ({"models": ["a/x", "b/x"]}, "the same name"),
    "limit": ({"limit": 0.5}, "number of documents"),
    "task twice": ({"tasks": ["a", "a"]}, "there twice"),
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
    "objective": (
        {"search": {"trials": 3, "space": {"top_k": {"low": 1, "high": 3}}, "objectives": ["speed"]}},
        "speed is no objective",
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


@pytest.mark.parametrize("content", ["- a", "models: [", "", "\x00"])
def test_files_that_are_no_studies(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(StudyError, match=r"x\.yaml"):
        read_study(tmp_path / "x.yaml")


def test_the_command_line_refuses_with_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", str(tmp_path / "none.yaml")]) == 2
    assert "cannot be read as a study" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda path: path.stem)
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
            block_alignment=family.block_alignment,
            stop_token_ids=(2,),
            max_context=4096,
            decoders=family.decoders,
            defaults=family.defaults(length),
            scheme=family.scheme,
        )
        configurations = {name: DecodingConfig.from_options(options, facts) for name, options in made.decoding.items()}
        assert len(set(map(str, configurations.values()))) == len(configurations)


def test_a_part_of_a_study() -> None:
    whole = read_study(ROOT / "studies" / "thresholds.yaml")
    part = chosen(whole, ["s2d2_gsm8k"], "dynamic")
    assert [task.task for task in part.tasks] == ["s2d2_gsm8k"]
    assert {options["decoder"] for options in part.decoding.values()} == {"ar", "dynamic"}
    assert chosen(whole, None, None) is whole
    with pytest.raises(StudyError, match=r"Did you mean s2d2_gsm8k\?"):
        chosen(whole, ["s2d2_gms8k"], None)
    with pytest.raises(StudyError, match=r"Did you mean dynamic\?"):
        chosen(whole, None, "dynamics")
