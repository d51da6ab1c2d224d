"""What a checkpoint is, where its type alone does not say it: class names, names of folders, what training recorded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from s2d2_lmeval import load
from s2d2_lmeval.cli import main
from s2d2_lmeval.errors import CheckpointError
from s2d2_lmeval.families import FAMILIES, adopt, checkpoint_facts, identify, load_checkpoint

SDAR_VOCABULARY = 151936


def auto_map(path: str, auto: str = "AutoModelForCausalLM") -> dict[str, Any]:
    return {"auto_map": {auto: path}}


OTHERS = [
    ({"model_type": "llama", "architectures": ["StableDiffoderForCausalLM"]}, "StableDiffoderForCausalLM"),
    ({"model_type": "qwen2", **auto_map("them/repo--modeling.Qwen2Model", "AutoModel")}, "Qwen2Model"),
    ({"model_type": "qwen3", "architectures": ["LlamaForCausalLMEagle3"]}, "LlamaForCausalLMEagle3"),
    ({"model_type": "sdar_moe", "_name_or_path": "someone/I-DLM-30B"}, "I-DLM"),
    ({"model_type": "sdar", "block_size": 3}, "block_size=3"),
    ({"model_type": "sdar", "architectures": ["OtherForCausalLM"]}, "OtherForCausalLM"),
    ({"model_type": "Dream", "architectures": ["DreamForCausalLM"]}, "DreamForCausalLM"),
    ({"model_type": "Dream", "block_size": 32}, "block_size=32"),
    ({"model_type": "llada", "architectures": ["LLaDAMoEModelLM"]}, "LLaDAMoEModelLM"),
    ({"model_type": "nemotron_labs_diffusion_vlm", "architectures": ["NemotronLabsDiffusionVLM"]}, "NemotronLabs"),
    ({"model_type": "nemotron_labs_diffusion", "dlm_paradigm": "sbd_block_diff"}, "dlm_paradigm='sbd_block_diff'"),
    ({"model_type": "a2d-qwen3", "architectures": ["A2DQwen3LMHeadModel"]}, "bd3lm"),
    ({"model_type": "a2d-qwen3", "_name_or_path": "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1"}, "full attention"),
    ({"model_type": "wedlm", "architectures": ["SDARForCausalLM"]}, "SDARForCausalLM"),
]

SHOWN = [
    ("stable_diffcoder", {"model_type": "llama", "architectures": ["StableDiffcoderForCausalLM"]}, ""),
    ("stable_diffcoder", {"model_type": "llama", **auto_map("modeling_x.StableDiffcoderForCausalLM")}, ""),
    ("idlm", {"model_type": "sdar", "architectures": ["SDARForCausalLM"], "use_regular_causal": True}, ""),
    ("idlm", {"model_type": "sdar", "block_size": 3, "_name_or_path": "yifanyu/I-DLM-8B"}, ""),
    ("idlm", {"model_type": "sdar", "_name_or_path": "someone/UNO-8b"}, ""),
    ("idlm", {"model_type": "sdar"}, "yifanyu/I-DLM-8B"),
    ("idlm", {"model_type": "sdar"}, "/x/idlm-8b/checkpoint-5"),
    ("idlm", {"model_type": "sdar"}, "/hub/models--a--I-DLM-8B/snapshots/ab12"),
    ("idlm", {"model_type": "sdar"}, "a/my-uno-v1"),
    ("sdar", {"model_type": "sdar"}, "them/SDAR-unofficial"),
    ("sdar", {"model_type": "qwen3", "architectures": ["SDARForCausalLM"]}, ""),
    ("sdar", {"model_type": "sdar", "architectures": ["SDARForCausalLM"]}, "Gen-Verse/TraDo-8B-Instruct"),
    ("nemotron_labs_diffusion", {"model_type": "nemotron_labs_diffusion", "dlm_paradigm": "block_diff"}, ""),
    ("tiny_a2d", {"model_type": "a2d-qwen3"}, "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1"),
    ("tiny_a2d_qwen2", {"model_type": "a2d-qwen2", "architectures": ["A2DQwen2LMHeadModel"], "block_size": 32}, ""),
    ("wedlm", {"model_type": "wedlm", "qk_norm": True, **auto_map("modeling_wedlm.WeDLMForCausalLM")}, ""),
    ("wedlm_qwen2", {"model_type": "wedlm", "qk_norm": False, "attention_bias": True}, ""),
]


@pytest.mark.parametrize(("family", "config", "source"), SHOWN)
def test_classes_fields_and_names_say_more_than_the_type(family: str, config: dict[str, Any], source: str) -> None:
    assert identify(config, source).name == family


@pytest.mark.parametrize(("config", "named"), OTHERS)
def test_other_models_under_a_known_type_are_refused(config: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match="family=") as caught:
        identify(config)
    assert named in str(caught.value)
    # A class of its own may be anything: nothing is suggested.
    assert ("has a model class of its own" in str(caught.value)) <= ("such as" not in str(caught.value))
    assert identify(config, family="sdar") is identify({**config, "block_diffusion_family": "sdar"}) is FAMILIES["sdar"]


def test_a_block_length_says_that_an_a2d_model_denoises_blocks() -> None:
    assert identify({"model_type": "a2d-qwen3"}, block_length=32).name == "tiny_a2d"
    with pytest.raises(CheckpointError, match="full attention"):
        identify({"model_type": "a2d-qwen3"}, "x-mdlm", block_length=32)


def test_norms_and_biases_of_wedlm_go_together(publish) -> None:
    for changes in ({"qk_norm": True, "attention_bias": True}, {"qk_norm": False, "attention_bias": False}):
        with pytest.raises(CheckpointError, match="the one or the other"):
            load_checkpoint(publish("wedlm", **changes).folder)


def test_the_tokenizer_names_the_mask_where_config_json_does_not(publish) -> None:
    folder = publish("stable_diffcoder", without=("mask_token_id",)).folder
    with pytest.raises(CheckpointError, match="names no mask token"):
        checkpoint_facts(folder)
    (folder / "special_tokens_map.json").write_text(json.dumps({"mask_token": {"content": "<m>"}}))
    added = {"added_tokens_decoder": {"58": {"content": "<m>"}, "59": {"content": "<n>"}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(added))
    assert checkpoint_facts(folder).mask_token_id == 58
    assert checkpoint_facts(folder, mask_token_id=59).mask_token_id == 59


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "auto_map": {"AutoTokenizer": "x.Y"}},
        {"model_type": "llama", "architectures": None},
        {"model_type": "sdar", "architectures": ["SDARForCausalLM"], **auto_map("modeling_sdar.SDARForCausalLM")},
        {"model_type": "sdar_moe", "architectures": ["SDARMoEForCausalLM"]},
        {"model_type": "Fast_dLLM_Qwen", **auto_map("modeling.Fast_dLLM_QwenForCausalLM")},
        {"model_type": "llada2_moe", **auto_map("modeling_llada2_moe.LLaDA2MoeModelLM"), "n_group": 8},
        {"model_type": "llada2_moe_veomni", "architectures": ["LLaDA2MoeModelLM"]},
        {"model_type": "llada", "architectures": ["LLaDAModelLM"]},
        {"model_type": "Dream", **auto_map("modeling_dream.DreamModel", "AutoModel")},
    ],
)
def test_published_class_names_are_accepted(config: dict[str, Any]) -> None:
    assert config["model_type"] in identify(config).model_types


@pytest.mark.parametrize("field", ["expert_capacity", "delete_token_id", "split_token_id", "image_token_offset"])
@pytest.mark.parametrize("told", [None, "llada2"])
def test_another_router_is_refused_whatever_is_said(publish, field: str, told: str | None) -> None:
    folder = publish("llada2", **{field: 48}).folder
    with pytest.raises(CheckpointError, match=f"LLaDA2MoeModelLM says {field}=48") as caught:
        load_checkpoint(folder, family=told)
    assert "family=" in str(caught.value)
    assert load_checkpoint(publish("llada2", expert_capacity=0).folder)[1].family == "llada2"


def test_a_loaded_model_of_another_class_is_refused(publish) -> None:
    native = publish("llada").native
    native.config.architectures = ["OtherForCausalLM"]
    for autoregressive in (True, False):
        with pytest.raises(CheckpointError, match="OtherForCausalLM"):
            adopt(native, mask_token_id=60, autoregressive=autoregressive)
    native.config.architectures = ["StableDiffcoderForCausalLM"]
    assert adopt(native, mask_token_id=60)[1].family == "stable_diffcoder"
    assert adopt(native, mask_token_id=60, family="llada")[1].family == "llada"


def test_family_is_said_as_in_the_file(publish, logits, capsys: pytest.CaptureFixture[str]) -> None:
    published = publish("fast_dllm_v2", model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    model, facts = load_checkpoint(published.folder, family="fast_dllm_v2")
    assert facts.family == checkpoint_facts(published.folder, family="fast_dllm_v2").family == "fast_dllm_v2"
    assert torch.equal(logits(model), logits(published.native))
    assert load(str(published.folder), family="dream", device="cpu").facts.family == "dream"
    main(["doctor", "--json", str(published.folder), "--option", "family=dream"])
    assert any(one["value"].startswith("dream, runs") for one in json.loads(capsys.readouterr().out))
    with pytest.raises(CheckpointError, match="no family is called 'nope'"):
        load(str(published.folder), family="nope")


def test_the_alignment_of_a_family_is_what_its_scheme_decodes() -> None:
    with pytest.raises(CheckpointError, match="no scheme is called 'blocks'"):
        replace(FAMILIES["sdar"], scheme="blocks")


# Block lengths


def sdar_facts(
    source: str | Path, config: dict[str, Any] | None = None, records: dict[str, Any] | None = None, **more: Any
) -> Any:
    family = FAMILIES["sdar"]
    native = family.config_class(vocab_size=SDAR_VOCABULARY)
    return family.facts(config or {}, native, records or {}, source=str(source), **more)


@pytest.mark.parametrize(
    ("source", "length"),
    [
        ("JetLM/SDAR-8B-Chat-b16", 16),
        ("/hub/models--JetLM--SDAR-8B-Chat-b16/snapshots/0123abcd", 16),
        ("them/X-4B-b64-Thinking", 64),
        ("/runs/x-b32-sft/checkpoint-500", 32),
        ("/b8/SDAR-4B_block-size_16/final/", 16),
        ("x.bd32", 32),
    ],
)
def test_the_whole_path_may_name_the_block_length(source: str, length: int) -> None:
    facts = sdar_facts(source)
    assert (facts.block_length, facts.caveat) == (length, "")
    assert facts.block_length_from.startswith("the name ")
    assert facts.defaults["block_length"] == length


@pytest.mark.parametrize("source", ["JetLM/SDAR-8B-Chat", "a/b-7b", "x-b2024/y", "Qwen3-4B", "sdar-v1.b5", "4b64x"])
def test_where_nothing_says_it_is_assumed(source: str) -> None:
    facts = sdar_facts(source)
    assert (facts.block_length, facts.block_length_from) == (4, "assumed")
    assert "blocks of 4 are assumed" in facts.caveat
    assert sdar_facts(source, {"block_size": 4}).caveat == sdar_facts(source, block_length=8).caveat == ""


def test_a_link_and_a_relative_path_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "x-b32-sft" / "checkpoint-500"
    folder.mkdir(parents=True)
    (tmp_path / "latest").symlink_to(folder)
    assert sdar_facts(tmp_path / "latest").block_length == 32
    monkeypatch.chdir(folder)
    assert sdar_facts(".").block_length == 32


@pytest.mark.parametrize("name", ["training_args.json", "args.json", "generation_config.json"])
def test_what_training_recorded(publish, name: str) -> None:
    folder = publish("sdar", without=("block_size",)).folder
    record = {"block_length": 16} if name.startswith("gen") else {"train": {"data": {"block_size": 16}}}
    (folder / name).write_text(json.dumps(record))
    facts = checkpoint_facts(folder)
    assert (facts.block_length, facts.block_length_from) == (16, name)
    (folder / name).write_text(json.dumps({"block_size": 2048}))  # the length of a text chunk
    with pytest.raises(CheckpointError, match="names no block length"):
        checkpoint_facts(folder)


def test_two_that_disagree_are_heard() -> None:
    facts = sdar_facts("them/SDAR-b16", {"block_size": 4})
    assert facts.block_length == 4
    assert "the name SDAR-b16 says 16" in facts.caveat
    recorded = sdar_facts("them/SDAR-b16", {"_name_or_path": "x-b32"}, records={"args.json": {"bd_size": 8}})
    assert (recorded.block_length, recorded.block_length_from) == (8, "args.json")
    assert sdar_facts("here", {"_name_or_path": "JetLM/SDAR-8B-Chat-b32"}).block_length == 32


def test_an_assumption_is_said_by_load_and_survives(publish, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    published = publish("sdar", without=("block_size",))
    monkeypatch.setitem(FAMILIES._parts, ("sdar", ""), replace(FAMILIES["sdar"], published_mask_ids={61: 60}))
    with pytest.warns(UserWarning, match="blocks of 4 are assumed"):
        model, _ = load_checkpoint(published.folder)
    assert adopt(model)[1].block_length_from == "assumed"
    model.save_pretrained(tmp_path / "again")
    assert "assumed" in checkpoint_facts(tmp_path / "again").caveat


# Stop tokens and dFactory's LLaDA2


def test_published_stop_token_of_llada2() -> None:
    family = FAMILIES["llada2"]
    native = family.config_class(vocab_size=157184)
    assert family.facts({}, native, {}, source="x").stop_token_ids == (156892,)
    assert family.facts(
        {"eos_token_id": 156892}, native, {"generation_config.json": {"eos_token_id": [5]}}, source="x"
    ).stop_token_ids == (
        5,
        156892,
    )
    assert family.facts({"eos_token_id": [156895]}, native, {}, source="x").stop_token_ids == (156892,)


def test_stacked_experts_of_dfactory(publish, rewrite, logits) -> None:
    folder, native, _, weights = publish("llada2", model_type="llada2_moe_veomni")
    stacked = {name: value for name, value in weights.items() if ".mlp.experts." not in name}
    for part in ("gate", "up", "down"):
        for layer in range(2):
            prefix = f"model.layers.{layer}.mlp.experts."
            experts = [
                weights[f"{prefix}{i}.{part}_proj.weight"]
                for i in range(12)
                if f"{prefix}{i}.{part}_proj.weight" in weights
            ]
            if experts:
                stacked[f"{prefix}{part}_proj"] = torch.stack(experts)
    rewrite(folder, stacked)
    assert torch.equal(logits(load_checkpoint(folder)[0]), logits(native))
    rewrite(folder, {name: value for name, value in stacked.items() if not name.endswith("up_proj")})
    with pytest.raises(CheckpointError, match="does not fit"):
        load_checkpoint(folder)
