"""A model that is already loaded is taken over without a copy and without a trace."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from s2d2_lmeval.errors import CheckpointError, ConfigError
from s2d2_lmeval.families import adopt, load_checkpoint
from s2d2_lmeval.model import load


class SDARConfig(Qwen3Config):
    """As the published code defines it: another type, the names of Qwen3."""

    model_type = "sdar"


class SDARForCausalLM(Qwen3ForCausalLM):
    config_class = SDARConfig
    config: SDARConfig


class LLaDAConfig(PreTrainedConfig):
    model_type = "llada"


class LLaDAModelLM(PreTrainedModel):
    """A model under LLaDA's names; its arithmetic is not needed to adopt it."""

    config_class = LLaDAConfig

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.model = nn.Module()
        self.post_init()


def pointers(model: nn.Module) -> set[int]:
    return {tensor.data_ptr() for tensor in model.parameters()}


@pytest.fixture
def remote(publish):
    """A model of the published class, and the native one with the same weights."""
    published = publish("sdar")
    model = SDARForCausalLM(SDARConfig(**published.config)).eval()
    model.load_state_dict(published.native.state_dict())
    return model, published.native


def test_native_model_of_every_family(publish, logits, family):
    published = publish(family)
    given = published.native
    before, config = logits(given), copy.deepcopy(given.config.to_dict())
    ours, facts = adopt(given, family=family, mask_token_id=60, block_length=32)
    assert ours is not given
    assert type(ours) is type(given)
    assert pointers(ours) == pointers(given)
    assert (facts.family, facts.block_length, facts.mask_token_id) == (family, 32, 60)
    assert torch.equal(logits(ours), before)
    ours.config._attn_implementation = "eager"
    assert given.config._attn_implementation == "sdpa"
    assert given.config.to_dict() == config
    assert torch.equal(logits(given), before)


def test_loaded_checkpoints_know_their_family(publish, logits, family):
    model, facts = load_checkpoint(publish(family).folder)
    ours, our_facts = adopt(model)
    assert our_facts == facts
    assert torch.equal(logits(ours), logits(model))


def test_native_class_with_a_mask_in_its_configuration(publish):
    native = publish("sdar").native
    with pytest.raises(CheckpointError, match="mask_token_id="):
        adopt(native, family="sdar")
    # As a folder of the type does, a class that names no mask says that it is autoregressive.
    assert adopt(native)[1].family == "qwen3"
    native.config.mask_token_id = 60
    with pytest.raises(CheckpointError, match="block_length="):
        adopt(native)
    _, facts = adopt(native, block_length=4)
    assert (facts.family, facts.mask_token_id) == ("sdar", 60)


def test_ambiguous_native_class_must_be_told(publish):
    native = publish("dream").native
    with pytest.raises(CheckpointError, match="fast_dllm_v2 or dream"):
        adopt(native, mask_token_id=60)
    assert adopt(native, family="dream", mask_token_id=60)[1].family == "dream"


def test_published_class(remote, logits):
    given, native = remote
    before, config = logits(given), copy.deepcopy(given.config.to_dict())
    ours, facts = adopt(given)
    assert type(ours) is Qwen3ForCausalLM
    assert (facts.mask_token_id, facts.block_length, facts.stop_token_ids) == (60, 4, (7,))
    assert pointers(ours) == pointers(given)
    assert torch.equal(logits(ours), logits(native))
    ours.config._attn_implementation = "eager"
    assert given.config.to_dict() == config
    assert type(given) is SDARForCausalLM
    assert torch.equal(logits(given), before)


def test_published_names_are_mapped(publish, logits):
    published = publish("llada")
    given = LLaDAModelLM(LLaDAConfig(**published.config))
    for name, value in published.weights.items():
        owner, *path, leaf = name.split(".")
        module = getattr(given, owner)
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(leaf, nn.Parameter(value))
    ours, _ = adopt(given)
    assert type(ours) is LlamaForCausalLM
    assert pointers(ours) == pointers(given)
    assert torch.equal(logits(ours), logits(published.native))


def test_published_class_with_a_tied_head(publish, logits):
    published = publish("sdar", tie_word_embeddings=True)
    given = SDARForCausalLM(SDARConfig(**published.config)).eval()
    given.load_state_dict(published.native.state_dict())
    ours, _ = adopt(given)
    assert ours.lm_head.weight.data_ptr() == given.model.embed_tokens.weight.data_ptr()
    assert torch.equal(logits(ours), logits(published.native))


