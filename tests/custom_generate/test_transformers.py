"""``model.generate(custom_generate=…)`` of transformers: with the function, and with the path of this repository."""

from __future__ import annotations

import copy
import inspect
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    Qwen3ForCausalLM,
    StoppingCriteria,
    dynamic_module_utils,
)
from transformers.generation import BaseStreamer

import s2d2_lmeval
from s2d2_lmeval.custom_generate.generate import generate
from s2d2_lmeval.decoding.options.config import SYNONYMS
from s2d2_lmeval.errors import ConfigError, RequestError
from s2d2_lmeval.families.facts import FAMILY_FIELD
from s2d2_lmeval.toy import checkpoint_path, held_out

from .checkpoints import REPOSITORY, SDAR

PROMPT = [62, 88, 46, 88, 47, 49, 60, 15, 71, 78, 41, 26, 15]
OPTIONS: dict[str, Any] = {"block_length": 4, "confidence_threshold": 0.5}


@cache
def engine() -> s2d2_lmeval.BlockDiffusionModel:
    return s2d2_lmeval.load(SDAR)


@cache
def plain() -> Qwen3ForCausalLM:
    """A transformers model as somebody else may have loaded it: no stop token, no pad token."""
    config = copy.deepcopy(engine().hf_model.config)
    config._attn_implementation = "sdpa"
    model = Qwen3ForCausalLM(config)
    model.load_state_dict(engine().hf_model.state_dict())
    model.generation_config = GenerationConfig()
    return model.eval()


