"""Training: what a step draws and costs, runs that go on, files that are whole, input that is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from s2d2_lmeval import load
from s2d2_lmeval.cli import main
from s2d2_lmeval.errors import TrainingError
from s2d2_lmeval.training import checkpointing
from s2d2_lmeval.training.adapter import Form
from s2d2_lmeval.training.anchors import draw
from s2d2_lmeval.training.checkpointing import replaced
from s2d2_lmeval.training.data import Text, divided
from s2d2_lmeval.training.drafter import DrafterForm
from s2d2_lmeval.training.losses import by_pace, by_place, draft_loss, hits
from s2d2_lmeval.training.run import Answers, Target, Watcher
from s2d2_lmeval.training.run import train as run
from s2d2_lmeval.training.student import Trainable
from s2d2_lmeval.training.trainer import Recipe

from .conftest import VOCABULARY

PROMPTS = [[(5 * i + 3 * j) % VOCABULARY for j in range(1 + i % 7)] for i in range(12)]
FORM = Form(window=4, rank=2)
RECIPE = Recipe(steps=6, windows=4, look=0.0)


def train(
    checkpoint: Path, folder: Path, recipe: Recipe = RECIPE, form: Trainable = FORM, **more: Any
) -> dict[str, Any]:
    target = Target(str(checkpoint), device="cpu")
    return run(target, more.pop("prompts", PROMPTS), folder, form, recipe, Answers(4, max_new_tokens=12), **more)


# ---- windows ----


def test_a_mask_guesses_the_token_after_the_one_in_whose_place_it_stands() -> None:
    texts = [Text([10, 11, 12], [13, 14, 15, 16]), Text([20], [21, 22, 23])]
    windows = draw(texts, 3, 100, Random(0), "cpu")
    assert windows.tokens[windows.starts].tolist() == [13, 14, 15, 21, 22]
    assert windows.positions_of(3).view(-1, 3)[0].tolist() == [3, 4, 5]
    assert windows.truth[0].tolist() == [14, 15, 16]
    assert windows.known.tolist() == [
        [True, True, True],
        [True, True, False],
        [True, False, False],
        [True, True, False],
        [True, False, False],
    ]
    assert (windows.tokens[windows.teachers].view(-1, 3)[:, 0]).tolist() == [13, 14, 15, 21, 22]


@pytest.mark.parametrize("causal", [False, True])
def test_a_draft_sees_its_text_to_the_start_and_itself(causal: bool) -> None:
    windows = draw([Text([1, 2], [3, 4, 5]), Text([6], [7, 8])], 2, 100, Random(0), "cpu")
    sight = windows.sight(2, causal)
    for number, start in enumerate(windows.starts.tolist()):
        for place in range(2):
            row, own = sight[2 * number + place], [8 + 2 * number + at for at in range(2)]
            begin = 0 if start < 5 else 5
            seen = [*range(begin, start), *(own[: place + 1] if causal else own)]
            assert row.nonzero().squeeze(1).tolist() == seen
    clean = windows.clean_sight()
    assert clean[4].tolist() == [True] * 5 + [False] * 3
    assert clean[6].tolist() == [False] * 5 + [True, True, False]


# ---- loss ----


@pytest.mark.parametrize("decay", [2.0, None], ids=["decay", "pace"])
def test_the_loss_is_the_distance_of_the_laws_and_some_entropy(decay: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(11, 5, generator=generator)
    drafted, taught = torch.randn(2, 600, 5, generator=generator)
    drafted.requires_grad_()
    truth = torch.randint(11, (150, 4), generator=generator)
    known = torch.arange(4) < torch.randint(1, 5, (150, 1), generator=generator)

    def answer(states: torch.Tensor) -> torch.Tensor:
        return states @ head.T

    law, target = answer(drafted).softmax(-1), answer(taught).softmax(-1)
    said = law.gather(1, truth.view(-1, 1)).view(150, 4)
    expected = -0.1 * said.log() + 0.9 * (law - target).abs().sum(1).view(150, 4)
    weight = by_pace(known, said.detach()) if decay is None else by_place(known, decay)
    for teacher, each in ((None, -said.log()), (taught, expected)):
        mean = (each * weight).sum() / weight.sum()
        found = draft_loss(answer, drafted, teacher, truth, known, decay)
        assert found.item() == pytest.approx(mean.item(), rel=1e-5)
        gradients = [torch.autograd.grad(one, drafted, retain_graph=True)[0] for one in (found, mean)]
        assert torch.allclose(*gradients, atol=1e-6)


def test_places_weigh_less_the_later_and_nothing_beyond_the_text() -> None:
    known = torch.tensor([[True, True, False]])
    assert by_place(known, 2.0)[0].tolist() == pytest.approx([1.0, 0.60653, 0.0], abs=1e-5)
    reached = [0.5 + 0.5 * 0.8, (0.5 + 0.5 * 0.8) * (0.5 + 0.5 * 0.2)]
    pace = by_pace(known, torch.tensor([[0.8, 0.2, 0.9]]))[0].tolist()
    assert pace == pytest.approx([sum(reached), reached[1], 0.0])
    truth = torch.tensor([[0, 1, 2]])
    assert hits(lambda states: states, torch.eye(3), truth, known).tolist() == [[True, True, False]]


# ---- runs ----


def test_a_run_learns_logs_and_writes_an_adapter_that_decodes(checkpoint: Path, tmp_path: Path) -> None:
    recipe = Recipe(steps=36, windows=8, texts=4, rate=2e-2, look=0.0)
    shares: list[float] = []
    last = train(checkpoint, tmp_path, recipe, Form(4, 8), watcher=Watcher(trained=shares.append))
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1] == last
    assert [record["step"] for record in log] == list(range(37))
    assert shares[-1] == 1.0
    assert log[12]["loss"] < log[1]["loss"] - 0.5  # both of entropy
    card = (tmp_path / "README.md").read_text()
    assert "10 greedy answers" in card
    assert f"{last['accepted_per_draft']:.2f}" in card
    plain, adapted = load(checkpoint, device="cpu"), load(checkpoint, device="cpu", draft_adapter=tmp_path)
    options = {"stop_token_ids": (), "max_new_tokens": 12, "lookup": False}
    expected = plain.generate(PROMPTS, {"decoder": "ar", "stop_token_ids": (), "max_new_tokens": 12})
    found = adapted.generate(PROMPTS, {"decoder": "sliding", **options})
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]


class Killed(BaseException):
    """What no code here catches, as a kill leaves it."""


@pytest.mark.parametrize("form", [FORM, Form(4, 2, (1, 50)), DrafterForm(4, 2)], ids=["vectors", "noise", "drafter"])
def test_a_run_that_was_killed_ends_as_one_that_was_not(checkpoint: Path, tmp_path: Path, form: Trainable) -> None:
    whole = train(checkpoint, tmp_path / "whole", form=form)
    for step in (2, 4):

        def killed(record: dict[str, Any], step: int = step) -> None:
            if record["step"] == step:
                raise Killed

        with pytest.raises(Killed):
            train(checkpoint, tmp_path / "parts", form=form, watcher=Watcher(looked=killed))
        for name in ("log.jsonl", "answers.jsonl"):  # what was being written
            with (tmp_path / "parts" / name).open("a") as file:
                file.write('{"step": ')
    parts = train(checkpoint, tmp_path / "parts", form=form)
    assert {**parts, "seconds": 0} == {**whole, "seconds": 0}
    for name in ("adapter_model.safetensors", "state.safetensors", "s2d2_draft.safetensors", "model.safetensors"):
        if (tmp_path / "whole" / name).exists():
            one, other = (load_file(tmp_path / run / name) for run in ("whole", "parts"))
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one)
    logs = [
        [json.loads(line)["step"] for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
        for run in ("whole", "parts")
    ]
    assert logs[0] == logs[1] == [0, 1, 2, 3, 4, 5, 6]


# ---- bad input ----


def test_the_command_trains_and_says_so(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Letters:
        chat_template, eos_token_id = None, None

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) % VOCABULARY for letter in text]}

        def __len__(self) -> int:
            return VOCABULARY

    monkeypatch.setattr("s2d2_lmeval.prompts.tokenizer_of", lambda source, hub: Letters())
    (tmp_path / "prompts.txt").write_text("\n".join(["once upon a time", "there was", "a", "long" * 50]))
    command = ["adapt", str(checkpoint), "--prompts", str(tmp_path / "prompts.txt"), "--max-prompt", "100"]
    command += ["--steps", "2", "--masks", "noise", "-n", "8", "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "1 of 4 prompts are longer" in said
    assert "accepted per draft" in said
    assert json.loads((tmp_path / "out" / "s2d2_draft.json").read_text())["noise"] == [0, VOCABULARY]
    assert main([*command, "--rank", "8"]) == 2
    assert "with another rank" in capsys.readouterr().err


def refused(said: str, call: Callable[[], Any]) -> None:
    with pytest.raises(TrainingError, match=said) as found:
        call()
    assert len(str(found.value).splitlines()) == 1


def test_what_cannot_be_trained_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    refused("no prompt", lambda: train(checkpoint, tmp_path, prompts=[]))
    refused("do not fit the 256 positions", lambda: train(checkpoint, tmp_path, prompts=[[1] * 250]))
    refused("nothing to learn from", lambda: divided([Text([1], [2])] * 4, 1))
    train(checkpoint, tmp_path / "run", Recipe(steps=1, windows=2))
    refused("answers to other prompts", lambda: train(checkpoint, tmp_path / "run", prompts=[[9, 9]] * 12))
    refused("another rate", lambda: train(checkpoint, tmp_path / "run", Recipe(steps=2, windows=2, rate=0.5)))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    weights_of = load_file(tmp_path / "model.safetensors")
    save_file({key: 2 * value for key, value in weights_of.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    refused("another base", lambda: train(tmp_path, tmp_path / "run", Recipe(steps=2, windows=2)))
    (tmp_path / "run" / "state.safetensors").write_bytes(b"half")
    refused("remove it to begin anew", lambda: train(checkpoint, tmp_path / "run", Recipe(steps=2, windows=2)))
    (tmp_path / "file").write_text("")
    refused("cannot be written", lambda: train(checkpoint, tmp_path / "file"))


def test_a_full_disk_leaves_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced(tmp_path / "kept", b"before")

    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(checkpointing.os, "fsync", full)
    refused("No space left", lambda: replaced(tmp_path / "kept", b"after"))
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("kept", b"before")]


TARGETS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
}


@pytest.mark.parametrize("family", TARGETS)
def test_every_target_is_adapted(family: str, tmp_path: Path) -> None:
    name, more = TARGETS[family]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 256}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes, **more)
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(tmp_path / "base")
    train(tmp_path / "base", tmp_path / "drafts", Recipe(steps=2, windows=4))
    plain = load(tmp_path / "base", device="cpu")
    adapted = load(tmp_path / "base", device="cpu", draft_adapter=tmp_path / "drafts")
    assert plain.facts.family == family
    found = [model.generate(PROMPTS, {"max_new_tokens": 8}) for model in (plain, adapted)]
    assert [one.token_ids for one in found[0]] == [one.token_ids for one in found[1]]
    assert all(one.stats["windows"] for one in found[1])
