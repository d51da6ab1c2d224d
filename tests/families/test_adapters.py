"""LoRA adapters: merged into the weights, under published names, or refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from s2d2_lmeval import load
from s2d2_lmeval.errors import CheckpointError
from s2d2_lmeval.families import adopt, load_checkpoint

from .lora import ALPHA, MODULES, RANK, factors, write_adapter


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, ALPHA / RANK),
        ({"use_rslora": True}, ALPHA / RANK**0.5),
        ({"alpha_pattern": {".*proj|.*out": 6, "other": 1}}, 6 / RANK),
    ],
)
@pytest.mark.parametrize("name", list(MODULES))
@pytest.mark.parametrize("form", ["{}.lora_{}.weight", "{}.lora_{}.default.weight"])
def test_merges_under_published_names(name, form, config, scale, publish, tmp_path):
    checkpoint = publish(name)
    tensors = factors(checkpoint.native, MODULES[name], form)
    adapter = write_adapter(tmp_path / "adapter", tensors, **config)
    plain, facts = load_checkpoint(checkpoint.folder)
    merged, same_facts = load_checkpoint(checkpoint.folder, adapter=adapter)
    assert "LoRA adapter: give it" in facts.caveat
    assert same_facts == replace(facts, adapter=str(adapter), caveat="")
    changed = {f"{native}.weight": published for published, native in MODULES[name].items()}
    for weight, value in merged.state_dict().items():
        expected = plain.state_dict()[weight]
        if weight in changed:
            prefix = f"base_model.model.{changed[weight]}"
            expected = expected + scale * tensors[form.format(prefix, "B")] @ tensors[form.format(prefix, "A")]
        assert torch.allclose(value, expected, atol=1e-6), weight
        assert (weight in changed) != torch.equal(value, plain.state_dict()[weight])


def test_a_merged_model_that_is_saved_remembers_its_adapter(publish, tmp_path):
    checkpoint = publish("dream")
    adapter = write_adapter(tmp_path / "adapter", factors(checkpoint.native, MODULES["dream"]))
    merged, facts = load_checkpoint(checkpoint.folder, adapter=adapter)
    merged.save_pretrained(tmp_path / "merged")
    again, facts_again = load_checkpoint(tmp_path / "merged")
    assert facts_again == facts
    assert adopt(again)[1].caveat == ""


def test_keeps_the_dtype_of_the_weights(publish, tmp_path):
    checkpoint = publish("dream")
    adapter = write_adapter(tmp_path / "adapter", factors(checkpoint.native, MODULES["dream"]))
    whole, _ = load_checkpoint(checkpoint.folder, adapter=adapter)
    half, _ = load_checkpoint(checkpoint.folder, adapter=str(adapter), dtype="bfloat16")
    name = "model.layers.1.mlp.up_proj.weight"
    assert half.get_parameter(name).dtype == torch.bfloat16
    assert torch.allclose(half.get_parameter(name).float(), whole.get_parameter(name), atol=2e-2)


def test_the_front_door_takes_an_adapter(publish, tmp_path):
    checkpoint = publish("llada")
    adapter = write_adapter(tmp_path / "adapter", factors(checkpoint.native, MODULES["llada"]))
    answers = [
        load(checkpoint.folder, **options).generate([[1, 2, 3]], {"block_length": 4, "max_new_tokens": 8})[0].token_ids
        for options in ({}, {"adapter": adapter})
    ]
    assert len(answers[0]) == len(answers[1]) == 8
    assert answers[0] != answers[1]


def test_agrees_with_peft(publish, tmp_path, logits):
    peft = pytest.importorskip("peft")
    checkpoint = publish("dream")
    base, _ = load_checkpoint(checkpoint.folder)
    base.set_attn_implementation("sdpa")
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(base, config)
    wrapped.save_pretrained(tmp_path / "adapter")
    merged, _ = load_checkpoint(checkpoint.folder, adapter=tmp_path / "adapter")
    merged.set_attn_implementation("sdpa")
    assert torch.allclose(logits(merged), logits(wrapped.merge_and_unload()), atol=1e-5)


def spoiled(tensors: dict[str, torch.Tensor], what: str) -> dict[str, torch.Tensor]:
    first = sorted(tensors)[0]
    if what == "half":
        return {name: value for name, value in tensors.items() if name != first}
    if what == "shape":
        return tensors | {first: tensors[first][:, :-1].clone()}
    if what == "rank":
        return tensors | {first: tensors[first][:-1].clone()}
    if what == "module":
        return {name.replace("layers.0", "layers.7"): value for name, value in tensors.items()}
    if what == "bias":
        return tensors | {"base_model.model.model.layers.0.self_attn.k_proj.lora_B.bias": torch.zeros(8)}
    return {}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("half", "only one factor of model.layers.0.self_attn.k_proj"),
        ("shape", r"k_proj has factors \[16, 3\] and \[3, 31\] for a weight \[16, 32\]"),
        ("rank", "does not fit this model"),
        ("module", "layers.7.self_attn.k_proj, which this dream model does not have"),
        ("bias", "not a factor of a LoRA"),
        ("empty", "no factor at all"),
    ],
)
def test_refuses_factors_that_do_not_fit(what, message, publish, tmp_path):
    checkpoint = publish("dream")
    tensors = spoiled(factors(checkpoint.native, MODULES["dream"]), what)
    adapter = write_adapter(tmp_path / "adapter", tensors)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(checkpoint.folder, adapter=adapter)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "type 'IA3'"),
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [3, 4]}, "alora_invocation_tokens"),
        ({"something_of_tomorrow": 1}, "something_of_tomorrow=1"),
        ({"bias": "all"}, "bias='all'"),
        ({"lora_alpha": None}, "lora_alpha=None"),
        ({"alpha_pattern": [3]}, "alpha_pattern"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "name the modules more plainly"),
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern"),
    ],
)
def test_refuses_what_is_no_plain_lora(config, message, publish, tmp_path):
    checkpoint = publish("dream")
    adapter = write_adapter(tmp_path / "adapter", factors(checkpoint.native, MODULES["dream"]), **config)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(checkpoint.folder, adapter=adapter)


def test_refuses_a_folder_without_an_adapter_and_pickled_weights(publish, tmp_path):
    checkpoint = publish("dream")
    with pytest.raises(CheckpointError, match="holds no adapter_config"):
        load_checkpoint(checkpoint.folder, adapter=checkpoint.folder)
    with pytest.raises(CheckpointError, match="no folder"):
        load_checkpoint(checkpoint.folder, adapter=tmp_path / "nowhere")
    adapter = write_adapter(tmp_path / "adapter", factors(checkpoint.native, MODULES["dream"]))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="not loaded here"):
        load_checkpoint(checkpoint.folder, adapter=adapter)
    with pytest.raises(CheckpointError, match="adapter="):
        load_checkpoint(adapter)
