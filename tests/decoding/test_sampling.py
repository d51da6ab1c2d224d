"""Filters and biases are those of transformers, for drafts and verifiers alike; what was said of sampling happens."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from s2d2_lmeval import DecodingConfig
from s2d2_lmeval.decoding.sampling.filters import bias_of, filtered
from s2d2_lmeval.errors import ConfigError

from .test_sliding import ENGINES
from .tiny import VOCABULARY, engine, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:The draft graph")

FAMILIES = tuple(ENGINES)
MASK = VOCABULARY - 1
WARPERS: dict[str, Any] = {
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
}
VALUES: dict[str, list[Any]] = {
    "temperature": [0.6, 1.7],
    "top_k": [3, 20],
    "top_p": [0.3, 0.9],
    "min_p": [0.02, 0.3],
    "typical_p": [0.2, 0.9],
}


@pytest.mark.parametrize("names", [*itertools.combinations(WARPERS, 1), *itertools.combinations(WARPERS, 2), WARPERS])
def test_filters_are_those_of_transformers(names: tuple[str, ...]) -> None:
    logits = 3 * torch.randn(64, 41, generator=torch.Generator().manual_seed(len(names)), dtype=torch.float64)
    for values in itertools.product(*(VALUES[name] for name in names)):
        given = dict(zip(names, values, strict=True))
        ours = filtered(logits, DecodingConfig(do_sample=True, **given))
        theirs = LogitsProcessorList([WARPERS[name](value) for name, value in given.items()])(
            torch.empty(64, 0), logits
        )
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_without_filters_nothing_is_computed() -> None:
    logits = torch.randn(2, 5)
    assert filtered(logits, DecodingConfig(do_sample=True)) is logits
    assert bias_of(DecodingConfig(), 5, torch.device("cpu")) is None


def test_biases_are_those_of_transformers() -> None:
    logits = torch.randn(4, 9)
    ids = torch.zeros(4, 1, dtype=torch.long)
    bias = bias_of(
        DecodingConfig.from_options({"sequence_bias": {(3,): 1.5, (7,): -2.0}, "suppress_tokens": [1, 8]}),
        *(9, torch.device("cpu")),
    )
    theirs = [SequenceBiasLogitsProcessor({(3,): 1.5, (7,): -2.0}), SuppressTokensLogitsProcessor([1, 8], device="cpu")]
    torch.testing.assert_close(logits + bias, LogitsProcessorList(theirs)(ids, logits))
    bad = bias_of(DecodingConfig.from_options({"bad_words_ids": [[2], [4]]}), 9, torch.device("cpu"))
    torch.testing.assert_close(logits + bad, NoBadWordsLogitsProcessor([[2], [4]], eos_token_id=0)(ids, logits))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampled", [{}, {"do_sample": True, "temperature": 3.0}], ids=["greedy", "sampled"])
def test_suppressed_tokens_never_come_and_favoured_ones_do(family: str, sampled: dict[str, Any]) -> None:
    model = ENGINES[family]()
    for decoder in model.facts.decoders:
        more = {"eb_threshold": 0.5} if decoder == "entropy_bounded" else {}
        options = {"decoder": decoder, **more, **sampled, "stop_token_ids": ()}
        free = model.generate([[3, 1, 4]], options, max_new_tokens=24)[0].token_ids
        barred = [token for token, _ in Counter(free).most_common(3)]
        tokens = model.generate([[3, 1, 4]], {**options, "suppress_tokens": barred}, max_new_tokens=24)[0].token_ids
        assert not set(tokens) & {*barred, model.facts.mask_token_id}, decoder
        wanted = model.generate([[3, 1, 4]], {**options, "logit_bias": {5: 1000.0}}, max_new_tokens=8)[0].token_ids
        assert wanted == [5] * 8, decoder


def test_greedy_decoding_takes_the_biased_arg_max() -> None:
    """As transformers' processors have it in a loop over a plain model."""
    text = [3, 1, 4]
    bias = {2: 1.0, 9: -1.0, 11: 0.5}
    processors = LogitsProcessorList(
        [
            SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()}),
            SuppressTokensLogitsProcessor([0, 6, MASK], device="cpu"),
        ]
    )
    options = {"decoder": "ar", "logit_bias": bias, "suppress_tokens": [0, 6], "min_p": 0.3, "typical_p": 0.5}
    got = engine().generate([text], {**options, "stop_token_ids": ()}, max_new_tokens=12)[0].token_ids
    for _ in range(12):
        logits = tiny_model()(torch.tensor([[*text, MASK]])).logits[:, -1]
        text = [*text, int(processors(torch.tensor([text]), logits).argmax())]
    assert got == text[3:]


