"""How many positions a checkpoint takes: yarn's stretched ones, a window's few, and frequencies that follow a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from s2d2_lmeval import load
from s2d2_lmeval.cli import main
from s2d2_lmeval.errors import CheckpointError, ConfigError
from s2d2_lmeval.families import checkpoint_facts

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
PROMPT = [3, 1, 4, 15, 9, 26, 5, 35]


def checkpoint(folder: Path, model_class: Any = Qwen3ForCausalLM, **fields: Any) -> Path:
    torch.manual_seed(0)
    config = model_class.config_class(**SIZES, **fields)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


def greedy(folder: Path, model_class: Any, tokens: int) -> list[int]:
    """What transformers writes."""
    model = model_class.from_pretrained(folder).eval()
    ids = torch.tensor([PROMPT])
    for _ in range(tokens):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(PROMPT) :].tolist()


def ours(folder: Path, tokens: int, **options: Any) -> list[int]:
    model = load(folder, device="cpu", **options)
    settings = {"decoder": "ar", "temperature": 0.0, "max_new_tokens": tokens, "stop_token_ids": ()}
    return model.generate([PROMPT], settings)[0].token_ids


def test_yarn_goes_on_to_its_stretched_context(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
    folder = checkpoint(tmp_path, rope_parameters=rope)
    facts = checkpoint_facts(folder)
    assert (facts.max_context, facts.context_limit) == (64, 128)
    assert ours(folder, 112, max_context=128) == greedy(folder, Qwen3ForCausalLM, 112)
    assert load(folder, device="cpu").max_context == 64  # as transformers and the harness have it
    with pytest.raises(ConfigError, match="takes 1 to 128 positions"):
        load(folder, device="cpu", max_context=129)


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "yarn", "factor": 0.25, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "yarn", "factor": 2}, 128),
        ({"rope_type": "linear", "factor": 4}, 64),
        ({"rope_type": "default"}, 64),
    ],
)
def test_limits_of_other_ropes(tmp_path: Path, rope: dict[str, Any], limit: int) -> None:
    facts = checkpoint_facts(checkpoint(tmp_path, rope_parameters={"rope_theta": 1e4, **rope}))
    assert (facts.max_context, facts.context_limit) == (64, limit)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_frequencies_that_follow_the_longest_text_are_refused(tmp_path: Path, kind: str) -> None:
    folder = checkpoint(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 32}
    config["rope_parameters"] = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4, **factors}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"rope_type='{kind}'.*neighbours"):
        load(folder, device="cpu")


def test_a_window_is_accepted_inside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path, MistralForCausalLM, sliding_window=24)
    expected = greedy(folder, MistralForCausalLM, 16)
    assert ours(folder, 16, max_context=24) == expected
    for asked in (None, 25):
        with pytest.raises(ConfigError, match=r"window of 24|1 to 24 positions"):
            load(folder, device="cpu", max_context=asked)
    assert main(["doctor", str(folder), "--json"]) == 1
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert "max_context=24" in found["context"]["value"]
    main(["doctor", str(folder), "--json", "--option", "max_context=24"])
    assert {one["name"]: one for one in json.loads(capsys.readouterr().out)}["context"]["state"] == "ok"


def test_windows_that_hold_the_context_or_are_switched_off(tmp_path: Path) -> None:
    wide = checkpoint(tmp_path / "wide", MistralForCausalLM, sliding_window=64)
    assert ours(wide, 40) == greedy(wide, MistralForCausalLM, 40)
    off = checkpoint(tmp_path / "off", use_sliding_window=False, sliding_window=8)
    assert checkpoint_facts(off).context_limit == 64
    on = checkpoint(tmp_path / "on", use_sliding_window=True, sliding_window=24, max_window_layers=0)
    assert checkpoint_facts(on).context_limit == 24
    assert ours(on, 16, max_context=24) == greedy(on, Qwen3ForCausalLM, 16)
    with pytest.raises(ConfigError, match="window of 24"):
        load(on, device="cpu")


def test_layers_that_see_parts_are_refused() -> None:
    from s2d2_lmeval.families.config_map import positions

    native = Qwen3Config(**SIZES)
    native.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(CheckpointError, match="chunked_attention"):
        positions(native)
    window = MistralConfig(**SIZES)
    window.sliding_window = -3
    with pytest.raises(CheckpointError, match="sliding_window=-3"):
        positions(window)
