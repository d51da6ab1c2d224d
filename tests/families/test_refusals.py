"""Every checkpoint that cannot be run is refused by one sentence that says what to do."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from s2d2_lmeval.errors import CheckpointError
from s2d2_lmeval.families import FAMILIES, family_named, identify, load_checkpoint, read_config


def refused(source, *needed: str, **arguments) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(source, **arguments)
    message = str(caught.value)
    for text in needed:
        assert text in message
    assert "\n" not in message
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return message


def test_missing_weights(publish, rewrite, family, caplog):
    folder, _, _, weights = publish(family)
    gone = sorted(weights)[len(weights) // 2]
    rewrite(folder, {name: value for name, value in weights.items() if name != gone})
    message = refused(folder, "does not fit", FAMILIES[family].native_class)
    assert "missing weights: " in message or "wrong shape" in message
    assert "LOAD REPORT" not in caplog.text


@pytest.mark.parametrize(
    ("name", "value"),
    [("llama_4_scaling_beta", None), ("llama_4_scaling_beta", "0.1"), ("original_max_position_embeddings", 0)],
)
def test_a_scale_by_position_that_is_not_one(publish, name, value):
    """Ministral3 reads both in every forward, whatever its rotary frequencies."""
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    rope |= {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8}
    folder, _, config, _ = publish("nemotron_labs_diffusion")
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": {**rope, name: value}}))
    refused(folder, f"{name}={value!r}", "rope_parameters")


def test_missing_weights_are_named(publish, rewrite):
    folder, _, _, weights = publish("sdar")
    rewrite(folder, {name: value for name, value in weights.items() if ".layers.1." not in name})
    refused(folder, "model.layers.1.input_layernorm.weight", "and 7 more")


def test_an_expert_that_is_missing(publish, rewrite):
    for name in ("sdar_moe", "llada2"):
        folder, _, _, weights = publish(name)
        rewrite(folder, {key: value for key, value in weights.items() if ".mlp.experts.3." not in key})
        refused(folder, "wrong shape", "mlp.experts.gate_up_proj")


def test_extra_weights(publish, rewrite, family):
    folder, _, _, weights = publish(family)
    rewrite(folder, {**weights, "model.layers.1.surplus.weight": torch.ones(3)})
    refused(folder, "no place for", "model.layers.1.surplus.weight")


def test_misshapen_weights(publish, rewrite):
    folder, _, _, weights = publish("sdar")
    rewrite(folder, {**weights, "model.norm.weight": torch.ones(33)})
    refused(folder, "wrong shape", "model.norm.weight", "[33]", "[32]")


def test_a_head_that_contradicts_the_configuration(publish, rewrite):
    folder, _, _, weights = publish("fast_dllm_v2", tie_word_embeddings=True)
    rewrite(folder, {**weights, "lm_head.weight": weights["model.embed_tokens.weight"] + 1})
    refused(folder, "tie_word_embeddings", "lm_head.weight")


def test_weights_that_cannot_be_converted(publish, rewrite):
    folder, _, _, weights = publish("llada2")
    fused = "model.layers.0.attention.query_key_value.weight"
    rewrite(folder, {**weights, fused: weights[fused][:-1]})
    refused(folder, "wrong shape", "model.layers.0.self_attn.q_proj.weight")
    expert = "model.layers.1.mlp.experts.2.down_proj.weight"
    rewrite(folder, {**weights, expert: weights[expert][:-1]})
    refused(folder, "wrong shape", "model.layers.1.mlp.experts.down_proj")


def test_unknown_model_type(publish):
    message = refused(publish("sdar", model_type="gpt_oss").folder, "'gpt_oss'")
    assert all(name in message for name in FAMILIES)
    with pytest.raises(CheckpointError, match="model_type None"):
        identify({})


def test_native_diffusion_models_are_pointed_elsewhere():
    for model_type in ("diffusion_gemma", "diffusion_gemma_text"):
        with pytest.raises(CheckpointError, match="--model hf"):
            identify({"model_type": model_type})


@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5", "qwen3_5_moe", "kimi_linear"])
def test_recurrent_targets_are_refused_by_name(model_type):
    with pytest.raises(CheckpointError, match="gated delta layers"):
        identify({"model_type": model_type})


def test_a_native_type_must_say_its_family(publish, logits):
    published = publish("fast_dllm_v2", model_type="qwen2")
    refused(published.folder, "block_diffusion_family", "fast_dllm_v2")
    config = {**published.config, "block_diffusion_family": "dream"}
    (published.folder / "config.json").write_text(json.dumps(config))
    model, facts = load_checkpoint(published.folder)
    assert facts.family == "dream"
    assert torch.equal(logits(model), logits(published.native))


def test_unknown_family_name():
    with pytest.raises(CheckpointError, match="Known families: sdar, "):
        family_named("gpt")


@pytest.mark.parametrize("mask", [61, -1, True, 3.0, "60"])
def test_mask_token_outside_the_vocabulary(publish, mask):
    refused(publish("sdar", mask_token_id=mask).folder, "mask token id", "ids 0 to 60")


def test_no_mask_token(publish, family):
    refused(publish(family, without=("mask_token_id",)).folder, "names no mask token", "mask_token_id=")


def test_no_block_length(publish):
    for name, field in (("sdar", "block_size"), ("fast_dllm_v2", "bd_size")):
        refused(publish(name, without=(field,)).folder, "names no block length", "block_length=")


@pytest.mark.parametrize("block", [0, -4, 2.5, True])
def test_block_length_out_of_range(publish, block):
    folder = publish("sdar", block_size=block).folder
    refused(folder, "not a positive integer")


def test_block_longer_than_the_context(publish):
    refused(publish("sdar").folder, "does not fit its 128 positions", block_length=129)


@pytest.mark.parametrize("stop", [61, -1])
def test_stop_token_out_of_range(publish, stop):
    refused(publish("sdar", eos_token_id=[7, stop]).folder, f"stop token id {stop!r}", "eos_token_id")


@pytest.mark.parametrize("stop", [61, -1, True, 7.0, "7", [7]])
def test_stop_token_of_the_generation_configuration(publish, stop):
    folder = publish("sdar").folder
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, stop]}))
    refused(folder, f"stop token id {stop!r}", "eos_token_id")


def test_a_mask_among_the_stop_tokens_ends_nothing(publish):
    assert load_checkpoint(publish("sdar", eos_token_id=[60, 7]).folder)[1].stop_token_ids == (7,)


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"num_hidden_layers": -2}, "num_hidden_layers=-2"),
        ({"vocab_size": "61"}, "vocab_size='61'"),
        ({"num_attention_heads": True}, "num_attention_heads=True"),
        ({"head_dim": None}, "lacks 'head_dim'"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
        ({"rope_theta": 0}, "rope_theta=0"),
        ({"rope_theta": None}, "rope_theta=None"),
        ({"num_key_value_heads": 3}, "must be a multiple"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"hidden_act": 3}, "hidden_act=3"),
        ({"hidden_act": "sigmund"}, "hidden_act='sigmund'; known are"),
        ({"attention_bias": "yes"}, "does not describe"),
        ({"head_dim": 15}, "even rotary dimension"),
        ({"torch_dtype": "float7"}, "dtype='float7'; known are"),
        ({"rope_scaling": {"type": "warp"}}, "rope_type='warp'; known are"),
        ({"rope_scaling": "linear"}, "an object is needed"),
        ({"partial_rotary_factor": 7}, "partial_rotary_factor=7"),
        ({"quantization_config": 3}, "quantization_config"),
        ({"block_diffusion_family": ["sdar"]}, "no family is called ['sdar']"),
    ],
)
def test_configuration_out_of_range(publish, changes, needed):
    published = publish("sdar")
    (published.folder / "config.json").write_text(json.dumps(published.config | changes))
    refused(published.folder, needed)


@pytest.mark.parametrize(
    ("name", "changes", "needed"),
    [
        ("sdar_moe", {"num_experts_per_tok": 99}, "takes 99 of 6 experts"),
        ("sdar_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0"),
        ("llada2", {"num_experts_per_tok": 9}, "takes 9 of 8 experts"),
        ("llada2", {"n_group": 5}, "12 experts in 5 groups"),
        ("llada2", {"topk_group": 9}, "9 of which are open"),
        ("llada2", {"first_k_dense_replace": 9}, "does not fit Glm4MoeForCausalLM"),
        ("llada", {"n_kv_heads": 3}, "must be a multiple"),
        ("fast_dllm_v2", {"bd_size": "32"}, "'32' is not a positive integer"),
    ],
)
def test_sizes_out_of_range(publish, name, changes, needed):
    published = publish(name)
    (published.folder / "config.json").write_text(json.dumps(published.config | changes))
    refused(published.folder, needed)


@pytest.mark.parametrize(
    ("name", "changes", "needed"),
    [
        ("llada", {"alibi": True}, "alibi=True"),
        ("llada", {"block_type": "sequential"}, "block_type='sequential'"),
        ("llada2", {"use_qkv_bias": True}, "use_qkv_bias=True"),
        ("llada2", {"score_function": "softmax"}, "score_function='softmax'"),
        ("dream", {"hidden_size": 30}, "must be a multiple"),
    ],
)
def test_an_architecture_that_the_native_class_does_not_compute(publish, name, changes, needed):
    published = publish(name)
    (published.folder / "config.json").write_text(json.dumps(published.config | changes))
    refused(published.folder, needed)


def test_missing_folder(tmp_path):
    refused(tmp_path / "nowhere", "there is no folder")
    refused(str(tmp_path / "nowhere"), "there is no folder")
    refused("./nowhere", "there is no folder")


def test_a_file_in_place_of_a_folder(publish):
    refused(publish("sdar").folder / "model.safetensors", "is a file")


def test_unreachable_hub_id(tmp_path):
    refused("someone/nothing", "someone/nothing is neither a folder", cache_dir=tmp_path, local_files_only=True)


def test_no_configuration(publish):
    folder = publish("sdar").folder
    (folder / "config.json").unlink()
    refused(folder, "no config.json")
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "LoRA adapter: load its base model, and give this folder as adapter=", "peft=")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/base"}))
    refused(folder, "load someone/base")


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_broken_configuration(publish, text):
    folder = publish("sdar").folder
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(folder)


def test_pickled_weights_only(publish):
    folder = publish("sdar").folder
    refuse_to_touch = folder / "pytorch_model.bin"
    (folder / "model.safetensors").rename(refuse_to_touch)
    refused(folder, "pytorch_model.bin", "no safetensors", "convert")


def test_no_weights(publish):
    folder = publish("sdar").folder
    (folder / "model.safetensors").unlink()
    refused(folder, "no model.safetensors")


def test_missing_shard(publish):
    folder = publish("sdar", shards=3).folder
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(folder, "model-00002-of-00003.safetensors", "not there")


def test_broken_index(publish):
    folder = publish("sdar", shards=3).folder
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(folder, "no weight_map")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
@pytest.mark.parametrize("shards", [1, 2])
def test_truncated_weights(publish, keep, shards):
    folder = publish("sdar", shards=shards).folder
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, file.name, "truncated")


def test_not_a_safetensors_file(publish):
    folder = publish("sdar").folder
    (folder / "model.safetensors").write_bytes((4).to_bytes(8, "little") + b"nope" + b"x" * 100)
    refused(folder, "header cannot be read")


@pytest.mark.parametrize("dtype", ["float7", "int64", "nn"])
def test_no_such_dtype(publish, dtype):
    refused(publish("sdar").folder, repr(dtype), "bfloat16", dtype=dtype)


def test_two_places_at_once(publish):
    refused(publish("sdar").folder, "one of them", device="cpu", device_map="auto")


def test_refusal_before_anything_large_is_read(publish, monkeypatch):
    """A wrong mask id is found without opening the weights."""
    folder = publish("sdar", mask_token_id=99).folder
    for file in Path(folder).glob("*.safetensors"):
        file.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(folder, "mask token id 99")
