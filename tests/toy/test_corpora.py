"""Generators, held-out sets and scorers of the toy corpora."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import islice

import pytest

from recipes.toy import problems as recipe
from recipes.toy.problems import HELD_OUT_SIZE, MAKE, made_held_out, training_stream
from recipes.toy.problems.instructions import KINDS
from recipes.toy.problems.programs import TEMPLATES
from s2d2_lmeval.toy import CORPORA, Problem, checkpoint_path, held_out, score
from s2d2_lmeval.toy.scoring import INSTRUCTIONS, SCORERS

NAMES = CORPORA


def test_every_corpus_is_made_and_scored() -> None:
    assert CORPORA == tuple(MAKE) == tuple(SCORERS)
    assert tuple(KINDS) == tuple(INSTRUCTIONS)


def of_kind(corpus: str, kind: str) -> Problem:
    return next(problem for problem in held_out(corpus) if problem.kind == kind)


@pytest.mark.parametrize("name", NAMES)
def test_streams_are_deterministic_by_seed(name: str) -> None:
    first, again, other = (list(islice(training_stream(name, seed), 50)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


@pytest.mark.parametrize("name", NAMES)
def test_held_out_is_fixed_distinct_and_disjoint_from_training(name: str) -> None:
    problems = held_out(name)
    prompts = {problem.prompt for problem in problems}
    assert len(prompts) == len(problems) == HELD_OUT_SIZE
    assert made_held_out(name) == problems, "run python -m recipes.toy.problems"
    assert not prompts & {problem.prompt for problem in islice(training_stream(name, 1), 5000)}


def test_training_stream_really_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = next(training_stream("instructions", 9))
    monkeypatch.setattr(recipe, "held_out", lambda name: (problem,))
    assert next(training_stream("instructions", 9)) != problem


@pytest.mark.parametrize("name", [name for name in NAMES if name != "programs"])
def test_reference_answers_score_one_and_corrupted_ones_zero(name: str) -> None:
    for problem in held_out(name):
        assert score(problem, problem.separator + problem.answer) == 1.0
        assert score(problem, problem.answer[:-1]) == 0.0 or problem.answer[-1] in ".!"
        assert score(problem, "") == 0.0


@pytest.mark.parametrize("kind", tuple(TEMPLATES))
def test_programs_are_scored_by_running_them(kind: str) -> None:
    problem = of_kind("programs", kind)
    assert score(problem, problem.separator + problem.answer) == 1.0
    assert score(problem, problem.answer) == 1.0
    assert score(problem, problem.answer.strip()) == 1.0 or "\n" in problem.answer
    assert score(problem, f"{problem.prompt}\n{problem.answer}") == 1.0
    wrong = re.sub(r"return .*", "return None", problem.answer)
    assert score(problem, wrong) == 0.0
    assert score(problem, "    return (") == 0.0


def test_programs_boolean_is_not_a_number() -> None:
    problem = of_kind("programs", "predicate")
    assert score(problem, problem.answer.replace("return ", "return 0 + (") + ")") == 0.0


def test_comparisons_come_apart_at_the_bound() -> None:
    problem = next(p for p in held_out("programs") if p.kind == "predicate" and " > " in p.answer)
    assert score(problem, problem.answer.replace(">", ">=")) == 0.0


def test_arithmetic_takes_the_first_result() -> None:
    problem = held_out("arithmetic")[0]
    result = problem.specification["result"]
    assert score(problem, f"#### {result}\n#### 1234") == 1.0
    assert score(problem, f"#### 1234\n#### {result}") == 0.0
    assert score(problem, f"#### {result}5") == 0.0


CORRUPTED = {
    "repeat": lambda text: text + text[-1],
    "uppercase": str.lower,
    "bullets": lambda text: text.replace("- ", ""),
    "ending": lambda text: text + " now",
    "reverse": lambda text: " ".join(reversed(text.split())),
    "quotes": lambda text: text[1:],
    "count": lambda text: text.split(" ", 1)[1],
    "distinct": lambda text: text + ", " + text.split(",")[0],
}


@pytest.mark.parametrize("kind", tuple(KINDS))
def test_every_kind_of_instruction_has_a_strict_checker(kind: str) -> None:
    problem = of_kind("instructions", kind)
    assert score(problem, problem.answer) == 1.0
    assert score(problem, CORRUPTED[kind](problem.answer)) == 0.0


def test_checkers_accept_other_ways_to_follow_an_instruction() -> None:
    distinct = Problem("instructions", "distinct", "", "", " ", '{"number": 2, "avoid": ["red"]}')
    assert score(distinct, "Blue, pink") == 1.0
    assert score(distinct, "red, pink") == 0.0
    bullets = Problem("instructions", "bullets", "", "", " ", '{"items": ["cat", "dog"]}')
    assert score(bullets, "* cat\n* dog") == 1.0


def test_import_is_light() -> None:
    heavy = "{'torch', 'transformers', 'lm_eval'}"
    code = f"import sys, s2d2_lmeval.toy; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert checkpoint_path().name == "checkpoint"
