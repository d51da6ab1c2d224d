"""Whatever an option is given, there is an answer or a sentence: no traceback, no hang, no memory without end."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest

from s2d2_lmeval import DecodingConfig, load
from s2d2_lmeval.decoding.spiffy.graph import parse_graph
from s2d2_lmeval.errors import ConfigError, RequestError
from s2d2_lmeval.runtime.memory import RowLimit

from ..fuzzing import Tries
from ..odd_values import VALUES, label
from .test_sliding import ENGINES
from .tiny import engine

pytestmark = pytest.mark.filterwarnings("ignore:The draft graph")
NAMES = sorted(DecodingConfig.option_names())
BUDGETS = frozenset(name for name in NAMES if name.startswith("max_") or name == "gen_length") - {"max_post_steps"}
PROMPTS = [[1, 2, 3], [4, 5]]


def cases(family: str, all_of_them: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every option at every value under every decoder of the family; or dealt out, to all decoders of all families."""
    every = [(owner, decoder) for owner, model in ENGINES.items() for decoder in model().facts.decoders]
    for number, (name, value) in enumerate(product(NAMES, VALUES)):
        for place, (owner, decoder) in enumerate(every):
            if owner == family and (all_of_them or number % len(every) == place):
                yield label(f"{family}, {decoder}, {name}", value), {"decoder": decoder, name: value}


def decode(family: str, options: dict[str, Any]) -> None:
    model = ENGINES[family]()
    model.max_batch = 2
    short = {} if BUDGETS & options.keys() else {"max_new_tokens": 6}
    model.generate(PROMPTS, {**short, **options})


def accepted(family: str, tries: Tries, all_of_them: bool = False) -> list[tuple[str, dict[str, Any]]]:
    """Those that make a configuration."""
    facts, fine = ENGINES[family]().facts, []
    for text, options in cases(family, all_of_them):
        before = tries.answered
        tries.attempt(text, lambda options=options: DecodingConfig.from_options(options, facts))
        if tries.answered > before:
            fine.append((text, options))
    return fine


@pytest.mark.parametrize("family", ENGINES)
def test_every_option_takes_every_value_in_an_answer_or_a_sentence(family: str) -> None:
    tries = Tries()
    fine = accepted(family, tries)
    for text, options in random.Random(family).sample(fine, 40):
        tries.attempt(text, lambda options=options: decode(family, options), seconds=30)
    tries.check(refused_at_least=500)


@pytest.mark.slow
@pytest.mark.parametrize("family", ENGINES)
def test_what_makes_a_configuration_decodes(family: str) -> None:
    tries = Tries()
    fine = accepted(family, tries, all_of_them=True)
    for text, options in random.Random(family).sample(fine, 1500):
        tries.attempt(text, lambda options=options: decode(family, options), seconds=60)
    tries.check()


@pytest.mark.slow
@pytest.mark.parametrize("family", ENGINES)
def test_several_odd_options_at_once(family: str) -> None:
    tries, rng, facts = Tries(), random.Random(family), ENGINES[family]().facts
    for number in range(1500):
        options: dict[str, Any] = {name: rng.choice(VALUES) for name in rng.sample(NAMES, rng.randrange(2, 5))}
        options["decoder"] = rng.choice(facts.decoders)
        tries.attempt(f"{number}: {sorted(options)}", lambda options=options: decode(family, options), seconds=60)
    tries.check(refused_at_least=500)


def test_prompts_budgets_and_seeds_of_any_kind() -> None:
    model, tries = engine(), Tries()
    for value in VALUES:
        for name, call in {
            "prompts": lambda value=value: model.generate(value, max_new_tokens=2),
            "prompt": lambda value=value: model.generate([value], max_new_tokens=2),
            "token": lambda value=value: model.generate([[1, value]], max_new_tokens=2),
            "budget": lambda value=value: model.generate([[1]], max_new_tokens=value),
            "budgets": lambda value=value: model.generate([[1]], max_new_tokens=[value]),
            "seed": lambda value=value: model.generate([[1]], max_new_tokens=2, seeds=[value]),
            "seeds": lambda value=value: model.generate([[1]], max_new_tokens=2, seeds=value),
            "config": lambda value=value: model.generate([[1]], value, max_new_tokens=2),
            "option name": lambda value=value: model.generate([[1]], {_hashable(value): 1}, max_new_tokens=2),
            "scored": lambda value=value: model.score([([1], value)]),
            "requests": lambda value=value: model.score(value),
            "rows": lambda value=value: RowLimit(value),
            "replaced": lambda value=value: model.config().replace(block_length=value),
        }.items():
            tries.attempt(label(name, value), call)
    tries.check(refused_at_least=500)


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return str(type(value))
    return value


def test_loading_arguments_of_any_kind() -> None:
    tries = Tries()
    for name in ("attention", "max_batch", "max_context", "static_shapes", "block_length", "mask_token_id", "family"):
        for value in VALUES:
            tries.attempt(label(name, value), lambda name=name, value=value: load(engine().hf_model, **{name: value}))
    tries.check(refused_at_least=100)


def test_a_great_many_rows_take_no_more_than_the_requests_need() -> None:
    model = load(engine().hf_model, max_batch=10**9, mask_token_id=engine().facts.mask_token_id, block_length=4)
    assert model.max_batch == 10**9
    assert len(model.generate(PROMPTS, max_new_tokens=4)) == 2
    assert len(model.score([([1], [2])])) == 1
    with pytest.raises(RequestError, match="token"):
        model.generate([[1, "x"]], max_new_tokens=2)  # type: ignore[list-item]


def test_draft_graphs_of_any_kind() -> None:
    tries = Tries()
    head = '{"format": "s2d2-lmeval draft graph", "version": 1, "block_length": 4, "nodes": '
    parts = ["1", "null", "{}", "[1]", "[[]]", '[{"pairs": 1}]', '[{"pairs": [[0, 0]], "parents": [9]}]']
    parts += [f'[{{"pairs": [[0, {"9" * 5000}]], "parents": [0]}}]', f'[{{"pairs": [[{10**30}, 0]], "parents": [0]}}]']
    for text in ("", "x", "[" * 100_000, "9" * 5000, '{"a":' * 10_000, "null", *(head + part + "}" for part in parts)):
        tries.attempt(text[-60:], lambda text=text: parse_graph(text))
    tries.check(refused_at_least=len(parts) + 6)


def test_token_ids_as_text_are_read_as_they_are_written_here() -> None:
    given = {"suppress_tokens": "[5, 7]", "logit_bias": "{5: -2.5}", "stop_token_ids": "9"}
    config = DecodingConfig.from_options(given)
    assert (config.suppress_tokens, config.logit_bias, config.stop_token_ids) == ((5, 7), ((5, -2.5),), (9,))
    for name, wrong in product(("suppress_tokens", "logit_bias"), ("(1", "[", "x", "{")):
        with pytest.raises(ConfigError, match=name):
            DecodingConfig.from_options({name: wrong})
