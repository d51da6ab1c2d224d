"""The examples of docs/extending.md, in the process and from an installed package."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from s2d2_lmeval import DecodingConfig, load, register_decoder
from s2d2_lmeval.cli import main
from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.harness.upstream import include_path
from s2d2_lmeval.registry import DECODERS, ESTIMATORS, POLICIES, STRATEGIES, Registrar

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
LONGEST = 60
PROMPTS = [[5, 9, 31], [7] * 11, [40, 41, 42, 43, 44]]


def code(heading: str) -> str:
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return block


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the page's code defines, registered for one test."""
    module = ModuleType("added")
    monkeypatch.setitem(sys.modules, "added", module)
    namespace = vars(module)
    for heading in ("Add a decoder", "Add a routing policy", "Add an estimator or a remasking strategy"):
        exec(compile(code(heading), heading, "exec"), namespace)
    yield namespace
    DECODERS.remove("no_echo")
    POLICIES.remove("share_of_block")
    ESTIMATORS.remove("margin_squared")
    STRATEGIES.remove("right_to_left")


def test_a_decoder_is_one_short_file() -> None:
    assert len([line for line in code("Add a decoder").splitlines() if line]) <= LONGEST


@pytest.mark.usefixtures("added")
def test_the_decoder_decodes_as_it_says() -> None:
    model = load("toy", max_batch=2)
    options = {"decoder": "no_echo", "max_new_tokens": 12}
    answers = model.generate(PROMPTS, options)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        text = [*prompt[-1:], *answer.token_ids]
        assert all(one != other for one, other in itertools.pairwise(text))
        assert answer.stats["nfe"] == answer.stats["new_tokens"]
    alone = [model.generate([prompt], options)[0].token_ids for prompt in PROMPTS]
    assert alone == [answer.token_ids for answer in answers]
    # Where echoes may be as long as the answer, this is greedy decoding.
    free = model.generate(PROMPTS, {**options, "longest_echo": 99, "stop_token_ids": []})
    greedy = model.generate(PROMPTS, {"decoder": "ar", "max_new_tokens": 12, "stop_token_ids": []})
    assert [answer.token_ids for answer in free] == [answer.token_ids for answer in greedy]


@pytest.mark.usefixtures("added")
def test_its_options_are_checked_listed_and_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    model = load("toy")
    assert model.facts.decoders[0] == "s2d2"
    assert "no_echo" in model.facts.decoders
    config = model.config({"decoder": "no_echo", "longest_echo": "3"})
    assert (config.longest_echo, config.promise) == (3, "greedy, without echoes")
    assert config.to_dict()["longest_echo"] == 3
    assert DecodingConfig(decoder="no_echo", longest_echo=2).replace(longest_echo=4).longest_echo == 4
    with pytest.raises(ConfigError, match=r"Did you mean longest_echo\?"):
        model.config({"decoder": "no_echo", "longest_ecko": 3})
    with pytest.raises(ConfigError, match="longest_echo=0 is too small"):
        model.config({"decoder": "no_echo", "longest_echo": 0})
    with pytest.raises(ConfigError, match="an option of decoder no_echo, and this run uses decoder=s2d2"):
        model.config({"decoder": "s2d2", "longest_echo": 3})
    with pytest.raises(ConfigError, match="block_length is an option of decoder"):
        model.config({"decoder": "no_echo", "block_length": 8})
    assert main(["options", "--decoder", "no_echo"]) == 0
    assert "longest_echo" in capsys.readouterr().out


@pytest.mark.usefixtures("added")
def test_policy_estimator_and_strategy() -> None:
    model = load("toy")
    shared = {"decoder": "s2d2", "block_length": 8, "max_new_tokens": 16, "stop_token_ids": []}
    routed = {
        share: model.generate(PROMPTS, {**shared, "do_verify_policy": "share_of_block", "verify_share": share})
        for share in (0.0, 1.0)
    }
    always = model.generate(PROMPTS, shared)
    assert [answer.token_ids for answer in routed[0.0]] == [answer.token_ids for answer in always]
    assert sum(one.stats["routed"] for one in routed[1.0]) < sum(one.stats["routed"] for one in routed[0.0])
    scored = {**shared, "do_verify_policy": "score_threshold", "token_acceptance_estimator": "margin_squared"}
    assert [len(answer.token_ids) for answer in model.generate(PROMPTS, scored)] == [16, 16, 16]
    backwards = {**shared, "remasking_strategy": "right_to_left", "confidence_threshold": 1.0}
    backwards |= {"do_verify_policy": "mask_span_length", "min_ssd_span_length": 99}
    (answer,) = model.generate([PROMPTS[0]], {**backwards, "max_new_tokens": 13})
    order = [-place for step in answer.decoding_order for place in step if place != "|"]
    assert order == [7, 6, 5, 4, 3, *range(15, 7, -1)]


