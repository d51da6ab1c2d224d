"""What ``--model s2d2`` refuses, or cuts and counts, before anything is decoded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from s2d2_lmeval.errors import CheckpointError, ConfigError, RequestError
from s2d2_lmeval.harness.model import S2D2LM


@pytest.mark.parametrize(
    ("prompt", "gen_kwargs", "error", "message"),
    [
        (
            "x" * 250,
            {"max_gen_toks": 20},
            RequestError,
            "task task, document 1: the prompt has 250 tokens and asks for 20 more",
        ),
        ("a<|MASK|>b", {"max_gen_toks": 4}, RequestError, r"document 1: the prompt contains the mask token \(id 259\)"),
        ("", {"max_gen_toks": 4}, RequestError, "document 1: the prompt is empty"),
        ("x", {"confidence_treshold": 0.5}, ConfigError, r"confidence_treshold .*Did you mean confidence_threshold\?"),
        ("x", {"confidence_threshold": "high"}, ConfigError, "confidence_threshold"),
        ("x", {"num_beams": 4}, ConfigError, "num_beams=4 is not available"),
    ],
)
def test_requests_that_cannot_be_answered(
    requests: Any,
    make: Callable[..., S2D2LM],
    prompt: str,
    gen_kwargs: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    lm = make(truncation=False, special_tokens="refuse")
    before = lm.engine.trace.totals()["forwards"]
    good = requests(["fine"], max_gen_toks=4)
    bad = Instance("generate_until", {}, (prompt, gen_kwargs), 0, metadata=("task", 1, 1))
    with pytest.raises(error, match=message):
        lm.generate_until([*good, bad], disable_tqdm=True)
    assert lm.engine.trace.totals()["forwards"] == before


def test_a_long_prompt_loses_its_oldest_tokens_and_is_counted(
    requests: Any, make: Callable[..., S2D2LM], caplog: pytest.LogCaptureFixture
) -> None:
    long = "abc" * 100
    model = make(max_length=64)
    cut = model.generate_until(requests([long, "short"], max_gen_toks=4), disable_tqdm=True)
    assert cut[0] == make().generate_until(requests([long[-60:]], max_gen_toks=4), disable_tqdm=True)[0]
    assert (cut[0].stats["prompt_tokens"], cut[0].stats["prompt_tokens_left_out"]) == (60, 240)
    assert "1 of 2 prompts do not fit" in caplog.text
    task = model.get_model_info()["s2d2"]["tasks"]["task"]
    assert (task["truncated_prompts"], task["prompt_tokens_left_out"], task["requests"]) == (1, 240, 2)
    with pytest.raises(RequestError, match="the prompt has 300 tokens"):
        make(max_length=64, truncation=False).generate_until(requests([long], max_gen_toks=4), disable_tqdm=True)


def test_the_mask_string_in_a_document_is_text(requests: Any, make: Callable[..., S2D2LM]) -> None:
    text = "what is <|MASK|> here? <|im_end|>"
    model = make()
    ids = model.tok_encode(text)
    assert bytes(model.tokenizer.decode(ids), "utf8") == text.encode()
    assert model.engine is not None
    assert model.engine.facts.mask_token_id not in ids
    assert 258 in ids  # other special strings are what they are for hf
    for name, count in (("parse", len(text) - len("<|im_end|>") + 1), ("text", len(text))):
        answer = make(special_tokens=name).generate_until(requests([text], max_gen_toks=4), disable_tqdm=True)
        assert answer[0].stats["prompt_tokens"] == count
    with pytest.raises(RequestError, match="mask token"):
        make(special_tokens="refuse").generate_until(requests([text], max_gen_toks=4), disable_tqdm=True)
    asked = [Instance("loglikelihood", {}, (text, " <|MASK|>"), 0)]
    assert model.loglikelihood(asked, disable_tqdm=True)[0][0] < 0
    with pytest.raises(ConfigError, match="chat template"):
        make(special_tokens="text").apply_chat_template([{"role": "user", "content": text}])
    with pytest.raises(ConfigError, match="special_tokens='mask' is not one of: parse, text, refuse"):
        make(special_tokens="mask")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"confidence_treshold": 0.9}, ConfigError, r"Did you mean confidence_threshold\?"),
        ({"decoder": "dynamic", "min_ssd_span_length": 2}, ConfigError, "min_ssd_span_length"),
        ({"max_length": 1000}, ConfigError, "max_length=1000: this model takes 2 to 256 positions"),
        ({"max_context": 1000}, ConfigError, "max_context=1000"),
        ({"batch_size": 0}, ConfigError, "batch_size=0"),
        ({"dtype": "float33"}, CheckpointError, "float33"),
        ({"tokenizer": "no/such/tokenizer"}, CheckpointError, "no tokenizer could be loaded from no/such/tokenizer"),
        ({"mask_token_id": 5000}, CheckpointError, "5000"),
        ({"enable_thinking": True}, ConfigError, "think_end_token"),
        ({"backend": "seq2seq"}, ConfigError, "backend"),
    ],
)
def test_models_that_cannot_be_made(
    make: Callable[..., S2D2LM], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(**options)


def test_devices_that_are_not_there(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="device=cuda:99"):
        S2D2LM(pretrained=str(checkpoint), device="cuda:99")
    with pytest.raises(ConfigError, match="is not the name of a device"):
        S2D2LM(pretrained=str(checkpoint), device="the big one")
