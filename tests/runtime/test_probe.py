"""The shift probe reads how masks predict, and refuses facts that it contradicts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import s2d2_lmeval
from s2d2_lmeval.errors import CheckpointError
from s2d2_lmeval.runtime.passes import Pass
from s2d2_lmeval.runtime.probe import TEXTS as TEXTS_OF_A_PROBE
from s2d2_lmeval.runtime.probe import WIDTH
from s2d2_lmeval.runtime.runner import Runner

DATA = Path(__file__).parents[1] / "families" / "data"
# What the recorded checkpoints were trained on: counting.
TEXTS = [[(start + step * place) % 89 + 4 for place in range(30)] for step in (1, 2, 3) for start in range(0, 80, 13)]


@pytest.mark.parametrize(
    ("family", "shifted"),
    [("nemotron_labs_diffusion", False), ("stable_diffcoder", False), ("idlm", True), ("wedlm", False)],
)
def test_trained_checkpoints_are_read_as_they_were_trained(family: str, shifted: bool) -> None:
    model = s2d2_lmeval.load(DATA / family / "checkpoint", device="cpu")
    before = model.generate([[18, 20, 22]], {"max_new_tokens": 4})[0].token_ids
    found = model.probe(TEXTS)
    assert found is not None
    assert found.drafts_shifted is shifted is bool(model.facts.draft_shift)
    assert abs(found.own - found.shifted) > 3.5
    assert (found.clean < 0.5) == model.facts.token_shift
    found.check(model.facts)
    assert found.verdict.startswith("masks predict the next token: " if shifted else "masks predict their own token: ")
    assert f"is {found.own:.2f} nats at its own mask and {found.shifted:.2f} at the one before" in found.verdict
    with pytest.raises(CheckpointError, match=rf"{found.own:.2f} nats at its own mask and {found.shifted:.2f}"):
        found.check(replace(model.facts, draft_shift=not shifted))
    assert model.generate([[18, 20, 22]], {"max_new_tokens": 4})[0].token_ids == before


def test_what_says_nothing_refuses_nothing() -> None:
    model = s2d2_lmeval.load(DATA / "tiny_a2d" / "checkpoint", device="cpu", mask_token_id=96, block_length=8)
    found = model.probe(TEXTS)  # of random weights
    assert found is not None
    assert found.drafts_shifted is None
    found.check(replace(model.facts, draft_shift=True))
    assert model.probe([[5, 6, 7]]) is None
    assert model.probe([]) is None


def test_it_is_one_forward_of_a_known_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cost on a model of any size: two operations per parameter and token, and those of the head where it reads:
    ten tokens of every text, and two masks.
    """
    model = s2d2_lmeval.load(DATA / "idlm" / "checkpoint", device="cpu")
    sizes: list[tuple[int, int]] = []
    forward = Runner.forward

    def counted(runner: Runner, request: Pass) -> torch.Tensor:
        sizes.append((len(request.tokens), len(request.wanted)))
        return forward(runner, request)

    monkeypatch.setattr(Runner, "forward", counted)
    assert model.probe(TEXTS) is not None
    assert sizes == [(TEXTS_OF_A_PROBE * WIDTH, TEXTS_OF_A_PROBE * 12)] == [(1536, 768)]