@pytest.mark.parametrize("family", FAMILIES)
def test_do_sample_alone_samples(family: str) -> None:
    model = ENGINES[family]()
    for decoder in model.facts.decoders:
        options = {
            "decoder": decoder,
            "do_sample": "true",
            **({"eb_threshold": 3} if decoder == "entropy_bounded" else {}),
        }
        config = model.config(options)
        assert (config.sampled, config.temperature) == (True, 1.0)
        several = {tuple(answer.token_ids) for answer in model.generate([[3, 1, 4]] * 6, config, max_new_tokens=16)}
        assert len(several) > 3, decoder
        assert not model.config(
            {"decoder": decoder, **({"eb_threshold": 3} if decoder == "entropy_bounded" else {})}
        ).sampled


@pytest.mark.parametrize("family", FAMILIES)
def test_a_temperature_alone_decides(family: str) -> None:
    facts = ENGINES[family]().facts
    assert DecodingConfig.from_options({"temperature": 0.7}, facts).sampled
    assert not DecodingConfig.from_options({"temperature": 0}, facts).sampled
    assert not DecodingConfig.from_options({"temperature": 0.7, "do_sample": False}, facts).sampled
    of_run = DecodingConfig.from_options({"temperature": 0.7}, facts, of_run={"do_sample": False})
    assert (of_run.sampled, of_run.temperature) == (True, 0.7)
    assert not DecodingConfig.from_options({"do_sample": False}, facts, of_run={"temperature": 0.7}).sampled
    for given, run in (
        ({"do_sample": True, "temperature": 0}, {}),
        ({"do_sample": True}, {"temperature": 0.0}),
        ({"do_sample": True, "temperature": "1e-9"}, {}),
    ):
        with pytest.raises(ConfigError, match="do_sample=true contradicts temperature"):
            DecodingConfig.from_options(given, facts, of_run=run)


@pytest.mark.parametrize(
    "neutral",
    [
        *(
            {"top_k": -1},
            {"top_k": 0},
            {"top_k": None},
            {"top_k": "-1"},
            {"min_p": 0.0},
            {"min_p": None},
            {"seed": None},
        ),
        *({"typical_p": 1.0}, {"repetition_penalty": 1.0}, {"num_beams": 1}, {"softmax_dtype": "float32"}),
        *({"softmax_dtype": torch.float32}, {"suppress_tokens": []}, {"bad_words_ids": None}, {"logit_bias": {}}),
        *({"use_cache": True}, {"stop": None}, {"presence_penalty": 0}, {"quantization_config": None}),
        *({"compile": False}, {"n": 1}, {"do_sample": None}, {"temperature": None}, {"num_return_sequences": "1"}),
    ],
    ids=str,
)
def test_what_changes_nothing_is_accepted(neutral: dict[str, Any]) -> None:
    assert DecodingConfig.from_options(neutral) == DecodingConfig.from_options({})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"quantization_config": {}}, "give it to s2d2_lmeval.load"),
        ({"stop": ["\n"]}, "`until`"),
        ({"compile": True}, "static_shapes"),
        ({"repetition_penalty": 1.1}, "depends on previous tokens"),
        ({"bad_words_ids": [[1, 2]]}, "not a single token"),
        ({"sequence_bias": [[[1, 2], 0.5]]}, "not a single token"),
        ({"logit_bias": {5: "x"}}, "token ids and the value to add"),
        ({"suppress_tokens": [1], "bad_words_ids": [[2]]}, "another name of suppress_tokens"),
        ({"top_k": -2}, "at least 0"),
        ({"min_p": 1.5}, "at most 1"),
    ],
    ids=str,
)
def test_what_would_change_something_says_what_to_do(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DecodingConfig.from_options(given)


def test_numbers_may_be_texts() -> None:
    """YAML reads 1e-5 as one."""
    config = DecodingConfig.from_options(
        {"temperature": "1e-5", "block_length": "8", "cache_ver": "True", "top_k": "3.0"}
    )
    assert (config.temperature, config.block_length, config.cache_ver, config.top_k) == (1e-5, 8, True, 3)


def test_written_out_and_read_again() -> None:
    config = DecodingConfig.from_options({"decoder": "ar", "logit_bias": {"5": 1, 7: -0.5}, "suppress_tokens": 3})
    assert config.to_dict()["logit_bias"] == {5: 1.0, 7: -0.5}
    kept = {name: config.to_dict()[name] for name in ("decoder", "logit_bias", "suppress_tokens")}
    assert DecodingConfig.from_options(kept) == config


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"suppress_tokens": [VOCABULARY]}, f"token id {VOCABULARY} is outside the vocabulary of {VOCABULARY}"),
        ({"logit_bias": {999: 1}}, "token id 999 is outside"),
        ({"suppress_tokens": list(range(MASK))}, "leaves nothing of the vocabulary"),
        ({"block_length": 10**9}, "block_length=1000000000 exceeds the 256 positions"),
    ],
    ids=["suppressed", "favoured", "all", "block"],
)
def test_what_the_checkpoint_cannot_have(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine().generate([[1, 2]], {"max_new_tokens": 4, **given})
