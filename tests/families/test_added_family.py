"""The worked example of docs/models.md: a family added from outside, as the page writes it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from s2d2_lmeval import load
from s2d2_lmeval.cli import main
from s2d2_lmeval.errors import CheckpointError, ConfigError
from s2d2_lmeval.families import FAMILIES, Family, load_checkpoint, register

from .conftest import COMMON, Layout, random_native, same, write_weights

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
PUBLISHED = {**COMMON, "model_type": "brook_lm", "width": 32, "depth": 2, "norm": "rms", "block_size": 8}
RENAMED = {"hidden_size", "num_hidden_layers"}


@pytest.fixture
def brook() -> Iterator[Family]:
    """The family that the page's code registers."""
    section = PAGE.read_text(encoding="utf-8").partition("## Add a family")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), namespace)
    yield namespace["BROOK"]
    FAMILIES.remove("brook")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint as published: other names for fields and weights."""
    layout = Layout("LlamaForCausalLM", PUBLISHED, same, dict)
    weights = random_native(layout, PUBLISHED).state_dict()
    names = {
        name: name.replace("model.embed_tokens", "decoder.embedding").replace("model.", "decoder.") for name in weights
    }
    write_weights(tmp_path, {names[name]: value for name, value in weights.items()}, shards=2)
    config = {name: value for name, value in PUBLISHED.items() if name not in RENAMED}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_its_checkpoints_load_and_decode(brook: Family, folder: Path, logits: Any) -> None:
    model, facts = load_checkpoint(folder)
    native = random_native(Layout("LlamaForCausalLM", PUBLISHED, same, dict), PUBLISHED)
    assert torch.equal(logits(model), logits(native))
    assert (facts.family, facts.block_length, facts.mask_token_id) == ("brook", 8, 60)
    engine = load(folder, device="cpu")
    for decoder in brook.decoders:
        bound = {"eb_threshold": 0.35} if decoder == "entropy_bounded" else {}
        runs = [
            engine.generate([[3, 1, 4], [1, 5]], {"decoder": decoder, "max_new_tokens": 10, **bound, **schedule})
            for schedule in ({}, {} if decoder == "sliding" else {"schedule": "reference"})
        ]
        assert [answer.token_ids for answer in runs[0]] == [answer.token_ids for answer in runs[1]]
        assert all(len(answer.token_ids) == 10 or answer.finish_reason == "stop" for answer in runs[0])


def test_its_settings_and_published_mask(brook: Family, folder: Path) -> None:
    model = load(folder, device="cpu")
    assert model.config({}).confidence_threshold == 0.9
    fast = model.config({"preset": "brook-fast"})
    assert (fast.block_length, fast.confidence_threshold) == (32, 0.7)
    with pytest.raises(ConfigError, match="brook has brook-fast"):
        model.config({"preset": "sdar-a"})
    facts = brook.facts({}, brook.config_class(vocab_size=64000), {}, source="published")
    assert (facts.mask_token_id, facts.block_length) == (63999, 8)


def test_what_its_class_does_not_compute_is_refused(brook: Family, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for changes, message in (
        ({"norm": "layer"}, "norm='layer'"),
        ({"width": 0}, "width=0"),
        ({"depth": None}, "depth"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(folder)


def test_doctor_knows_it(brook: Family, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json", str(folder)])
    found = {(one["section"], one["name"]): one["value"] for one in json.loads(capsys.readouterr().out)}
    assert found["checkpoint", "family"].startswith("brook, runs as transformers' LlamaForCausalLM")
    assert (
        found["decoders", "preset=brook-fast"] == "the default setting with block_length=32, confidence_threshold=0.7"
    )


def test_names_of_another_family_are_taken(brook: Family) -> None:
    with pytest.raises(CheckpointError, match="brook belongs to the family brook already"):
        register(brook)
    with pytest.raises(CheckpointError, match="brook_lm belongs to the family brook already"):
        register(replace(brook, name="stream"))
    with pytest.raises(CheckpointError, match="brook-fast belongs to the family brook already"):
        register(replace(brook, name="stream", model_types=("stream",), presets={"brook-fast": {}}))
    assert "stream" not in FAMILIES
