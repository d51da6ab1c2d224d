"""Drafters that are trained: what a step sees is what decodes, for every kind of target."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from s2d2_lmeval import load
from s2d2_lmeval.cli import main
from s2d2_lmeval.errors import TrainingError
from s2d2_lmeval.families import load_checkpoint
from s2d2_lmeval.runtime.drafting.dflash import FeatureTap
from s2d2_lmeval.runtime.drafting.loading import load_drafter
from s2d2_lmeval.runtime.passes import Layout, Pass
from s2d2_lmeval.runtime.runner import Runner
from s2d2_lmeval.training.anchors import draw
from s2d2_lmeval.training.data import Text
from s2d2_lmeval.training.drafter import DrafterForm, DraftingStudent
from s2d2_lmeval.training.run import Answers, Target, train
from s2d2_lmeval.training.trainer import Recipe

from .conftest import VOCABULARY

PROMPTS = [[(5 * i + 3 * j) % VOCABULARY for j in range(1 + i % 7)] for i in range(12)]
FORM = DrafterForm(block=5, layers=2)
RECIPE = Recipe(steps=2, windows=4, look=0.0)
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
TARGETS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": SCALED}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
}


@pytest.fixture(params=TARGETS)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    name, more = TARGETS[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **more)
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_what_a_step_sees_is_what_decodes(base: Path, tmp_path: Path) -> None:
    """Logits of a training step over two texts, and of the loaded drafter after each text alone."""
    model, facts = load_checkpoint(base, device="cpu")
    student = FORM.student(model, facts, seed=1)
    assert isinstance(student, DraftingStudent)
    generator = torch.Generator().manual_seed(2)
    for parameter in student.parameters.values():
        noisy = parameter.data + 0.1 * torch.randn(parameter.shape, generator=generator)
        parameter.data = noisy.bfloat16().float()
    student.save(tmp_path, "", "a/base")
    windows = draw([Text([8] * 4, [9, 7, 5]), Text([3, 1, 4, 1, 5], [9, 2, 6, 5, 3])], 4, 3, Random(0), "cpu")
    drafted, taught = student.forward(windows, generator)
    assert taught is not None
    assert taught.shape == drafted.shape
    found = student.head(drafted).view(len(windows.starts), 4, -1)

    alone = load_checkpoint(base, device="cpu")[0]
    drafter = load_drafter(tmp_path, alone)
    tap = FeatureTap(alone.get_decoder(), drafter.shape.layer_ids)
    mask = drafter.shape.mask_token_id
    for number, start in enumerate(windows.starts.tolist()):
        begin = 0 if start < 7 else 7
        length, runner = start - begin, Runner(drafter, "sdpa")  # type: ignore[arg-type]
        runner.reserve(1, 32)
        runner.cache.write_to(torch.arange(length))
        with torch.no_grad():
            alone(windows.tokens[begin:start].view(1, -1))
            drafter.absorb(tap.features(), torch.arange(length).view(1, -1), runner.cache)
        runner.cache.lengths[0] = length
        block = torch.tensor([int(windows.tokens[start])] + [mask] * 4)
        layout, place = Layout(np.zeros(1, dtype=np.int64), np.array([5])), torch.arange(5)
        sees = torch.ones(1, 5, 5, dtype=torch.bool)
        logits = runner.forward(Pass(layout, block, length + place, sees, place, np.zeros(1, dtype=np.int64)))
        torch.testing.assert_close(logits[1:], found[number], rtol=1e-4, atol=1e-4)


def test_every_target_gets_a_drafter_that_changes_no_answer(base: Path, tmp_path: Path) -> None:
    train(Target(str(base), device="cpu"), PROMPTS, tmp_path / "out", FORM, RECIPE, Answers(4, max_new_tokens=12))
    options = {"stop_token_ids": (), "max_new_tokens": 9}
    expected = [one.token_ids for one in load(base, device="cpu").generate(PROMPTS, {"decoder": "ar", **options})]
    model = load(base, device="cpu", draft=tmp_path / "out")
    for decoder in ("ddtree", "dflash"):
        found = model.generate(PROMPTS, {"decoder": decoder, **options})
        assert [one.token_ids for one in found] == expected
        assert sum(one.stats["rounds"] for one in found) > 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "blocks of 5, 2 layers" in card
    assert "greedy answers" in card


PARTS = {"vanilla": set(), "gated": {"gate_proj.weight", "gate_proj.bias"}}
PARTS["rnn"] = {"joint_proj.weight", "joint_proj.bias"}


@pytest.mark.parametrize("kind", PARTS)
def test_a_head_beside_a_drafter_that_stays(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    """Trained alone, whatever the rest; and what a step adds to logits is what the engine adds."""
    target, answers = Target(str(checkpoint), device="cpu"), Answers(4, max_new_tokens=12)
    train(target, PROMPTS, tmp_path / "drafter", FORM, RECIPE, answers)
    form = DrafterForm.beside(str(tmp_path / "drafter"), 3, kind)
    train(target, PROMPTS, tmp_path / "head", form, RECIPE, answers)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("drafter", "head"))
    parts = {"markov_w1.weight", "markov_w2.weight", *PARTS[kind]}
    assert after.keys() - before.keys() == {f"markov_head.{part}" for part in parts}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert after["markov_head.markov_w2.weight"].abs().max() > 0
    options = {"stop_token_ids": (), "max_new_tokens": 9}
    expected = [one.token_ids for one in load(checkpoint, device="cpu").generate(PROMPTS, {"decoder": "ar", **options})]
    model = load(checkpoint, device="cpu", draft=tmp_path / "head")
    for decoder in ("ddtree", "dflash"):
        found = model.generate(PROMPTS, {"decoder": decoder, **options})
        assert [one.token_ids for one in found] == expected

    student = form.student(*load_checkpoint(checkpoint, device="cpu"), 0)
    assert isinstance(student, DraftingStudent)
    head, rows = student.drafter.head, torch.randn(2, 3, 32)
    assert head is not None
    torch.nn.init.normal_(head.vectors)
    token, every, state = torch.tensor([[5, 9, 7], [1, 60, 4]]), torch.arange(VOCABULARY).expand(2, 1, -1), None
    found = student.head(torch.cat([rows.flatten(0, 1), student._said(token, rows)], 1)).view(2, 3, -1)
    for place in range(3):
        at = slice(place, place + 1)
        bias, state = head(token[:, at].unsqueeze(2), every, rows[:, at], state, place)
        torch.testing.assert_close(found[:, place], student.model.lm_head(rows[:, place]) + bias[:, 0, 0])


def test_it_learns(checkpoint: Path, tmp_path: Path) -> None:
    recipe = Recipe(steps=40, windows=8, texts=4, rate=5e-3, look=0.0, pace=True)
    prompts = [[i, i + 1] for i in range(8)]
    train(Target(str(checkpoint), device="cpu"), prompts, tmp_path, FORM, recipe, Answers(8, max_new_tokens=12))
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[13]["loss"] < log[1]["loss"] - 0.3  # both of entropy


def test_a_target_that_denoises_blocks_teaches_its_tokens_alone(tmp_path: Path) -> None:
    model, facts = load_checkpoint("toy")
    student = FORM.student(model, facts, seed=1)
    windows = draw([Text([8] * 4, [9, 7, 5, 6])], 4, 3, Random(0), "cpu")
    drafted, taught = student.forward(windows, torch.Generator())
    assert taught is None
    assert len(drafted) == windows.known.numel()
    student.save(tmp_path, "", "toy")
    assert json.loads((tmp_path / "config.json").read_text())["dflash_config"]["mask_token_id"] == facts.mask_token_id
    toy = load("toy", draft=tmp_path)
    prompt = [[5, 6, 7, 8]]
    expected, found = (toy.generate(prompt, {"decoder": name}, max_new_tokens=8)[0] for name in ("ar", "ddtree"))
    assert found.token_ids == expected.token_ids


def test_what_cannot_be_trained_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, answers = Target(str(checkpoint), device="cpu"), Answers(4, max_new_tokens=12)
    with pytest.raises(TrainingError, match=r"3 layers has more than its target, 2"):
        train(target, PROMPTS, tmp_path / "deep", DrafterForm(4, 3), RECIPE, answers)
    train(target, PROMPTS, tmp_path / "out", FORM, RECIPE, answers)
    with pytest.raises(TrainingError, match="with another block"):
        train(target, PROMPTS, tmp_path / "out", DrafterForm(6, 2), RECIPE, answers)
    (tmp_path / "empty.txt").write_text("")
    command = ["train-drafter", str(checkpoint), "--prompts", str(tmp_path / "empty.txt"), "--steps", "1"]
    assert main([*command, "--out", str(tmp_path / "none")]) == 2
    assert "holds no prompt" in capsys.readouterr().err