@pytest.fixture(params=["function", "path"])
def how(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Both ways to name the decoder."""
    if request.param == "function":
        return {"custom_generate": generate}
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    return {"custom_generate": str(REPOSITORY), "trust_remote_code": True}


def decode(how: dict[str, Any], prompts: torch.Tensor | None = None, **arguments: Any) -> Any:
    ids = torch.tensor([PROMPT]) if prompts is None else prompts
    return plain().generate(ids, **how, **{**OPTIONS, **arguments})


def test_both_ways_decode_what_the_engine_decodes(how: dict[str, Any]) -> None:
    expected = engine().generate([PROMPT], {**OPTIONS, "max_new_tokens": 11, "stop_token_ids": ()})[0]
    assert decode(how, max_new_tokens=11).tolist() == [PROMPT + expected.token_ids]


@pytest.mark.parametrize("decoder", [None, "sliding"])
def test_an_autoregressive_model_decodes_as_its_class_does(how: dict[str, Any], decoder: str | None) -> None:
    config = copy.deepcopy(plain().config)
    for name in ("mask_token_id", "block_length", FAMILY_FIELD):
        delattr(config, name)
    model = Qwen3ForCausalLM(config).eval()
    arguments: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(torch.tensor([PROMPT]), **arguments)
    given = {} if decoder is None else {"decoder": decoder}
    assert model.generate(torch.tensor([PROMPT]), **how, **arguments, **given).equal(expected)


def test_every_option_of_the_decoder_can_be_given(how: dict[str, Any]) -> None:
    options: dict[str, Any] = {
        "decoder": "s2d2",
        "schedule": "reference",
        "do_verify_policy": "score_hysteresis",
        "hysteresis_threshold_on": 1.0,
        "hysteresis_threshold_off": -5.0,
        "do_verify_score_type": "difference_dynamic",
        "score_penalty_coef": 1.0,
        "seed": 5,
    }
    expected = engine().generate([PROMPT], {**OPTIONS, **options, "max_new_tokens": 16, "stop_token_ids": ()})[0]
    stats: list[dict[str, float]] = []
    answer = decode(how, max_new_tokens=16, stats=stats, **options)
    assert answer.tolist() == [PROMPT + expected.token_ids]
    assert len(stats) == 1
    assert stats[0]["nfe"] == expected.stats["nfe"]


def test_a_generation_config_says_how_long_and_how_to_sample(how: dict[str, Any]) -> None:
    settings = GenerationConfig(max_new_tokens=9, do_sample=True, temperature=0.7, top_k=10, top_p=0.9)
    torch.manual_seed(3)
    seed = int(torch.randint(2**31, ()).item())
    sampling: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_k": 10, "top_p": 0.9, "seed": seed}
    expected = engine().generate([PROMPT], {**OPTIONS, **sampling, "max_new_tokens": 9, "stop_token_ids": ()})[0]
    torch.manual_seed(3)
    assert decode(how, generation_config=settings).tolist() == [PROMPT + expected.token_ids]


def test_sampling_follows_the_global_seed_and_greedy_does_not(how: dict[str, Any]) -> None:
    def run(seed: int, sample: bool) -> list[int]:
        torch.manual_seed(seed)
        return decode(how, max_new_tokens=24, do_sample=sample)[0].tolist()

    assert run(1, True) == run(1, True)
    assert len({tuple(run(seed, True)) for seed in range(4)}) > 1
    assert run(1, False) == run(2, False)


def test_max_length_counts_the_prompt(how: dict[str, Any]) -> None:
    assert decode(how, max_length=20).shape == (1, 20)


def test_a_stop_token_is_kept_and_the_rest_is_padding(how: dict[str, Any]) -> None:
    free = decode(how, max_new_tokens=24)[0].tolist()
    stop = free[len(PROMPT) + 5]
    first = free.index(stop, len(PROMPT))
    prompts = torch.tensor([PROMPT, PROMPT[::-1]])
    answer = decode(how, prompts=prompts, max_new_tokens=24, eos_token_id=stop, pad_token_id=0)
    assert answer[0, : first + 1].tolist() == free[: first + 1]
    assert set(answer[0, first + 1 :].tolist()) <= {0}


def test_left_padded_prompts_decode_as_they_do_alone(how: dict[str, Any]) -> None:
    texts = [PROMPT, PROMPT[:5], PROMPT[:9]]
    width = max(len(text) for text in texts)
    ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    answer = decode(how, prompts=ids, attention_mask=mask, max_new_tokens=10)
    expected = engine().generate(texts, {**OPTIONS, "max_new_tokens": 10, "stop_token_ids": ()})
    assert [row[width:].tolist() for row in answer] == [one.token_ids for one in expected]
    assert torch.equal(answer[:, :width], ids)


def test_several_sequences_of_one_prompt_differ(how: dict[str, Any]) -> None:
    answers = decode(how, max_new_tokens=24, do_sample=True, num_return_sequences=4)
    assert answers.shape == (4, len(PROMPT) + 24)
    assert len({tuple(row.tolist()) for row in answers}) > 1


def test_an_output_object_on_request(how: dict[str, Any]) -> None:
    answer = decode(how, max_new_tokens=4, return_dict_in_generate=True)
    assert torch.equal(answer.sequences, decode(how, max_new_tokens=4))


def test_log_probabilities_come_in_the_output_object(how: dict[str, Any]) -> None:
    prompts = torch.tensor([PROMPT, PROMPT[::-1]])
    asked: dict[str, Any] = {"max_new_tokens": 6, "logprobs": True, "top_logprobs": 2, "eos_token_id": None}
    answer = decode(how, prompts=prompts, return_dict_in_generate=True, **asked)
    for ids, logprobs, several in zip(answer.sequences, answer.logprobs, answer.top_logprobs, strict=True):
        assert len(logprobs) == len(several) == 6
        for token, logprob, best in zip(ids[len(PROMPT) :].tolist(), logprobs, several, strict=True):
            assert len(best) == 2
            assert dict(best).get(token, logprob) == logprob <= best[0][1] <= 0
    assert decode(how, max_new_tokens=4, return_dict_in_generate=True).logprobs is None
    with pytest.raises(RequestError, match="give return_dict_in_generate=True too"):
        decode(how, **asked)


class EndsWith(StoppingCriteria):
    """Stops where the last token is one of ``tokens``; remembers that it was asked for every length."""

    def __init__(self, tokens: set[int]) -> None:
        self.tokens, self.lengths = tokens, []  # type: ignore[var-annotated]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.lengths.append(input_ids.shape[1])
        return torch.tensor([int(row[-1]) in self.tokens for row in input_ids])


def test_stopping_criteria_stop_where_they_would_have_token_by_token(how: dict[str, Any]) -> None:
    free = decode(how, max_new_tokens=24)[0].tolist()
    token = free[len(PROMPT) + 6]
    first = free.index(token, len(PROMPT))
    rule = EndsWith({token})
    answer = decode(how, max_new_tokens=24, stopping_criteria=[rule])
    assert answer[0].tolist() == free[: first + 1]
    assert rule.lengths == list(range(len(PROMPT) + 1, first + 2))


def test_stopping_criteria_are_asked_of_each_row_of_a_batch(how: dict[str, Any]) -> None:
    free = decode(how, prompts=torch.tensor([PROMPT, PROMPT[::-1]]), max_new_tokens=24).tolist()
    token = free[0][len(PROMPT) + 6]
    rule = EndsWith({token})
    answer = decode(
        how, prompts=torch.tensor([PROMPT, PROMPT[::-1]]), max_new_tokens=24, stopping_criteria=[rule], pad_token_id=0
    )
    for row, whole in zip(answer.tolist(), free, strict=True):
        until = next((place for place in range(len(PROMPT), len(whole)) if whole[place] == token), len(whole)) + 1
        assert row[:until] == whole[:until]
        assert set(row[until:]) <= {0}
    none_left = decode(how, prompts=torch.tensor([PROMPT, PROMPT]), max_new_tokens=24, max_time=0.0)
    assert none_left.shape[1] < len(PROMPT) + 24


class Recorder(BaseStreamer):
    """Keeps what it is given; ``None`` at the end."""

    def __init__(self) -> None:
        self.given: list[list[int] | None] = []

    def put(self, value: torch.Tensor) -> None:
        self.given.append(value.flatten().tolist())

    def end(self) -> None:
        self.given.append(None)


def test_a_streamer_gets_the_answer_block_by_block(how: dict[str, Any]) -> None:
    recorder = Recorder()
    free = decode(how, max_new_tokens=22)[0].tolist()
    stop = free[len(PROMPT) + 9]
    answer = decode(how, max_new_tokens=22, streamer=recorder, eos_token_id=stop)[0].tolist()
    prompt, *pieces, end = recorder.given
    assert prompt == PROMPT
    assert end is None
    assert len(pieces) > 1
    assert prompt + [token for piece in pieces for token in piece or ()] == answer
    with pytest.raises(RequestError, match="one prompt at a time"):
        decode(how, prompts=torch.tensor([PROMPT, PROMPT]), max_new_tokens=4, streamer=Recorder())


@pytest.mark.parametrize("given", ["argument", "generation_config"])
def test_stop_strings_are_read_with_the_tokenizer(how: dict[str, Any], given: str) -> None:
    model, tokenizer = s2d2_lmeval.load("toy"), AutoTokenizer.from_pretrained(checkpoint_path())
    ids = tokenizer(held_out("instructions")[0].prompt, return_tensors="pt").input_ids
    settings = GenerationConfig(max_new_tokens=24, eos_token_id=model.facts.stop_token_ids[0], pad_token_id=0)
    free = model.hf_model.generate(ids, **how, generation_config=settings)[0, ids.shape[1] :]
    text = tokenizer.decode(free)
    arguments: dict[str, Any] = {"tokenizer": tokenizer}
    if given == "argument":
        arguments["stop_strings"] = text[2:4]
    else:
        settings.stop_strings = [text[2:4]]
    if how["custom_generate"] is generate:
        with pytest.raises(ValueError, match="tokenizer"):  # which transformers withholds from functions
            model.hf_model.generate(ids, **how, generation_config=settings, **arguments)
    else:
        cut = model.hf_model.generate(ids, **how, generation_config=settings, **arguments)[0, ids.shape[1] :]
        assert text[2:4] in tokenizer.decode(cut)
        assert len(cut) < len(free)
        assert free[: len(cut)].tolist() == cut.tolist()
        with pytest.raises(RequestError, match="tokenizer"):
            model.hf_model.generate(ids, **how, generation_config=settings, **(arguments | {"tokenizer": None}))


@pytest.mark.parametrize(
    "arguments",
    [
        {"output_scores": True},
        {"output_logits": True},
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"past_key_values": DynamicCache()},
        {"assistant_model": torch.nn.Identity()},
        {"prompt_lookup_num_tokens": 3},
        {"negative_prompt_ids": torch.tensor([[1]])},
        {"penalty_alpha": 0.5, "top_k": 4},
        {"dola_layers": "low"},
        {"inputs_embeds": torch.zeros(1, 3, 32)},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_what_cannot_be_honoured_is_refused_by_name(how: dict[str, Any], arguments: dict[str, Any]) -> None:
    name = next(iter(arguments))
    known_as = {"past_key_values": "past_key_values|cache"}.get(name, name)  # transformers 5.24 hands it on as cache
    with pytest.raises((RequestError, ValueError), match=known_as):
        decode(how, max_new_tokens=4, **arguments)


def test_the_function_is_for_transformers_to_call() -> None:
    with pytest.raises(RequestError, match=r"model\.generate"):
        generate(plain(), torch.tensor([PROMPT]), generation_config=GenerationConfig())


def test_a_misspelt_option_is_refused(how: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="confidence_treshold"):
        decode(how, max_new_tokens=4, confidence_treshold=0.5)
    with pytest.raises(ConfigError, match="do_verify_policy"):
        decode(how, max_new_tokens=4, do_verify_policy="somtimes")


def test_what_looks_at_one_row_of_logits_works_as_in_transformers(how: dict[str, Any]) -> None:
    settings = {"do_sample": True, "temperature": 0.7, "min_p": 0.05, "typical_p": 0.9, "suppress_tokens": [3, 5]}
    torch.manual_seed(3)
    seed = int(torch.randint(2**31, ()).item())
    ours = {**settings, "suppress_tokens": [3, 5, 7], "logit_bias": {11: 2.0}, "seed": seed}
    expected = engine().generate([PROMPT], {**OPTIONS, **ours, "max_new_tokens": 9, "stop_token_ids": ()})[0]
    torch.manual_seed(3)
    theirs = {**settings, "bad_words_ids": [[7]], "sequence_bias": {(11,): 2.0}}
    assert decode(how, max_new_tokens=9, **theirs).tolist() == [PROMPT + expected.token_ids]
    # Stop tokens are no bad words to transformers.
    words = decode(how, max_new_tokens=9, bad_words_ids=[[1], [2]], eos_token_id=[1], pad_token_id=0)
    suppressed = decode(how, max_new_tokens=9, suppress_tokens=[2], eos_token_id=[1], pad_token_id=0)
    assert torch.equal(words, suppressed)
    with pytest.raises(ConfigError, match="not a single token"):
        decode(how, max_new_tokens=4, bad_words_ids=[[1, 2]])


def test_a_checkpoint_s_repetition_penalty_is_left_out_with_a_note(
    how: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    plain_answer = decode(how, max_new_tokens=9)
    plain().generation_config.repetition_penalty = 1.1
    try:
        assert torch.equal(decode(how, max_new_tokens=9), plain_answer)
        assert "repetition_penalty=1.1 of generation_config.json is left out" in caplog.text
        with pytest.raises(RequestError, match="RepetitionPenalty"):
            decode(how, max_new_tokens=4, repetition_penalty=1.3)
    finally:
        plain().generation_config = GenerationConfig()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"repetition_penalty": 1.3}, "RepetitionPenalty"),
        ({"min_new_tokens": 3, "eos_token_id": 1, "pad_token_id": 0}, "MinNewTokens"),
    ],
)
def test_what_blocks_cannot_do_is_refused(how: dict[str, Any], arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError, match=named):
        decode(how, max_new_tokens=4, **arguments)


def test_right_padding_is_refused(how: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="left"):
        decode(
            how,
            prompts=torch.tensor([PROMPT, PROMPT]),
            attention_mask=torch.tensor([[1] * 13, [1] * 12 + [0]]),
            max_new_tokens=4,
        )


def test_answers_of_different_lengths_need_a_pad_token(how: dict[str, Any]) -> None:
    free = decode(how, max_new_tokens=12)[0].tolist()
    answer = decode(how, prompts=torch.tensor([PROMPT, PROMPT[::-1]]), max_new_tokens=12, eos_token_id=free[-6])
    assert answer.shape[0] == 2  # padded with the stop token where there is no other


def test_the_path_form_asks_for_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="trust_remote_code"):
        plain().generate(torch.tensor([PROMPT]), custom_generate=str(REPOSITORY), trust_remote_code=False)


def test_the_function_names_every_option_and_nothing_that_transformers_keeps() -> None:
    named = set(inspect.signature(generate).parameters)
    kept = set(GenerationConfig().__dict__)
    assert not named & kept
    assert not named & {"attention_mask", "use_cache", "position_ids", "past_key_values", "logits_to_keep"}
    elsewhere = {name for name, target in SYNONYMS.items() if target in kept}
    assert s2d2_lmeval.DecodingConfig.option_names() - kept - elsewhere <= named
