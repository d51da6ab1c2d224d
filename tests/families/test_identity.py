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
    ({"model_type": "llama", "architectures": ["StableDiffcoderForCausalLM"]}, "StableDiffcoderForCausalLM"),
    ({"model_type": "llama", **auto_map("modeling_x.StableDiffcoderForCausalLM")}, "StableDiffcoderForCausalLM"),
    ({"model_type": "qwen2", **auto_map("them/repo--modeling.Qwen2Model", "AutoModel")}, "Qwen2Model"),
    ({"model_type": "qwen3", "architectures": ["LlamaForCausalLMEagle3"]}, "LlamaForCausalLMEagle3"),
    ({"model_type": "sdar", "architectures": ["SDARForCausalLM"], "use_regular_causal": True}, "SDARForCausalLM"),
    ({"model_type": "sdar", "_name_or_path": "yifanyu/I-DLM-8B"}, "I-DLM"),
    ({"model_type": "sdar", "_name_or_path": "someone/UNO-8b"}, "UNO"),
    ({"model_type": "sdar", "block_size": 3}, "block_size=3"),
    ({"model_type": "sdar", "architectures": ["OtherForCausalLM"]}, "OtherForCausalLM"),
    ({"model_type": "Dream", "architectures": ["DreamForCausalLM"]}, "DreamForCausalLM"),
    ({"model_type": "Dream", "block_size": 32}, "block_size=32"),
    ({"model_type": "llada", "architectures": ["LLaDAMoEModelLM"]}, "LLaDAMoEModelLM"),
    ({"model_type": "nemotron_labs_diffusion", "architectures": ["NemotronLabsDiffusionModel"]}, "NemotronLabs"),
    ({"model_type": "a2d-qwen3", "architectures": ["A2DQwen3LMHeadModel"]}, "A2DQwen3LMHeadModel"),
    ({"model_type": "wedlm", **auto_map("modeling_wedlm.WeDLMForCausalLM")}, "WeDLMForCausalLM"),
]


@pytest.mark.parametrize(("config", "named"), OTHERS)
def test_other_models_under_a_known_type_are_refused(config: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match="family=") as caught:
        identify(config)
    assert named in str(caught.value)
    assert identify(config, family="sdar") is identify({**config, "block_diffusion_family": "sdar"}) is FAMILIES["sdar"]


@pytest.mark.parametrize(
    "source", ["yifanyu/I-DLM-8B", "/x/idlm-8b/checkpoint-5", "/hub/models--a--I-DLM-8B/snapshots/ab12", "a/my-uno-v1"]
)
def test_names_of_causal_relatives_of_sdar(source: str) -> None:
    with pytest.raises(CheckpointError, match="I-DLM and UNO"):
        identify({"model_type": "sdar"}, source)
    assert identify({"model_type": "sdar"}, "them/SDAR-unofficial").name == "sdar"


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
    native.config.architectures = ["StableDiffcoderForCausalLM"]
    for autoregressive in (True, False):
        with pytest.raises(CheckpointError, match="StableDiffcoderForCausalLM"):
            adopt(native, mask_token_id=60, autoregressive=autoregressive)
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
