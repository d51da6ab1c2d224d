"""``--model_args`` and ``generation_kwargs``: who gets what, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import BitsAndBytesConfig

from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.harness.arguments import OF_HARNESS, OF_LOADING, GenerationArguments, rows_in_flight, sort_arguments
from s2d2_lmeval.runtime.memory import RowLimit


def test_three_readers() -> None:
    sorted_ = sort_arguments(
        "x",
        {
            "decoder": "s2d2",
            "threshold": 0.9,
            "attention": "sdpa",
            "max_batch": 16,
            "max_context": 512,
            "mask_token_id": 7,
            "max_length": 128,
            "think_end_token": "</think>",
            "trust_remote_code": True,
            "local_files_only": True,
        },
    )
    assert sorted_.decoding == {"decoder": "s2d2", "threshold": 0.9}
    expected = {"attention": "sdpa", "max_context": 512, "mask_token_id": 7, "local_files_only": True}
    assert sorted_.loading == expected
    assert sorted_.harness == {"max_length": 128, "think_end_token": "</think>", "trust_remote_code": True}
    assert sorted_.rows == RowLimit(16)


def test_a_block_length_also_chooses_the_paper_setting() -> None:
    for name in ("block_length", "block_size"):
        sorted_ = sort_arguments("x", {name: 16})
        assert sorted_.loading == {"block_length": 16}
        assert sorted_.decoding == {name: 16}


def test_draft_is_a_drafter_or_what_sliding_drafts() -> None:
    assert sort_arguments("x", {"decoder": "sliding", "draft": "chain"}).decoding["draft_shape"] == "chain"
    assert sort_arguments("x", {"decoder": "ddtree", "draft": "some/drafter"}).loading == {"draft": "some/drafter"}


def test_transformers_names_of_loading() -> None:
    sorted_ = sort_arguments("x", {"torch_dtype": "float32", "attn_implementation": "flash_attention_2"})
    assert sorted_.loading == {"dtype": "float32", "attention": "flash"}
    assert sort_arguments("x", {"attn_implementation": "eager"}).loading == {"attention": "sdpa"}
    with pytest.raises(ConfigError, match="attn_implementation and another name of attention"):
        sort_arguments("x", {"attention": "flash", "attn_implementation": "sdpa"})


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("confidence_treshold", "confidence_threshold"),
        ("atention", "attention"),
        ("batchsize", "batch_size"),
        ("pretraind", "pretrained"),
        ("max_lenght", "max_length"),
        ("parallelise", "parallelize"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} is not an option of --model s2d2\. Did you mean {hint}\?$"):
        sort_arguments("x", {name: 1})


@pytest.mark.parametrize("backend", ["seq2seq", 1])
def test_models_are_causal(backend: Any) -> None:
    with pytest.raises(ConfigError, match="models are causal"):
        sort_arguments("x", {"backend": backend})


def test_missing_checkpoint() -> None:
    with pytest.raises(ConfigError, match="no pretrained="):
        sort_arguments(None, {})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[
            ("delta", "x"),
            ("logits_cache", False),
            ("subfolder", "a"),
            ("softmax_dtype", "bfloat16"),
        ],
        *[("quantization_config", 1), ("stop", "x"), ("gpu_memory_utilization", 0.5)],
    ],
)
def test_options_of_hf_models_that_mean_nothing_here(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name}={value} is not available with --model s2d2: "):
        sort_arguments("x", {name: value})


def test_every_argument_of_loading_has_its_reader_and_null_is_as_if_it_were_not_there() -> None:
    assert sort_arguments("m", {"compile": True}).loading == {"compile": True}
    for name in (*OF_LOADING, *OF_HARNESS):
        found = sort_arguments("m", {name: None})
        assert (found.loading, found.harness) == ({}, {}), name


def test_their_defaults_pass() -> None:
    neutral = {"tp_plan": None, "gptqmodel": False, "logits_cache": True, "subfolder": ""}
    neutral |= {"softmax_dtype": "float32", "quantization_config": None, "use_cache": True, "torch_dtype": None}
    assert not sort_arguments("x", neutral).harness


def test_quantization(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BitsAndBytesConfig, "post_init", lambda self: None)
    config = sort_arguments("x", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}).loading["quantization_config"]
    assert config.load_in_4bit
    assert config.bnb_4bit_quant_type == "nf4"
    with pytest.raises(ConfigError, match="say what to quantize to"):
        sort_arguments("x", {"bnb_4bit_quant_type": "nf4"})
    hint = r"bnb_4bit_quant_typ is not a quantization option. Did you mean bnb_4bit_quant_type\?"
    with pytest.raises(ConfigError, match=hint):
        sort_arguments("x", {"load_in_4bit": True, "bnb_4bit_quant_typ": "nf4"})
    assert not sort_arguments("x", {"load_in_8bit": False}).loading


def test_spreading_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    spread = sort_arguments("x", {"parallelize": True, "max_memory_per_gpu": "10GiB", "max_cpu_memory": "1GiB"})
    assert spread.loading == {"device_map": "auto", "max_memory": {0: "10GiB", 1: "10GiB", "cpu": "1GiB"}}
    assert not sort_arguments("x", {"parallelize": False}).loading
    with pytest.raises(ConfigError, match="add parallelize=True"):
        sort_arguments("x", {"max_memory_per_gpu": "10GiB"})


def test_rows_in_flight() -> None:
    assert rows_in_flight(4, None) == RowLimit(4)
    assert rows_in_flight("16", 8) == RowLimit(16)
    assert rows_in_flight("auto", None) == RowLimit("auto")
    assert rows_in_flight("auto:4", 4) == RowLimit("auto", 4)
    assert sort_arguments("x", {"max_batch": "auto"}).rows == RowLimit("auto")
    for wrong in (0, -1, "many", 1.5, 10**5000):
        with pytest.raises(ConfigError, match="number of requests to decode side by side"):
            rows_in_flight(wrong, None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_batch=0"):
        sort_arguments("x", {"max_batch": 0})


@pytest.mark.parametrize(
    ("given", "options", "budget"),
    [
        ({"until": "a", "do_sample": False, "temperature": 0.0, "max_gen_toks": 5}, {"do_sample": False}, 5),
        ({"do_sample": False, "temperature": 0.7}, {"do_sample": False}, None),
        ({"temperature": 0.7}, {"temperature": 0.7, "do_sample": True}, None),
        ({"temperature": 0}, {"do_sample": False}, None),
        ({"do_sample": True, "temperature": 0.2}, {"do_sample": True, "temperature": 0.2}, None),
        ({"max_tokens": 3, "max_new_tokens": 4}, {}, 4),
        ({"max_gen_toks": 48, "max_new_tokens": 3}, {}, 3),  # --gen_kwargs come after the task's own
        ({"max_gen_toks": None, "max_new_tokens": 3}, {}, 3),
        ({"do_sample": None, "top_k": None, "seed": None, "temperature": None}, {}, None),
        ({"temperature": "1e-5", "max_gen_toks": "8"}, {"temperature": 1e-5, "do_sample": True}, 8),
        ({"repetition_penalty": 1.0, "n": 1, "guidance_scale": 1, "length_penalty": "1.0"}, {}, None),
        ({"max_gen_toks": 0}, {}, 0),
        ({"max_gen_toks": 7.0, "num_beams": 1, "use_cache": True}, {}, 7),
        ({"confidence_threshold": 0.5, "top_p": 0.9}, {"confidence_threshold": 0.5, "top_p": 0.9}, None),
        ({}, {}, None),
    ],
)
def test_generation_arguments(given: dict[str, Any], options: dict[str, Any], budget: int | None) -> None:
    asked = GenerationArguments.parse(given)
    assert dict(asked.options) == options
    assert asked.max_new_tokens == budget


def test_until() -> None:
    assert GenerationArguments.parse({"until": "a"}).until == ("a",)
    assert GenerationArguments.parse({"until": ["a", "b"]}).until == ("a", "b")
    assert GenerationArguments.parse({"until": None}).until == ()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_beams": 4}, "num_beams=4 is not available .*: blocks are not decoded by beam search"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2 .* depends on previous tokens"),
        ({"stop": ["x"]}, "stop=.*: stop strings are `until`"),
        ({"max_length": 10}, "give max_new_tokens"),
        ({"max_gen_toks": -1}, "is not a number of tokens"),
        ({"max_gen_toks": "many"}, "is not a number of tokens"),
        ({"until": 3}, "until must be a string"),
        ({"temperature": "warm"}, "it takes a finite number"),
    ],
)
def test_refused_generation_arguments(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GenerationArguments.parse(given)