def test_published_class_in_bfloat16_keeps_exact_frequencies(remote, logits):
    given, native = remote
    given, native = given.to(torch.bfloat16), native.to(torch.bfloat16)
    ours, _ = adopt(given)
    assert ours.dtype == torch.bfloat16
    assert ours.model.rotary_emb.inv_freq.dtype == torch.float32
    assert (logits(ours) - logits(native)).abs().max() < 0.5


def test_a_change_in_place_is_seen_by_both(remote, logits):
    given, _ = remote
    ours, _ = adopt(given)
    before = logits(ours)
    with torch.no_grad():
        given.lm_head.weight.mul_(2)
    assert torch.allclose(logits(ours), 2 * before, atol=1e-5)


def test_the_same_model_is_adopted_once(publish, remote):
    for given in (remote[0], load_checkpoint(publish("sdar").folder)[0]):
        assert adopt(given)[0] is adopt(given, block_length=16)[0]
    assert adopt(given, block_length=16)[1].block_length == 16


def test_new_weights_are_adopted_anew(publish, remote, logits):
    for given in (remote[0], load_checkpoint(publish("sdar").folder)[0]):
        first, _ = adopt(given)
        given.lm_head.weight = nn.Parameter(given.lm_head.weight.detach() * 2)
        second, _ = adopt(given)
        assert second is not first
        assert torch.equal(logits(second), 2 * logits(first))


def test_adoption_keeps_no_model_alive(publish):
    given, _ = load_checkpoint(publish("sdar").folder)
    adopt(given)
    gone = weakref.ref(given)
    del given
    gc.collect()
    assert gone() is None


def test_training_mode_of_the_given_model_is_left_alone(publish):
    given, _ = load_checkpoint(publish("sdar").folder)
    given.train()
    ours, _ = adopt(given)
    assert given.training
    assert not ours.training


def test_published_weights_in_another_shape(publish):
    published = publish("llada2")

    class LLaDA2MoeConfig(LLaDAConfig):
        model_type = "llada2_moe"

    class LLaDA2MoeModelLM(LLaDAModelLM):
        config_class = LLaDA2MoeConfig

    with pytest.raises(CheckpointError, match=r"another shape .* by its path"):
        adopt(LLaDA2MoeModelLM(LLaDA2MoeConfig(**published.config)))


def test_quantized_model_under_published_names(remote):
    given, _ = remote
    given.hf_quantizer = object()
    with pytest.raises(CheckpointError, match="quantization_config"):
        adopt(given)


def test_weights_that_are_not_those_of_the_class(remote):
    given, _ = remote
    given.model.layers[0].mlp.extra = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"mlp\.extra\.bias has \[2\], needs no such weight"):
        adopt(given)


def test_offloaded_model(remote, publish):
    for given in (remote[0], load_checkpoint(publish("sdar").folder)[0]):
        given.lm_head.to("meta")
        with pytest.raises(CheckpointError, match="device_map"):
            adopt(given)


def test_a_head_that_is_not_the_embedding_though_the_configuration_says_so(remote):
    given, _ = remote
    given.config.tie_word_embeddings = True
    with pytest.raises(CheckpointError, match="the head is the embedding, but it is not"):
        adopt(given)


def test_what_is_no_transformers_model():
    with pytest.raises(CheckpointError, match="not a transformers model"):
        adopt(nn.Linear(2, 2))


def test_model_of_an_unknown_family():
    class Other(LLaDAConfig):
        model_type = "other"

    class OtherModel(LLaDAModelLM):
        config_class = Other

    with pytest.raises(CheckpointError, match="Known families"):
        adopt(OtherModel(Other()))


def test_adapter_must_be_merged(publish):
    peft = pytest.importorskip("peft")
    native = publish("sdar").native
    wrapped = peft.get_peft_model(native, peft.LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(CheckpointError, match="merge_and_unload"):
        adopt(wrapped)


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_the_model_itself_is_not_called(call: str) -> None:
    """Its attention is that of passes: whoever calls it is told what to call."""
    with pytest.raises(ConfigError, match=r"call generate\(\) of what load\(\) returned"):
        getattr(load("toy").hf_model, call)(torch.tensor([[1, 2, 3]]))
