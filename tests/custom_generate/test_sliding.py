"""sliding_generate: what ``model.generate`` of the engine writes autoregressively, one prompt or several."""

from __future__ import annotations

import pytest
import torch

from s2d2_lmeval.custom_generate.sliding import sliding_generate
from s2d2_lmeval.errors import ConfigError, RequestError
from tests.decoding.tiny import engine

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1]]


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 0.7, "seed": 11}])
def test_ids_are_those_of_ar_and_left_padding_is_left_out(sampling: dict[str, object]) -> None:
    expected = engine().generate(PROMPTS, {"decoder": "ar", "stop_token_ids": (), **sampling}, max_new_tokens=20)
    padded = torch.tensor([PROMPTS[0], [0] * 5 + PROMPTS[1]])
    mask = torch.tensor([[1] * 8, [0] * 5 + [1] * 3])
    ids, stats = sliding_generate(
        engine(),
        padded,
        attention_mask=mask,
        gen_length=20,
        stopping_criteria_idx=(),
        return_forward_stats=True,
        **sampling,
    )
    assert ids[:, :8].tolist() == padded.tolist()
    assert ids[:, 8:].tolist() == [answer.token_ids for answer in expected]
    assert all(steps < 20 for steps in stats["total_forward_steps"])
    assert all(a + b >= 20 for a, b in zip(stats["accepted"], stats["total_forward_steps"], strict=True))


def test_shorter_answers_are_filled_up_with_the_stop_token() -> None:
    free = engine().generate(PROMPTS, {"decoder": "ar", "stop_token_ids": ()}, max_new_tokens=20)
    stop = next(token for token in free[0].token_ids if token != free[0].token_ids[0])
    expected = engine().generate(PROMPTS, {"decoder": "ar", "stop_token_ids": (stop,)}, max_new_tokens=20)
    rows = [torch.tensor([prompt]) for prompt in PROMPTS]
    alone = [sliding_generate(engine(), row, gen_length=20, stopping_criteria_idx=[stop]) for row in rows]
    for prompt, ids, answer in zip(PROMPTS, alone, expected, strict=True):
        assert ids[0].tolist() == prompt + answer.token_ids
    padded = torch.tensor([PROMPTS[0], [0] * 5 + PROMPTS[1]])
    mask = (torch.arange(8) >= torch.tensor([[0], [5]])).long()
    together = sliding_generate(engine(), padded, mask, max_gen_toks=20, gen_length=3, stopping_criteria_idx=[stop])
    longest = max(len(answer.token_ids) for answer in expected)
    for row, answer in zip(together, expected, strict=True):
        assert row[8:].tolist() == answer.token_ids + [stop] * (longest - len(answer.token_ids))


def test_refusals() -> None:
    with pytest.raises(RequestError, match="must be 2-D"):
        sliding_generate(engine(), torch.tensor([1, 2]))
    with pytest.raises(ConfigError, match="Did you mean row_budget"):
        sliding_generate(engine(), torch.tensor([[1, 2]]), row_budgt=3)