def test_names_are_taken_once() -> None:
    with pytest.raises(ConfigError, match="s2d2 is the name of one of the decoders already"):
        register_decoder("s2d2", "block", promise="another")(type("Mine", (), {}))
    with pytest.raises(ConfigError, match="unexpected keyword argument 'promisse'"):
        register_decoder("mine", "block", promisse="another")(type("Mine", (), {}))
    assert "mine" not in DECODERS


def test_an_option_that_is_taken_already(added: dict[str, Any]) -> None:
    taken = type("Taken", (), {"__annotations__": {"block_length": "int"}, "block_length": added["option"](3, "mine")})
    options = added["dataclass"](frozen=True)(taken)
    register_decoder("mine", "block", promise="mine", options=(options,))(added["NoEcho"])
    try:
        with pytest.raises(ConfigError, match="block_length is an option already"):
            DecodingConfig(decoder="mine")
    finally:
        DECODERS.remove("mine")


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """An environment in which a package with the page's decoder is installed, and one that is broken."""
    (tmp_path / "no_echo.py").write_text(code("Add a decoder"))
    (tmp_path / "broken_plugin.py").write_text("import a_module_that_is_not_there\n")
    info = tmp_path / "no_echo-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: no-echo\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[s2d2_lmeval.decoders]\nno_echo = no_echo\nbroken = broken_plugin\n")
    return {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "200"}


def test_installed_it_is_a_decoder_of_lm_eval(installed: dict[str, str], tmp_path: Path) -> None:
    run = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "run", "--model", "s2d2", "--tasks", "s2d2_toy_arithmetic"),
            *("--model_args", "pretrained=toy,decoder=no_echo,longest_echo=2", "--limit", "2"),
            *("--include_path", str(include_path())),
            *("--output_path", str(tmp_path / "results")),
        ],
        env=installed,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "broken = broken_plugin (s2d2_lmeval.decoders) is left out: No module named 'a_module" in run.stderr
    (path,) = tmp_path.glob("results/**/results_*.json")
    results = json.loads(path.read_text())
    figures = results["results"]["s2d2_toy_arithmetic"]
    assert (figures["accuracy,none"], figures["tokens_per_forward,none"]) == (1, 1)
    listed = subprocess.run(
        [sys.executable, "-m", "s2d2_lmeval", "options", "longest_echo"], env=installed, capture_output=True, text=True
    )
    assert "how often a token may be written in a row" in listed.stdout


def test_a_registry_is_filled_whoever_asks_first() -> None:
    code = "from s2d2_lmeval.decoding.options.spiffy import BASES; print(*BASES)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert set(shown.split()) == {"editing", "dynamic", "static", "sequential", "entropy_bounded"}


def test_a_registry_that_could_not_be_filled_is_not_taken_for_a_full_one() -> None:
    registry = Registrar("strategies", "a_module_that_is_not_there")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError):
            list(registry)


@pytest.mark.parametrize("first", ["rounds.target", "pipelined.s2d2", "blocks.subblocks", "blocks.editing"])
def test_the_order_of_parts_does_not_depend_on_what_is_imported_first(first: str) -> None:
    code = (
        f"import s2d2_lmeval.decoding.{first}\n"
        "from s2d2_lmeval.registry import DECODERS\n"
        "print([(name, [part.implementation.__name__ for part in DECODERS.all(name)]) for name in DECODERS])\n"
        "print([name for name in DECODERS if len({part.promise for part in DECODERS.all(name)} - {''}) != 1])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    order, unlike = shown.splitlines()
    assert order == str([(name, [part.implementation.__name__ for part in DECODERS.all(name)]) for name in DECODERS])
    assert unlike == "[]"
