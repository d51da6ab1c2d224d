"""Published checkpoints load into their native classes without a difference."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers

from s2d2_lmeval.errors import CheckpointError
from s2d2_lmeval.families import FAMILIES, identify, load_checkpoint, read_config


@pytest.mark.parametrize("shards", [1, 3])
def test_logits_are_those_of_the_native_class(publish, logits, family, shards):
    published = publish(family, shards=shards)
    model, facts = load_checkpoint(published.folder)
    assert type(model) is type(published.native)
    assert not model.training
    assert torch.equal(logits(model), logits(published.native))
    assert (facts.family, facts.native_class) == (family, type(model).__name__)


def test_facts(publish, family):
    published = publish(family)
    (published.folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    _, facts = load_checkpoint(published.folder)
    assert facts.stop_token_ids == (9, 7)
    assert (facts.mask_token_id, facts.vocab_size, facts.max_context) == (60, 61, 128)
    block = 4 if family.startswith("sdar") else FAMILIES[family].published_block_length
    assert facts.block_length == published.config.get("block_size", block) or family == "idlm"
    shifted = ("fast_dllm_v2", "dream", "nemotron_labs_diffusion", "idlm", "wedlm", "wedlm_qwen2")
    assert facts.token_shift == (family in shifted)
    assert facts.draft_shift == (family in ("fast_dllm_v2", "dream", "idlm"))
    aligned = {"tiny_a2d": "prompt_end"} | dict.fromkeys(("llada", *shifted[1:]), "prompt")
    assert facts.block_alignment == aligned.get(family, "absolute")
    assert facts.defaults["block_length"] == facts.block_length
    assert facts.decoders[0] == (FAMILIES[family].default_decoder or "s2d2")
    hash(facts)


def test_tied_head(publish, logits, family):
    tied = {"weight_tying" if family == "llada" else "tie_word_embeddings": True}
    published = publish(family, **tied)
    model, _ = load_checkpoint(published.folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), logits(published.native))


def test_saved_by_transformers_and_loaded_again(publish, logits, family, tmp_path):
    model, facts = load_checkpoint(publish(family).folder)
    model.save_pretrained(tmp_path / "again")
    again, facts_again = load_checkpoint(tmp_path / "again")
    assert facts_again == facts
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("saved", ["float32", "bfloat16"])
def test_auto_dtype_is_float32_on_a_cpu(publish, saved):
    published = publish("sdar", torch_dtype=saved)
    assert load_checkpoint(published.folder, device="cpu")[0].dtype == torch.float32
    assert load_checkpoint(published.folder, device_map="cpu")[0].dtype == torch.float32


def test_bfloat16_on_request(publish, logits, family):
    published = publish(family)
    for dtype in ("bfloat16", torch.bfloat16):
        model, _ = load_checkpoint(published.folder, dtype=dtype, device="cpu")
        assert model.dtype == torch.bfloat16
    assert (logits(model) - logits(published.native)).abs().max() < 0.5


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(publish, logits, family, device_map):
    published = publish(family)
    model, _ = load_checkpoint(published.folder, device_map=device_map)
    assert torch.allclose(logits(model), logits(published.native), atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_goes_to_the_gpu_in_the_dtype_of_the_checkpoint(publish, family):
    field = "torch_dtype"
    model, _ = load_checkpoint(publish(family, **{field: "bfloat16"}).folder)
    assert model.device.type == "cuda"
    assert model.dtype == torch.bfloat16


def test_toy_is_the_embedded_checkpoint(publish, monkeypatch):
    published = publish("sdar")
    monkeypatch.setattr("s2d2_lmeval.toy.checkpoint_path", lambda: published.folder)
    assert read_config("toy") == published.config
    assert load_checkpoint("toy")[1].family == "sdar"


def test_every_model_has_its_own_configuration(publish):
    folder = publish("sdar").folder
    first, second = load_checkpoint(folder)[0], load_checkpoint(folder)[0]
    assert first.config is not second.config
    assert all(layer.self_attn.config is first.config for layer in first.model.layers)


def test_no_remote_code_is_run(publish):
    folder = publish("sdar", auto_map={"AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"}).folder
    (folder / "modeling_sdar.py").write_text("raise SystemExit('ran')")
    model, _ = load_checkpoint(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers.models.")


def test_loading_tells_no_table(publish, caplog):
    load_checkpoint(publish("llada2").folder)
    assert "LOAD REPORT" not in caplog.text


def test_given_facts_override_the_configuration(publish):
    folder = publish("sdar").folder
    model, facts = load_checkpoint(folder, mask_token_id=5, block_length=16)
    assert (facts.mask_token_id, facts.block_length) == (5, 16)
    assert facts.defaults["score_penalty_coef"] == 0.0
    assert (model.config.mask_token_id, model.config.block_length) == (5, 16)


def test_given_facts_supply_what_the_configuration_lacks(publish):
    folder = publish("sdar", without=("mask_token_id", "block_size")).folder
    _, facts = load_checkpoint(folder, mask_token_id=60, block_length=8)
    assert (facts.mask_token_id, facts.block_length) == (60, 8)


@pytest.mark.parametrize(
    ("name", "vocabulary", "mask", "block"),
    [
        ("sdar", 151936, 151669, 4),
        ("fast_dllm_v2", 152064, 151665, 32),
        ("fast_dllm_v2", 151936, 151665, 32),
        ("llada2", 157184, 156895, 32),
        ("llada", 126464, 126336, 32),
        ("dream", 152064, 151666, 32),
    ],
)
def test_published_vocabularies_need_no_mask_in_the_configuration(name, vocabulary, mask, block):
    family = FAMILIES[name]
    native = family.config_class(vocab_size=vocabulary, max_position_embeddings=128)
    facts = family.facts({}, native, {}, source="published/model")
    assert (facts.mask_token_id, facts.block_length) == (mask, block)


def test_block_length_of_published_variants_is_in_their_name():
    native = FAMILIES["sdar"].config_class(vocab_size=151936)
    for source, block in (("JetLM/SDAR-8B-Chat", 4), ("JetLM/SDAR-8B-Chat-b16", 16), ("/models/SDAR-b64/", 64)):
        assert FAMILIES["sdar"].facts({}, native, {}, source=source).block_length == block
    assert FAMILIES["sdar"].facts({"block_size": 8}, native, {}, source="SDAR-b16").block_length == 8


def test_hub_id_out_of_the_cache(publish, logits, tmp_path):
    published = publish("llada2", shards=2)
    repository = tmp_path / "cache" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v2").write_text("0" * 40)
    shutil.copytree(published.folder, repository / "snapshots" / ("0" * 40))
    hub = {"cache_dir": str(tmp_path / "cache"), "local_files_only": True}
    model, facts = load_checkpoint("someone/tiny", revision="v2", **hub)
    assert torch.equal(logits(model), logits(published.native))
    assert facts.family == "llada2"
    with pytest.raises(CheckpointError, match="someone/tiny"):
        load_checkpoint("someone/tiny", revision="v1", **hub)


def test_read_config_and_identify(publish, family):
    published = publish(family)
    assert read_config(published.folder) == published.config
    assert identify(read_config(str(published.folder))).name == family
    assert read_config(published.folder, "main") == published.config
    with pytest.raises(CheckpointError, match=r"is a folder, which has no revision 'v2'; leave revision out\."):
        load_checkpoint(published.folder, revision="v2")


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "qwen2", "llama", "mistral"])
def test_autoregressive_models_need_no_mask(name, tmp_path):
    family = FAMILIES[name]
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "sliding_window": None}
    sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16} if "moe" in name else {}
    stock = getattr(transformers, family.native_class)._from_config(family.config_class(**sizes, eos_token_id=3))
    stock.save_pretrained(tmp_path)
    model, facts = load_checkpoint(tmp_path)
    assert (facts.family, facts.scheme, facts.token_shift, facts.mask_token_id) == (name, "autoregressive", True, -1)
    assert facts.stop_token_ids == (3,)
    assert facts.decoders == ("ar", "sliding")
    ids = torch.arange(12).view(1, -1)
    assert torch.equal(model(ids).logits, stock.eval()(ids).logits)


def test_presets_have_distinct_names_and_one_setting_is_the_default():
    again = {"sdar_moe", "tiny_a2d_qwen2", "tiny_a2d_llama", "wedlm_qwen2"}
    names = [name for family in FAMILIES.values() for name in family.presets if family.name not in again]
    assert len(names) == len(set(names))
    for family in FAMILIES.values():
        presets = list(family.presets.values())
        assert bool(presets) == (family.scheme != "autoregressive")
        assert not presets or family.defaults(presets[0]["block_length"]) in presets


def test_sdar_settings_are_the_published_ones():
    presets = FAMILIES["sdar"].presets
    shared = {"do_verify_policy": "score_threshold", "do_verify_score_threshold": 0.0, "cache_ver": True}
    shared |= {"draft_ver": True, "do_verify_score_type": "difference_static", "confidence_threshold": 0.85}
    shared |= {"token_acceptance_estimator": "soft_entropy_negexp", "remasking_strategy": "low_confidence_dynamic"}
    for name, block, cost in (("sdar-a", 4, 1.0), ("sdar-b", 16, 0.0)):
        expected = shared | {"block_length": block, "denoising_steps": block, "score_penalty_coef": cost}
        assert presets[name] == expected | {"temperature": 1.0, "do_sample": False}
    assert FAMILIES["sdar"].defaults(64)["score_penalty_coef"] == 0.0
