"""A decoding function, a model class and an adapter of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from safetensors.torch import load_file, save_file

from s2d2_lmeval.errors import CheckpointError, ConfigError, RequestError
from s2d2_lmeval.families import load_checkpoint
from s2d2_lmeval.harness.model import S2D2LM

PROMPTS = ["Q: one? A:", "Q: a much longer question, is it not? A:", "x", "é€😀", "Q: one? A:"]

FUNCTION = """
import torch
from transformers import Qwen3ForCausalLM


def echo(model, input_ids, max_gen_toks=5, tokenizer=None, shout=False, return_stats=False):
    assert input_ids.shape[0] == 1
    text = ("HEY" if shout else "hey") + str(int(torch.randint(10, (1,)))) + " stop here"
    new = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    ids = torch.cat([input_ids, new], dim=1)
    return (ids, {"nfe": 5}) if return_stats else ids


class Own(Qwen3ForCausalLM):
    pass
"""


def test_a_function_of_ones_own(requests: Any, make: Callable[..., S2D2LM], tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(FUNCTION)
    model = make(custom_generate=f"{tmp_path}/own.py:echo", shout=True)
    answers = model.generate_until(requests(PROMPTS, max_gen_toks=9, until=["stop"]), disable_tqdm=True)
    assert all(answer.startswith("HEY") and answer.endswith(" ") for answer in answers)
    assert answers[0].stats["new_tokens"] == 9
    assert answers[0].stats["tokens_per_forward"] == 9 / 5
    again = model.generate_until(requests(PROMPTS[::-1], max_gen_toks=9, until=["stop"]), disable_tqdm=True)
    assert again[::-1] == answers
    info = model.get_model_info()["s2d2"]
    assert info["decoder"].endswith("own.py:echo")
    assert info["totals"]["nfe"] == 50
    assert model.generate_until(requests(["x"], max_gen_toks=0), disable_tqdm=True) == [""]


def test_the_published_function_equals_the_engine(requests: Any, make: Callable[..., S2D2LM], lm: S2D2LM) -> None:
    name = "s2d2_lmeval.custom_generate.sdar:block_diffusion_generate"
    options = {**lm.engine.facts.defaults, "random_source": "fixed"}
    published = make(custom_generate=name, **options)
    own = make(**options, schedule="reference", suppress_mask_token=False)
    asked = requests(PROMPTS[2:4], max_gen_toks=6)
    answers = [model.generate_until(asked, disable_tqdm=True) for model in (published, own)]
    for theirs, ours in zip(*answers, strict=True):
        assert theirs == ours
        assert theirs.stats["nfe"] == ours.stats["nfe"]


def test_a_class_of_ones_own(
    requests: Any, make: Callable[..., S2D2LM], lm: S2D2LM, tmp_path: Path, checkpoint: Path
) -> None:
    (tmp_path / "own_class.py").write_text(
        FUNCTION.replace(
            "class Own(Qwen3ForCausalLM):\n    pass",
            """
class Own(Qwen3ForCausalLM):
    @classmethod
    def from_pretrained(cls, source, **options):
        from s2d2_lmeval.families import load_checkpoint
        assert set(options) <= {"dtype", "revision"}
        return load_checkpoint(source)[0]


class Foreign(torch.nn.Linear):
    device, dtype, name_or_path = torch.device("cpu"), torch.float32, ""

    @classmethod
    def from_pretrained(cls, source, **options):
        model = cls(2, 2)
        model.config = __import__("transformers").PretrainedConfig(max_position_embeddings=64)
        model.tie_weights = lambda: None
        return model
""",
        )
    )
    asked = requests(PROMPTS[:2], max_gen_toks=6)
    own = make(custom_model_class=f"{tmp_path}/own_class.py:Own")
    assert own.generate_until(asked, disable_tqdm=True) == lm.generate_until(asked, disable_tqdm=True)
    foreign = f"{tmp_path}/own_class.py:Foreign"
    with pytest.raises(CheckpointError):
        make(custom_model_class=foreign)
    both = make(custom_model_class=foreign, custom_generate=f"{tmp_path}/own_class.py:echo")
    assert both.generate_until(requests(["x"], max_gen_toks=4), disable_tqdm=True)[0].startswith("hey")
    with pytest.raises(RequestError, match="cannot score"):
        both.loglikelihood([Instance("loglikelihood", {}, ("a", "b"), 0)], disable_tqdm=True)
    assert both.get_model_info()["s2d2"]["family"] is None


def test_adapters_are_merged(requests: Any, make: Callable[..., S2D2LM], lm: S2D2LM, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base, _ = load_checkpoint(lm.pretrained)
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(base, settings).save_pretrained(tmp_path / "adapter")
    prompts = requests(PROMPTS[:2], max_gen_toks=6)
    model = make(peft=str(tmp_path / "adapter"))
    assert model.generate_until(prompts, disable_tqdm=True) != lm.generate_until(prompts, disable_tqdm=True)
    changed = model.engine.hf_model.model.layers[0].self_attn.q_proj.weight
    assert not torch.equal(changed, lm.engine.hf_model.model.layers[0].self_attn.q_proj.weight)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name.replace("layers", "blocks"): tensor for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(CheckpointError, match="this sdar model does not have under that name"):
        make(peft=str(tmp_path / "adapter"))
    with pytest.raises(CheckpointError, match=r"no folder .*nowhere"):
        make(peft=str(tmp_path / "nowhere"))
    ready = {"tokenizer": lm.tokenizer, "peft": str(tmp_path / "adapter")}
    with pytest.raises(ConfigError, match="merge the adapter into your model yourself"):
        S2D2LM(pretrained=lm.engine.hf_model, **ready)
