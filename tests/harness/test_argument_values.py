"""Whatever ``--model_args``, ``generation_kwargs`` and command lines say, there is an answer or a sentence."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from s2d2_lmeval.cli import COMMANDS, build_parser, main
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.options.names import FOREIGN
from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.harness import arguments
from s2d2_lmeval.harness.arguments import GenerationArguments, rows_in_flight, sort_arguments
from s2d2_lmeval.harness.model import S2D2LM
from s2d2_lmeval.runtime import clock

from ..fuzzing import Tries
from ..odd_values import TEXTS, VALUES, label

LOADING = sorted(
    {
        *arguments.OF_HARNESS,
        *arguments.OF_LOADING,
        *arguments.LOADING_SYNONYMS,
        *(
            "max_batch",
            "peft",
            "custom_generate",
            "custom_model_class",
            "log_decoding_order",
            "load_in_8bit",
            "no_such",
        ),
    }
)
NAMES = sorted({*LOADING, *FOREIGN, *DecodingConfig.option_names()})


def test_model_arguments_of_any_kind() -> None:
    tries = Tries()
    for name in NAMES:
        for value in VALUES:
            tries.attempt(label(name, value), lambda name=name, value=value: sort_arguments("toy", {name: value}))
    for value in VALUES:
        tries.attempt(label("pretrained", value), lambda value=value: sort_arguments(value, {}))
        tries.attempt(label("batch_size", value), lambda value=value: rows_in_flight(value, None))
        tries.attempt(label("max_batch_size", value), lambda value=value: rows_in_flight("auto", value))
    tries.check(refused_at_least=1000)


def test_generation_arguments_of_any_kind() -> None:
    tries = Tries()
    for name in ("until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature", *NAMES):
        for value in VALUES:
            tries.attempt(label(name, value), lambda name=name, value=value: GenerationArguments.parse({name: value}))
    for value in VALUES:
        tries.attempt(label("all", value), lambda value=value: GenerationArguments.parse(value))
    tries.check(refused_at_least=300)


def evaluate(lm: S2D2LM, requests: Any, name: str, value: Any) -> None:
    budget = {} if name in ("max_gen_toks", "max_new_tokens", "max_tokens", "gen_length") else {"max_gen_toks": 3}
    lm.generate_until(requests(["one", "two"], **{**budget, name: value}), disable_tqdm=True)


def test_requests_with_odd_generation_arguments(lm: S2D2LM, requests: Any) -> None:
    tries, rng = Tries(), random.Random(0)
    names = ("until", *sorted(DecodingConfig.option_names()))
    for _ in range(120):
        name, value = rng.choice(names), rng.choice(VALUES)
        tries.attempt(
            label(name, value), lambda name=name, value=value: evaluate(lm, requests, name, value), seconds=30
        )
    tries.check(refused_at_least=20)


@pytest.mark.slow
def test_requests_with_every_odd_generation_argument(lm: S2D2LM, requests: Any) -> None:
    tries = Tries()
    for name in ("until", *sorted(DecodingConfig.option_names())):
        for value in VALUES:
            tries.attempt(
                label(name, value), lambda name=name, value=value: evaluate(lm, requests, name, value), seconds=60
            )
    tries.check()


def load_with(make: Callable[..., S2D2LM], name: str, value: Any) -> None:
    make(**{name: value})


def odd_loads() -> list[tuple[str, Any]]:
    """Arguments that reach further than sorting; what a hub would be asked for is not among them."""
    names = set(LOADING) - {"custom_generate", "custom_model_class", "no_such", "device"}
    names |= {"batch_size", "max_batch_size", "dtype", "temperature", "block_length"}
    return [(name, value) for name in sorted(names) for value in VALUES]


def test_models_with_odd_arguments(make: Callable[..., S2D2LM]) -> None:
    tries = Tries()
    for name, value in random.Random(1).sample(odd_loads(), 50):
        tries.attempt(label(name, value), lambda name=name, value=value: load_with(make, name, value), seconds=30)
    tries.check(refused_at_least=10)


@pytest.mark.slow
def test_models_with_many_odd_arguments(make: Callable[..., S2D2LM]) -> None:
    tries = Tries()
    for name, value in random.Random(3).sample(odd_loads(), 1500):
        tries.attempt(label(name, value), lambda name=name, value=value: load_with(make, name, value), seconds=60)
    tries.check()


@pytest.mark.parametrize("size", [10**9, "1000000000"])
def test_a_batch_of_a_billion_is_as_many_as_there_are_requests(
    make: Callable[..., S2D2LM], requests: Any, size: Any
) -> None:
    model = make(batch_size=size)
    assert len(model.generate_until(requests(["a", "b"], max_gen_toks=2), disable_tqdm=True)) == 2
    with pytest.raises(ConfigError, match="batch_size=1e400"):
        make(batch_size="1e400")


# Command lines


def run_command(line: list[str]) -> None:
    """A wrong command line leaves by argparse with exit code 2 and its sentence; the rest is for the caller to see."""
    try:
        if main(line) == 2:
            raise ConfigError("refused")
    except SystemExit as left:
        if left.code == 2:
            raise ConfigError("refused by argparse") from None
        if left.code:
            raise


def command_lines(folder: Path) -> list[list[str]]:
    """Every option of every subcommand at every text, beside what the subcommand cannot do without."""
    quick = {
        "generate": ["--model", "toy", "--prompt", "What is 1 + 1?", "--max_new_tokens", "2"],
        "doctor": ["toy"],
        "options": [],
        "bench": [
            "--decoders",
            "ar",
            "--prompts",
            "1",
            "--new_tokens",
            "1",
            "--repeats",
            "1",
            "--no_baselines",
            "--batch",
            "1",
        ],
        "sweep": [str(folder / "none.yaml")],
        "report": [str(folder / "none")],
        "calibrate": [
            "--model_args",
            "pretrained=toy",
            "--prompts",
            str(folder / "none.txt"),
            "--output",
            str(folder / "g"),
        ],
    }
    subcommands = next(action for action in build_parser()._actions if isinstance(action.choices, dict)).choices
    lines = []
    for name, given in quick.items():
        assert name in COMMANDS
        for option, action in subcommands[name]._option_string_actions.items():
            if not option.startswith("--") or option in ("--help", "--output", "--plot", "--traces", "--ar_quality"):
                continue
            values = [text for text in TEXTS if "\0" not in text] if action.nargs != 0 else [""]  # as no system allows
            lines += [[name, *given, *([option, text] if action.nargs != 0 else [option])] for text in values]
    return lines


def try_commands(lines: list[list[str]], seconds: float) -> Tries:
    """Commands set variables of the environment, threads and the clock for their process, which ends with them."""
    tries, threads = Tries(), torch.get_num_threads()
    with patch.dict(os.environ):
        for line in lines:
            tries.attempt(f"{line!r:.200}", lambda line=line: run_command(line), seconds=seconds)
    torch.set_num_threads(threads)
    clock.choose("wall")
    return tries


def test_command_lines_of_any_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    try_commands(random.Random(2).sample(command_lines(tmp_path), 120), 60).check(refused_at_least=60)


@pytest.mark.slow
def test_every_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO())  # of --prompt -
    try_commands(command_lines(tmp_path), 120).check()
