"""Draft adapters trained for checkpoints that have masks of their own: they begin with these, and draft as decoding
does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from s2d2_lmeval import load
from s2d2_lmeval.families import load_checkpoint
from s2d2_lmeval.families.drafts import digest
from s2d2_lmeval.runtime.runner import Runner
from s2d2_lmeval.training.adapter import AdaptedModel, Form
from s2d2_lmeval.training.anchors import draw
from s2d2_lmeval.training.data import Text
from s2d2_lmeval.training.run import Answers, Target, train
from s2d2_lmeval.training.trainer import Recipe

PROMPTS = [[(5 * i + 3 * j) % 57 for j in range(2 + 3 * i)] for i in range(6)]
FORM = Form(window=5, rank=2)


def opened(folder: Path, **more: Any) -> Any:
    return load(folder, device="cpu", dtype="float32", mask_token_id=60, **more)


def test_a_trained_adapter_changes_no_answer(family: str, publish: Callable[..., Any], tmp_path: Path) -> None:
    folder = publish(family, mask_token_id=60).folder
    recipe, answers = Recipe(steps=2, windows=4), Answers(3, max_new_tokens=8)
    train(Target(str(folder), device="cpu"), PROMPTS, tmp_path / "drafts", FORM, recipe, answers)
    options = {"stop_token_ids": (), "max_new_tokens": 9}
    expected = opened(folder).generate(PROMPTS, {"decoder": "ar", **options})
    adapted = opened(folder, draft_adapter=tmp_path / "drafts")
    assert adapted.config({"decoder": "sliding"}).window == 5
    found = adapted.generate(PROMPTS, {"decoder": "sliding", **options})
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert all(one.stats["windows"] for one in found)


def seen_by_a_step(adapted: AdaptedModel, text: list[int], answer: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (W, V) of the draft that starts at the first token of ``answer``, and of what the target says there."""
    windows = draw([Text(text, answer)], adapted.masks, len(answer) - 1, Random(0), "cpu")
    drafted, taught = adapted.forward(windows, torch.Generator())
    (first,) = (windows.starts == len(text)).nonzero()[0].tolist()
    rows = slice(first * adapted.masks, (first + 1) * adapted.masks)
    return adapted.head(drafted)[rows].detach(), adapted.head(taught)[rows]


@pytest.mark.parametrize("trained", [False, True], ids=["its own masks", "an adapter"])
def test_a_step_sees_what_decoding_sees(
    family: str, trained: bool, publish: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The window at the end of a prompt, and the target's own choices after it."""
    folder = publish(family, mask_token_id=60).folder
    prompt, options = PROMPTS[4], {"max_new_tokens": 6, "stop_token_ids": (), "do_sample": False}
    adapted = AdaptedModel(*load_checkpoint(folder, device="cpu", dtype=torch.float32), FORM, seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in adapted.parameters.values():
        if trained:
            changed = parameter + 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.data = changed.bfloat16().float()  # as it is stored
    adapted.save(tmp_path, digest([folder / "model.safetensors"]), str(folder))
    model = opened(folder, **({"draft_adapter": tmp_path} if trained else {}))
    answer = model.generate([prompt], {"decoder": "ar", **options})[0].token_ids
    seen: list[torch.Tensor] = []
    run = Runner.run

    def recorded(*args: Any, **more: Any) -> torch.Tensor:
        logits = run(*args, **more)
        seen.append(logits.clone())
        return logits

    monkeypatch.setattr(Runner, "run", recorded)
    model.generate([prompt], {"decoder": "sliding", "window": 5, **options})
    decoded = next(logits for logits in seen if len(logits) == 5)[1:]  # the root's own, and its window's
    drafted, taught = seen_by_a_step(adapted, prompt, answer)
    assert (drafted - decoded).abs().max() < 1e-4
    assert taught.argmax(1).tolist() == answer[1:5]
